"""DiT."""

import torch
from diffusers.models.embeddings import LabelEmbedding

from .base import Family, check_only_resolution


class DiTFamily(Family):
    """DiT: a transformer over VAE latents, conditioned on a class.

    A caption is the number of a class, or its name in the pipeline's `id2label`. diffusers has no training script for
    DiT; timesteps are drawn uniformly and the loss is the mean squared error of the noise, as in the DiT paper
    (https://huggingface.co/papers/2212.09748). The channels of the learned variance are dropped. The null condition is
    the class that DiT adds for guidance.
    """

    pipeline_classes = ("DiTPipeline",)
    encoders = ("vae",)
    conditions = ("class_labels",)
    not_applicable = {"embedding_attack": "a class is a number, and no embedding that can be searched"}

    def __init__(self, pipeline):
        super().__init__(pipeline)
        for module in pipeline.transformer.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0  # it draws from the global random state; the training has `caption_dropout`

    @property
    def pixels_per_latent(self):
        return 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)

    def check_resolution(self, resolution):
        check_only_resolution(resolution, self.trained_at)

    def cache_key(self):
        return [*super().cache_key(), self.pipeline.labels]

    def labels(self, captions: list[str]) -> list[int]:
        """The numbers of the classes that captions name.

        Raises:
            ValueError: for a caption that is neither a name nor a number of a class.
        """
        names, count = self.pipeline.labels, self.denoiser.config.num_embeds_ada_norm
        labels = [names.get(text, int(text) if text.isdecimal() else -1) for text in captions]
        if wrong := sum(not 0 <= label < count for label in labels):  # a caption may be a report: none is shown
            raise ValueError(
                f"{wrong} of {len(labels)} captions are no class: give a number below {count}, or a name of the "
                "pipeline's id2label"
            )
        return labels

    def encode(self, prompts):
        return (torch.tensor(self.labels(prompts), device=self.device),)

    def null_condition(self):
        return {"class_labels": torch.tensor([self.denoiser.config.num_embeds_ada_norm], device=self.device)}

    def meta_condition(self):
        return {"class_labels": torch.empty(1, dtype=torch.int64, device="meta")}

    def call_denoiser(self, denoiser, noisy, timesteps, class_labels):
        prediction = denoiser(noisy, timestep=timesteps, class_labels=class_labels, return_dict=False)[0]
        return prediction[:, : noisy.shape[1]]

    def pipeline_arguments(self, prompts, resolution, guidance_scale):
        count = self.denoiser.config.num_embeds_ada_norm
        if guidance_scale > 1 and count != 1000:  # the pipeline takes class 1000 for the null class
            raise ValueError(
                f"DiTPipeline guides only models of 1000 classes, not {count}: set the guidance scale to 1"
            )
        return {"class_labels": self.labels(prompts), "guidance_scale": guidance_scale}
