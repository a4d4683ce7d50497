"""What differs between model families: encoding a picture and its condition, noise, target, and the denoiser's call.

A family is one short class; [`family_of`] picks it from the pipeline's own class. How to add one: docs/families.md.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.loaders.single_file_utils import (
    SingleFileComponentError,
    fetch_diffusers_config,
    load_single_file_checkpoint,
)
from diffusers.models.embeddings import LabelEmbedding
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr
from torch import nn

from .demo import DEMO_PIPELINE
from .search_space import SearchSpace

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Condition = Mapping[str, torch.Tensor]
"""What a denoiser is told beside the noisy latents: named tensors `[N, ...]`, a row for each image."""


def null_like(null: Condition, condition: Condition) -> Condition:
    """The null condition, whose tensors are one row with or without its dimension, for each row of a condition."""
    return {name: null[name].reshape(1, *t.shape[1:]).to(t).expand_as(t) for name, t in condition.items()}


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
            them; also the arguments of [`Family.call`] and the columns of the cached data.
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

    def __init__(self, pipeline: "DiffusionPipeline"):
        for name in (self.denoiser_name, *self.encoders):
            if getattr(pipeline, name, None) is None and name not in self.optional:
                raise ValueError(f"the {type(pipeline).__name__} has no {name}: load it with all of its parts")
        if getattr(getattr(pipeline, "vae", None), "config", {}).get("latents_mean") is not None:
            raise ValueError("a VAE whose latents are shifted and scaled by channel (latents_mean) is not supported")
        self.pipeline: DiffusionPipeline | None = pipeline
        self.set_scheduler(pipeline.scheduler)

    @classmethod
    def of_scheduler(cls, scheduler: SchedulerMixin) -> "Family":
        """The family without a pipeline: it can add noise and call a denoiser, but not encode or sample."""
        family = cls.__new__(cls)
        family.pipeline = None
        family.set_scheduler(scheduler)
        return family

    def set_scheduler(self, scheduler: SchedulerMixin) -> None:
        """Take the noise schedule and the prediction type of a scheduler."""
        if "beta_schedule" not in scheduler.config:
            raise ValueError(f"a {type(scheduler).__name__} has no beta schedule: such models are not supported")
        prediction = scheduler.config.get("prediction_type", "epsilon")
        if prediction not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"unknown prediction type {prediction!r}: use epsilon, v_prediction or sample")
        # by default it would clip, which samplers that have no such setting do not, and latents lie outside of [-1, 1]
        clip_sample = scheduler.config.get("clip_sample", False)
        self.scheduler = DDPMScheduler.from_config(scheduler.config, clip_sample=clip_sample)

    # ---- a family's own: most write `encode` and `call` and leave the rest as it is ----

    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, ...]:
        """`N` captions -> the tensors `[N, ...]` that `conditions` names."""
        raise NotImplementedError

    def call(self, denoiser: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, **condition: torch.Tensor):
        """The prediction `[N, C, h, w]` for noisy latents `[N, C, h, w]` at `timesteps` `[N]` under a condition."""
        raise NotImplementedError

    def null_condition(self) -> dict[str, torch.Tensor] | None:
        """What guidance steers away from, one row: the empty caption. `None` where there is no such thing."""
        return self.encode_prompts([""])

    def request(self, prompts: list[str], resolution: int, guidance_scale: float) -> dict[str, Any]:
        """The arguments with which the pipeline samples an image for each caption."""
        return {"prompt": prompts, "height": resolution, "width": resolution, "guidance_scale": guidance_scale}

    def example(self) -> dict[str, torch.Tensor]:
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

    def encoding(self) -> list[Any]:
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
        """An image for each caption: `[N, 3, H, W]` in [0, 1] on the CPU; `changes` are made to the `request`."""
        with captions_kept_out_of_logs(self.pipeline), safety_checker_off(self.pipeline):
            images = self.pipeline(
                **{**self.request(list(prompts), resolution, guidance_scale), **(changes or {})},
                num_inference_steps=num_inference_steps,
                generator=generators,
                output_type="pt",
            ).images
        return images.float().cpu()

    # ---- noise ----

    def coefficients(self, timestep: float) -> tuple[float, float]:
        """`(a, s)` of `x_t = a · x_0 + s · ε`."""
        signal = self.scheduler.alphas_cumprod[timestep].item()
        return signal**0.5, (1 - signal) ** 0.5

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """`x_t` of latents and noise `[N, C, h, w]` at `timesteps` `[N]`."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the denoiser shall predict, by the scheduler's prediction type."""
        match self.scheduler.config.prediction_type:
            case "epsilon":
                return noise
            case "v_prediction":
                return self.scheduler.get_velocity(latents, noise, timesteps)
            case _:  # "sample"
                return latents

    def to_epsilon(self, prediction: torch.Tensor, noisy: torch.Tensor, timestep: float) -> torch.Tensor:
        """The noise that a prediction sees in `noisy`, whatever the denoiser predicts."""
        signal, noise = self.coefficients(timestep)
        match self.scheduler.config.prediction_type:
            case "epsilon":
                return prediction
            case "v_prediction":
                return signal * prediction + noise * noisy
            case _:  # "sample"
                return (noisy - signal * prediction) / noise

    def epsilon_scale(self, timestep: float) -> float:
        """How far the noise prediction moves for each unit of the denoiser's own prediction, at `x_t` held fixed."""
        signal, noise = self.coefficients(timestep)
        match self.scheduler.config.prediction_type:
            case "epsilon":
                return 1.0
            case "v_prediction":
                return signal
            case _:  # "sample"
                return signal / noise

    def timesteps(self, count: int) -> list[int] | list[float]:
        """`count` timesteps in the middle of as many equal parts of the schedule, from low noise to high."""
        total = self.scheduler.config.num_train_timesteps
        return [int((i + 0.5) * total / count) for i in range(count)]

    def check_timesteps(self, *timesteps: float) -> None:
        """Raise `ValueError` for a timestep outside the schedule."""
        total = self.scheduler.config.num_train_timesteps
        for timestep in timesteps:
            if not 0 <= timestep < total:
                raise ValueError(f"timestep {timestep} lies outside the schedule: use 0 to {total - 1}")

    def sample_timestep(self, generator: torch.Generator) -> torch.Tensor:
        """A timestep as training draws it, `[]`: uniform."""
        return torch.randint(self.scheduler.config.num_train_timesteps, (), generator=generator)

    def trajectory(self, num_inference_steps: int, shape: Sequence[int]) -> SchedulerMixin:
        """A deterministic sampler of latents of a shape `(C, h, w)` with its timesteps set: DDIM."""
        scheduler = DDIMScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(num_inference_steps)
        return scheduler

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
        return self.call(denoiser, noisy.to(dtype), timesteps, **cast).float()

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
        return self.denoise(denoiser, self.add_noise(latents, noise, timesteps), timesteps, condition)

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
            weights (`torch.Tensor`, *optional*): `[N]`, as [`Family.loss_weights`] gives them for training.

        Returns:
            `torch.Tensor`: `[N]`, the mean squared error to [`Family.target`], weighted.
        """
        prediction = self.predict(denoiser, latents, condition, timesteps, noise)
        return self.losses_of(prediction, latents, timesteps, noise, weights)

    def losses_of(
        self,
        prediction: torch.Tensor,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[`Family.losses`] of predictions that are there already."""
        losses = (prediction - self.target(latents, noise, timesteps).float()).square().flatten(1).mean(1)
        return losses if weights is None else losses * weights

    def check_snr_gamma(self, snr_gamma: float | None) -> None:
        """Raise `ValueError` for a weighting that the family has no use for."""

    def loss_weights(self, timesteps: torch.Tensor, snr_gamma: float | None = None) -> torch.Tensor | None:
        """What training weighs the losses at `timesteps` `[N]` with; `None` for all alike.

        Args:
            snr_gamma (`float`, *optional*): min-SNR weighting (https://huggingface.co/papers/2303.09556).
        """
        if snr_gamma is None:
            return None
        snr = compute_snr(self.scheduler, timesteps)
        clipped = snr.clamp(max=snr_gamma)
        match self.scheduler.config.prediction_type:
            case "epsilon":
                return clipped / snr
            case "v_prediction":
                return clipped / (snr + 1)
            case _:  # "sample": the loss on x0 has weight SNR in the units of epsilon
                return clipped


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


class PixArtFamily(Family):
    """PixArt-α and PixArt-Σ: a transformer that predicts the noise, conditioned on T5.

    As in diffusers' `research_projects/pixart`: uniform timesteps, no weights but min-SNR where asked for, and the
    channels of the learned variance are dropped.
    """

    pipeline_classes = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    conditions = ("prompt_embeds", "prompt_attention_mask")

    def encode(self, prompts):
        encoded = self.pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, device=self.device)
        return encoded[0], encoded[1]

    def example(self):
        tokens = signature(self.pipeline.encode_prompt).parameters["max_sequence_length"].default
        return {
            "prompt_embeds": torch.empty(1, tokens, self.denoiser.config.caption_channels, device="meta"),
            "prompt_attention_mask": torch.empty(1, tokens, dtype=torch.int64, device="meta"),
        }

    def call(self, denoiser, noisy, timesteps, prompt_embeds, prompt_attention_mask):
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

    def request(self, prompts, resolution, guidance_scale):
        request = super().request(prompts, resolution, guidance_scale)
        return request | {"clean_caption": False, "use_resolution_binning": False}  # as `encode` does it


class DiTFamily(Family):
    """DiT: a transformer over VAE latents, conditioned on a class; a caption is its number or its name.

    Names are those of the pipeline's `id2label`. diffusers has no training script: uniform timesteps and the mean
    squared error of the noise, as the DiT paper (https://huggingface.co/papers/2212.09748); the channels of the
    learned variance are dropped. The null condition is the class that DiT adds for guidance.
    """

    pipeline_classes = ("DiTPipeline",)
    encoders = ("vae",)
    conditions = ("class_labels",)

    def __init__(self, pipeline):
        super().__init__(pipeline)
        for module in pipeline.transformer.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0  # it would draw from the global random state; `caption_dropout` is ours

    @property
    def pixels_per_latent(self):
        return 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)

    def check_resolution(self, resolution):
        _check_only_resolution(resolution, self.trained_at)

    def encoding(self):
        return [*super().encoding(), self.pipeline.labels]

    def labels(self, captions: list[str]) -> list[int]:
        """The classes that captions name."""
        names, count = self.pipeline.labels, self.denoiser.config.num_embeds_ada_norm
        labels = [names.get(text, int(text) if text.isdecimal() else -1) for text in captions]
        for text, label in zip(captions, labels):
            if not 0 <= label < count:
                raise ValueError(f"{text!r} is no class: give a number below {count}, or a name of the id2label")
        return labels

    def encode(self, prompts):
        return (torch.tensor(self.labels(prompts), device=self.device),)

    def null_condition(self):
        return {"class_labels": torch.tensor([self.denoiser.config.num_embeds_ada_norm], device=self.device)}

    def example(self):
        return {"class_labels": torch.empty(1, dtype=torch.int64, device="meta")}

    def call(self, denoiser, noisy, timesteps, class_labels):
        prediction = denoiser(noisy, timestep=timesteps, class_labels=class_labels, return_dict=False)[0]
        return prediction[:, : noisy.shape[1]]

    def request(self, prompts, resolution, guidance_scale):
        count = self.denoiser.config.num_embeds_ada_norm
        if guidance_scale > 1 and count != 1000:  # what the pipeline takes for the null class
            raise ValueError(
                f"DiTPipeline guides only models of 1000 classes, not {count}: set the guidance scale to 1"
            )
        return {"class_labels": self.labels(prompts), "guidance_scale": guidance_scale}


class UnconditionalFamily(Family):
    """DDPM and DDIM: a UNet over pixels, without a condition; captions are not read.

    As in diffusers' `train_unconditional.py`: uniform timesteps, no weights, but the SNR where the image itself is
    predicted. Images of one channel are the mean of the three.
    """

    pipeline_classes = ("DDPMPipeline", "DDIMPipeline")
    denoiser_name = "unet"
    encoders = ()
    conditions = ()
    not_applicable = dict.fromkeys(("noise_norm", "clid"), "an unconditional model has no condition to leave out")
    pixels_per_latent = 1

    def __init__(self, pipeline):
        super().__init__(pipeline)
        if self.latent_channels not in (1, 3):
            raise ValueError(f"the UNet reads images of {self.latent_channels} channels, but only 1 or 3 can be given")

    @property
    def latent_channels(self):
        return self.denoiser.config.in_channels

    def check_resolution(self, resolution):
        _check_only_resolution(resolution, self.trained_at)

    def encoding(self):
        return [type(self).__name__, self.latent_channels]

    def encode_images(self, pixels):
        if self.latent_channels == 1:
            pixels = pixels.mean(1, keepdim=True)
        return pixels * 2 - 1

    def encode(self, prompts):
        return ()

    def null_condition(self):
        return None

    def example(self):
        return {}

    def call(self, denoiser, noisy, timesteps):
        return denoiser(noisy, timesteps, return_dict=False)[0]

    def loss_weights(self, timesteps, snr_gamma=None):
        if snr_gamma is None and self.scheduler.config.prediction_type == "sample":
            return compute_snr(self.scheduler, timesteps)
        return super().loss_weights(timesteps, snr_gamma)

    def request(self, prompts, resolution, guidance_scale):
        return {"batch_size": len(prompts)}

    def sample(self, *args, **kwargs):
        images = super().sample(*args, **kwargs)
        return images.expand(-1, 3, -1, -1)


def _check_only_resolution(resolution: int, trained_at: int) -> None:
    if resolution != trained_at:
        raise ValueError(f"resolution {resolution} is not {trained_at}, the only one that this model samples at")


class FlowMatchingFamily(Family):
    """Flow matching: `x_t = (1 - σ) x_0 + σ ε`, and the denoiser predicts the velocity `ε - x_0`.

    Timesteps are real numbers, the schedule's `1000 σ`. SecMI and PIA have exact counterparts: an Euler step along the
    velocity is a DDIM step for this noise, and the noise that the denoiser sees is `x_t + (1 - σ) v`. They may be
    asked at any timestep from 0 to 1000; the papers' own are those of DDPM noise, which at the same number is more.
    """

    def set_scheduler(self, scheduler):
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)

    def coefficients(self, timestep):
        sigma = timestep / self.scheduler.config.num_train_timesteps
        return 1 - sigma, sigma

    def add_noise(self, latents, noise, timesteps):
        sigmas = self._sigmas(timesteps)
        return (1 - sigmas) * latents + sigmas * noise

    def _sigmas(self, timesteps: torch.Tensor) -> torch.Tensor:
        return (timesteps / self.scheduler.config.num_train_timesteps).view(-1, 1, 1, 1)

    def target(self, latents, noise, timesteps):
        return noise - latents

    def to_epsilon(self, prediction, noisy, timestep):
        return noisy + self.coefficients(timestep)[0] * prediction

    def epsilon_scale(self, timestep):
        """1: the velocity takes the noise's place. Of the noise, its difference would vanish where sampling starts."""
        return 1.0

    def timesteps(self, count):
        return self.scheduler.timesteps.flip(0)[super().timesteps(count)].tolist()

    def check_timesteps(self, *timesteps):
        total = self.scheduler.config.num_train_timesteps
        for timestep in timesteps:
            if not 0 <= timestep <= total:
                raise ValueError(f"timestep {timestep} lies outside the schedule: use 0 to {total}")

    def trajectory(self, num_inference_steps, shape):
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)
        if not scheduler.config.use_dynamic_shifting:
            scheduler.set_timesteps(num_inference_steps)
            return scheduler
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        tokens = shape[1] * shape[2] // self.patch**2
        mu = calculate_shift(tokens, *(scheduler.config[name] for name in names))
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_inference_steps, num_inference_steps), mu=mu)
        return scheduler

    def check_snr_gamma(self, snr_gamma):
        if snr_gamma is not None:
            raise ValueError(
                f"snr_gamma {snr_gamma} is for DDPM noise, but this model has flow matching: leave it out"
            )

    def loss_weights(self, timesteps, snr_gamma=None):
        return None


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


class FluxFamily(FlowMatchingFamily):
    """Flux: a transformer, conditioned on T5 and a pooled CLIP embedding.

    As in diffusers' `train_dreambooth_flux.py`: the place in the schedule is drawn uniformly, no weights. A model that
    guidance was distilled into (dev) is given the scale 3.5 in training and by every attack. Such a model was not
    trained to leave a caption out, so that its null condition, the empty caption, is one caption among others.
    """

    pipeline_classes = ("FluxPipeline",)
    encoders = ("vae", "text_encoder", "text_encoder_2")
    conditions = ("prompt_embeds", "pooled_prompt_embeds")
    guidance = 3.5
    patch = 2

    @property
    def trained_at(self):
        return self.pipeline.default_sample_size * self.pixels_per_latent

    def encode(self, prompts):
        return self.pipeline.encode_prompt(prompts, device=self.device)[:2]

    def example(self):
        config = self.denoiser.config
        tokens = signature(self.pipeline.encode_prompt).parameters["max_sequence_length"].default
        return {
            "prompt_embeds": torch.empty(1, tokens, config.joint_attention_dim, device="meta"),
            "pooled_prompt_embeds": torch.empty(1, config.pooled_projection_dim, device="meta"),
        }

    def call(self, denoiser, noisy, timesteps, prompt_embeds, pooled_prompt_embeds):
        n, channels, h, w = noisy.shape
        prediction = denoiser(
            hidden_states=self.pipeline._pack_latents(noisy, n, channels, h, w),
            timestep=timesteps / self.scheduler.config.num_train_timesteps,
            guidance=noisy.new_full((n,), self.guidance) if self.denoiser.config.guidance_embeds else None,
            pooled_projections=pooled_prompt_embeds,
            encoder_hidden_states=prompt_embeds,
            txt_ids=noisy.new_zeros(prompt_embeds.shape[1], 3),
            img_ids=self.pipeline._prepare_latent_image_ids(n, h // 2, w // 2, noisy.device, noisy.dtype),
            return_dict=False,
        )[0]
        factor = self.pixels_per_latent
        return self.pipeline._unpack_latents(prediction, h * factor, w * factor, factor)

    def sample_timestep(self, generator):
        return self.scheduler.timesteps[super().sample_timestep(generator)]


FAMILIES: list[type[Family]] = [
    StableDiffusionFamily,
    StableDiffusionXLFamily,
    StableDiffusion3Family,
    FluxFamily,
    PixArtFamily,
    DiTFamily,
    UnconditionalFamily,
]
"""The families that are known; append your own (docs/families.md)."""


def family_of(pipeline: "DiffusionPipeline") -> Family:
    """The family of a pipeline.

    Raises:
        ValueError: for a pipeline class that no family claims, one that lacks a part, or an unknown prediction type.
    """
    for family in FAMILIES:
        if type(pipeline).__name__ in family.pipeline_classes:
            return family(pipeline)
    known = ", ".join(name for family in FAMILIES for name in family.pipeline_classes)
    raise ValueError(
        f"{type(pipeline).__name__} is no pipeline that can be tuned here; known: {known}. For another, append "
        "a subclass of memcontrol_hf.diffusion.Family to FAMILIES: it names pipeline_classes, denoiser_name, encoders "
        "and conditions, and writes encode() (captions to tensors) and call() (the denoiser); see docs/families.md"
    )


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Of a pipeline's weights, by name."""

QUANTIZATIONS = {
    "bnb_4bit": ("bitsandbytes", 0.5),
    "bnb_8bit": ("bitsandbytes", 1.0),
    "torchao_int8": ("torchao", 1.0),
}
"""How the denoiser can be quantized: the package that does it, and bytes for each parameter."""


def load_pipeline(
    name: str,
    revision: str | None = None,
    variant: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    config: str | None = None,
) -> "DiffusionPipeline":
    """A pipeline by name.

    Args:
        name (`str`): a Hub id, a folder or a single `.safetensors` file; `"demo"` for the one in the package.
        revision, variant (`str`, *optional*): on the Hub; and of the weights, say `"fp16"`.
        dtype (`str`, *optional*): of the weights, out of `DTYPES`; float32 by default.
        quantization (`str`, *optional*): of the denoiser, out of `QUANTIZATIONS`; only LoRA trains on such a base.
        config (`str`, *optional*): for a single file, a folder or Hub id of a pipeline with the same architecture; by
            default the one that diffusers recognizes in the file's tensors.

    Raises:
        ValueError: when it cannot be loaded, and for a quantization whose package is missing.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: use {', '.join(DTYPES)}")
    if quantization is not None:
        if quantization not in QUANTIZATIONS:
            raise ValueError(f"unknown quantization {quantization!r}: use {', '.join(QUANTIZATIONS)}")
        package = QUANTIZATIONS[quantization][0]
        if find_spec(package) is None:
            raise ValueError(f"quantization {quantization} needs {package}: pip install {package}")
    arguments: dict[str, Any] = {"dtype": DTYPES[dtype or "float32"]}
    name = str(DEMO_PIPELINE) if name == "demo" else name
    try:
        if name.endswith(".safetensors"):
            if quantization is not None:
                raise ValueError("a single file cannot be quantized: save it as a folder first (save_pretrained)")
            return _load_single_file(name, config, **arguments)
        if quantization is not None:
            parts = diffusers.DiffusionPipeline.load_config(name, revision=revision)
            arguments["quantization_config"] = _quantization(quantization, parts, arguments["dtype"])
        return diffusers.DiffusionPipeline.from_pretrained(name, revision=revision, variant=variant, **arguments)
    except (OSError, ValueError, KeyError, RuntimeError, SingleFileComponentError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot load the pipeline {name!r}: {reason}") from None


def _load_single_file(file: str, config: str | None, **arguments: Any) -> "DiffusionPipeline":
    if not Path(file).is_file():
        raise ValueError("there is no such file")
    known = config or fetch_diffusers_config(load_single_file_checkpoint(file))["pretrained_model_name_or_path"]
    try:
        index = diffusers.DiffusionPipeline.load_config(known)
    except OSError:
        guess = "" if config else ", which it is taken for"
        raise ValueError(
            f"there is no model_index.json of {known!r}{guess}: name the folder or Hub id of a pipeline that is built "
            "alike with --single_file_config"
        ) from None
    pipeline = getattr(diffusers, index["_class_name"]).from_single_file(file, config=known, **arguments)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            vars(part).pop("hf_device_map", None)  # it says CPU, and the Trainer would leave the denoiser there
    return pipeline


def _quantization(quantization: str, parts: Iterable[str], dtype: torch.dtype) -> diffusers.PipelineQuantizationConfig:
    """For the denoiser among a pipeline's parts."""
    if quantization == "torchao_int8":
        from torchao.quantization import Int8WeightOnlyConfig

        config = diffusers.TorchAoConfig(Int8WeightOnlyConfig())
    elif quantization == "bnb_4bit":
        config = diffusers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    else:
        config = diffusers.BitsAndBytesConfig(load_in_8bit=True)
    denoisers = {family.denoiser_name for family in FAMILIES}
    return diffusers.PipelineQuantizationConfig(quant_mapping={name: config for name in parts if name in denoisers})
