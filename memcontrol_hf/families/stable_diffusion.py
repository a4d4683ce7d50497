"""Stable Diffusion 1.x and 2.x, SDXL, Stable Diffusion 3 and 3.5."""

from inspect import signature

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from .base import Family
from .noise import FlowMatchingFamily


class StableDiffusionFamily(Family):
    """Stable Diffusion 1.x and 2.x: a UNet, conditioned on CLIP text embeddings.

    As in diffusers' `train_text_to_image.py`: uniform timesteps, no weights but min-SNR where asked for.
    """

    pipeline_classes = ("StableDiffusionPipeline",)
    denoiser_name = "unet"

    def encode(self, prompts):
        return self.pipeline.encode_prompt(prompts, self.device, 1, do_classifier_free_guidance=False)[:1]

    def example(self):
        tokens = self.pipeline.text_encoder.config.max_position_embeddings
        width = self.denoiser.config.cross_attention_dim
        return {"prompt_embeds": torch.empty(1, tokens, width, device="meta")}

    def call(self, denoiser, noisy, timesteps, prompt_embeds):
        return denoiser(noisy, timesteps, encoder_hidden_states=prompt_embeds, return_dict=False)[0]


class StableDiffusionXLFamily(Family):
    """SDXL: a UNet, conditioned on two text encoders, a pooled embedding, and sizes.

    As in diffusers' `train_text_to_image_sdxl.py`: uniform timesteps, no weights but min-SNR where asked for. The time
    ids are those of an image that was neither resized nor cropped, as the pipeline samples by default. The null
    condition is the pipeline's own: zeros with `force_zeros_for_empty_prompt`, else the empty caption.
    """

    pipeline_classes = ("StableDiffusionXLPipeline",)
    denoiser_name = "unet"
    encoders = ("vae", "text_encoder", "text_encoder_2")
    penultimate = ("text_encoder",)
    conditions = ("prompt_embeds", "pooled_prompt_embeds")

    def encode(self, prompts):
        encoded = self.pipeline.encode_prompt(prompts, device=self.device, do_classifier_free_guidance=False)
        return encoded[0], encoded[2]

    def null_condition(self):
        null = super().null_condition()
        if self.pipeline.config.force_zeros_for_empty_prompt:
            null = {name: torch.zeros_like(tensor) for name, tensor in null.items()}
        return null

    def example(self):
        tokens = self.pipeline.text_encoder.config.max_position_embeddings
        width = self.denoiser.config.cross_attention_dim
        pooled = self.pipeline.text_encoder_2.config.projection_dim
        return {
            "prompt_embeds": torch.empty(1, tokens, width, device="meta"),
            "pooled_prompt_embeds": torch.empty(1, pooled, device="meta"),
        }

    def call(self, denoiser, noisy, timesteps, prompt_embeds, pooled_prompt_embeds):
        height, width = (side * self.pixels_per_latent for side in noisy.shape[2:])
        time_ids = noisy.new_tensor([[height, width, 0, 0, height, width]]).expand(len(noisy), -1)
        added = {"text_embeds": pooled_prompt_embeds, "time_ids": time_ids}
        return denoiser(
            noisy, timesteps, encoder_hidden_states=prompt_embeds, added_cond_kwargs=added, return_dict=False
        )[0]


class StableDiffusion3Family(FlowMatchingFamily):
    """Stable Diffusion 3 and 3.5: a transformer, conditioned on two CLIPs and (if it is there) T5.

    As in diffusers' `train_dreambooth_sd3.py`: the place in the schedule is drawn logit-normal, and the outputs are
    preconditioned, so that the loss is that of `x_0`: `σ²` times the loss of the velocity.
    """

    pipeline_classes = ("StableDiffusion3Pipeline",)
    encoders = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    optional = ("text_encoder_3",)
    conditions = ("prompt_embeds", "pooled_prompt_embeds")

    def encode(self, prompts):
        encoded = self.pipeline.encode_prompt(
            prompts, None, None, device=self.device, do_classifier_free_guidance=False
        )  # fmt: skip
        return encoded[0], encoded[2]

    def example(self):
        config = self.denoiser.config
        clip = self.pipeline.text_encoder.config.max_position_embeddings
        t5 = signature(self.pipeline.encode_prompt).parameters["max_sequence_length"].default
        return {
            "prompt_embeds": torch.empty(1, clip + t5, config.joint_attention_dim, device="meta"),
            "pooled_prompt_embeds": torch.empty(1, config.pooled_projection_dim, device="meta"),
        }

    def call(self, denoiser, noisy, timesteps, prompt_embeds, pooled_prompt_embeds):
        return denoiser(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled_prompt_embeds,
            return_dict=False,
        )[0]

    def sample_timestep(self, generator):
        place = compute_density_for_timestep_sampling("logit_normal", 1, 0.0, 1.0, generator=generator)
        return self.scheduler.timesteps[int(place * self.scheduler.config.num_train_timesteps)]

    def loss_weights(self, timesteps, snr_gamma=None):
        return self._sigmas(timesteps).flatten().square()
