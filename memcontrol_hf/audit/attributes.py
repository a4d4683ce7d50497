"""Attribute inference in an audit: which value of an attribute in its caption does the model find in an image?"""

import copy
import re
from dataclasses import replace

import torch
from datasets import Dataset

from .. import metrics
from ..data import ATTRIBUTE, EncodedImages
from ..evaluation import Evaluator
from ..randomness import Purpose
from .settings import Figure

MOST_VALUES = 10
"""Largest number of values of an attribute: each of them costs a pass for each image and timestep."""


def check_attribute(train: Dataset, held_out: Dataset) -> list[str]:
    """The values of the attribute, sorted; none where the sets have no such column.

    Args:
        train, held_out (`Dataset`): columns `text` and, in both or in neither, `attribute`.

    Raises:
        ValueError: where one set alone has the column, for rows without a value or whose caption does not hold it as a
            word, and for fewer than two or more than `MOST_VALUES` values. No message shows a value: it may be of a
            person.
    """
    named = [ATTRIBUTE in images.column_names for images in (train, held_out)]
    if named[0] != named[1]:
        with_column, without = ("train", "held_out") if named[0] else ("held_out", "train")
        raise ValueError(
            f"the {with_column} set has a column {ATTRIBUTE!r} and the {without} set has none: give both one"
        )
    if not named[0]:
        return []
    for name, images in (("train", train), ("held_out", held_out)):
        column = images[ATTRIBUTE][:]
        if missing := sum(value is None or not str(value).strip() for value in column):
            raise ValueError(f"{missing} rows of the {name} set have no value of the attribute: give each row one")
        captions = images["text"][:]
        if elsewhere := sum(not _word(str(value)).search(text) for value, text in zip(column, captions)):
            raise ValueError(
                f"{elsewhere} of {len(column)} captions of the {name} set do not hold the value of the attribute as a "
                "word: a model can be asked only for what its captions name. Choose another --attribute_column"
            )
    values = [{str(value) for value in images[ATTRIBUTE]} for images in (train, held_out)]
    if len(shared := values[0] & values[1]) < 2 or len(values[0] | values[1]) > MOST_VALUES:
        raise ValueError(
            f"the attribute has {len(values[0])} values in train and {len(values[1])} in held_out, {len(shared)} of "
            f"them in both: an attribute needs 2 values or more in both sets, and at most {MOST_VALUES} in all"
        )
    return sorted(values[0] | values[1])


def attribute_figures(evaluator: Evaluator, members: EncodedImages, others: EncodedImages) -> dict[str, Figure]:
    """The attribute advantage of a model, and the balanced accuracies that it is the difference of.

    The attacker has a person's image and the words of its caption except for the attribute. They ask the model for the
    denoising loss of the image under the caption with each value of the attribute, with the same noise, and guess the
    value with the smallest loss (the classifier of https://huggingface.co/papers/2303.16203). See
    [`~memcontrol_hf.metrics.attribute_inference`].

    Args:
        evaluator ([`~memcontrol_hf.evaluation.Evaluator`]): what measures the model.
        members, others ([`~memcontrol_hf.data.EncodedImages`]): images with the column `attribute`, as the model
            encodes them.
    """
    values = sorted({str(value) for images in (members, others) for value in images.images[ATTRIBUTE]})
    sides = []
    purposes = (Purpose.AUDIT_ATTRIBUTES, Purpose.AUDIT_ATTRIBUTES_HELD_OUT)
    for images, purpose in zip((members, others), purposes):
        guessed = guesses(evaluator, images, values, purpose).tolist()
        true = [values.index(str(images.images[row][ATTRIBUTE])) for row in images.distinct]
        sides.append((guessed, true, images.units_of(images.distinct)))
    names = ("attribute_advantage", "attribute_accuracy", "attribute_accuracy_held_out")
    try:
        result = metrics.attribute_inference(*sides)
    except ValueError as error:
        return dict.fromkeys(names, Figure(None, note=f"not estimable: {error}"))
    figures = (Figure(result.advantage, *result.interval), Figure(result.train), Figure(result.held_out))
    return dict(zip(names, figures))


def guesses(evaluator: Evaluator, images: EncodedImages, values: list[str], purpose: Purpose) -> torch.Tensor:
    """The place in `values` of the value that is guessed for each distinct image, `[N]`."""
    asking = replace(evaluator, encode_captions=True)
    losses = [asking.losses(with_value(images, value), purpose) for value in values]
    return torch.stack(losses).argmin(0)


def with_value(images: EncodedImages, value: str) -> EncodedImages:
    """The same images, with one value of the attribute in all captions in the place of each image's own."""
    result = copy.copy(images)
    texts = [
        _word(str(own)).sub(lambda _: value, text)
        for own, text in zip(images.images[ATTRIBUTE], images.images["text"])
    ]
    result.images = images.images.remove_columns("text").add_column("text", texts)
    return result


def _word(value: str) -> re.Pattern:
    """A pattern that finds a value as a word of a caption, in upper or lower case."""
    return re.compile(rf"(?<!\w){re.escape(value)}(?!\w)", re.IGNORECASE)
