"""How the attacks call a denoiser: image by image, with draws of each image's own, in batches."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..families import Condition, Family, null_like
from ..randomness import seeded_generator


def draw_noise(seed: int | tuple[int, ...], shape: Sequence[int]) -> torch.Tensor:
    """Normal noise on the CPU that depends on the seed and the shape alone."""
    key = (seed,) if isinstance(seed, int) else seed
    return torch.randn(tuple(shape), generator=seeded_generator(*key))


def check_seeds(seeds: Sequence[int | tuple[int, ...]], images: int) -> None:
    """Raise `ValueError` when there are not as many seeds as images."""
    if len(seeds) != images:
        raise ValueError(f"{images} images but {len(seeds)} seeds: give one for each image")


def null_condition(family: Family, null: Condition | torch.Tensor | None) -> Condition:
    """The null condition with the names of its tensors; `ValueError` for a family that has none."""
    if null is None:
        raise ValueError(f"{type(family).__name__} has no null condition, without which this has no meaning")
    return family.named(null)


def implied_noise(
    family: Family, denoiser: nn.Module, noisy: torch.Tensor, condition: Condition, timestep: int
) -> torch.Tensor:
    """The noise that the denoiser sees in `noisy` `[n, C, h, w]`, for every prediction type."""
    steps = torch.full((len(noisy),), timestep, device=noisy.device)
    return family.noise.to_epsilon(family.denoise(denoiser, noisy, steps, condition), noisy, timestep)


def ddim_step(
    family: Family, denoiser: nn.Module, noisy: torch.Tensor, condition: Condition, start: int, stop: int
) -> torch.Tensor:
    """A deterministic step of DDIM from one timestep to another, in either direction.

    For flow matching this is an Euler step along the velocity. A step cannot start where no signal is left.

    Args:
        family ([`~memcontrol_hf.families.Family`]): family of the pipeline.
        denoiser (`nn.Module`): denoiser, called once.
        noisy (`torch.Tensor`): noisy latents at `start`, `[n, C, h, w]`.
        condition (`Condition`): `n` rows.
        start, stop (`int`): timesteps.

    Returns:
        `torch.Tensor`: noisy latents at `stop`, `[n, C, h, w]`.
    """
    noise = implied_noise(family, denoiser, noisy, condition, start)
    (signal, amount), (next_signal, next_amount) = (family.noise.coefficients(t) for t in (start, stop))
    return next_signal / signal * (noisy - amount * noise) + next_amount * noise


def both_predictions(
    family: Family,
    denoiser: nn.Module,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    condition: Condition,
    null: Condition,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The predictions for `noisy` `[n, C, h, w]` under the condition and under the null condition, in one pass."""
    without = null_like(null, condition)
    both = {name: torch.cat([tensor, without[name]]) for name, tensor in condition.items()}
    return family.denoise(denoiser, noisy.repeat(2, 1, 1, 1), timesteps.repeat(2), both).chunk(2)


def at_timesteps(
    measure: Callable[[torch.Tensor, Condition, torch.Tensor, torch.Tensor], torch.Tensor],
    denoiser: nn.Module,
    latents: torch.Tensor,
    condition: Condition,
    timesteps: Sequence[float],
    seeds: Sequence[int | tuple[int, ...]],
    batch_size: int,
) -> torch.Tensor:
    """`measure(latents, condition, steps, noise)` `[n]` at each timestep, under each image's own noise: `[N, T]`."""
    check_seeds(seeds, len(latents))

    def score(x: torch.Tensor, c: Condition, rows: slice) -> torch.Tensor:
        draws = [draw_noise(seed, (len(timesteps), *x.shape[1:])) for seed in seeds[rows]]
        noise = torch.stack(draws, dim=1).to(x.device)
        steps = (torch.full((len(x),), t, device=x.device) for t in timesteps)
        return torch.stack([measure(x, c, *pair) for pair in zip(steps, noise, strict=True)], dim=1)

    return in_batches(score, denoiser, latents, condition, batch_size)


def in_batches(
    score: Callable[[torch.Tensor, Condition, slice], torch.Tensor],
    denoiser: nn.Module,
    latents: torch.Tensor,
    condition: Condition,
    batch_size: int,
) -> torch.Tensor:
    """`score(latents, condition, rows)` of `N` rows, in batches on the denoiser's device: `[N, ...]` on the CPU."""
    lengths = [len(tensor) for tensor in (latents, *condition.values())]
    if len(set(lengths)) > 1 or len(latents) == 0:
        raise ValueError(f"give as many images as conditions, at least one, not {lengths}")
    device = next(denoiser.parameters()).device
    results = []
    for start in range(0, len(latents), batch_size):
        rows = slice(start, start + batch_size)
        batch = {name: tensor[rows].to(device) for name, tensor in condition.items()}
        results.append(score(latents[rows].to(device), batch, rows).cpu())
    return torch.cat(results)
