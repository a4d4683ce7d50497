"""Mitigations that change what a training step reads as the caption of an image."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..families import Family
from .base import Mitigation, check_text

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass
class MultipleCaptions(Mitigation):
    """Draws one caption from a row's list of captions at each read (https://huggingface.co/papers/2305.20086).

    All captions of a row have the same probability.

    - Cost: no forward pass of the denoiser, but one of the text encoder at each step.
    - Against: a caption that becomes the key to its image.
    - Not against: an image that is repeated with the same captions, and attacks that need no caption. The measures
      read the `text` column, so each list should contain the row's `text`.

    Args:
        column (`str`):
            Column of the training images that holds a list of captions in each row.
    """

    number = 0
    usage = "multiple_captions[:column], the name of a column with a list of captions in each row"
    column: str = "captions"

    def caption(self, caption, row, tokenizer, generator):
        captions = row[self.column]
        return captions[int(torch.randint(len(captions), (), generator=generator))]

    def check(self, family: Family, images: Dataset, args: "TrainingArguments", tunes_text: bool) -> None:
        """Raise `ValueError` when the column is missing, or when a row does not hold a list of captions."""
        check_text("multiple_captions", family)
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
    """Adds `n` random tokens at random places of the caption (https://huggingface.co/papers/2305.20086).

    Each token is put before, between or after the words of the caption. When the caption already fills the text
    encoder, the added tokens push its last words out.

    The variant is the one that the paper's authors use in sampling, with 4 tokens (`rand_word_add` in
    `sd_mitigation.py` of github.com/somepago/DCR), applied here to every caption that training reads. In training, the
    authors change only a share of the captions, 10 % by default (`--trainspecial_prob` of their `diff_train.py`).

    - Cost: no forward pass of the denoiser, but one of the text encoder at each step.
    - Against: a caption that becomes the key to its image.
    - Not against: repeated images, and attacks that need no caption.

    Args:
        n (`int`):
            Number of tokens, at least 1.
    """

    number = 1
    usage = "rwa[:n], a whole number of at least 1, such as rwa:n=4"
    n: int = 4

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n is {self.n}")

    def check(self, family: Family, images: Dataset, args: "TrainingArguments", tunes_text: bool) -> None:
        check_text("rwa", family)

    def caption(self, caption, row, tokenizer, generator):
        words = caption.split()
        for _ in range(self.n):
            place = int(torch.randint(len(words) + 1, (), generator=generator))
            words.insert(place, self._token(tokenizer, generator))
        return " ".join(words)

    def _token(self, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator) -> str:
        """The text of a random token. Tokens without a text (special tokens, parts of a character) are drawn again."""
        while True:
            token = int(torch.randint(len(tokenizer), (), generator=generator))
            text = tokenizer.decode([token], skip_special_tokens=True).strip()
            if text and "\ufffd" not in text:
                return text


@dataclass
class GaussianNoise(Mitigation):
    """Adds noise to the text embedding `c`: `c + std · n`, `n ~ N(0, 1)` (https://huggingface.co/papers/2305.20086).

    A caption that `caption_dropout` replaces gets the null condition without noise.

    - Cost: no forward pass.
    - Against: a text embedding that becomes the key to its image.
    - Not against: repeated images, and attacks that need no caption. How strong a given `std` is depends on the text
      encoder.

    Args:
        std (`float`):
            Standard deviation of the noise, above 0.
    """

    number = 2
    usage = "gaussian_noise[:std], a number above 0, such as gaussian_noise:std=0.1"
    std: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.std < math.inf:
            raise ValueError(f"std is {self.std}")

    def check(self, family: Family, images: Dataset, args: "TrainingArguments", tunes_text: bool) -> None:
        check_text("gaussian_noise", family)

    def embedding(self, embedding, generator):
        return embedding + self.std * torch.randn(embedding.shape, generator=generator).to(embedding)


@dataclass
class CaptionDropout(Mitigation):
    """Replaces a caption by the empty one with probability `p` (https://huggingface.co/papers/2207.12598).

    The mitigation sets the training argument `caption_dropout`.

    - Cost: no forward pass.
    - Against: a caption that is the key to its image. Guidance goes on working.
    - Not against: memorization without a caption, which can even become stronger.

    Args:
        p (`float`):
            Probability of the empty caption, above 0 and at most 1.
    """

    usage = "caption_dropout[:p], a share above 0 and at most 1, such as caption_dropout:p=0.1"
    p: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"p is {self.p}")

    def check(self, family: Family, images: Dataset, args: "TrainingArguments", tunes_text: bool) -> None:
        if not family.conditions:
            raise ValueError(f"caption_dropout drops captions, which {type(family).__name__} has not: leave it out")

    def check_arguments(self, args: "TrainingArguments", others: Mapping[str, Mitigation]) -> None:
        args.caption_dropout = self.p
