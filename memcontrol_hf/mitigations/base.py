"""The base class of all mitigations: the hooks that training and sampling call."""

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

    from ..families.noise import DDPMNoise


class PrivateTraining(Protocol):
    """An object that replaces the Trainer's batches and gradients. It is the batch sampler, too.

    See [`~memcontrol_hf.mitigations.PrivateGradients`].
    """

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
    """What a mitigation can read about the images that are about to be sampled."""

    family: Family
    denoiser: nn.Module
    guidance_scale: float

    def training_latents_and_conditions(self) -> tuple[torch.Tensor, Condition]: ...


@dataclass
class Mitigation:
    """A mitigation. The fields of the class are the arguments of the mitigation.

    Every hook does nothing by default; a mitigation overrides the hooks that it needs. The hooks are called in this
    order: [`check_arguments`] when the training arguments are made; [`check`] when the trainer is made; [`callback`]
    and [`private_training`] before the first step; [`timestep`], [`caption`], then [`embedding`] for each row that a
    step reads; [`losses`] for each batch. Every image that an evaluation generates is sampled within [`sampling`].

    Attributes:
        usage (`str`): text that says how the arguments are written.
        guards_weights (`bool`): whether the mitigation changes the weights. A mitigation that works only while images
            are sampled protects nobody once the weights are published: anybody can then sample without it.
        number (`int`): number of the mitigation's stream of random draws for [`caption`] and [`embedding`]; no other
            mitigation has the same.
    """

    usage: ClassVar[str]
    guards_weights: ClassVar[bool] = True
    number: ClassVar[int] = 0

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of the metrics that the callback measures on the training and the validation images."""
        return ()

    def check_arguments(self, args: "TrainingArguments", others: "Mapping[str, Mitigation]") -> None:
        """Check that the mitigation works with the training arguments and the other mitigations.

        A mitigation can also adjust the training arguments here.

        Args:
            args (`TrainingArguments`): training arguments, which may be changed.
            others (`dict`): all mitigations of the training, by name.

        Raises:
            ValueError: names what the mitigation cannot be combined with.
        """

    def check(self, family: Family, images: "Dataset", args: "TrainingArguments", tunes_text: bool) -> None:
        """Check that the mitigation works with the model and the training images.

        Args:
            family ([`~memcontrol_hf.families.Family`]): family of the pipeline.
            images (`Dataset`): training images and captions.
            args (`TrainingArguments`): training arguments.
            tunes_text (`bool`): whether text encoders are a part of the search space.

        Raises:
            ValueError: names what the mitigation cannot be combined with.
        """

    def timestep(self, timestep: torch.Tensor, noise: "DDPMNoise", generator: torch.Generator) -> torch.Tensor:
        """The timestep, of shape `[]`, that a training step takes instead of `timestep`.

        Args:
            timestep (`torch.Tensor`): timestep, as earlier mitigations have changed it.
            noise ([`~memcontrol_hf.families.noise.DDPMNoise`]): noise process of the family.
            generator (`torch.Generator`): generator of all draws for this row and epoch; the noise is drawn after.
        """
        return timestep

    def caption(
        self,
        caption: str,
        row: Mapping[str, Any],
        tokenizer: "PreTrainedTokenizerBase",
        generator: torch.Generator,
    ) -> str:
        """The caption that a training step reads instead of `caption`.

        Args:
            caption (`str`): caption, as earlier mitigations have changed it.
            row (`dict`): columns of the training row, without the image.
            tokenizer (`PreTrainedTokenizerBase`): tokenizer of the pipeline.
            generator (`torch.Generator`): generator of the draws for this row, step or epoch, and mitigation.
        """
        return caption

    def embedding(self, embedding: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The tensor that a training step reads instead of `embedding`.

        Args:
            embedding (`torch.Tensor`): floating-point tensor of a row's condition, say the text embedding `[L, D]`.
            generator (`torch.Generator`): generator of the draws for this row, step or epoch, and mitigation.
        """
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
        """The losses of a batch, `[N]`, that training uses instead of `losses`.

        Args:
            losses (`torch.Tensor`): losses `[N]`, as earlier mitigations have changed them.
            prediction (`torch.Tensor`): prediction `[N, C, h, w]` of the denoiser for the batch.
            family ([`~memcontrol_hf.families.Family`]): family of the pipeline.
            denoiser (`nn.Module`): denoiser with its adapter.
            null (`Callable`): function that returns the null condition, one row.
            batch (`dict`): `latents`, `condition`, `timesteps`, `noise` and `weights` of the batch.
        """
        return losses

    def reset(self) -> None:
        """Forget what an earlier training has left, before another one, which may be a screening without callbacks."""
        self.counts()

    def counts(self) -> dict[str, int | torch.Tensor]:
        """Counts on this process since the last call, for the training's log. A call sets the counts to zero."""
        return {}

    def callback(self, measure: Callable[[list[str]], dict[str, float]]) -> "TrainerCallback | None":
        """A callback of the training, or `None`.

        Args:
            measure (`Callable`): function from names of metrics to the figures of the present model.
        """
        return None

    def stopped(self, state: "TrainerState") -> bool:
        """Whether the mitigation stopped a training at this state."""
        return False

    def private_training(self, rows: int, batch_size: int, parts: int, steps: int) -> PrivateTraining | None:
        """The object that replaces the Trainer's batches and gradients, or `None`.

        Args:
            rows (`int`): number of training rows.
            batch_size (`int`): number of rows in a step.
            parts (`int`): number of batches in which the rows of a step are read.
            steps (`int`): number of steps in the training.
        """
        return None

    def sampling(self, context: Sampling) -> "AbstractContextManager[Callable[..., dict[str, Any]] | None]":
        """A context within which images are sampled.

        Args:
            context ([`Sampling`]): pipeline, denoiser and guidance scale of the sampling, and the training images.

        Returns:
            A context manager. It can yield a function that changes the pipeline's call: see `adjust_prompts` of
            [`~memcontrol_hf.sampling.generate`].
        """
        return nullcontext()


def overrides(mitigation: Mitigation, hook: str) -> bool:
    """Whether a mitigation overrides a hook."""
    return getattr(type(mitigation), hook) is not getattr(Mitigation, hook)


def check_text(mitigation: str, family: Family) -> None:
    """Raise `ValueError` when a family has no captions that a mitigation could change."""
    if "prompt_embeds" not in family.conditions:
        raise ValueError(f"{mitigation} changes a text, which {type(family).__name__} has not: leave it out")


def check_stable_diffusion(mitigation: str, family: Family) -> None:
    """Raise `ValueError` for a mitigation that works with Stable Diffusion only, and another family."""
    if not isinstance(family, StableDiffusionFamily):
        raise ValueError(
            f"{mitigation} is there for Stable Diffusion 1.x and 2.x alone, not for {type(family).__name__}: "
            "leave it out"
        )
