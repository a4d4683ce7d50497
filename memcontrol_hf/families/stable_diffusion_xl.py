"""SDXL."""

import torch

from .base import Family


class StableDiffusionXLFamily(Family):
    """SDXL: a UNet, conditioned on two text encoders, a pooled embedding, and sizes.

    The training follows diffusers' `train_text_to_image_sdxl.py`: timesteps are drawn uniformly, and all losses weigh
    alike unless min-SNR weighting is asked for. The time ids describe an image that was neither resized nor cropped,
    as the pipeline samples by default. That script gives each image's own size and crop instead, which are left out
    here on purpose: the size of a scan is nearly unique, so that a model could learn it as the key to a single image,
    and the adapter would be tuned at sizes at which the pipeline does not sample. The null condition is the pipeline's
    own: zeros with `force_zeros_for_empty_prompt`, else the empty caption.
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

    def meta_condition(self):
        tokens = self.pipeline.text_encoder.config.max_position_embeddings
        width = self.denoiser.config.cross_attention_dim
        pooled = self.pipeline.text_encoder_2.config.projection_dim
        return {
            "prompt_embeds": torch.empty(1, tokens, width, device="meta"),
            "pooled_prompt_embeds": torch.empty(1, pooled, device="meta"),
        }

    def call_denoiser(self, denoiser, noisy, timesteps, prompt_embeds, pooled_prompt_embeds):
        height, width = (side * self.pixels_per_latent for side in noisy.shape[2:])
        time_ids = noisy.new_tensor([[height, width, 0, 0, height, width]]).expand(len(noisy), -1)
        added = {"text_embeds": pooled_prompt_embeds, "time_ids": time_ids}
        return denoiser(
            noisy, timesteps, encoder_hidden_states=prompt_embeds, added_cond_kwargs=added, return_dict=False
        )[0]
