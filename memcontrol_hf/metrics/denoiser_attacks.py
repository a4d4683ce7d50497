"""Attacks that query a denoiser. No result depends on the batch size or on the global random state.

All but [`noise_norm`] begin with `(family, denoiser, latents, condition, ...)`; [`trajectory_noise_norms`] needs no
image and has the null condition in the place of the latents: `(family, denoiser, condition, null, ...)`.
"""

from collections.abc import Sequence

import torch
from diffusers import SchedulerMixin
from torch import nn

from ..families import Condition, Family, StableDiffusionFamily, null_like
from .denoiser_calls import (
    at_timesteps,
    both_predictions,
    check_seeds,
    ddim_step,
    draw_noise,
    implied_noise,
    in_batches,
    null_condition,
)


@torch.no_grad()
def denoising_losses(
    family: Family,
    denoiser: nn.Module,
    latents: torch.Tensor,
    condition: Condition | torch.Tensor,
    timesteps: Sequence[float],
    seeds: Sequence[int | tuple[int, ...]],
    batch_size: int = 64,
) -> torch.Tensor:
    """The unweighted denoising loss of each image at fixed timesteps, under fixed noise of its own.

    The negative mean over the timesteps is the score of the loss-threshold membership attack
    (https://huggingface.co/papers/2301.09956).

    Args:
        family ([`~memcontrol_hf.families.Family`]): family of the pipeline.
        denoiser (`nn.Module`): the pipeline's denoiser, with its adapter if it has one, in evaluation mode.
        latents (`torch.Tensor`): latents of the images, `[N, C, h, w]`.
        condition (`Condition`): `N` rows. A tensor `[N, L, D]` stands for the first of the family's `conditions`.
        timesteps (list of `float`): the `T` timesteps.
        seeds (list of `int` or tuples): random seed of the noise of each image.
        batch_size (`int`): number of images measured at once; only the speed depends on it.

    Returns:
        `torch.Tensor`: `[N, T]` on the CPU, ≥ 0. The cost is `T` forward passes for each image.

    Raises:
        ValueError: when there are not as many conditions or seeds as images, and for no image at all.
    """

    def losses(x: torch.Tensor, c: Condition, steps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return family.losses(denoiser, x, c, steps, noise)

    return at_timesteps(losses, denoiser, latents, family.named(condition), timesteps, seeds, batch_size)


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
    timesteps: Sequence[float],
    seeds: Sequence[int | tuple[int, ...]],
    batch_size: int = 64,
) -> torch.Tensor:
    """How hard the text alone steers: the norm of the conditional minus the unconditional prediction.

    `||ε(x_t, t, c) − ε(x_t, t, ∅)||₂` of Wen et al. (https://huggingface.co/papers/2407.21720), on noised latents, at
    fixed timesteps, under fixed noise of each image's own. `ε` is the noise that a prediction implies, whatever the
    model predicts; for flow matching the norm is of the velocity.

    The arguments differ from those of the other attacks on purpose: the function can be called with a Stable Diffusion
    UNet and its scheduler alone, without a pipeline, and its signature is a promise to such callers.

    Args:
        unet (`nn.Module`): the denoiser, in evaluation mode.
        latents (`torch.Tensor`): latents of the images, `[N, C, h, w]`.
        embeddings (`Condition`): `N` rows. A tensor `[N, L, D]` stands for the first of the family's `conditions`.
        null_embedding (`Condition`): null condition, as a rule the empty prompt: one row, `[L, D]` or `[1, L, D]`.
        scheduler (`SchedulerMixin` or [`~memcontrol_hf.families.Family`]): family of the pipeline. A scheduler stands
            for Stable Diffusion with the noise of that scheduler.
        timesteps (list of `float`): the `T` timesteps.
        seeds (list of `int` or tuples): random seed of the noise of each image.
        batch_size (`int`): number of images measured at once; only the speed depends on it.

    Returns:
        `torch.Tensor`: `[N, T]` on the CPU, ≥ 0. The cost is `2 T` forward passes for each image.

    Raises:
        ValueError: when there are not as many conditions or seeds as images, for no image at all, and for a family
            without a null condition.
    """
    family = scheduler if isinstance(scheduler, Family) else StableDiffusionFamily.of_scheduler(scheduler)
    null = null_condition(family, null_embedding)

    def norms(x: torch.Tensor, c: Condition, steps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        noisy = family.noise.add_noise(x, noise, steps)
        return family.noise.epsilon_scales(steps) * steering_norms(
            *both_predictions(family, unet, noisy, steps, c, null)
        )

    return at_timesteps(norms, unet, latents, family.named(embeddings), timesteps, seeds, batch_size)


@torch.no_grad()
def secmi(
    family: Family,
    denoiser: nn.Module,
    latents: torch.Tensor,
    condition: Condition | torch.Tensor,
    timestep: int = 100,
    stride: int = 10,
    batch_size: int = 64,
) -> torch.Tensor:
    """Membership score SecMI_stat of Duan et al. (https://huggingface.co/papers/2302.01316).

    The negative t-error: the model's own deterministic DDIM steps carry an image to `timestep`, then one step on and
    one step back; the score is `-||back - before||²`. Members come back closer. No noise is drawn.

    Args:
        family ([`~memcontrol_hf.families.Family`]): family of the pipeline.
        denoiser (`nn.Module`): the pipeline's denoiser, with its adapter if it has one, in evaluation mode.
        latents (`torch.Tensor`): latents of the images, `[N, C, h, w]`.
        condition (`Condition`): `N` rows. A tensor `[N, L, D]` stands for the first of the family's `conditions`.
        timestep (`int`): timestep of the t-error, a multiple of `stride`; the paper's is 100 of 1,000.
        stride (`int`): number of timesteps that one step goes over; the paper's is 10.
        batch_size (`int`): number of images measured at once; only the speed depends on it.

    Returns:
        `torch.Tensor`: `[N]` on the CPU, ≤ 0; higher = more member-like. The cost is `timestep / stride + 2` forward
        passes for each image.

    Raises:
        ValueError: when there are not as many conditions as images, for no image at all, and for a timestep outside
            the schedule or that is no multiple of the stride.
    """
    errors = secmi_errors(family, denoiser, latents, condition, [timestep], stride, batch_size)
    return -errors[:, 0]


@torch.no_grad()
def secmi_errors(
    family: Family,
    denoiser: nn.Module,
    latents: torch.Tensor,
    condition: Condition | torch.Tensor,
    timesteps: Sequence[int] = (50, 100, 200),
    stride: int = 10,
    batch_size: int = 64,
) -> torch.Tensor:
    """The t-error of [`secmi`] at several timesteps of one trajectory.

    One timestep is fragile on small models: which one tells members from others depends on the model. The negative
    mean of the logarithms joins the timesteps, whose errors differ in size.

    Args:
        family ([`~memcontrol_hf.families.Family`]): family of the pipeline.
        denoiser (`nn.Module`): the pipeline's denoiser, with its adapter if it has one, in evaluation mode.
        latents (`torch.Tensor`): latents of the images, `[N, C, h, w]`.
        condition (`Condition`): `N` rows. A tensor `[N, L, D]` stands for the first of the family's `conditions`.
        timesteps (list of `int`): the `T` timesteps, multiples of `stride`.
        stride (`int`): number of timesteps that one step goes over; the paper's is 10.
        batch_size (`int`): number of images measured at once; only the speed depends on it.

    Returns:
        `torch.Tensor`: `[N, T]` on the CPU, ≥ 0; lower = more member-like. The cost is
        `max(timesteps) / stride + 1 + T` forward passes for each image.

    Raises:
        ValueError: as [`secmi`].
    """
    for timestep in timesteps:
        if stride < 1 or timestep < stride or timestep % stride:
            raise ValueError(f"timestep must be a positive multiple of stride {stride}, but got {timestep}")
    last = max(timesteps)
    family.noise.check_timesteps(last + stride)

    def errors(x: torch.Tensor, c: Condition, _: slice) -> torch.Tensor:
        found = {}
        for start in range(0, last + stride, stride):
            further = ddim_step(family, denoiser, x, c, start, start + stride)
            if start in timesteps:
                back = ddim_step(family, denoiser, further, c, start + stride, start)
                found[start] = (back - x).square().flatten(1).sum(1)
            x = further
        return torch.stack([found[timestep] for timestep in timesteps], dim=1)

    return in_batches(errors, denoiser, latents, family.named(condition), batch_size)


@torch.no_grad()
def sima(
    family: Family,
    denoiser: nn.Module,
    latents: torch.Tensor,
    condition: Condition | torch.Tensor,
    timestep: int = 100,
    p: float = 4.0,
    batch_size: int = 64,
) -> torch.Tensor:
    """Membership score SimA of Rao et al. (https://huggingface.co/papers/2509.25003): one call, no noise.

    `-||ε(x_0, t)||_p`: the denoiser is given the image itself as if it were noised. The noise that it sees there
    points to the mean of the training images nearby, so that its norm is small at a training image.

    Args:
        family ([`~memcontrol_hf.families.Family`]): family of the pipeline.
        denoiser (`nn.Module`): the pipeline's denoiser, with its adapter if it has one, in evaluation mode.
        latents (`torch.Tensor`): latents of the images, `[N, C, h, w]`.
        condition (`Condition`): `N` rows. A tensor `[N, L, D]` stands for the first of the family's `conditions`.
        timestep (`int`): timestep t. The authors report the best of several; here it is fixed beforehand.
        p (`float`): order of the norm; 4 in the authors' code.
        batch_size (`int`): number of images measured at once; only the speed depends on it.

    Returns:
        `torch.Tensor`: `[N]` on the CPU, ≤ 0; higher = more member-like. The cost is one forward pass an image.

    Raises:
        ValueError: when there are not as many conditions as images, for no image at all, and for a timestep outside
            the schedule.
    """
    family.noise.check_timesteps(timestep)

    def score(x: torch.Tensor, c: Condition, _: slice) -> torch.Tensor:
        return -implied_noise(family, denoiser, x, c, timestep).flatten(1).norm(p=p, dim=1)

    return in_batches(score, denoiser, latents, family.named(condition), batch_size)


@torch.no_grad()
def pia(
    family: Family,
    denoiser: nn.Module,
    latents: torch.Tensor,
    condition: Condition | torch.Tensor,
    timestep: int = 200,
    p: float = 4.0,
    batch_size: int = 64,
) -> torch.Tensor:
    """Membership score PIA of Kong et al. (https://huggingface.co/papers/2305.18355), equation 9.

    `-||ε(x_0, 0) - ε(√ᾱ_t x_0 + √(1 - ᾱ_t) ε(x_0, 0), t)||_p`: the noise that the model sees at t = 0 is put on the
    image, and the model finds that noise again better on members. No noise is drawn.

    Args:
        family ([`~memcontrol_hf.families.Family`]): family of the pipeline.
        denoiser (`nn.Module`): the pipeline's denoiser, with its adapter if it has one, in evaluation mode.
        latents (`torch.Tensor`): latents of the images, `[N, C, h, w]`.
        condition (`Condition`): `N` rows. A tensor `[N, L, D]` stands for the first of the family's `conditions`.
        timestep (`int`): timestep t; the paper's figures peak at 200 of 1,000 for DDPM.
        p (`float`): order of the norm; the paper's is 4.
        batch_size (`int`): number of images measured at once; only the speed depends on it.

    Returns:
        `torch.Tensor`: `[N]` on the CPU, ≤ 0; higher = more member-like. The cost is two forward passes an image.

    Raises:
        ValueError: when there are not as many conditions as images, for no image at all, and for a timestep outside
            the schedule.
    """
    family.noise.check_timesteps(timestep)
    signal, amount = family.noise.coefficients(timestep)

    def score(x: torch.Tensor, c: Condition, _: slice) -> torch.Tensor:
        noise = implied_noise(family, denoiser, x, c, 0)
        again = implied_noise(family, denoiser, signal * x + amount * noise, c, timestep)
        return -(noise - again).flatten(1).norm(p=p, dim=1)

    return in_batches(score, denoiser, latents, family.named(condition), batch_size)


def clid(
    family: Family,
    denoiser: nn.Module,
    latents: torch.Tensor,
    condition: Condition | torch.Tensor,
    null: Condition | torch.Tensor,
    timesteps: Sequence[float],
    seeds: Sequence[int | tuple[int, ...]],
    batch_size: int = 64,
    losses: torch.Tensor | None = None,
) -> torch.Tensor:
    """Membership score CLiD of Zhai et al. (https://huggingface.co/papers/2405.14800), equation 13.

    `E_{t,ε}[ ||ε(x_t, t, ∅) - ε||² - ||ε(x_t, t, c) - ε||² ]`, the mean over the latent's values: how much a caption
    helps the model to denoise its image, which is more for the captions of the training. The paper's CLiD_th also
    adds the loss itself. That sum is left out here: the paper rescales both terms by the quartiles of all images, so
    that the score of one image would depend on the other images.

    Args:
        family ([`~memcontrol_hf.families.Family`]): family of the pipeline.
        denoiser (`nn.Module`): the pipeline's denoiser, with its adapter if it has one, in evaluation mode.
        latents (`torch.Tensor`): latents of the images, `[N, C, h, w]`.
        condition (`Condition`): `N` rows. A tensor `[N, L, D]` stands for the first of the family's `conditions`.
        null (`Condition`): null condition, as a rule the empty prompt: one row, `[L, D]` or `[1, L, D]`.
        timesteps (list of `float`): the `T` timesteps.
        seeds (list of `int` or tuples): random seed of the noise of each image.
        batch_size (`int`): number of images measured at once; only the speed depends on it.
        losses (`torch.Tensor`, *optional*): result of [`denoising_losses`] for the same arguments, where it is known.

    Returns:
        `torch.Tensor`: `[N]` on the CPU; higher = more member-like. The cost is `2 T` forward passes for each image,
        `T` with `losses`.

    Raises:
        ValueError: when there are not as many conditions or seeds as images, for no image at all, for a timestep
            outside the schedule, and for a family without a null condition.
    """
    family.noise.check_timesteps(*timesteps)
    condition = family.named(condition)
    without = null_like(null_condition(family, null), condition)
    if losses is None:
        losses = denoising_losses(family, denoiser, latents, condition, timesteps, seeds, batch_size)
    null_losses = denoising_losses(family, denoiser, latents, without, timesteps, seeds, batch_size)
    scales = torch.tensor([family.noise.epsilon_scale(t) for t in timesteps])
    return ((null_losses - losses) * scales.square()).mean(1)


@torch.no_grad()
def trajectory_noise_norms(
    family: Family,
    denoiser: nn.Module,
    condition: Condition | torch.Tensor,
    null: Condition | torch.Tensor,
    shape: Sequence[int],
    seeds: Sequence[int | tuple[int, ...]],
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    first: int | None = None,
    batch_size: int = 64,
) -> torch.Tensor:
    """How hard a prompt steers the sampling of an image: Wen et al. (https://huggingface.co/papers/2407.21720).

    The mean over the steps of a sampling trajectory of `||ε(x_t, t, c) - ε(x_t, t, ∅)||₂`. Only the prompt is needed,
    no training image. Trajectories are DDIM's (Euler steps for flow matching), with guidance; they draw no noise after
    the start.

    Args:
        family ([`~memcontrol_hf.families.Family`]): family of the pipeline.
        denoiser (`nn.Module`): the pipeline's denoiser, with its adapter if it has one, in evaluation mode.
        condition (`Condition`): `N` rows, one for each prompt. A tensor `[N, L, D]` stands for the first of the
            family's `conditions`.
        null (`Condition`): null condition, as a rule the empty prompt: one row, `[L, D]` or `[1, L, D]`.
        shape (list of `int`): shape of one image's latents, `(C, h, w)`.
        seeds (list of `int` or tuples): random seed of the start of each prompt's trajectory.
        num_inference_steps (`int`): number of steps of a trajectory.
        guidance_scale (`float`): guidance scale of the trajectory; the norm is taken of the difference before it is
            scaled.
        first (`int`, *optional*): number of steps to take; all steps by default. The paper detects memorized prompts
            by the first step.
        batch_size (`int`): number of prompts measured at once; only the speed depends on it.

    Returns:
        `torch.Tensor`: `[N]` on the CPU, ≥ 0; higher = more like a memorized prompt. The cost is two forward passes
        for each prompt and step.

    Raises:
        ValueError: when there are not as many seeds as prompts, for no prompt at all, for a `first` outside the
            trajectory, and for a family without a null condition.
    """
    first = num_inference_steps if first is None else first
    if not 1 <= first <= num_inference_steps:
        raise ValueError(f"first must lie between 1 and num_inference_steps {num_inference_steps}, but got {first}")
    condition, null = family.named(condition), null_condition(family, null)
    check_seeds(seeds, len(next(iter(condition.values()))))
    start = torch.cat([draw_noise(seed, (1, *shape)) for seed in seeds])

    def score(x: torch.Tensor, c: Condition, _: slice) -> torch.Tensor:
        sampler = family.noise.trajectory(num_inference_steps, family.tokens(shape))
        norms = []
        for t in sampler.timesteps[:first]:
            steps = t.expand(len(x)).to(x.device)
            conditional, unconditional = both_predictions(family, denoiser, x, steps, c, null)
            norms.append(family.noise.epsilon_scale(t.item()) * steering_norms(conditional, unconditional))
            guided = unconditional + guidance_scale * (conditional - unconditional)
            x = sampler.step(guided, t, x).prev_sample
        return torch.stack(norms).mean(0)

    return in_batches(score, denoiser, start, condition, batch_size)
