"""Mitigations that change what a training step reads as the caption of an image."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..families import Condition, Family, StableDiffusionFamily
from ..randomness import seeded_generator
from .base import Mitigation


@dataclass
class _Drawing(Mitigation):
    """One that draws at each read of a row; `number` keeps its draws apart from those of the others."""

    number: ClassVar[int]

    def generator(self, key: tuple[int, ...], row: int) -> torch.Generator:
        """Of a row's draws, by the key of [`Conditions.__call__`]."""
        return seeded_generator(*key, self.number, row)


@dataclass
class MultipleCaptions(_Drawing):
    """One caption drawn uniformly from a row's list of them, at each read (https://huggingface.co/papers/2305.20086).

    - Cost: no forward pass of the denoiser; the text encoder at each step.
    - Against: a caption that becomes the key to its image.
    - Not against: an image that is repeated with the same captions, and attacks that need no caption. The measures
      read the `text` column, which the list should hold.

    Args:
        column (`str`):
            Of the training images, with a list of captions in each row.
    """

    number = 0
    usage = "multiple_captions[:column], the name of a column with a list of captions in each row"
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
class RandomWordAddition(_Drawing):
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

    number = 1
    usage = "rwa[:n], a whole number of at least 1, such as rwa:n=4"
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
class GaussianNoise(_Drawing):
    """`c + std · n`, `n ~ N(0, 1)`, for the text embedding `c` (https://huggingface.co/papers/2305.20086).

    A caption that `caption_dropout` replaces stays the exact null condition.

    - Cost: no forward pass.
    - Against: a text embedding that becomes the key to its image.
    - Not against: repeated images, and attacks that need no caption. What `std` means depends on the text encoder.

    Args:
        std (`float`):
            Above 0.
    """

    number = 2
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
    - Against: a caption that is the key to its image, which it loosens. It keeps guidance working.
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
        self.of_captions = [m for m in mitigations.values() if isinstance(m, (MultipleCaptions, RandomWordAddition))]
        self.noise = mitigations.get("gaussian_noise")
        of_text = [name for name, mitigation in mitigations.items() if isinstance(mitigation, _Drawing)]
        if of_text and "prompt_embeds" not in family.conditions:
            raise ValueError(f"{of_text[0]} changes a text, which {type(family).__name__} has not: leave it out")
        if "threshold" in mitigations and "noise_norm" in family.not_applicable:
            raise ValueError(f"threshold needs the noise norm: {family.not_applicable['noise_norm']}; leave it out")
        in_sampling = [name for name, mitigation in mitigations.items() if not mitigation.guards_weights]
        if in_sampling and not isinstance(family, StableDiffusionFamily):
            raise ValueError(
                f"{in_sampling[0]} is there for Stable Diffusion 1.x and 2.x alone, not for {type(family).__name__}: "
                "leave it out"
            )
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
            for mitigation in self.of_captions:
                caption = mitigation.caption(caption, others, tokenizer, mitigation.generator(key, row))
            captions.append(caption)
        return captions

    def __call__(
        self, condition: Condition, rows: Sequence[int], key: tuple[int, ...], encode: bool = False
    ) -> Condition:
        """The conditions of some rows.

        Args:
            condition (`Condition`): of the captions as they are: what is used unless a caption changes.
            rows (list of `int`): their numbers.
            key (tuple of `int`): seed, purpose and epoch (or step). With the row, this is all that a draw depends on.
            encode (`bool`): encode the captions even if none changes, as the text encoders are tuned.
        """
        if self.of_captions or encode:
            encoded = self.family.encode_prompts(self.captions(rows, key))
            condition = {name: encoded[name].to(tensor) for name, tensor in condition.items()}
        if self.noise is None:
            return condition
        generators = [self.noise.generator(key, row) for row in rows]
        return {
            name: torch.stack([self.noise.embedding(*pair) for pair in zip(tensor, generators)])
            if tensor.is_floating_point()
            else tensor
            for name, tensor in condition.items()
        }
