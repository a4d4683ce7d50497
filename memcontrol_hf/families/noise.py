"""The noise process of a model: what is added to an image, and what the denoiser predicts."""

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from .base import Family


class FlowMatchingFamily(Family):
    """Flow matching: `x_t = (1 - σ) x_0 + σ ε`, and the denoiser predicts the velocity `ε - x_0`.

    Timesteps are real numbers, the schedule's `1000 σ`. SecMI and PIA have exact counterparts: an Euler step along the
    velocity is a DDIM step for this noise, and the noise that the denoiser sees is `x_t + (1 - σ) v`. They may be
    asked at any timestep from 0 to 1000; the papers' own are those of DDPM noise, which at the same number is more.
    """

    def set_scheduler(self, scheduler):
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)

    def coefficients(self, timestep):
        sigma = timestep / self.scheduler.config.num_train_timesteps
        return 1 - sigma, sigma

    def add_noise(self, latents, noise, timesteps):
        sigmas = self._sigmas(timesteps)
        return (1 - sigmas) * latents + sigmas * noise

    def _sigmas(self, timesteps: torch.Tensor) -> torch.Tensor:
        return (timesteps / self.scheduler.config.num_train_timesteps).view(-1, 1, 1, 1)

    def target(self, latents, noise, timesteps):
        return noise - latents

    def to_epsilon(self, prediction, noisy, timestep):
        return noisy + self.coefficients(timestep)[0] * prediction

    def epsilon_scale(self, timestep):
        """1: the velocity takes the noise's place. Of the noise, its difference would vanish where sampling starts."""
        return 1.0

    def timesteps(self, count):
        return self.scheduler.timesteps.flip(0)[super().timesteps(count)].tolist()

    def check_timesteps(self, *timesteps):
        total = self.scheduler.config.num_train_timesteps
        for timestep in timesteps:
            if not 0 <= timestep <= total:
                raise ValueError(f"timestep {timestep} lies outside the schedule: use 0 to {total}")

    def trajectory(self, num_inference_steps, shape):
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)
        if not scheduler.config.use_dynamic_shifting:
            scheduler.set_timesteps(num_inference_steps)
            return scheduler
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        tokens = shape[1] * shape[2] // self.patch**2
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
