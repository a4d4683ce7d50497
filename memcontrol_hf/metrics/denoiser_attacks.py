"""Attacks that query a denoiser. No result depends on the batch size or on the global random state."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import nn

from ..families import Condition, Family, StableDiffusionFamily, null_like
from ..randomness import seeded_generator


def _noise(seed: int | tuple[int, ...], shape: Sequence[int], count: int) -> torch.Tensor:
    key = (seed,) if isinstance(seed, int) else seed
    return torch.randn((count, *shape), generator=seeded_generator(*key))


def _noises(seeds: Sequence, rows: torch.Tensor, latents: torch.Tensor, count: int) -> torch.Tensor:
    """`count` draws for each of a batch's rows, of its own seed: `[n, count, C, h, w]`."""
    draws = [_noise(seeds[row], latents.shape[1:], count) for row in rows.tolist()]
    return torch.stack(draws).to(latents.device)


def _check_seeds(latents: torch.Tensor, seeds: Sequence) -> None:
    if len(seeds) != len(latents):
        raise ValueError(f"{len(latents)} images but {len(seeds)} seeds: give one for each image")


@torch.no_grad()
def denoising_losses(
    family: Family,
    denoiser: nn.Module,
    latents: torch.Tensor,
    embeds: Condition | torch.Tensor,
    timesteps: Sequence[int],
    seeds: Sequence[int | tuple[int, ...]],
    batch_size: int = 64,
) -> torch.Tensor:
    """The unweighted denoising loss of each image at fixed timesteps under its own fixed noise.

    Its negative mean over the timesteps is the score of the loss-threshold membership attack
    (https://huggingface.co/papers/2301.09956).

    Args:
        family: the pipeline's family (`memcontrol_hf.families.family_of`).
        denoiser (`nn.Module`): as the family calls it.
        latents (`torch.Tensor`): `[N, C, h, w]`.
        embeds (`Condition`): `N` rows; a tensor alone is the first of the family's conditions, `[N, L, D]`.
        timesteps (list of `int`): `T` of them.
        seeds (list of `int` or tuples): one for each image.
        batch_size (`int`): only a matter of speed.

    Returns:
        `torch.Tensor`: `[N, T]` on the CPU.
    """
    _check_seeds(latents, seeds)

    def score(x: torch.Tensor, c: Condition, rows: torch.Tensor) -> torch.Tensor:
        noise = _noises(seeds, rows, x, len(timesteps))
        columns = [
            family.losses(denoiser, x, c, torch.full((len(x),), t, device=x.device), noise[:, k])
            for k, t in enumerate(timesteps)
        ]
        return torch.stack(columns, dim=1)

    return _in_batches(score, denoiser, batch_size, latents, family.named(embeds), torch.arange(len(latents)))


def steering_norms(conditional: torch.Tensor, unconditional: torch.Tensor) -> torch.Tensor:
    """Euclidean norm of the difference of two noise predictions `[N, ...]`, for each image: `[N]`."""
    return (conditional - unconditional).float().flatten(1).norm(dim=1)


@torch.no_grad()
def noise_norm(
    unet: nn.Module,
    latents: torch.Tensor,
    embeddings: Condition | torch.Tensor,
    null_embedding: Condition | torch.Tensor,
    scheduler: SchedulerMixin | Family,
    timesteps: Sequence[int],
    seeds: Sequence[int | tuple[int, ...]],
    batch_size: int = 64,
) -> torch.Tensor:
    """How hard the text alone steers: the norm of the conditional minus the unconditional prediction.

    `||ε(x_t, t, c) − ε(x_t, t, ∅)||₂` of Wen et al. (https://huggingface.co/papers/2407.21720), on noised latents, at
    fixed timesteps and with one generator for each image.

    Args:
        unet (`nn.Module`): the denoiser.
        latents (`torch.Tensor`): `[N, C, h, w]`.
        embeddings (`Condition`): `N` rows; a tensor alone is the first of the family's conditions, `[N, L, D]`.
        null_embedding (`Condition`): of the empty prompt; its tensors are one row, `[L, D]` or `[1, L, D]`.
        scheduler: the pipeline's family; for Stable Diffusion its scheduler will do.
        timesteps (list of `int`): `T` of them.
        seeds (list of `int` or tuples): one for each image.
        batch_size (`int`): only a matter of speed.

    Returns:
        `torch.Tensor`: `[N, T]` on the CPU, ≥ 0.
    """
    _check_seeds(latents, seeds)
    family = _as_family(scheduler)
    null = _null(family, null_embedding)

    def score(x: torch.Tensor, c: Condition, rows: torch.Tensor) -> torch.Tensor:
        noise = _noises(seeds, rows, x, len(timesteps))
        both = _with_null(c, null)
        columns = []
        for k, t in enumerate(timesteps):
            steps = torch.full((2 * len(x),), t, device=x.device)
            twice = noise[:, k].repeat(2, 1, 1, 1)
            conditional, unconditional = family.predict(unet, x.repeat(2, 1, 1, 1), both, steps, twice).chunk(2)
            columns.append(steering_norms(conditional, unconditional))
        return torch.stack(columns, dim=1)

    return _in_batches(score, unet, batch_size, latents, family.named(embeddings), torch.arange(len(latents)))


def _as_family(scheduler: SchedulerMixin | Family) -> Family:
    return scheduler if isinstance(scheduler, Family) else StableDiffusionFamily.of_scheduler(scheduler)


def _null(family: Family, null: Condition | torch.Tensor | None) -> Condition:
    if null is None:
        raise ValueError(f"{type(family).__name__} has no null condition, without which this has no meaning")
    return family.named(null)


def _with_null(condition: Condition, null: Condition) -> Condition:
    """The rows of a condition `[n, ...]`, then the null condition as often: `[2 n, ...]`."""
    expanded = null_like(null, condition)
    return {name: torch.cat([tensor, expanded[name]]) for name, tensor in condition.items()}


def _epsilon(family: Family, denoiser: nn.Module, noisy: torch.Tensor, c: Condition, timestep: int) -> torch.Tensor:
    """The noise that the denoiser sees in `noisy` `[N, C, h, w]`, whatever it predicts."""
    steps = torch.full((len(noisy),), timestep, device=noisy.device)
    return family.noise.to_epsilon(family.denoise(denoiser, noisy, steps, c), noisy, timestep)


def _in_batches(
    score: Callable, denoiser: nn.Module, batch_size: int, latents: torch.Tensor, condition: Condition, *rest: Any
) -> torch.Tensor:
    """`score` of what has `N` rows, in batches on the denoiser's device -> `[N, ...]` on the CPU."""
    lengths = [len(tensor) for tensor in (latents, *condition.values(), *rest)]
    if len(set(lengths)) > 1 or len(latents) == 0:
        raise ValueError(f"give as many images as conditions, at least one, not {lengths}")
    device = next(denoiser.parameters()).device
    results = []
    for start in range(0, len(latents), batch_size):
        rows = slice(start, start + batch_size)
        c = {name: tensor[rows].to(device) for name, tensor in condition.items()}
        results.append(score(latents[rows].to(device), c, *(tensor[rows].to(device) for tensor in rest)).cpu())
    return torch.cat(results)


@torch.no_grad()
def secmi(
    family: Family,
    denoiser: nn.Module,
    latents: torch.Tensor,
    embeds: Condition | torch.Tensor,
    timestep: int = 100,
    stride: int = 10,
    batch_size: int = 64,
) -> torch.Tensor:
    """Membership score SecMI_stat of Duan et al. (https://huggingface.co/papers/2302.01316).

    The negative t-error: an image is carried to `timestep` by deterministic DDIM steps of the model itself, then one
    step on and back again; `-||back - before||²`. Members come back closer. It draws no noise.

    Args:
        family: the pipeline's family (`memcontrol_hf.families.family_of`).
        denoiser (`nn.Module`): as the family calls it, in evaluation mode.
        latents (`torch.Tensor`): `[N, C, h, w]`.
        embeds (`Condition`): `N` rows; a tensor alone is the first of the family's conditions, `[N, L, D]`.
        timestep (`int`): a multiple of `stride`; the paper's is 100 of 1,000.
        stride (`int`): timesteps that one step goes over; the paper's is 10.
        batch_size (`int`): only a matter of speed.

    Returns:
        `torch.Tensor`: `[N]` on the CPU, ≤ 0; higher = more member-like. Costs `timestep / stride + 2` forward passes.

    Raises:
        ValueError: for a timestep outside the schedule or that is no multiple of the stride.
    """
    if stride < 1 or timestep < stride or timestep % stride:
        raise ValueError(f"timestep must be a positive multiple of stride {stride}, but got {timestep}")
    family.noise.check_timesteps(timestep + stride)

    def step(x: torch.Tensor, c: Condition, start: int, stop: int) -> torch.Tensor:
        noise = _epsilon(family, denoiser, x, c, start)
        (signal, amount), (next_signal, next_amount) = (family.noise.coefficients(t) for t in (start, stop))
        return next_signal / signal * (x - amount * noise) + next_amount * noise

    def score(x: torch.Tensor, c: Condition) -> torch.Tensor:
        for start in range(0, timestep, stride):
            x = step(x, c, start, start + stride)
        back = step(step(x, c, timestep, timestep + stride), c, timestep + stride, timestep)
        return -(back - x).square().flatten(1).sum(1)

    return _in_batches(score, denoiser, batch_size, latents, family.named(embeds))


@torch.no_grad()
def pia(
    family: Family,
    denoiser: nn.Module,
    latents: torch.Tensor,
    embeds: Condition | torch.Tensor,
    timestep: int = 200,
    p: float = 4.0,
    batch_size: int = 64,
) -> torch.Tensor:
    """Membership score PIA of Kong et al. (https://huggingface.co/papers/2305.18355), equation 9.

    `-||ε(x_0, 0) - ε(√ᾱ_t x_0 + √(1 - ᾱ_t) ε(x_0, 0), t)||_p`: the model's own noise at t = 0 is put on the image, and
    is found again better on members. It draws no noise.

    Args:
        family: the pipeline's family (`memcontrol_hf.families.family_of`).
        denoiser (`nn.Module`): as the family calls it, in evaluation mode.
        latents (`torch.Tensor`): `[N, C, h, w]`.
        embeds (`Condition`): `N` rows; a tensor alone is the first of the family's conditions, `[N, L, D]`.
        timestep (`int`): 200 of 1,000 is where the paper's figures peak.
        p (`float`): of the norm; 4 is the paper's.
        batch_size (`int`): only a matter of speed.

    Returns:
        `torch.Tensor`: `[N]` on the CPU, ≤ 0; higher = more member-like. Costs two forward passes.

    Raises:
        ValueError: for a timestep outside the schedule.
    """
    family.noise.check_timesteps(timestep)
    signal, amount = family.noise.coefficients(timestep)

    def score(x: torch.Tensor, c: Condition) -> torch.Tensor:
        noise = _epsilon(family, denoiser, x, c, 0)
        again = _epsilon(family, denoiser, signal * x + amount * noise, c, timestep)
        return -(noise - again).flatten(1).norm(p=p, dim=1)

    return _in_batches(score, denoiser, batch_size, latents, family.named(embeds))


def clid(
    family: Family,
    denoiser: nn.Module,
    latents: torch.Tensor,
    embeds: Condition | torch.Tensor,
    null_embedding: Condition | torch.Tensor,
    timesteps: Sequence[int],
    seeds: Sequence[int | tuple[int, ...]],
    batch_size: int = 64,
    losses: torch.Tensor | None = None,
) -> torch.Tensor:
    """Membership score CLiD of Zhai et al. (https://huggingface.co/papers/2405.14800), equation 13.

    `E_{t,ε}[ ||ε(x_t, t, ∅) - ε||² - ||ε(x_t, t, c) - ε||² ]`, the mean over the latent's values: how much its caption
    helps the model to denoise an image, which is more for the captions it was trained with. The paper's CLiD_th also
    adds the loss itself; both are rescaled there by the quartiles of all images, so that no image has a score of its
    own, which is why it is left out.

    Args:
        family: the pipeline's family (`memcontrol_hf.families.family_of`).
        denoiser (`nn.Module`): as the family calls it, in evaluation mode.
        latents (`torch.Tensor`): `[N, C, h, w]`.
        embeds (`Condition`): `N` rows; a tensor alone is the first of the family's conditions, `[N, L, D]`.
        null_embedding (`Condition`): of the empty prompt; its tensors are one row, `[L, D]` or `[1, L, D]`.
        timesteps (list of `int`): `T` of them.
        seeds (list of `int` or tuples): one for each image.
        batch_size (`int`): only a matter of speed.
        losses (`torch.Tensor`, *optional*): what [`denoising_losses`] gives for the same arguments, if it is there.

    Returns:
        `torch.Tensor`: `[N]` on the CPU; higher = more member-like. Costs `2 T` forward passes, `T` with `losses`.

    Raises:
        ValueError: for a timestep outside the schedule, and when the seeds are not as many as the images.
    """
    family.noise.check_timesteps(*timesteps)
    embeds = family.named(embeds)
    null = null_like(_null(family, null_embedding), embeds)
    if losses is None:
        losses = denoising_losses(family, denoiser, latents, embeds, timesteps, seeds, batch_size)
    without = denoising_losses(family, denoiser, latents, null, timesteps, seeds, batch_size)
    scales = torch.tensor([family.noise.epsilon_scale(t) for t in timesteps])
    return ((without - losses) * scales.square()).mean(1)


@torch.no_grad()
def trajectory_noise_norms(
    family: Family,
    denoiser: nn.Module,
    embeds: Condition | torch.Tensor,
    null_embedding: Condition | torch.Tensor,
    shape: Sequence[int],
    seeds: Sequence[int | tuple[int, ...]],
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    first: int | None = None,
    batch_size: int = 64,
) -> torch.Tensor:
    """How hard a prompt steers the sampling of an image: Wen et al. (https://huggingface.co/papers/2407.21720).

    The mean over the steps of a sampling trajectory of `||ε(x_t, t, c) - ε(x_t, t, ∅)||₂`. It needs no training image,
    only the prompt. Trajectories are those of DDIM (of Euler steps for flow matching), which draw no noise on the way,
    with guidance.

    Args:
        family: the pipeline's family (`memcontrol_hf.families.family_of`).
        denoiser (`nn.Module`): in evaluation mode.
        embeds (`Condition`): of the prompts, `N` rows; a tensor alone is the first of the family's conditions.
        null_embedding (`Condition`): of the empty prompt; its tensors are one row, `[L, D]` or `[1, L, D]`.
        shape (list of `int`): of one image's latent, `(C, h, w)`.
        seeds (list of `int` or tuples): one for each prompt.
        num_inference_steps (`int`): of the trajectory.
        guidance_scale (`float`): of the trajectory; the norm is taken before it.
        first (`int`, *optional*): stop after so many steps; all, when not given. The paper detects memorized prompts
            by the first one.
        batch_size (`int`): only a matter of speed.

    Returns:
        `torch.Tensor`: `[N]` on the CPU, ≥ 0; higher = more like a memorized prompt. Costs two forward passes a step.

    Raises:
        ValueError: when the seeds are not as many as the prompts, and for no step at all.
    """
    embeds, null = family.named(embeds), _null(family, null_embedding)
    _check_seeds(next(iter(embeds.values())), seeds)
    first = num_inference_steps if first is None else first
    if not 1 <= first <= num_inference_steps:
        raise ValueError(f"first must lie between 1 and num_inference_steps {num_inference_steps}, but got {first}")
    steps = family.noise.trajectory(num_inference_steps, family.tokens(shape)).timesteps[:first]
    start = torch.cat([_noise(seed, shape, 1) for seed in seeds])

    def score(x: torch.Tensor, c: Condition) -> torch.Tensor:
        both = _with_null(c, null)
        sampler = family.noise.trajectory(num_inference_steps, family.tokens(shape))
        norms = []
        for t in steps:
            twice = x.repeat(2, 1, 1, 1)
            prediction = family.denoise(denoiser, twice, t.expand(len(twice)).to(x.device), both)
            conditional, unconditional = prediction.chunk(2)
            norms.append(family.noise.epsilon_scale(t.item()) * steering_norms(conditional, unconditional))
            guided = unconditional + guidance_scale * (conditional - unconditional)
            x = sampler.step(guided, t, x).prev_sample
        return torch.stack(norms).mean(0)

    return _in_batches(score, denoiser, batch_size, start, embeds)
