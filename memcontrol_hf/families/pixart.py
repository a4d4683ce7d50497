"""PixArt-α and PixArt-Σ."""

from inspect import signature

import torch

from .base import Family


class PixArtFamily(Family):
    """PixArt-α and PixArt-Σ: a transformer that predicts the noise, conditioned on T5.

    The training follows diffusers' `research_projects/pixart`: timesteps are drawn uniformly, all losses weigh alike
    unless min-SNR weighting is asked for, and the channels of the learned variance are dropped.
    """

    pipeline_classes = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    conditions = ("prompt_embeds", "prompt_attention_mask")

    def encode(self, prompts):
        encoded = self.pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, device=self.device)
        return encoded[0], encoded[1]

    def meta_condition(self):
        tokens = signature(self.pipeline.encode_prompt).parameters["max_sequence_length"].default
        return {
            "prompt_embeds": torch.empty(1, tokens, self.denoiser.config.caption_channels, device="meta"),
            "prompt_attention_mask": torch.empty(1, tokens, dtype=torch.int64, device="meta"),
        }

    def call_denoiser(self, denoiser, noisy, timesteps, prompt_embeds, prompt_attention_mask):
        added = {"resolution": None, "aspect_ratio": None}
        if self.denoiser.use_additional_conditions:
            height, width = (side * self.pixels_per_latent for side in noisy.shape[2:])
            added["resolution"] = noisy.new_tensor([[height, width]]).expand(len(noisy), -1)
            added["aspect_ratio"] = noisy.new_tensor([[height / width]]).expand(len(noisy), -1)
        prediction = denoiser(
            noisy,
            encoder_hidden_states=prompt_embeds,
            encoder_attention_mask=prompt_attention_mask,
            timestep=timesteps,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return prediction[:, : noisy.shape[1]]

    def pipeline_arguments(self, prompts, resolution, guidance_scale):
        arguments = super().pipeline_arguments(prompts, resolution, guidance_scale)
        return arguments | {"clean_caption": False, "use_resolution_binning": False}  # as in `encode`
