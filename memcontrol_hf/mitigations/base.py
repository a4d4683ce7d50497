"""What all mitigations have in common: the hooks that training and sampling call."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import nn

from ..families import Condition, Family, StableDiffusionFamily

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState, TrainingArguments


class PrivateTraining(Protocol):
    """What a mitigation puts in the place of the Trainer's batches and gradients; it is a batch sampler, too."""

    def __iter__(self) -> Iterator[list[int]]: ...

    def backward(
        self, model: nn.Module, loss_function: Callable, batch: dict[str, Any], step: int, last: bool
    ) -> torch.Tensor: ...

    def check_layers(self, model: nn.Module, loss_function: Callable, batch: dict[str, Any]) -> None: ...

    def check_moved(self) -> None: ...

    def report(self) -> dict[str, Any]: ...

    def save(self, checkpoint: Any) -> None: ...

    def load(self, checkpoint: Any) -> None: ...


class Sampling(Protocol):
    """What a mitigation can ask about the images that are about to be sampled."""

    family: Family
    denoiser: nn.Module
    guidance_scale: float

    def training_latents_and_conditions(self) -> tuple[torch.Tensor, Condition]: ...


@dataclass
class Mitigation:
    """A mitigation and its arguments, which are its fields.

    Every hook does nothing by default; a mitigation overrides those that it works by. Training calls, in this order:
    [`check_arguments`] when the training arguments are made, [`check`] when the trainer is made, [`callback`] and
    [`private_training`] before the first step; for each row that a step reads [`caption`], then [`embedding`]; for
    each batch [`losses`]. Every image that an evaluation generates is sampled within [`sampling`].

    Attributes:
        usage (`str`): how its arguments are written.
        guards_weights (`bool`): whether it changes the weights. What works while images are sampled protects nobody
            once the weights are published: whoever has them samples without it.
        number (`int`): keeps the random draws of [`caption`] and [`embedding`] apart from those of other mitigations.
    """

    usage: ClassVar[str]
    guards_weights: ClassVar[bool] = True
    number: ClassVar[int] = 0

    def check_arguments(self, args: "TrainingArguments", others: "Mapping[str, Mitigation]") -> None:
        """See that the mitigation goes with the training arguments and the other mitigations; adjust the arguments.

        Raises:
            ValueError: says what does not go with it.
        """

    def check(self, family: Family, images: "Dataset", args: "TrainingArguments", tunes_text: bool) -> None:
        """See that the mitigation goes with the model and the training images.

        Args:
            family ([`~memcontrol_hf.families.Family`]): family of the pipeline.
            images (`Dataset`): the training images and captions.
            args: the training arguments.
            tunes_text (`bool`): whether text encoders are a part of the search space.

        Raises:
            ValueError: says what does not go with it.
        """

    def caption(
        self,
        caption: str,
        row: Mapping[str, Any],
        tokenizer: "PreTrainedTokenizerBase",
        generator: torch.Generator,
    ) -> str:
        """The caption as a step reads it; `row` holds the columns of the training image, but not the image."""
        return caption

    def embedding(self, embedding: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """One floating-point tensor of a row's condition, say the text embedding `[L, D]`, as a step reads it."""
        return embedding

    def losses(
        self,
        losses: torch.Tensor,
        prediction: torch.Tensor,
        family: Family,
        denoiser: nn.Module,
        null: Callable[[], Condition | None],
        batch: Mapping[str, Any],
    ) -> torch.Tensor:
        """The losses of a batch `[N]`, given the denoiser's prediction `[N, C, h, w]`.

        Args:
            losses (`torch.Tensor`): `[N]`, so far.
            prediction (`torch.Tensor`): `[N, C, h, w]`, the denoiser's prediction for the batch.
            family, denoiser: the pipeline's family, and the denoiser with its adapter.
            null (`Callable`): gives the null condition, one row.
            batch (`dict`): `latents`, `condition`, `timesteps`, `noise` and `weights` of the batch.
        """
        return losses

    def counts(self) -> dict[str, int | torch.Tensor]:
        """What the training logs: counts on this process since the last call, which sets them to zero."""
        return {}

    def callback(self, measure: Callable[[list[str]], dict[str, float]]) -> "TrainerCallback | None":
        """A callback of the training; `measure` evaluates metrics of the model as it is."""
        return None

    def stopped(self, state: "TrainerState") -> bool:
        """Whether the mitigation stopped a training at this state."""
        return False

    def private_training(self, rows: int, batch_size: int, parts: int, steps: int) -> PrivateTraining | None:
        """What takes the place of the Trainer's batches and gradients.

        Args:
            rows (`int`): number of training rows.
            batch_size (`int`): number of rows of a step.
            parts (`int`): number of batches that the rows of a step are read in.
            steps (`int`): number of steps of the training.
        """
        return None

    def sampling(self, context: Sampling) -> "AbstractContextManager[Callable[..., dict[str, Any]] | None]":
        """A context in which images are sampled; it may give a function for `generate(adjust_prompts=...)`."""
        return nullcontext()


def overrides(mitigation: Mitigation, hook: str) -> bool:
    """Whether a mitigation works by a hook."""
    return getattr(type(mitigation), hook) is not getattr(Mitigation, hook)


def check_text(mitigation: str, family: Family) -> None:
    """Raise `ValueError` when a family has no captions that a mitigation could change."""
    if "prompt_embeds" not in family.conditions:
        raise ValueError(f"{mitigation} changes a text, which {type(family).__name__} has not: leave it out")


def check_stable_diffusion(mitigation: str, family: Family) -> None:
    """Raise `ValueError` for a family whose sampling a mitigation does not know."""
    if not isinstance(family, StableDiffusionFamily):
        raise ValueError(
            f"{mitigation} is there for Stable Diffusion 1.x and 2.x alone, not for {type(family).__name__}: "
            "leave it out"
        )
