"""Stable Diffusion 1.x and 2.x."""

import torch

from .base import Family


class StableDiffusionFamily(Family):
    """Stable Diffusion 1.x and 2.x: a UNet, conditioned on CLIP text embeddings.

    The training follows diffusers' `train_text_to_image.py`: timesteps are drawn uniformly, and all losses weigh alike
    unless min-SNR weighting is asked for.
    """

    pipeline_classes = ("StableDiffusionPipeline",)
    denoiser_name = "unet"

    def encode(self, prompts):
        return self.pipeline.encode_prompt(prompts, self.device, 1, do_classifier_free_guidance=False)[:1]

    def meta_condition(self):
        tokens = self.pipeline.text_encoder.config.max_position_embeddings
        width = self.denoiser.config.cross_attention_dim
        return {"prompt_embeds": torch.empty(1, tokens, width, device="meta")}

    def call_denoiser(self, denoiser, noisy, timesteps, prompt_embeds):
        return denoiser(noisy, timesteps, encoder_hidden_states=prompt_embeds, return_dict=False)[0]
