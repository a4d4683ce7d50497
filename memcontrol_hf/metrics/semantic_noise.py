"""Membership by semantic initial noise: what a model samples from the noise that an image inverts to."""

from itertools import pairwise

import torch
from torch import nn

from ..families import Condition, Family
from .denoiser_calls import both_predictions, ddim_step, in_batches


@torch.no_grad()
def semantic_noise(
    family: Family,
    denoiser: nn.Module,
    latents: torch.Tensor,
    condition: Condition | torch.Tensor,
    null: Condition | torch.Tensor | None,
    num_inference_steps: int = 50,
    guidance_scale: float = 4.5,
    inverter: nn.Module | None = None,
    batch_size: int = 64,
) -> torch.Tensor:
    """Membership score by semantic initial noise, of Lian et al. (https://huggingface.co/papers/2601.21628).

    `-||G(x_T) - x_0||₂` of equation 8, where `x_T` is the noise to which DDIM inversion (equations 4 to 6) carries the
    image with its caption, and `G` is the sampling with guidance from that noise and caption. The noise of the last
    timestep still carries what the image shows, and a model that was fine-tuned on the image finds the way back to it.
    No noise is drawn.

    The paper's attacker cannot look into the fine-tuned model, and so inverts by its frozen base (give it as
    `inverter`). Whoever has an adapter has the weights, so that here the model itself inverts by default; the paper
    does this, too, to explain the attack (its table 3). Three more things are this package's own: images are inverted
    without guidance and with as many steps as are sampled (the paper inverts with its guidance 1, in 100 steps, and
    finds that both matter little), and the distance is one of latents, where the paper compares pixels.

    Args:
        family ([`~memcontrol_hf.families.Family`]): family of the pipeline.
        denoiser (`nn.Module`): the pipeline's denoiser, with its adapter if it has one, in evaluation mode.
        latents (`torch.Tensor`): latents of the images, `[N, C, h, w]`.
        condition (`Condition`): `N` rows. A tensor `[N, L, D]` stands for the first of the family's `conditions`.
        null (`Condition`): null condition, as a rule the empty prompt: one row, `[L, D]` or `[1, L, D]`. `None`
            samples without guidance, as for a family that has no null condition.
        num_inference_steps (`int`): number of steps of the inversion and of the sampling; the paper samples with 50.
        guidance_scale (`float`): guidance scale of the sampling; the paper's 3.5 is 4.5 as diffusers counts;
            at most 1 is without guidance.
        inverter (`nn.Module`, *optional*): denoiser that inverts the images, by default `denoiser` itself.
        batch_size (`int`): number of images measured at once; only the speed depends on it.

    Returns:
        `torch.Tensor`: `[N]` on the CPU, ≤ 0; higher = more member-like. The cost is `3 * num_inference_steps` forward
        passes for each image, `2 * num_inference_steps` without guidance.

    Raises:
        ValueError: when there are not as many conditions as images, and for no image at all.
    """
    inverter = denoiser if inverter is None else inverter
    null = None if null is None or guidance_scale <= 1 else family.named(null)

    def score(x: torch.Tensor, c: Condition, _: slice) -> torch.Tensor:
        sampler = family.noise.trajectory(num_inference_steps, family.tokens(x.shape[1:]))
        ascending = [timestep for timestep in sampler.timesteps.flip(0).tolist() if timestep > 0]
        noisy = x
        for start, stop in pairwise([0, *ascending]):
            noisy = ddim_step(family, inverter, noisy, c, start, stop)
        for timestep in sampler.timesteps:
            steps = timestep.expand(len(x)).to(x.device)
            if null is None:
                prediction = family.denoise(denoiser, noisy, steps, c)
            else:
                conditional, unconditional = both_predictions(family, denoiser, noisy, steps, c, null)
                prediction = unconditional + guidance_scale * (conditional - unconditional)
            noisy = sampler.step(prediction, timestep, noisy).prev_sample
        return -(noisy - x).flatten(1).norm(dim=1)

    return in_batches(score, denoiser, latents, family.named(condition), batch_size)
