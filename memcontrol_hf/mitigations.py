"""What training can do against memorization beside a mask: mitigations, which combine with it and with each other.

Each is a small class, named and set up by `NAME[:arguments]`: positional (`rwa:4`), by name (`threshold:q=0.8`), with
commas between several (`early_stop:metric=noise_norm,limit=20`). They always apply in the order of `MITIGATIONS`.
Every draw depends on the seed, the epoch and the row alone, so that the batch size, the number of processes and
resuming play no part. None gives a formal guarantee.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from .diffusion import Condition, Family, null_like, seeded_generator
from .metrics import steering_norms

if TYPE_CHECKING:
    from .trainer import MemControlTrainer


@dataclass
class Mitigation:
    """What all have in common: where one is not concerned, it changes nothing."""

    usage: ClassVar[str]
    changes_captions: ClassVar[bool] = False

    def caption(
        self, caption: str, others: Sequence[str], tokenizer: PreTrainedTokenizerBase, generator: torch.Generator
    ) -> str:
        """The caption of a row as this read of it sees it; `others` are the row's further captions."""
        return caption


@dataclass
class MultipleCaptions(Mitigation):
    """One caption drawn uniformly from a row's list of them, at each read (https://huggingface.co/papers/2305.20086).

    - Cost: no forward pass of the denoiser; the text encoder at each step.
    - Against: a caption that becomes the key to its image.
    - Not against: an image that is repeated with the same captions, and attacks that need no caption. The measures
      read the `text` column, which the list should hold.

    Args:
        column (`str`):
            Of the training images, with a list of captions in each row.
    """

    usage = "multiple_captions[:column], the name of a column with a list of captions in each row"
    changes_captions = True
    column: str = "captions"

    def caption(
        self, caption: str, others: Sequence[str], tokenizer: PreTrainedTokenizerBase, generator: torch.Generator
    ) -> str:
        return others[int(torch.randint(len(others), (), generator=generator))]

    def check(self, images: Dataset) -> None:
        """Raise `ValueError` when the column is missing, or a row holds anything but a list of captions."""
        if self.column not in images.column_names:
            raise ValueError(
                f"multiple_captions: the training images have no column {self.column!r}, only "
                f"{', '.join(images.column_names)}: name the column as in multiple_captions:column"
            )
        for row, captions in enumerate(images[self.column]):
            if not (isinstance(captions, list) and captions and all(isinstance(c, str) for c in captions)):
                raise ValueError(
                    f"multiple_captions: row {row} of the column {self.column!r} holds no list of captions: "
                    "give every row a list of at least one text"
                )


@dataclass
class RandomWordAddition(Mitigation):
    """`n` random tokens of the tokenizer at random places of the caption (https://huggingface.co/papers/2305.20086).

    Each is put before, between or behind the words that are there. In a caption that fills the text encoder, they push
    the last words out.

    - Cost: no forward pass of the denoiser; the text encoder at each step.
    - Against: a caption that becomes the key to its image.
    - Not against: repeated images, and attacks that need no caption.

    Args:
        n (`int`):
            How many tokens, at least 1.
    """

    usage = "rwa[:n], a whole number of at least 1, such as rwa:n=4"
    changes_captions = True
    n: int = 4

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n is {self.n}")

    def caption(
        self, caption: str, others: Sequence[str], tokenizer: PreTrainedTokenizerBase, generator: torch.Generator
    ) -> str:
        words = caption.split()
        for _ in range(self.n):
            place = int(torch.randint(len(words) + 1, (), generator=generator))
            words.insert(place, self._token(tokenizer, generator))
        return " ".join(words)

    def _token(self, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator) -> str:
        """A token as text. Drawn again where it has none: the special ones, and parts of a character."""
        while True:
            token = int(torch.randint(len(tokenizer), (), generator=generator))
            text = tokenizer.decode([token], skip_special_tokens=True).strip()
            if text and "\ufffd" not in text:
                return text


@dataclass
class GaussianNoise(Mitigation):
    """`c + std · n`, `n ~ N(0, 1)`, for the text embedding `c` (https://huggingface.co/papers/2305.20086).

    A caption that `caption_dropout` replaces stays the exact null condition.

    - Cost: no forward pass.
    - Against: a text embedding that becomes the key to its image.
    - Not against: repeated images, and attacks that need no caption. What `std` means depends on the text encoder.

    Args:
        std (`float`):
            Above 0.
    """

    usage = "gaussian_noise[:std], a number above 0, such as gaussian_noise:std=0.1"
    std: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.std < math.inf:
            raise ValueError(f"std is {self.std}")

    def embedding(self, embedding: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """One tensor of a row's condition, say the text embedding `[L, D]`, as this read of it sees it."""
        return embedding + self.std * torch.randn(embedding.shape, generator=generator).to(embedding)


@dataclass
class CaptionDropout(Mitigation):
    """The empty caption with probability `p` (https://huggingface.co/papers/2207.12598): the same as `caption_dropout`
    of the training arguments, which it sets.

    - Cost: no forward pass.
    - Against: little. It loosens the tie between caption and image, and keeps guidance working.
    - Not against: memorization without a caption, which it can add to.

    Args:
        p (`float`):
            Between 0 and 1.
    """

    usage = "caption_dropout[:p], a share between 0 and 1, such as caption_dropout:p=0.1"
    p: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"p is {self.p}")


@dataclass
class Threshold(Mitigation):
    """Leaves samples out of the loss whose text steers hard (https://huggingface.co/papers/2407.21720).

    Left out is each sample of a batch with `||ε(x_t, t, c) − ε(x_t, t, ∅)||₂` above `value`, or above the quantile `q`
    of the batch. It counts as a loss of 0, so that what is kept weighs the same whatever else is in the batch. A fixed
    value therefore does the same at every batch size. A quantile depends, by definition, on what is in the batch of
    each device: it leaves out at least the sample with the largest norm (unless there are ties), so one in four at
    batch size 4, and none at batch size 1.

    - Cost: one forward pass without a gradient more, for the null condition; the conditional one is the loss's own.
    - Against: captions that have begun to call up their image.
    - Not against: memorization that does not show in the norm, and whatever is learnt before it does.

    Args:
        value (`float`, *optional*):
            A fixed norm, in the units of the metric `noise_norm`.
        q (`float`, *optional*):
            A quantile instead; 0.9 when neither is given.
    """

    usage = "threshold[:value] with a norm above 0, or threshold[:q=0.9] with a quantile between 0 and 1, not both"
    value: float | None = None
    q: float | None = None

    def __post_init__(self) -> None:
        if self.value is not None and self.q is not None:
            raise ValueError(f"value is {self.value} and q is {self.q}")
        if self.value is not None and not 0 < self.value < math.inf:
            raise ValueError(f"value is {self.value}")
        if self.value is None and self.q is None:
            self.q = 0.9
        if self.q is not None and not 0 < self.q < 1:
            raise ValueError(f"q is {self.q}")
        self.dropped: int | torch.Tensor = 0  # since it was last set to 0

    def losses(
        self,
        family: Family,
        denoiser: nn.Module,
        null: Condition,
        latents: torch.Tensor,
        condition: Condition,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
        weights: torch.Tensor | None,
    ) -> torch.Tensor:
        """[`Family.losses`] of a batch, 0 for those that are left out; `null` is the null condition."""
        prediction = family.predict(denoiser, latents, condition, timesteps, noise)
        with torch.no_grad():
            without = family.predict(denoiser, latents, null_like(null, condition), timesteps, noise)
        norms = steering_norms(prediction.detach(), without)
        drop = norms > (torch.quantile(norms, self.q) if self.value is None else self.value)
        self.dropped = self.dropped + drop.sum()
        losses = family.losses_of(prediction, latents, timesteps, noise, weights)
        return torch.where(drop, 0.0, losses)


@dataclass
class EarlyStop(Mitigation):
    """Stops when a memorization metric passes a limit (https://huggingface.co/papers/2505.17638: memorization sets in
    after quality does, at a time that grows with the number of images).

    The metric compares the training images with the validation images, which after that are no longer unseen: final
    figures are for the held-out images.

    - Cost: an evaluation each `every` steps. For `membership_auc` and `noise_norm` these are `eval_num_timesteps`
      forward passes (twice as many for `noise_norm`) for each image; `amd` samples images.
    - Against: what the metric sees, up to `every` steps late.
    - Not against: other attacks, and a few images that are memorized early (repeated ones), which a mean hides.

    Args:
        metric (`str`):
            `membership_auc`, `noise_norm` or `amd`.
        limit (`float`, *optional*):
            The worst value that is allowed; 0.6 for `membership_auc`, to be given for the others.
        every (`int`):
            Steps between two looks.
    """

    usage = (
        "early_stop[:metric=membership_auc,limit=0.6,every=25]; metric is membership_auc, noise_norm or amd, limit a "
        "number (to be given for noise_norm and amd), every a whole number of at least 1"
    )
    metric: str = "membership_auc"
    limit: float | None = None
    every: int = 25

    def __post_init__(self) -> None:
        if self.metric not in ("membership_auc", "noise_norm", "amd"):
            raise ValueError(f"metric is {self.metric}")
        if self.limit is None and self.metric == "membership_auc":
            self.limit = 0.6
        if self.limit is None or not math.isfinite(self.limit):
            raise ValueError(f"limit is {self.limit}")
        if self.every < 1:
            raise ValueError(f"every is {self.every}")

    def passed(self, value: float) -> bool:
        """Whether a value of the metric is worse than the limit."""
        return value < self.limit if self.metric == "amd" else value > self.limit

    def stopped(self, checkpoint: str) -> TrainerState | None:
        """The state in a checkpoint of a run that stopped there; `None` when the run is to go on."""
        file = Path(checkpoint) / TRAINER_STATE_NAME
        if not file.exists():
            return None
        state = TrainerState.load_from_json(str(file))
        looks = [log[f"eval_{self.metric}"] for log in state.log_history
                 if log["step"] == state.global_step and f"eval_{self.metric}" in log]  # fmt: skip
        return state if looks and state.global_step % self.every == 0 and self.passed(looks[-1]) else None


class EarlyStopCallback(TrainerCallback):
    """Looks at the metric of an [`EarlyStop`] while a trainer trains."""

    def __init__(self, early_stop: EarlyStop, trainer: "MemControlTrainer"):
        self.early_stop = early_stop
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.early_stop.every:
            return
        due = control.should_log, control.should_evaluate  # which a look would have the Trainer take as done
        figures = self.trainer.evaluate(metrics=[self.early_stop.metric])
        control.should_log, control.should_evaluate = due
        if self.early_stop.passed(figures[f"eval_{self.early_stop.metric}"]):
            control.should_training_stop = True


MITIGATIONS: dict[str, type[Mitigation]] = {
    "multiple_captions": MultipleCaptions,
    "rwa": RandomWordAddition,
    "gaussian_noise": GaussianNoise,
    "caption_dropout": CaptionDropout,
    "threshold": Threshold,
    "early_stop": EarlyStop,
}
"""By name, in the order in which they apply. The place of each is part of its seed: add new ones at the end."""

_KINDS = {int: "whole number", float: "number", float | None: "number"}


def parse_mitigations(texts: Iterable[str]) -> dict[str, Mitigation]:
    """Mitigations from `NAME[:arguments]`, by name and in the order in which they apply.

    Raises:
        ValueError: for an unknown name, one that is given twice, and arguments that it does not take.
    """
    parsed = {}
    for text in texts:
        name, _, arguments = text.partition(":")
        if name not in MITIGATIONS:
            raise ValueError(f"unknown mitigation {text!r}: use some of {', '.join(MITIGATIONS)}")
        if name in parsed:
            raise ValueError(f"the mitigation {name!r} is given twice: give it once, with all its arguments")
        try:
            parsed[name] = MITIGATIONS[name](**_arguments(MITIGATIONS[name], arguments))
        except ValueError as error:
            raise ValueError(f"mitigation {text!r}: {error}; use {MITIGATIONS[name].usage}") from None
    return {name: parsed[name] for name in MITIGATIONS if name in parsed}


def _arguments(mitigation: type[Mitigation], text: str) -> dict[str, Any]:
    """`"4"` or `"n=4"` -> `{"n": 4}`, cast as the mitigation's fields are."""
    known = {f.name: f.type for f in fields(mitigation)}
    values = {}
    for position, part in enumerate(text.split(",") if text else ()):
        name, equals, value = part.partition("=")
        if not equals:
            name, value = list(known)[position] if position < len(known) else part, part
        if name not in known or name in values or not value:
            raise ValueError(f"cannot take {part!r}")
        try:
            values[name] = (known[name] if isinstance(known[name], type) else float)(value)
        except ValueError:
            raise ValueError(f"{name} is {value!r}, no {_KINDS[known[name]]}") from None
    return values


class Conditions:
    """The text embeddings that a training step sees.

    Args:
        mitigations: of [`parse_mitigations`].
        family: the pipeline's.
        images (`Dataset`): the training images, with the columns `text` and, for [`MultipleCaptions`], its own.
        rows (list of `int`): the number of each.

    Raises:
        ValueError: when the column of [`MultipleCaptions`] is missing or holds no lists of captions, and for a
            mitigation that the family has no use for.
    """

    def __init__(
        self,
        mitigations: dict[str, Mitigation],
        family: Family,
        images: Dataset,
        rows: Sequence[int],
    ):
        self.family = family
        self.of_captions = {n: m for n, m in mitigations.items() if m.changes_captions}
        self.noise = mitigations.get("gaussian_noise")
        of_text = [*self.of_captions, *(["gaussian_noise"] if self.noise else [])]
        if of_text and "prompt_embeds" not in family.conditions:
            raise ValueError(f"{of_text[0]} changes a text, which {type(family).__name__} has not: leave it out")
        if "threshold" in mitigations and "noise_norm" in family.not_applicable:
            raise ValueError(f"threshold needs the noise norm: {family.not_applicable['noise_norm']}; leave it out")
        self.texts: dict[int, tuple[str, Sequence[str]]] = {}
        if self.of_captions:
            several = mitigations.get("multiple_captions")
            if several is not None:
                several.check(images)
            others = [()] * len(images) if several is None else list(images[several.column])
            self.texts = dict(zip(rows, zip(images["text"], others), strict=True))

    def captions(self, rows: Sequence[int], key: tuple[int, ...]) -> list[str]:
        """The captions of some rows, by a seed that [`__call__`] describes."""
        tokenizer, captions = self.family.pipeline.tokenizer, []
        for row in rows:
            caption, others = self.texts[row]
            for name, mitigation in self.of_captions.items():
                caption = mitigation.caption(caption, others, tokenizer, _generator(key, name, row))
            captions.append(caption)
        return captions

    def __call__(self, condition: Condition, rows: Sequence[int], key: tuple[int, ...]) -> Condition:
        """The conditions of some rows.

        Args:
            condition (`Condition`): of the captions as they are: what is used unless a caption changes.
            rows (list of `int`): their numbers.
            key (tuple of `int`): seed, purpose and epoch. With the row, this is all that a draw depends on.
        """
        if self.of_captions:
            encoded = self.family.encode_prompts(self.captions(rows, key))
            condition = {name: encoded[name].to(tensor) for name, tensor in condition.items()}
        if self.noise is None:
            return condition
        generators = [_generator(key, "gaussian_noise", row) for row in rows]
        return {
            name: torch.stack([self.noise.embedding(*pair) for pair in zip(tensor, generators)])
            if tensor.is_floating_point()
            else tensor
            for name, tensor in condition.items()
        }


def _generator(key: tuple[int, ...], name: str, row: int) -> torch.Generator:
    return seeded_generator(*key, list(MITIGATIONS).index(name), row)
