"""The base class of all families: how a pipeline of Stable Diffusion's kind is encoded, called and sampled."""

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
"""The inputs of a denoiser beside the noisy latents: named tensors `[N, ...]`, a row for each image."""


def null_like(null: Condition, condition: Condition) -> Condition:
    """The null condition, repeated for each row of a condition.

    Args:
        null (`Condition`): tensors of one row, `[...]` or `[1, ...]`.
        condition (`Condition`): tensors `[N, ...]`, whose precision and device the result takes.

    Returns:
        `Condition`: tensors `[N, ...]`.
    """
    return {name: null[name].reshape(1, *t.shape[1:]).to(t).expand_as(t) for name, t in condition.items()}


@contextmanager
def captions_kept_out_of_logs(pipeline: "DiffusionPipeline") -> Iterator[None]:
    """Silence the warning that prints the end of a caption that is too long: captions may be reports on patients."""
    logger = logging.getLogger(type(pipeline).__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def safety_checker_off(pipeline: "DiffusionPipeline") -> Iterator[None]:
    """Let a pipeline sample without its safety checker.

    The checker blacks images out before they are measured, anybody who has the weights can leave it out, and a trainer
    does not move it to its device.
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
    """A pipeline's parts: how they encode images and captions, how the denoiser is called, and how images are sampled.

    The base class is for VAE latents, a caption and DDPM noise. A subclass changes what differs; the noise process is
    an object of its own, `noise`.

    Args:
        pipeline (`DiffusionPipeline`): pipeline of one of the `pipeline_classes`.

    Attributes:
        pipeline_classes (tuple of `str`): names of the pipelines of this family.
        denoiser_name (`str`): name of the pipeline's part that is tuned.
        encoders (tuple of `str`): names of the parts that encode images and captions.
        optional (tuple of `str`): names of the encoders that a pipeline may lack.
        penultimate (tuple of `str`): names of the text encoders whose last layer the pipeline does not read.
        conditions (tuple of `str`): names of a condition's tensors, in the order in which [`Family.encode`] returns
            them; also the arguments of [`Family.call_denoiser`] and the columns of the cached data.
        guided_passes (`int`): forward passes of an image in a sampling step with guidance.
        not_applicable (dict of `str`): names of the measures that have no meaning for this family, each with the
            reason.
        noise_class (`type`): class of the noise process.
        noise ([`DDPMNoise`]): noise process with the settings of the pipeline's scheduler.

    Raises:
        ValueError: when the pipeline lacks a part, for an unknown prediction type, for a scheduler of another noise
            process, and for a VAE whose latents are scaled by channel.
    """

    pipeline_classes: ClassVar[tuple[str, ...]] = ()
    denoiser_name: ClassVar[str] = "transformer"
    encoders: ClassVar[tuple[str, ...]] = ("vae", "text_encoder")
    optional: ClassVar[tuple[str, ...]] = ()
    penultimate: ClassVar[tuple[str, ...]] = ()
    conditions: ClassVar[tuple[str, ...]] = ("prompt_embeds",)
    guided_passes: ClassVar[int] = 2
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
        self._attributes: tuple[nn.Module, list[dict[str, Any]]] | None = None  # of the denoiser's modules

    @classmethod
    def of_scheduler(cls, scheduler: SchedulerMixin) -> "Family":
        """The family without a pipeline, which can add noise and call a denoiser, but not encode or sample."""
        family = cls.__new__(cls)
        family.pipeline = None
        family.noise = cls.noise_class(scheduler)
        return family

    # ---- a family's own: most write `encode` and `call_denoiser` and leave the rest as it is ----

    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, ...]:
        """The tensors `[N, ...]` of `N` captions, in the order of `conditions`."""
        raise NotImplementedError

    def call_denoiser(
        self, denoiser: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, **condition: torch.Tensor
    ) -> torch.Tensor:
        """The prediction `[N, C, h, w]` for noisy latents `[N, C, h, w]` at `timesteps` `[N]` under a condition."""
        raise NotImplementedError

    def null_condition(self) -> dict[str, torch.Tensor] | None:
        """The condition that guidance steers away from, one row: the empty caption. `None` where a family has none."""
        return self.encode_prompts([""])

    def pipeline_arguments(self, prompts: list[str], resolution: int, guidance_scale: float) -> dict[str, Any]:
        """The arguments with which the pipeline samples one image for each caption."""
        return {"prompt": prompts, "height": resolution, "width": resolution, "guidance_scale": guidance_scale}

    def meta_condition(self) -> dict[str, torch.Tensor]:
        """A condition of one row on the meta device, shaped as by `encode`; the dry run reads the configs alone."""
        raise NotImplementedError

    @property
    def latent_channels(self) -> int:
        """Number of channels of the latents."""
        return self.pipeline.vae.config.latent_channels

    @property
    def pixels_per_latent(self) -> int:
        """Number of pixels for one latent value, in each direction."""
        return self.pipeline.vae_scale_factor

    @property
    def patch(self) -> int:
        """Number of latent values that one token of a transformer covers, in each direction."""
        return self.denoiser.config.get("patch_size", 1)

    def tokens(self, shape: Sequence[int]) -> int:
        """Number of tokens of one image, whose latents have the shape `(C, h, w)`."""
        return shape[1] * shape[2] // self.patch**2

    @property
    def trained_at(self) -> int:
        """Side in pixels of the images that the model was trained on."""
        return self.denoiser.config.sample_size * self.pixels_per_latent

    def check_resolution(self, resolution: int) -> None:
        """Raise `ValueError` for a `resolution` in pixels that does not give whole latents and whole patches."""
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
        """The device on which captions are encoded."""
        return [self.denoiser, *self.encoder_modules][-1].device

    @property
    def encoder_modules(self) -> list[nn.Module]:
        """The parts that encode images and captions."""
        parts = (getattr(self.pipeline, name, None) for name in self.encoders)
        return [part for part in parts if part is not None]

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """The text encoders that the pipeline has, by name."""
        names = (name for name in self.encoders if name.startswith("text_encoder"))
        return {name: part for name in names if (part := getattr(self.pipeline, name, None)) is not None}

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The parts that can have an adapter, by its folder: `""`, the adapter folder itself, is the denoiser's."""
        return {"": self.denoiser, **self.text_encoders}

    def search_space(
        self, granularity: str | Sequence[str] = "block", text_encoder_blocks: bool = False
    ) -> SearchSpace:
        """The blocks that a mask switches.

        Args:
            granularity (`str` or list of `str`): size of a block, as in [`SearchSpace.from_model`].
            text_encoder_blocks (`bool`): whether the layers of the text encoders are blocks, beside the denoiser's.

        Raises:
            ValueError: in the cases of [`SearchSpace.from_model`], and for text encoder blocks of a pipeline without
                a text encoder.
        """
        if text_encoder_blocks and not self.text_encoders:
            raise ValueError(f"--text_encoder_blocks: the {type(self.pipeline).__name__} has no text encoder")
        encoders = self.text_encoders if text_encoder_blocks else {}
        return SearchSpace.from_model(self.denoiser, granularity, encoders, self.penultimate)

    def cache_key(self) -> list[Any]:
        """The settings that cached latents and conditions depend on, beside the data and the encoders' weights."""
        config = self.pipeline.vae.config
        return [type(self).__name__, config.scaling_factor, config.shift_factor]

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Latents `[N, C, h, w]` of images `[N, 3, H, W]` in [0, 1]: the scaled mean of the posterior, in float32."""
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
        """The condition of `N` captions, `N` rows; its floating-point tensors are in float32.

        Gradients flow to the text encoders unless these are frozen, or `torch.no_grad()` is on.
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
        """One image for each caption.

        Args:
            prompts (list of `str`): `N` captions.
            generators (list of `torch.Generator`): source of each image's noise.
            resolution (`int`): side of the images in pixels.
            num_inference_steps (`int`): number of sampling steps.
            guidance_scale (`float`): guidance scale.
            changes (dict, *optional*): arguments of the pipeline's call that replace those of
                [`Family.pipeline_arguments`].

        Returns:
            `torch.Tensor`: images in [0, 1] on the CPU, `[N, 3, H, W]`.
        """
        with captions_kept_out_of_logs(self.pipeline), safety_checker_off(self.pipeline):
            images = self.pipeline(
                **{**self.pipeline_arguments(list(prompts), resolution, guidance_scale), **(changes or {})},
                num_inference_steps=num_inference_steps,
                generator=generators,
                output_type="pt",
            ).images
        return images.float().cpu()

    # ---- the denoiser, and its loss ----

    def denoise(
        self,
        denoiser: nn.Module,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        condition: "Condition | torch.Tensor",
    ) -> torch.Tensor:
        """The denoiser's prediction for noisy latents.

        Args:
            denoiser (`nn.Module`): the pipeline's denoiser, with its adapter if it has one.
            noisy (`torch.Tensor`): noisy latents, `[N, C, h, w]`.
            timesteps (`torch.Tensor`): timestep of each row, `[N]`.
            condition (`Condition`): `N` rows. A tensor stands for the first of `conditions`.

        Returns:
            `torch.Tensor`: `[N, C, h, w]` in float32.
        """
        dtype = noisy.dtype if self.pipeline is None else self._dtype()
        cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in self.named(condition).items()}
        return self.call_denoiser(denoiser, noisy.to(dtype), timesteps, **cast).float()

    def _dtype(self) -> torch.dtype:
        """`denoiser.dtype`, without its visit to every module by name: it looks for a hook that casts."""
        denoiser = self.denoiser
        if self._attributes is None or self._attributes[0] is not denoiser:
            self._attributes = denoiser, [vars(module) for module in denoiser.modules()]
        parameter = next(denoiser.parameters())
        plain = parameter.is_floating_point() and not getattr(denoiser, "_keep_in_fp32_modules", None)
        if not plain or any("_diffusers_hook" in attributes for attributes in self._attributes[1]):
            return denoiser.dtype
        return parameter.dtype

    def named(self, condition: "Condition | torch.Tensor") -> Condition:
        """The condition with the names of its tensors; a tensor alone is the first of `conditions`."""
        return {self.conditions[0]: condition} if isinstance(condition, torch.Tensor) else condition

    def predict(
        self,
        denoiser: nn.Module,
        latents: torch.Tensor,
        condition: "Condition | torch.Tensor",
        timesteps: torch.Tensor,
        noise: torch.Tensor,
    ) -> torch.Tensor:
        """The denoiser's prediction for `latents` `[N, C, h, w]` with `noise` added at `timesteps` `[N]`."""
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
            denoiser (`nn.Module`): the pipeline's denoiser, with its adapter if it has one.
            latents, noise (`torch.Tensor`): latents and the noise added to them, `[N, C, h, w]`.
            condition (`Condition`): `N` rows. A tensor stands for the first of `conditions`.
            timesteps (`torch.Tensor`): timestep of each row, `[N]`.
            weights (`torch.Tensor`, *optional*): weights of [`DDPMNoise.loss_weights`], `[N]`; 1 by default.

        Returns:
            `torch.Tensor`: `[N]`, the mean squared error to [`DDPMNoise.target`] times the weight.
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
        """[`Family.losses`] where the predictions `[N, C, h, w]` are known already."""
        losses = (prediction - self.noise.target(latents, noise, timesteps).float()).square().flatten(1).mean(1)
        return losses if weights is None else losses * weights


def check_only_resolution(resolution: int, trained_at: int) -> None:
    """Raise `ValueError` for a resolution other than the one that a model was trained at, both in pixels."""
    if resolution != trained_at:
        raise ValueError(f"resolution {resolution} is not {trained_at}, the only one that this model samples at")
