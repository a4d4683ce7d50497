"""The runs of a screening: trainings with all blocks on, aside from the trainer's own, whose steps are probed."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

from accelerate import Accelerator
from datasets import Dataset
from peft import PeftConfig
from transformers import TrainerCallback

from ..data import EncodedImages
from ..families import Family
from ..randomness import Purpose
from ..search_space import SearchSpace
from ..tuners import MemControlConfig
from .aside import training_aside
from .estimates import estimate
from .probes import BlockProbes, ProbeImages, SingularValueProbes
from .result import Screening
from .settings import ScreeningSettings

PROBE_SHARE = 0.25
"""Rows that a probe draws from each of the two sets, as a share of the rows that training reads from one probe to the
next: two probes, each with a forward and a backward pass, add half of the training's own work."""


class ScreenableTrainer(Protocol):
    """What a screening asks of a trainer, beside what every `transformers.Trainer` has."""

    args: Any
    peft_config: PeftConfig
    family: Family
    search_space: SearchSpace
    mask: Mapping[str, bool]
    train_dataset: EncodedImages
    eval_dataset: Dataset | EncodedImages | None
    accelerator: Accelerator
    adapters: Any

    def encode(self, images: Dataset | EncodedImages) -> EncodedImages: ...

    def measure(self, wanted: Sequence[str], train: EncodedImages, others: EncodedImages) -> dict[str, float]: ...

    def train(self) -> Any: ...

    def add_callback(self, callback: TrainerCallback) -> None: ...

    def remove_callback(self, callback: TrainerCallback) -> None: ...


def run_screening(trainer: ScreenableTrainer, settings: ScreeningSettings, singular_values: bool = False) -> Screening:
    """Train all blocks together and probe the steps; the trainer is afterwards as before.

    Args:
        trainer, settings: the trainer, and the settings of the screening.
        singular_values (`bool`): whether to tell the figures of single singular values, too.

    Raises:
        ValueError: in the run, when a loss is not finite. [`check_screening`] says before what is wrong.
    """
    train, validation = trainer.train_dataset, trainer.encode(trainer.eval_dataset)
    kind = SingularValueProbes if singular_values else BlockProbes
    with all_blocks_aside(trainer, settings):
        runs = [
            train_and_probe(trainer, settings, seed, train, validation, probes_of=kind) for seed in settings.run_seeds
        ]
    images = {"train_images": len(train.distinct), "validation_images": len(validation.distinct)}
    return estimate(list(trainer.search_space.blocks), runs, settings, images)


def check_screening(trainer: ScreenableTrainer, singular_values: bool = False) -> None:
    """Raise `ValueError` for what a screening does not go with.

    That is a search space of fewer than two blocks, and a trainer without validation images; and, where single
    `singular_values` are asked for, another method than SV-DIFF of all singular values.
    """
    config = trainer.peft_config
    if singular_values and not (isinstance(config, MemControlConfig) and config.method == "svdiff"):
        raise ValueError("single singular values are tuned by SV-DIFF alone: give its config (--method svdiff)")
    if singular_values and config.singular_values is not None:
        raise ValueError("the config names single singular values already: screen with one that tunes all of them")
    if len(trainer.search_space.blocks) < 2:
        raise ValueError("a screening compares blocks, but the search space has only one: use a finer granularity")
    if trainer.eval_dataset is None or not len(trainer.eval_dataset):
        raise ValueError("a screening compares with validation images, but there are none: give an eval_dataset")


@contextmanager
def all_blocks_aside(trainer: ScreenableTrainer, settings: ScreeningSettings) -> Iterator[None]:
    """Let the trainer train all blocks by the settings of a screening; it is afterwards as before."""
    aside: AbstractContextManager[None] = training_aside(trainer, settings.arguments)
    with aside, trainer.adapters.set_aside():
        trainer.mask = trainer.search_space.mask(True)
        yield


def train_and_probe(
    trainer: ScreenableTrainer,
    settings: ScreeningSettings,
    seed: int,
    seen: EncodedImages,
    unseen: EncodedImages,
    probe_images: type[ProbeImages] = ProbeImages,
    probes_of: type[BlockProbes] = BlockProbes,
) -> BlockProbes:
    """The probes of one training within [`all_blocks_aside`].

    Args:
        trainer, settings: the trainer, and the settings of the screening.
        seed (`int`): random seed of the training and of the probes.
        seen ([`~memcontrol_hf.data.EncodedImages`]): images to train on.
        unseen ([`~memcontrol_hf.data.EncodedImages`]): images to compare with.
        probe_images (`type`): how a probe draws from either of them.
        probes_of (`type`): what the probes allocate the falls to; the blocks by default.
    """
    trainer.args.seed, trainer.train_dataset = seed, seen
    probes = _probes(trainer, settings, seen, unseen, probe_images, probes_of)
    trainer.add_callback(probes)
    trainer.train()
    trainer.remove_callback(probes)
    return probes


def _probes(
    trainer: ScreenableTrainer,
    settings: ScreeningSettings,
    seen: EncodedImages,
    unseen: EncodedImages,
    probe_images: type[ProbeImages],
    probes_of: type[BlockProbes],
) -> BlockProbes:
    args, text = trainer.args, bool(trainer.search_space.text_encoders)
    read = args.train_batch_size * args.gradient_accumulation_steps * args.world_size * settings.every
    count = max(2, round(PROBE_SHARE * read))
    sets = [
        probe_images(data, purpose, trainer.family, args.seed, args.device, text, count)
        for data, purpose in ((seen, Purpose.SCREENING_TRAIN), (unseen, Purpose.SCREENING_VALIDATION))
    ]
    # Few images, and the same ones before and after: what this costs shall not grow with the data.
    measured = [data.select(images.rows(settings.steps)) for data, images in zip((seen, unseen), sets)]
    return probes_of(
        sets,
        trainer.family,
        trainer.search_space,
        settings.stretches,
        args.per_device_train_batch_size,
        trainer.accelerator,
        measure=partial(trainer.measure, ["loss"], *measured),
    )
