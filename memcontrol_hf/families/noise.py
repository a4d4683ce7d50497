"""Noise processes: how noise is added to an image, what the denoiser predicts, and which timesteps training draws."""

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_snr


class DDPMNoise:
    """DDPM noise, `x_t = √ᾱ_t · x_0 + √(1 - ᾱ_t) · ε` (https://huggingface.co/papers/2006.11239).

    Timesteps are whole numbers from 0 (almost no noise) to `num_train_timesteps - 1` (almost only noise). The denoiser
    predicts the noise, the velocity or the image, by the scheduler's `prediction_type`. Training draws timesteps
    uniformly, and weighs all of them alike unless min-SNR weighting is asked for.

    Args:
        scheduler (`SchedulerMixin`): the pipeline's scheduler, whose noise schedule and prediction type are read.

    Attributes:
        scheduler (`SchedulerMixin`): scheduler of the training, with the settings of the pipeline's scheduler.

    Raises:
        ValueError: for a scheduler of another noise process, and for an unknown prediction type.
    """

    def __init__(self, scheduler: SchedulerMixin):
        if "beta_schedule" not in scheduler.config:
            raise ValueError(f"a {type(scheduler).__name__} has no beta schedule: such models are not supported")
        prediction = scheduler.config.get("prediction_type", "epsilon")
        if prediction not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"unknown prediction type {prediction!r}: use epsilon, v_prediction or sample")
        # DDPMScheduler and DDIMScheduler clip by default; samplers without that setting do not clip, and latents lie
        # outside of [-1, 1].
        clip_sample = scheduler.config.get("clip_sample", False)
        self.scheduler = DDPMScheduler.from_config(scheduler.config, clip_sample=clip_sample)

    def coefficients(self, timestep: float) -> tuple[float, float]:
        """The pair `(a, s)` of `x_t = a · x_0 + s · ε` at one timestep."""
        signal = self.scheduler.alphas_cumprod[timestep].item()
        return signal**0.5, (1 - signal) ** 0.5

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Noisy latents `x_t` `[N, C, h, w]` from latents and noise `[N, C, h, w]` at `timesteps` `[N]`."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The tensor `[N, C, h, w]` that the denoiser is trained to predict."""
        match self.scheduler.config.prediction_type:
            case "epsilon":
                return noise
            case "v_prediction":
                return self.scheduler.get_velocity(latents, noise, timesteps)
            case _:  # "sample"
                return latents

    def to_epsilon(self, prediction: torch.Tensor, noisy: torch.Tensor, timestep: float) -> torch.Tensor:
        """The noise `ε` that a prediction implies for noisy latents, for every prediction type.

        Args:
            prediction, noisy (`torch.Tensor`): the denoiser's prediction and its input, `[N, C, h, w]`.
            timestep (`float`): timestep of all rows.

        Returns:
            `torch.Tensor`: `[N, C, h, w]`.
        """
        signal, noise = self.coefficients(timestep)
        match self.scheduler.config.prediction_type:
            case "epsilon":
                return prediction
            case "v_prediction":
                return signal * prediction + noise * noisy
            case _:  # "sample"
                return (noisy - signal * prediction) / noise

    def epsilon_scale(self, timestep: float) -> float:
        """The change of the implied noise for each unit by which the prediction changes, with `x_t` held fixed."""
        signal, noise = self.coefficients(timestep)
        match self.scheduler.config.prediction_type:
            case "epsilon":
                return 1.0
            case "v_prediction":
                return signal
            case _:  # "sample"
                return signal / noise

    def epsilon_scales(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The [`epsilon_scale`] of each of `timesteps` `[N]`: `[N]`."""
        if self.scheduler.config.prediction_type == "epsilon":
            return torch.ones(timesteps.shape, device=timesteps.device)
        return torch.tensor([self.epsilon_scale(t) for t in timesteps.tolist()], device=timesteps.device)

    def timesteps(self, count: int) -> list[int] | list[float]:
        """`count` timesteps from low noise to high, the middles of `count` equal parts of the schedule."""
        total = self.scheduler.config.num_train_timesteps
        return [int((i + 0.5) * total / count) for i in range(count)]

    def check_timesteps(self, *timesteps: float) -> None:
        """Raise `ValueError` for a timestep outside the schedule."""
        total = self.scheduler.config.num_train_timesteps
        for timestep in timesteps:
            if not 0 <= timestep < total:
                raise ValueError(f"timestep {timestep} lies outside the schedule: use 0 to {total - 1}")

    def sample_timestep(self, generator: torch.Generator) -> torch.Tensor:
        """One timestep as training draws it, a tensor of shape `[]`."""
        return torch.randint(self.scheduler.config.num_train_timesteps, (), generator=generator)

    def timestep_at(self, quantile: float) -> torch.Tensor:
        """The timestep below which [`sample_timestep`] lies with probability `quantile` in [0, 1), of shape `[]`."""
        return torch.tensor(int(quantile * self.scheduler.config.num_train_timesteps))

    def trajectory(self, num_inference_steps: int, tokens: int) -> SchedulerMixin:
        """A deterministic sampler (DDIM; Euler for flow matching) whose timesteps are set.

        Args:
            num_inference_steps (`int`): number of sampling steps.
            tokens (`int`): number of tokens that a transformer makes of one image ([`Family.tokens`]), by which some
                flow-matching models shift their timesteps.
        """
        scheduler = DDIMScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(num_inference_steps)
        return scheduler

    def check_inference_steps(self, count: int) -> None:
        """Raise `ValueError` for more sampling steps than the schedule has timesteps."""
        if count > (total := self.scheduler.config.num_train_timesteps):
            raise ValueError(f"{count} sampling steps are too many: the schedule of this model has {total} timesteps")

    def check_snr_gamma(self, snr_gamma: float | None) -> None:
        """Raise `ValueError` when min-SNR weighting is asked for and the noise process has no such weighting."""

    def loss_weights(self, timesteps: torch.Tensor, snr_gamma: float | None = None) -> torch.Tensor | None:
        """The weights `[N]` of training's losses at `timesteps` `[N]`, or `None` when all losses weigh 1.

        Args:
            timesteps (`torch.Tensor`): timesteps, `[N]`.
            snr_gamma (`float`, *optional*): `γ` of min-SNR weighting (https://huggingface.co/papers/2303.09556).
        """
        if snr_gamma is None:
            return None
        snr = compute_snr(self.scheduler, timesteps)
        clipped = snr.clamp(max=snr_gamma)
        match self.scheduler.config.prediction_type:
            case "epsilon":
                return clipped / snr
            case "v_prediction":
                return clipped / (snr + 1)
            case _:  # "sample": the loss of x_0 has weight SNR in the units of epsilon
                return clipped


class FlowMatchingNoise(DDPMNoise):
    """Flow matching: `x_t = (1 - σ) x_0 + σ ε`, and the denoiser predicts the velocity `ε - x_0`.

    Timesteps are the real numbers `1000 σ`. Training draws a step of the scheduler uniformly and weighs all losses
    alike. SecMI and PIA have exact counterparts: an Euler step along the velocity `v` is a DDIM step for this noise,
    and the noise that a velocity implies is `x_t + (1 - σ) v`. Both attacks accept any timestep from 0 to 1000; the
    timesteps in their papers are those of DDPM, where the same number means more noise.
    """

    def __init__(self, scheduler):
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)

    def coefficients(self, timestep):
        sigma = timestep / self.scheduler.config.num_train_timesteps
        return 1 - sigma, sigma

    def add_noise(self, latents, noise, timesteps):
        sigmas = self.sigmas(timesteps).view(-1, 1, 1, 1)
        return (1 - sigmas) * latents + sigmas * noise

    def sigmas(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The share of noise `σ` `[N]` in `x_t` at `timesteps` `[N]`."""
        return timesteps / self.scheduler.config.num_train_timesteps

    def target(self, latents, noise, timesteps):
        return noise - latents

    def to_epsilon(self, prediction, noisy, timestep):
        return noisy + self.coefficients(timestep)[0] * prediction

    def epsilon_scale(self, timestep):
        """1, because norms are taken of the velocity: a difference of implied noise would vanish at `σ = 1`."""
        return 1.0

    def epsilon_scales(self, timesteps):
        return torch.ones(timesteps.shape, device=timesteps.device)

    def timesteps(self, count):
        return self.scheduler.timesteps.flip(0)[super().timesteps(count)].tolist()

    def check_timesteps(self, *timesteps):
        total = self.scheduler.config.num_train_timesteps
        for timestep in timesteps:
            if not 0 <= timestep <= total:
                raise ValueError(f"timestep {timestep} lies outside the schedule: use 0 to {total}")

    def sample_timestep(self, generator):
        return self.scheduler.timesteps[super().sample_timestep(generator)]

    def timestep_at(self, quantile):
        return self.scheduler.timesteps.flip(0)[super().timestep_at(quantile)]

    def trajectory(self, num_inference_steps, tokens):
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)
        if not scheduler.config.use_dynamic_shifting:
            scheduler.set_timesteps(num_inference_steps)
            return scheduler
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift(tokens, *(scheduler.config[name] for name in names))
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_inference_steps, num_inference_steps), mu=mu)
        return scheduler

    def check_snr_gamma(self, snr_gamma):
        if snr_gamma is not None:
            raise ValueError(
                f"snr_gamma {snr_gamma} is for DDPM noise, but this model has flow matching: leave it out"
            )

    def loss_weights(self, timesteps, snr_gamma=None):
        return None
