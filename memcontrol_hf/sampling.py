"""Images from a pipeline, one generator for each image."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from .families import family_of
from .randomness import seeded_generator

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from .mitigations import PromptEmbedding


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
    prompt_embedding: "PromptEmbedding | None" = None,
) -> torch.Tensor:
    """Generate one image for each prompt.

    Args:
        prompts (list of `str`): `N` prompts.
        keys (list of tuples of `int`): for each image, what its noise is seeded with.
        resolution (`int`): height and width in pixels.
        batch_size (`int`): only a matter of speed.
        prompt_embedding ([`~memcontrol_hf.mitigations.PromptEmbedding`], *optional*): adjusts the prompts first.

    Returns:
        `torch.Tensor`: `[N, 3, H, W]` in [0, 1] on the CPU.
    """
    if len(prompts) != len(keys):
        raise ValueError(f"{len(prompts)} prompts but {len(keys)} seeds")
    family = family_of(pipeline)
    images = []
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        generators = [seeded_generator(*key) for key in keys[batch]]
        how = (prompts[batch], generators, resolution, num_inference_steps)
        changes = None if prompt_embedding is None else prompt_embedding.inputs(family, *how)
        images.append(family.sample(*how, guidance_scale, changes))
    return torch.cat(images) if images else torch.empty(0, 3, resolution, resolution)
