"""Images from a pipeline, with a generator of its own for each image."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .families import Condition, Family, family_of
from .progress import bar
from .randomness import seeded_generator

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@contextmanager
def denoiser_in_place(pipeline: "DiffusionPipeline", denoiser: nn.Module) -> Iterator[None]:
    """Let a pipeline sample with `denoiser` (say, one with an adapter) in evaluation mode, then restore its own."""
    name = family_of(pipeline).denoiser_name
    original, training = getattr(pipeline, name), denoiser.training
    setattr(pipeline, name, denoiser.eval())
    try:
        yield
    finally:
        setattr(pipeline, name, original)
        denoiser.train(training)


@torch.no_grad()
def generate(
    pipeline: "DiffusionPipeline",
    prompts: Sequence[str],
    keys: Sequence[tuple[int, ...]],
    resolution: int,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    batch_size: int = 16,
    adjust_prompts: Sequence[Callable[..., dict[str, Any]]] = (),
    condition: Condition | None = None,
) -> torch.Tensor:
    """Generate one image for each prompt.

    Args:
        prompts (list of `str`): `N` prompts.
        keys (list of tuples of `int`): for each image, the key of its noise; see
            [`~memcontrol_hf.randomness.seeded_generator`].
        resolution (`int`): height and width in pixels.
        num_inference_steps (`int`): number of sampling steps.
        guidance_scale (`float`): scale of the classifier-free guidance.
        batch_size (`int`): number of images sampled at once; only the speed depends on it.
        adjust_prompts (list of `Callable`): functions of `(family, prompts, generators, resolution,
            num_inference_steps)`, each of which returns what changes in the pipeline's call.
        condition (`Condition`, *optional*): embeddings in the place of the prompts, `N` rows.

    Returns:
        `torch.Tensor`: `[N, 3, H, W]` in [0, 1] on the CPU.
    """
    if len(prompts) != len(keys):
        raise ValueError(f"{len(prompts)} prompts but {len(keys)} seeds")
    family = family_of(pipeline)
    images = []
    pipeline.set_progress_bar_config(disable=True)
    for start in bar(range(0, len(prompts), batch_size), f"sampling {len(prompts)} images"):
        batch = slice(start, start + batch_size)
        generators = [seeded_generator(*key) for key in keys[batch]]
        sampled = (prompts[batch], generators, resolution, num_inference_steps)
        changes: dict[str, Any] = {}
        for adjust in adjust_prompts:
            changes |= adjust(family, *sampled)
        if condition is not None:
            changes |= {"prompt": None, **_as_the_denoiser_reads(family, condition, batch)}
        images.append(family.sample(*sampled, guidance_scale, changes))
    return torch.cat(images) if images else torch.empty(0, 3, resolution, resolution)


def _as_the_denoiser_reads(family: Family, condition: Condition, rows: slice) -> dict[str, torch.Tensor]:
    """Some rows of a condition, on the denoiser's device and in its precision."""
    denoiser = family.denoiser
    return {
        name: tensor[rows].to(denoiser.device, denoiser.dtype if tensor.is_floating_point() else None)
        for name, tensor in condition.items()
    }
