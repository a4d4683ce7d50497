"""Attribute inference: is an attribute guessed better of training persons than of others?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .intervals import clopper_pearson
from .persons import mean_of_persons


@dataclass(frozen=True)
class AttributeInferenceResult:
    """How well an attribute is guessed, for training persons and for held-out persons.

    Args:
        train (`float`): balanced accuracy for training persons, in [0, 1]; a guess at random gives 1 / `values`.
        held_out (`float`): balanced accuracy for held-out persons.
        advantage (`float`): the first minus the second, in [-1, 1]; 0 where nothing was memorized.
        interval (`tuple[float, float]`): interval of the advantage at 95 %, over persons.
        values (`int`): number of values of the attribute that were compared.
    """

    train: float
    held_out: float
    advantage: float
    interval: tuple[float, float]
    values: int


def attribute_inference(
    train: tuple[Sequence[int], Sequence[int], Sequence[int]],
    held_out: tuple[Sequence[int], Sequence[int], Sequence[int]],
) -> AttributeInferenceResult:
    """The attribute advantage of Yeom et al. 2018 (https://huggingface.co/papers/1709.01604).

    The advantage is how much more often the attribute of a training example is guessed right than that of another
    example of the same population. What can be guessed of anybody, by an image or by the other words of a caption,
    counts on both sides and cancels; guessing it is the inversion of Fredrikson et al. 2014.

    The accuracy is balanced: the mean of the values' recalls, so that guessing the most frequent value gains nothing.
    The recall of a value is the mean over its persons of the share of their images that is guessed right. Its interval
    is Clopper and Pearson's over these persons; the intervals of all recalls are combined by the method of variance
    estimates recovery (Zou & Donner, Statistics in Medicine 2008, 27:1693). Values that one side lacks are left out.

    Args:
        train (`tuple`): for each training image its guessed value, its true value and the number of its person.
        held_out (`tuple`): the same for held-out images.

    Raises:
        ValueError: for lists of different lengths, and for fewer than two values that both sides have.
    """
    recalls = [_recalls(*side) for side in (train, held_out)]
    values = sorted(recalls[0].keys() & recalls[1].keys())
    if len(values) < 2:
        raise ValueError(f"an attribute needs two values or more that both sets have, but there are {len(values)}")
    mine, others = ([of[value] for value in values] for of in recalls)
    means = [math.fsum(recall for recall, *_ in of) / len(values) for of in (mine, others)]
    below = sum((r - low) ** 2 for r, low, _ in mine) + sum((high - r) ** 2 for r, _, high in others)
    above = sum((high - r) ** 2 for r, _, high in mine) + sum((r - low) ** 2 for r, low, _ in others)
    advantage = means[0] - means[1]
    interval = (advantage - math.sqrt(below) / len(values), advantage + math.sqrt(above) / len(values))
    return AttributeInferenceResult(*means, advantage, (max(-1.0, interval[0]), min(1.0, interval[1])), len(values))


def _recalls(
    guessed: Sequence[int], true: Sequence[int], persons: Sequence[int]
) -> dict[int, tuple[float, float, float]]:
    """The recall of each value with the ends of its interval."""
    if not len(guessed) == len(true) == len(persons):
        raise ValueError(f"{len(guessed)} guesses, {len(true)} true values and {len(persons)} persons: give as many")
    found = {}
    for value in set(true):
        rows = [row for row, of in enumerate(true) if of == value]
        right = torch.tensor([float(guessed[row] == value) for row in rows])
        shares = mean_of_persons(right, [persons[row] for row in rows])
        found[value] = (shares.mean().item(), *clopper_pearson(shares.sum().item(), len(shares)))
    return found
