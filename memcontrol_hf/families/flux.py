"""Flux."""

from inspect import signature

import torch

from .base import Family
from .noise import FlowMatchingNoise


class FluxFamily(Family):
    """Flux: a transformer, conditioned on T5 and a pooled CLIP embedding.

    The training follows diffusers' `train_dreambooth_flux.py`: the place in the schedule is drawn uniformly, and all
    losses weigh alike. A model with distilled guidance (dev) gets the guidance scale 3.5 in training, in every attack
    and in sampling, whatever guidance scale is asked for: an adapter is tuned at this one. Such a model was not
    trained to leave a caption out; its null condition, the empty caption, is one caption among others.
    """

    pipeline_classes = ("FluxPipeline",)
    encoders = ("vae", "text_encoder", "text_encoder_2")
    conditions = ("prompt_embeds", "pooled_prompt_embeds")
    noise_class = FlowMatchingNoise
    guidance = 3.5
    guided_passes = 1
    patch = 2

    @property
    def trained_at(self):
        return self.pipeline.default_sample_size * self.pixels_per_latent

    def encode(self, prompts):
        return self.pipeline.encode_prompt(prompts, device=self.device)[:2]

    def meta_condition(self):
        config = self.denoiser.config
        tokens = signature(self.pipeline.encode_prompt).parameters["max_sequence_length"].default
        return {
            "prompt_embeds": torch.empty(1, tokens, config.joint_attention_dim, device="meta"),
            "pooled_prompt_embeds": torch.empty(1, config.pooled_projection_dim, device="meta"),
        }

    def pipeline_arguments(self, prompts, resolution, guidance_scale):
        return super().pipeline_arguments(prompts, resolution, self.guidance)

    def call_denoiser(self, denoiser, noisy, timesteps, prompt_embeds, pooled_prompt_embeds):
        n, channels, h, w = noisy.shape
        prediction = denoiser(
            hidden_states=self.pipeline._pack_latents(noisy, n, channels, h, w),
            timestep=timesteps / self.noise.scheduler.config.num_train_timesteps,
            guidance=noisy.new_full((n,), self.guidance) if self.denoiser.config.guidance_embeds else None,
            pooled_projections=pooled_prompt_embeds,
            encoder_hidden_states=prompt_embeds,
            txt_ids=noisy.new_zeros(prompt_embeds.shape[1], 3),
            img_ids=self.pipeline._prepare_latent_image_ids(n, h // 2, w // 2, noisy.device, noisy.dtype),
            return_dict=False,
        )[0]
        factor = self.pixels_per_latent
        return self.pipeline._unpack_latents(prediction, h * factor, w * factor, factor)
