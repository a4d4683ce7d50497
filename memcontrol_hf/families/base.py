"""What all families have in common, and what a new one has to say."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import SchedulerMixin
from torch import nn

from ..search_space import SearchSpace
from .noise import DDPMNoise

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


Condition = Mapping[str, torch.Tensor]
"""What a denoiser is told beside the noisy latents: named tensors `[N, ...]`, a row for each image."""


def null_like(null: Condition, condition: Condition) -> Condition:
    """The null condition, whose tensors are one row with or without its dimension, for each row of a condition."""
    return {name: null[name].reshape(1, *t.shape[1:]).to(t).expand_as(t) for name, t in condition.items()}


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


@contextmanager
def safety_checker_off(pipeline: "DiffusionPipeline") -> Iterator[None]:
    """Let a pipeline sample without its filter, which whoever has the weights can leave out.

    It blacks images out before they are measured, and it is on no device that a trainer moves.
    """
    checker = getattr(pipeline, "safety_checker", None)
    if checker is None:
        yield
        return
    pipeline.safety_checker = None
    try:
        yield
    finally:
        pipeline.safety_checker = checker


class Family:
    """What all families have in common: DDPM noise over VAE latents, conditioned on a caption.

    Attributes:
        pipeline_classes (tuple of `str`): names of the pipelines of this family.
        denoiser_name (`str`): the pipeline's part that is tuned.
        encoders (tuple of `str`): its parts that encode images and captions; those of them that are there.
        optional (tuple of `str`): those that may be missing.
        penultimate (tuple of `str`): text encoders whose last layer the pipeline does not read.
        conditions (tuple of `str`): names of a condition's tensors, in the order in which [`Family.encode`] gives
            them; also the arguments of [`Family.call_denoiser`] and the columns of the cached data.
        not_applicable (dict of `str`): measures that say nothing of this family, and why.
        scheduler: of the training: `DDPMScheduler` with the pipeline's settings.

    Raises:
        ValueError: when the pipeline lacks a part, for an unknown prediction type, and for a scheduler or a VAE of
            another kind.
    """

    pipeline_classes: ClassVar[tuple[str, ...]] = ()
    denoiser_name: ClassVar[str] = "transformer"
    encoders: ClassVar[tuple[str, ...]] = ("vae", "text_encoder")
    optional: ClassVar[tuple[str, ...]] = ()
    penultimate: ClassVar[tuple[str, ...]] = ()
    conditions: ClassVar[tuple[str, ...]] = ("prompt_embeds",)
    not_applicable: ClassVar[dict[str, str]] = {}
    noise_class: ClassVar[type[DDPMNoise]] = DDPMNoise

    def __init__(self, pipeline: "DiffusionPipeline"):
        for name in (self.denoiser_name, *self.encoders):
            if getattr(pipeline, name, None) is None and name not in self.optional:
                raise ValueError(f"the {type(pipeline).__name__} has no {name}: load it with all of its parts")
        if getattr(getattr(pipeline, "vae", None), "config", {}).get("latents_mean") is not None:
            raise ValueError("a VAE whose latents are shifted and scaled by channel (latents_mean) is not supported")
        self.pipeline: DiffusionPipeline | None = pipeline
        self.noise = self.noise_class(pipeline.scheduler)

    @classmethod
    def of_scheduler(cls, scheduler: SchedulerMixin) -> "Family":
        """The family without a pipeline: it can add noise and call a denoiser, but not encode or sample."""
        family = cls.__new__(cls)
        family.pipeline = None
        family.noise = cls.noise_class(scheduler)
        return family

    # ---- a family's own: most write `encode` and `call_denoiser` and leave the rest as it is ----

    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, ...]:
        """`N` captions -> the tensors `[N, ...]` that `conditions` names."""
        raise NotImplementedError

    def call_denoiser(
        self, denoiser: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, **condition: torch.Tensor
    ):
        """The prediction `[N, C, h, w]` for noisy latents `[N, C, h, w]` at `timesteps` `[N]` under a condition."""
        raise NotImplementedError

    def null_condition(self) -> dict[str, torch.Tensor] | None:
        """What guidance steers away from, one row: the empty caption. `None` where there is no such thing."""
        return self.encode_prompts([""])

    def pipeline_arguments(self, prompts: list[str], resolution: int, guidance_scale: float) -> dict[str, Any]:
        """The arguments with which the pipeline samples an image for each caption."""
        return {"prompt": prompts, "height": resolution, "width": resolution, "guidance_scale": guidance_scale}

    def meta_condition(self) -> dict[str, torch.Tensor]:
        """A condition of one row on the meta device, as `encode` makes them; read off configs, for the dry run."""
        raise NotImplementedError

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.pipeline.vae.config.latent_channels

    @property
    def pixels_per_latent(self) -> int:
        """Pixels of the image for one value of the latent, in each direction."""
        return self.pipeline.vae_scale_factor

    @property
    def patch(self) -> int:
        """Latent values that one token of a transformer covers, in each direction."""
        return self.denoiser.config.get("patch_size", 1)

    def tokens(self, shape: Sequence[int]) -> int:
        """Number of tokens that a transformer makes of one image's latents of a shape `(C, h, w)`."""
        return shape[1] * shape[2] // self.patch**2

    @property
    def trained_at(self) -> int:
        """Side in pixels of the images that the model was trained at."""
        return self.denoiser.config.sample_size * self.pixels_per_latent

    def check_resolution(self, resolution: int) -> None:
        """Raise `ValueError` when the VAE and the patches of a transformer do not divide `resolution` (pixels)."""
        # An odd size on the way down is rounded up and no longer meets its skip connection on the way up, except
        # that diffusers' UNet forwards the upsample size below the first levels: only whole latents are needed.
        factor = self.pixels_per_latent * self.patch
        if resolution <= 0 or resolution % factor:
            raise ValueError(
                f"resolution {resolution} is not a positive multiple of {factor}, as the model needs; "
                f"it was trained at {self.trained_at}"
            )

    # ---- images and captions ----

    @property
    def denoiser(self) -> nn.Module:
        """The pipeline's part that is tuned."""
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def device(self) -> torch.device:
        """Where captions are encoded."""
        return [self.denoiser, *self.encoder_modules][-1].device

    @property
    def encoder_modules(self) -> list[nn.Module]:
        """The parts that encode images and captions."""
        parts = (getattr(self.pipeline, name, None) for name in self.encoders)
        return [part for part in parts if part is not None]

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """The text encoders that are there, by name."""
        names = (name for name in self.encoders if name.startswith("text_encoder"))
        return {name: part for name in names if (part := getattr(self.pipeline, name, None)) is not None}

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What can have an adapter, by the folder in which that is saved: the denoiser's is the adapter's own."""
        return {"": self.denoiser, **self.text_encoders}

    def search_space(
        self, granularity: str | Sequence[str] = "block", text_encoder_blocks: bool = False
    ) -> SearchSpace:
        """The blocks that a mask switches: those of the denoiser, and if wanted the layers of the text encoders.

        Raises:
            ValueError: as [`SearchSpace.from_model`], and when there is no text encoder.
        """
        if text_encoder_blocks and not self.text_encoders:
            raise ValueError(f"--text_encoder_blocks: the {type(self.pipeline).__name__} has no text encoder")
        encoders = self.text_encoders if text_encoder_blocks else {}
        return SearchSpace.from_model(self.denoiser, granularity, encoders, self.penultimate)

    def cache_key(self) -> list[Any]:
        """What cached latents and conditions depend on beside the data and the encoders' weights."""
        config = self.pipeline.vae.config
        return [type(self).__name__, config.scaling_factor, config.shift_factor]

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Images `[N, 3, H, W]` in [0, 1] -> latents `[N, C, h, w]`, the mean of the posterior, scaled."""
        vae = self.pipeline.vae
        overflows = vae.dtype == torch.float16 and vae.config.force_upcast  # as diffusers' own pipelines take it
        if overflows:
            vae.to(torch.float32)
        pixels = pixels.to(vae.device, vae.dtype) * 2 - 1
        latents = vae.encode(pixels).latent_dist.mode()
        if overflows:
            vae.to(torch.float16)
        return ((latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor).float()

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """`N` captions -> a condition of `N` rows, floating-point tensors in float32.

        Gradients flow to the text encoders unless they are frozen, or disabled with `torch.no_grad()`.
        """
        # Always in the text encoders' own precision: they are called outside of the denoiser's autocast in training.
        with captions_kept_out_of_logs(self.pipeline), torch.autocast(self.device.type, enabled=False):
            tensors = self.encode(list(prompts))
        return {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in zip(self.conditions, tensors, strict=True)
        }

    def sample(
        self,
        prompts: Sequence[str],
        generators: list[torch.Generator],
        resolution: int,
        num_inference_steps: int,
        guidance_scale: float,
        changes: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """An image for each caption: `[N, 3, H, W]` in [0, 1] on the CPU; `changes` override `pipeline_arguments`."""
        with captions_kept_out_of_logs(self.pipeline), safety_checker_off(self.pipeline):
            images = self.pipeline(
                **{**self.pipeline_arguments(list(prompts), resolution, guidance_scale), **(changes or {})},
                num_inference_steps=num_inference_steps,
                generator=generators,
                output_type="pt",
            ).images
        return images.float().cpu()

    # ---- the loss ----

    def denoise(
        self,
        denoiser: nn.Module,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        condition: "Condition | torch.Tensor",
    ) -> torch.Tensor:
        """What the denoiser says of noisy latents, in float32.

        Args:
            denoiser (`nn.Module`): the pipeline's, or that with an adapter.
            noisy (`torch.Tensor`): `[N, C, h, w]`.
            timesteps (`torch.Tensor`): `[N]`.
            condition (`Condition`): `N` rows. A tensor stands for the first of `conditions`.

        Returns:
            `torch.Tensor`: `[N, C, h, w]`.
        """
        dtype = noisy.dtype if self.pipeline is None else self.denoiser.dtype
        cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in self.named(condition).items()}
        return self.call_denoiser(denoiser, noisy.to(dtype), timesteps, **cast).float()

    def named(self, condition: "Condition | torch.Tensor") -> Condition:
        """A condition; a tensor alone is the first of `conditions`."""
        return {self.conditions[0]: condition} if isinstance(condition, torch.Tensor) else condition

    def predict(
        self,
        denoiser: nn.Module,
        latents: torch.Tensor,
        condition: "Condition | torch.Tensor",
        timesteps: torch.Tensor,
        noise: torch.Tensor,
    ) -> torch.Tensor:
        """What the denoiser says of `latents` `[N, C, h, w]` with `noise` added at `timesteps` `[N]`."""
        return self.denoise(denoiser, self.noise.add_noise(latents, noise, timesteps), timesteps, condition)

    def losses(
        self,
        denoiser: nn.Module,
        latents: torch.Tensor,
        condition: "Condition | torch.Tensor",
        timesteps: torch.Tensor,
        noise: torch.Tensor,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The denoising loss of each image of a batch.

        Args:
            latents, noise (`torch.Tensor`): `[N, C, h, w]`.
            condition (`Condition`): `N` rows.
            timesteps (`torch.Tensor`): `[N]`.
            weights (`torch.Tensor`, *optional*): `[N]`, as [`DDPMNoise.loss_weights`] gives them for training.

        Returns:
            `torch.Tensor`: `[N]`, the mean squared error to [`DDPMNoise.target`], weighted.
        """
        prediction = self.predict(denoiser, latents, condition, timesteps, noise)
        return self.losses_from_prediction(prediction, latents, timesteps, noise, weights)

    def losses_from_prediction(
        self,
        prediction: torch.Tensor,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[`Family.losses`] of predictions that are there already."""
        losses = (prediction - self.noise.target(latents, noise, timesteps).float()).square().flatten(1).mean(1)
        return losses if weights is None else losses * weights


def check_only_resolution(resolution: int, trained_at: int) -> None:
    if resolution != trained_at:
        raise ValueError(f"resolution {resolution} is not {trained_at}, the only one that this model samples at")
