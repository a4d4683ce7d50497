"""The figures of a model. The trainer's evaluation and the audit use the same engine, [`Evaluator`].

Each row is measured by itself. Its random draws depend only on the seed, the purpose and the number of the row, so a
figure does not depend on the batch size, on the order of the rows, or on the number of processes that share the work.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from . import metrics
from .data import EncodedImages
from .families import Condition, Family
from .mitigations import Mitigation
from .progress import bar
from .randomness import Purpose, row_keys, seeded_generator
from .sampling import denoiser_in_place, generate

METRICS = {
    "fid": "minimize",
    "amd": "maximize",
    "membership_auc": "minimize",
    "noise_norm": "minimize",
    "loss": "minimize",
}
"""Metrics that [`~memcontrol_hf.MemControlTrainer.evaluate`] can measure, each with its better direction."""


SECMI_STRIDES = (5, 10, 20)
"""Timesteps of the attack SecMI, in strides of a hundredth of the schedule. The attack of the paper takes 10."""

SEMANTIC_NOISE_STEPS = 5
"""Steps of inversion and of sampling in the attack by semantic initial noise."""


def check_objectives(objectives: Sequence[str]) -> None:
    """Raise `ValueError` for an objective that is not in `METRICS`, an objective named twice, and an empty list."""
    unknown = [name for name in objectives if name not in METRICS]
    if unknown or not objectives:
        raise ValueError(f"unknown objective(s) {', '.join(unknown) or '(none)'}: use some of {', '.join(METRICS)}")
    if len(set(objectives)) < len(objectives):
        raise ValueError(f"an objective is named twice: {', '.join(objectives)}")


@dataclass
class Evaluator:
    """Measures a denoiser and the pipeline that samples with it.

    Args:
        family ([`~memcontrol_hf.families.Family`]): family of the pipeline.
        denoiser (`nn.Module`): denoiser to measure, with its adapter if it has one.
        resolution (`int`): side of the images in pixels.
        seed (`int`): random seed of all draws.
        batch_size (`int`): number of images measured at once; only the speed depends on it.
        num_timesteps (`int`): number of fixed timesteps of the denoising loss and of the noise norm.
        inference_steps (`int`): number of sampling steps.
        guidance_scale (`float`): guidance scale of the sampling.
        null (`Condition`, *optional*): null condition, one row, if the family has one.
        encode_captions (`bool`):
            Whether to encode captions again instead of reading the cached conditions, because a text encoder is tuned.
        mitigations (list of [`~memcontrol_hf.mitigations.Mitigation`]):
            Mitigations whose `sampling` hook applies to the images that are generated.
        training_images ([`~memcontrol_hf.data.EncodedImages`], *optional*):
            Training images, which the `sampling` hook of a mitigation may read.
        rank (`int`): number of this process.
        world_size (`int`): number of processes that share the rows.
    """

    family: Family
    denoiser: nn.Module
    resolution: int
    seed: int
    batch_size: int
    num_timesteps: int
    inference_steps: int
    guidance_scale: float
    null: Condition | None = None
    encode_captions: bool = False
    mitigations: Iterable[Mitigation] = ()
    training_images: EncodedImages | None = None
    rank: int = 0
    world_size: int = 1

    # ---- the attacks on single images ----

    @property
    def timesteps(self) -> list[int] | list[float]:
        """The fixed timesteps, from low to high noise."""
        return self.family.noise.timesteps(self.num_timesteps)

    def losses(self, data: EncodedImages, purpose: Purpose) -> torch.Tensor:
        """Mean denoising loss of each distinct image over the fixed timesteps: `[N]`."""
        return self._losses_and_mean(data, purpose)[:, -1]

    def _losses_and_mean(self, data: EncodedImages, purpose: Purpose) -> torch.Tensor:
        """Denoising losses of each distinct image at the `T` fixed timesteps, and last their mean: `[N, T + 1]`."""

        def measure(*rows: Any) -> torch.Tensor:
            losses = metrics.denoising_losses(self.family, self.denoiser, *rows, self.batch_size)
            return torch.cat([losses, losses.mean(1, keepdim=True)], dim=1)

        return self._per_image(measure, data, purpose)

    def noise_norms(self, data: EncodedImages, purpose: Purpose) -> torch.Tensor:
        """Mean noise norm of each distinct image over the fixed timesteps: `[N]`."""

        def measure(
            latents: torch.Tensor, condition: Condition, timesteps: Sequence[float], keys: Sequence[tuple[int, ...]]
        ) -> torch.Tensor:
            arguments = (self.denoiser, latents, condition, self.null, self.family, timesteps, keys, self.batch_size)
            return metrics.noise_norm(*arguments).mean(1)

        return self._per_image(measure, data, purpose)

    def membership_scores(self, data: EncodedImages, purpose: Purpose) -> dict[str, torch.Tensor]:
        """Scores of the membership attacks on each distinct image: name of the attack -> `[N]`.

        A higher score means that the image looks more like a training image. CLiD compares a prediction with and
        without the condition, so a family without conditions has no score of CLiD.
        """
        with_clid = "clid" not in self.family.not_applicable
        names = ["loss", "secmi", "pia", *(["clid"] if with_clid else []), "secmi_several", "sima", "semantic_noise"]
        guided = self.null if self.family.guided_passes > 1 else None
        # the papers' 10, 50, 100 and 200 of 1,000 timesteps, at the same shares of a shorter or longer schedule
        stride = max(1, round(self.family.noise.scheduler.config.num_train_timesteps / 100))

        def measure(
            latents: torch.Tensor, condition: Condition, timesteps: Sequence[float], keys: Sequence[tuple[int, ...]]
        ) -> torch.Tensor:
            images = (self.family, self.denoiser, latents, condition)
            losses = metrics.denoising_losses(*images, timesteps, keys, self.batch_size)
            errors = metrics.secmi_errors(
                *images, [of * stride for of in SECMI_STRIDES], stride, batch_size=self.batch_size
            )
            columns = [
                -losses.mean(1),
                -errors[:, SECMI_STRIDES.index(10)],
                metrics.pia(*images, 20 * stride, batch_size=self.batch_size),
            ]
            if with_clid:
                columns.append(metrics.clid(*images, self.null, timesteps, keys, self.batch_size, losses))
            columns.append(-errors.clamp(min=torch.finfo(errors.dtype).tiny).log().mean(1))
            columns.append(metrics.sima(*images, 10 * stride, batch_size=self.batch_size))
            way = (guided, SEMANTIC_NOISE_STEPS, self.guidance_scale)
            columns.append(metrics.semantic_noise(*images, *way, batch_size=self.batch_size))
            return torch.stack(columns, dim=1)

        return dict(zip(names, self._per_image(measure, data, purpose).unbind(1)))

    def trajectory_norms(self, data: EncodedImages, rows: Sequence[int]) -> torch.Tensor:
        """Noise norm along the sampling trajectory of each row: `[len(rows)]`. It tells how hard the caption steers.

        Args:
            data ([`~memcontrol_hf.data.EncodedImages`]): images whose captions are sampled.
            rows (list of `int`): rows of `data`.
        """
        shape = data.encoded[0]["latents"].shape
        # A model without classifier-free guidance is sampled along its prediction for the caption.
        guidance_scale = self.guidance_scale if self.family.guided_passes > 1 else 1.0
        norms = []
        for start in bar(range(0, len(rows), self.batch_size), f"trajectories of {len(rows)} captions"):
            batch = list(rows[start : start + self.batch_size])
            norms.append(
                metrics.trajectory_noise_norms(
                    self.family,
                    self.denoiser,
                    self.condition_of(data, batch),
                    self.null,
                    shape,
                    self._keys(data, batch, Purpose.AUDIT_TRAJECTORIES),
                    self.inference_steps,
                    guidance_scale,
                    batch_size=self.batch_size,
                )
            )
        return torch.cat(norms)

    # ---- generated images ----

    def images(
        self,
        data: EncodedImages,
        rows: Sequence[int],
        purpose: Purpose,
        per_caption: int | None = None,
        condition: Condition | None = None,
    ) -> torch.Tensor:
        """Images generated from the captions of some rows: `[len(rows) * per_caption, 3, H, W]` in [0, 1].

        Args:
            data ([`~memcontrol_hf.data.EncodedImages`]): images whose captions are read.
            rows (list of `int`): rows of `data`.
            purpose ([`~memcontrol_hf.randomness.Purpose`]): purpose of the images, a part of the key of their noise.
            per_caption (`int`, *optional*):
                Number of images for each caption. The key of an image's noise then holds the image's number, too. By
                default each caption gives one image, whose key holds no number.
            condition (`Condition`, *optional*): embeddings in the place of the captions, a row for each of `rows`.
        """
        captions = [caption for caption in data.captions(rows) for _ in range(per_caption or 1)]
        keys = self._keys(data, rows, purpose)
        if per_caption is not None:
            keys = [(*key, i) for key in keys for i in range(per_caption)]
        if condition is not None:
            condition = {name: tensor.repeat_interleave(per_caption or 1, 0) for name, tensor in condition.items()}
        pipeline = self.family.pipeline
        with ExitStack() as stack:
            stack.enter_context(denoiser_in_place(pipeline, self.denoiser))
            sampling = [stack.enter_context(m.sampling(self)) for m in self.mitigations]
            adjusters = [adjust for adjust in sampling if adjust is not None]
            return generate(
                pipeline,
                captions,
                keys,
                self.resolution,
                self.inference_steps,
                self.guidance_scale,
                self.batch_size,
                adjusters,
                condition,
            )

    def training_latents_and_conditions(self) -> tuple[torch.Tensor, Condition]:
        """Latents `[N, C, h, w]` and conditions of all training rows, for the `sampling` hook of a mitigation."""
        data = self.training_images
        rows = range(len(data))
        return data.batch(rows, ["latents"])["latents"], self.condition_of(data, rows)

    def sampled(self, data: EncodedImages, purpose: Purpose, count: int) -> list[int]:
        """Positions in `data.distinct` of the images whose captions are sampled, at most `count` of them."""
        order = torch.randperm(len(data.distinct), generator=seeded_generator(self.seed, purpose)).tolist()
        return order[:count]

    def generated_features(
        self, data: EncodedImages, purpose: Purpose, count: int, encoder: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Features of generated images, one for each of at most `count` captions of distinct images: `[count, D]`."""
        rows = [data.distinct[i] for i in self.sampled(data, purpose, count)]
        return self._over_processes(lambda mine: encoder(self.images(data, mine, purpose)), rows)

    # ---- the trainer's metrics ----

    def measure(
        self,
        wanted: Iterable[str],
        train: EncodedImages,
        others: EncodedImages,
        num_images: int,
        encoder: Callable[[], Callable[[torch.Tensor], torch.Tensor]],
    ) -> dict[str, float]:
        """Measure metrics; see [`~memcontrol_hf.MemControlTrainer.evaluate`] for the figures that each returns.

        Args:
            wanted (list of `str`): names in `METRICS`.
            train ([`~memcontrol_hf.data.EncodedImages`]): images that the model was trained on.
            others ([`~memcontrol_hf.data.EncodedImages`]): images of the same domain that it was not trained on.
            num_images (`int`): number of images generated for `fid`, and as many again for `amd`.
            encoder (`Callable`): function that returns the image encoder; called only if a metric needs features.
        """
        wanted, figures = set(wanted), {}
        if {"loss", "membership_auc"} & wanted:
            member_losses = self.losses(train, Purpose.MEMBERS)
            by_timestep = self._losses_and_mean(others, Purpose.NONMEMBERS)
            other_losses = by_timestep[:, -1]
            of_timesteps = by_timestep[:, :-1].mean(0).tolist()
            figures |= {f"loss_t{timestep:.0f}": loss for timestep, loss in zip(self.timesteps, of_timesteps)}
            figures["loss"], figures["loss_train"] = other_losses.mean().item(), member_losses.mean().item()
            if "membership_auc" in wanted:
                result = metrics.membership(-member_losses, -other_losses)
                figures["membership_auc"] = result.auc
                figures["membership_auc_low"], figures["membership_auc_high"] = result.interval
        if "noise_norm" in wanted - self.family.not_applicable.keys():
            figures["noise_norm"] = self.noise_norms(train, Purpose.MEMBERS).mean().item()
            figures["noise_norm_held_out"] = self.noise_norms(others, Purpose.NONMEMBERS).mean().item()
        if "fid" in wanted:
            generated = self.generated_features(others, Purpose.EVALUATION_CAPTIONS, num_images, encoder())
            figures["fid"] = metrics.fid(generated, others.features(encoder()))
        if "amd" in wanted:
            generated = self.generated_features(train, Purpose.TRAINING_CAPTIONS, num_images, encoder())
            own = self.sampled(train, Purpose.TRAINING_CAPTIONS, num_images)
            figures |= self.amd(generated, own, train.features(encoder()), others.features(encoder()))
        return figures

    def amd(
        self, generated: torch.Tensor, own: Sequence[int], train: torch.Tensor, others: torch.Tensor
    ) -> dict[str, float]:
        """`amd`, the mean distance to the nearest training image, and `amd_held_out`, the same to held-out images.

        Both sets are cut to the same size, because a larger set has nearer neighbours.

        Args:
            generated, train, others (`torch.Tensor`): features `[M, D]`, `[N, D]`, `[L, D]`.
            own (list of `int`): rows of `train`, one for each generated image: the image that has the same caption.
        """
        seed = (self.seed, Purpose.TRIAL_ROWS)
        to_train, to_held_out = metrics.distances_to_both(generated, train, others, seed, own=own)
        return {"amd": to_train.mean().item(), "amd_held_out": to_held_out.mean().item()}

    # ---- rows, in batches and over processes ----

    def _keys(self, data: EncodedImages, rows: Sequence[int], purpose: Purpose) -> list[tuple[int, ...]]:
        return row_keys(self.seed, purpose, (data.numbers[row] for row in rows))

    def condition_of(self, data: EncodedImages, rows: Sequence[int]) -> Condition:
        """The conditions of some rows: the cached conditions, unless a text encoder is tuned."""
        if self.encode_captions:
            return self.family.encode_prompts(data.captions(rows))
        return data.condition(self.family.conditions, rows)

    def _per_image(self, measure: Callable[..., torch.Tensor], data: EncodedImages, purpose: Purpose) -> torch.Tensor:
        """Results of `measure(latents, condition, timesteps, keys)` for all distinct images: `[N, ...]`."""

        def measure_rows(rows: list[int]) -> torch.Tensor:
            values = []
            for start in bar(range(0, len(rows), self.batch_size), f"measuring {len(rows)} images"):
                batch = rows[start : start + self.batch_size]
                latents, condition = data.batch(batch, ["latents"])["latents"], self.condition_of(data, batch)
                values.append(measure(latents, condition, self.timesteps, self._keys(data, batch, purpose)))
            return torch.cat(values)

        return self._over_processes(measure_rows, data.distinct)

    def _over_processes(self, measure_rows: Callable[[list[int]], torch.Tensor], rows: list[int]) -> torch.Tensor:
        """Share rows among the processes. Every process gets all results, in the order of `rows`."""
        if self.world_size == 1:
            return measure_rows(rows)
        mine = rows[self.rank :: self.world_size]
        parts = gather_object([measure_rows(mine) if mine else None])
        result: list[Any] = [None] * len(rows)
        for first, part in enumerate(parts):
            for i, value in enumerate(part if part is not None else []):
                result[first + i * self.world_size] = value
        return torch.stack(result)
