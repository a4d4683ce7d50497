"""Stable Diffusion 3 and 3.5."""

from inspect import signature

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from .base import Family
from .noise import FlowMatchingNoise


class StableDiffusion3Noise(FlowMatchingNoise):
    """Flow matching with logit-normal timesteps and the loss of `x_0`: `σ²` times the loss of the velocity."""

    def sample_timestep(self, generator):
        place = compute_density_for_timestep_sampling("logit_normal", 1, 0.0, 1.0, generator=generator)
        return self.scheduler.timesteps[int(place * self.scheduler.config.num_train_timesteps)]

    def timestep_at(self, quantile):
        place = torch.special.ndtri(torch.tensor(quantile, dtype=torch.double)).sigmoid().item()
        return super().timestep_at(place)

    def loss_weights(self, timesteps, snr_gamma=None):
        return self.sigmas(timesteps).square()


class StableDiffusion3Family(Family):
    """Stable Diffusion 3 and 3.5: a transformer, conditioned on two CLIPs and, where the pipeline has it, T5.

    The training follows diffusers' `train_dreambooth_sd3.py`: the place in the schedule is drawn logit-normal, and the
    outputs are preconditioned, which makes the loss that of `x_0` ([`StableDiffusion3Noise`]).
    """

    pipeline_classes = ("StableDiffusion3Pipeline",)
    encoders = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    optional = ("text_encoder_3",)
    conditions = ("prompt_embeds", "pooled_prompt_embeds")
    noise_class = StableDiffusion3Noise

    def encode(self, prompts):
        encoded = self.pipeline.encode_prompt(
            prompts, None, None, device=self.device, do_classifier_free_guidance=False
        )  # fmt: skip
        return encoded[0], encoded[2]

    def meta_condition(self):
        config = self.denoiser.config
        clip = self.pipeline.text_encoder.config.max_position_embeddings
        t5 = signature(self.pipeline.encode_prompt).parameters["max_sequence_length"].default
        return {
            "prompt_embeds": torch.empty(1, clip + t5, config.joint_attention_dim, device="meta"),
            "pooled_prompt_embeds": torch.empty(1, config.pooled_projection_dim, device="meta"),
        }

    def call_denoiser(self, denoiser, noisy, timesteps, prompt_embeds, pooled_prompt_embeds):
        return denoiser(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled_prompt_embeds,
            return_dict=False,
        )[0]
