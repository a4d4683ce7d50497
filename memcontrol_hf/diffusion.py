"""What differs between model families: encoding a picture and its condition, noise, target, and the denoiser's call.

A family is one short class; [`family_of`] picks it from the pipeline's own class.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import nn

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def seeded_generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on a tuple of non-negative integers and on nothing else.

    Each image of each purpose gets one, so that no number depends on the batch, on the order of the draws, or on how
    many processes share the work.
    """
    sequence = np.random.SeedSequence((len(key), *key))  # the length, since numpy takes (1,) and (1, 0) for the same
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))


@contextmanager
def captions_kept_out_of_logs(pipeline: "DiffusionPipeline") -> Iterator[None]:
    """Silence a pipeline that prints the ends of captions that are too long: they may be reports of patients."""
    logger = logging.getLogger(type(pipeline).__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class StableDiffusionFamily:
    """Stable Diffusion 1.x and 2.x: a UNet over VAE latents, conditioned on CLIP text embeddings."""

    pipeline_classes = ("StableDiffusionPipeline",)
    denoiser_name = "unet"

    def __init__(self, pipeline: "DiffusionPipeline"):
        self.pipeline = pipeline
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)

    def check_resolution(self, resolution: int) -> None:
        """Raise `ValueError` when the VAE and the UNet's levels do not divide `resolution` (pixels)."""
        config = self.pipeline.unet.config
        # An odd size on the way down is rounded up and no longer meets its skip connection on the way up, except
        # that diffusers' UNet forwards the upsample size below the first levels: only whole latents are needed.
        factor = self.pipeline.vae_scale_factor
        if resolution <= 0 or resolution % factor:
            raise ValueError(
                f"resolution {resolution} is not a positive multiple of {factor}, as the VAE needs; "
                f"the model was trained at {config.sample_size * factor}"
            )

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Images `[N, 3, H, W]` in [0, 1] -> latents `[N, C, h, w]`, the mean of the posterior, scaled."""
        vae = self.pipeline.vae
        pixels = pixels.to(vae.device, vae.dtype) * 2 - 1
        latents = vae.encode(pixels).latent_dist.mode()
        return ((latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor).float()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """`N` prompts -> text embeddings `[N, L, D]`; the empty prompt is the null condition."""
        with captions_kept_out_of_logs(self.pipeline):
            embeds, _ = self.pipeline.encode_prompt(
                list(prompts), device=self.pipeline.text_encoder.device, num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )  # fmt: skip
        return embeds.float()

    def timesteps(self, count: int) -> list[int]:
        """`count` timesteps in the middle of as many equal parts of the schedule, from low noise to high."""
        total = self.scheduler.config.num_train_timesteps
        return [int((i + 0.5) * total / count) for i in range(count)]

    def losses(
        self,
        denoiser: nn.Module,
        latents: torch.Tensor,
        embeds: torch.Tensor,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
        snr_gamma: float | None = None,
    ) -> torch.Tensor:
        """The denoising loss of each image of a batch.

        Args:
            latents, noise (`torch.Tensor`): `[N, C, h, w]`.
            embeds (`torch.Tensor`): `[N, L, D]`.
            timesteps (`torch.Tensor`): `[N]`.
            snr_gamma (`float`, *optional*): min-SNR weighting (https://huggingface.co/papers/2303.09556).

        Returns:
            `torch.Tensor`: `[N]`, the mean squared error to the target of the scheduler's prediction type.
        """
        prediction = predict(denoiser, self.scheduler, latents, embeds, timesteps, noise)
        target = _target(self.scheduler, latents, noise, timesteps)
        losses = (prediction.float() - target.float()).square().flatten(1).mean(1)
        return losses if snr_gamma is None else losses * self._min_snr_weights(timesteps, snr_gamma)

    def _min_snr_weights(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        snr = compute_snr(self.scheduler, timesteps)
        clipped = snr.clamp(max=gamma)
        match self.scheduler.config.prediction_type:
            case "epsilon":
                return clipped / snr
            case "v_prediction":
                return clipped / (snr + 1)
            case _:  # "sample": the loss on x0 has weight SNR in the units of epsilon
                return clipped


FAMILIES = (StableDiffusionFamily,)


def family_of(pipeline: "DiffusionPipeline") -> StableDiffusionFamily:
    """The family of a pipeline.

    Raises:
        ValueError: for a pipeline class that no family claims, or an unknown prediction type.
    """
    for family in FAMILIES:
        if type(pipeline).__name__ in family.pipeline_classes:
            prediction = pipeline.scheduler.config.get("prediction_type", "epsilon")
            if prediction not in ("epsilon", "v_prediction", "sample"):
                raise ValueError(f"unknown prediction type {prediction!r}: use epsilon, v_prediction or sample")
            return family(pipeline)
    known = ", ".join(name for family in FAMILIES for name in family.pipeline_classes)
    raise ValueError(f"{type(pipeline).__name__} is no pipeline that can be tuned here; known: {known}")


def load_pipeline(name: str, revision: str | None = None, variant: str | None = None) -> "DiffusionPipeline":
    """A pipeline by name: `"demo"` for the one in the package, a Hub id or a folder.

    Raises:
        ValueError: when it cannot be loaded.
    """
    if name == "demo":
        from .demo import demo_pipeline

        return demo_pipeline()
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(name, revision=revision, variant=variant)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the pipeline {name!r}: {str(error).splitlines()[0]}") from None


def predict(
    denoiser: nn.Module,
    scheduler: DDPMScheduler,
    latents: torch.Tensor,
    embeds: torch.Tensor,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """What the denoiser says of `latents` `[N, C, h, w]` with `noise` added at `timesteps` `[N]`."""
    noisy = scheduler.add_noise(latents, noise, timesteps)
    return denoiser(noisy, timesteps, encoder_hidden_states=embeds, return_dict=False)[0]


def _target(
    scheduler: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    match scheduler.config.prediction_type:
        case "epsilon":
            return noise
        case "v_prediction":
            return scheduler.get_velocity(latents, noise, timesteps)
        case _:
            return latents
