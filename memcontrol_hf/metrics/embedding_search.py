"""Search for the text embedding that makes a model denoise one image best: it can bring back what a caption hides."""

from collections.abc import Sequence

import torch
from torch import nn

from ..families import Condition, Family
from ..randomness import seeded_generator

STEPS, DRAWS = 50, 8
"""Steps of a search, and draws of noise and timestep in each step: those of the paper."""


def search_embeddings(
    family: Family,
    denoiser: nn.Module,
    latents: torch.Tensor,
    condition: Condition | torch.Tensor,
    seeds: Sequence[int | tuple[int, ...]],
    steps: int = STEPS,
    draws: int = DRAWS,
    lr: float = 0.1,
    batch_size: int = 64,
) -> dict[str, torch.Tensor]:
    """The embeddings under which a model denoises each image best, after Kowalczuk et al. (DoRI).

    The search of https://huggingface.co/papers/2507.16880, by the paper's abstract and a summary of its method: from
    the caption's embedding, `steps` steps of Adam along the gradient of the denoising loss of the image, under `draws`
    new draws of noise and timestep in each step. The embedding that is found therefore brings the image back from any
    noise. A model that does not hold the image needs many more steps than 50, but in the end a search writes any image
    into the embedding itself: compare with the same search for images that were not trained on, and on a model that
    was not trained on the images.

    The rate is in units of the root mean square of each image's embedding. For Stable Diffusion's text encoder that is
    about 1, and the rate is the paper's; for others it is this package's reading. Tensors of whole numbers, such as
    the mask of a caption, stay as they are.

    Args:
        family ([`~memcontrol_hf.families.Family`]): family of the pipeline.
        denoiser (`nn.Module`): the pipeline's denoiser, with its adapter if it has one, in evaluation mode. It is not
            changed, and no gradients of its parameters are kept.
        latents (`torch.Tensor`): latents of the images, `[N, C, h, w]`.
        condition (`Condition`): embeddings at which the search starts, `N` rows, as a rule of the images' captions. A
            tensor `[N, L, D]` stands for the first of the family's `conditions`.
        seeds (list of `int` or tuples): random seed of the draws of each image.
        steps (`int`): number of steps.
        draws (`int`): number of draws of noise and timestep in each step.
        lr (`float`): rate of Adam.
        batch_size (`int`): number of images in the denoiser at once, `draws` for each image of the search; only the
            speed depends on it.

    Returns:
        `dict`: the condition with the embeddings that were found, `N` rows on the CPU. The cost is `steps * draws`
        forward and backward passes for each image.

    Raises:
        ValueError: when there are not as many conditions or seeds as images, for no image at all, and for a family
            whose conditions are no embeddings.
    """
    condition = family.named(condition)
    lengths = [len(tensor) for tensor in (latents, seeds, *condition.values())]
    if len(set(lengths)) > 1 or len(latents) == 0:
        raise ValueError(f"give as many images as seeds and conditions, at least one, not {lengths}")
    if not any(tensor.is_floating_point() for tensor in condition.values()):
        raise ValueError(f"{type(family).__name__} has no embedding to search: its conditions are {list(condition)}")
    together = max(1, batch_size // draws)
    parts = []
    for start in range(0, len(latents), together):
        rows = slice(start, start + together)
        part = {name: tensor[rows] for name, tensor in condition.items()}
        parts.append(_search(family, denoiser, latents[rows], part, seeds[rows], steps, draws, lr))
    return {name: torch.cat([part[name] for part in parts]) for name in condition}


def _search(
    family: Family,
    denoiser: nn.Module,
    latents: torch.Tensor,
    condition: Condition,
    seeds: Sequence[int | tuple[int, ...]],
    steps: int,
    draws: int,
    lr: float,
) -> Condition:
    """The search for a few images at once. Each has its own: the loss is a sum, and Adam is elementwise."""
    device = next(denoiser.parameters()).device
    generators = [seeded_generator(*((seed,) if isinstance(seed, int) else seed)) for seed in seeds]
    repeated = latents.to(device).repeat_interleave(draws, 0)
    fixed = {name: tensor.detach().to(device) for name, tensor in condition.items()}
    scales = {
        name: tensor.square().flatten(1).mean(1).sqrt().clamp(min=1e-6).view(-1, *[1] * (tensor.dim() - 1))
        for name, tensor in fixed.items()
        if tensor.is_floating_point()
    }
    searched = {name: (fixed[name] / scale).detach().requires_grad_() for name, scale in scales.items()}
    optimizer = torch.optim.Adam(searched.values(), lr=lr)
    for _ in range(steps):
        pairs = [
            (family.noise.sample_timestep(generator), torch.randn(latents.shape[1:], generator=generator))
            for generator in generators
            for _ in range(draws)
        ]
        timesteps, noise = (torch.stack(values).to(device) for values in zip(*pairs))
        with torch.enable_grad():
            scaled = {name: tensor * scales[name] for name, tensor in searched.items()}
            embeddings = {name: t.repeat_interleave(draws, 0) for name, t in {**fixed, **scaled}.items()}
            loss = family.losses(denoiser, repeated, embeddings, timesteps, noise).sum() / draws
            gradients = torch.autograd.grad(loss, list(searched.values()), allow_unused=True)
        for tensor, gradient in zip(searched.values(), gradients):
            tensor.grad = gradient
        optimizer.step()
    found = {name: (tensor.detach() * scales[name]).cpu() for name, tensor in searched.items()}
    return {name: found.get(name, tensor).cpu() for name, tensor in fixed.items()}
