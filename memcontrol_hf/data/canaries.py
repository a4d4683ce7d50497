"""Canaries: training images that show whether attacks find what is there to be found."""

from collections import Counter

import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from datasets.exceptions import DatasetsError

from ..error_lines import first_line
from ..images import pixel_digest
from ..randomness import seeded_generator

INCLUDED = "included"
"""Column of the canaries for which a coin was flipped: whether the image is trained on."""


def plant_canaries(train: Dataset, count: int, repeats: int, seed: int = 0) -> Dataset:
    """Repeat some training images as canaries: an audit counts how many of them each attack finds.

    A model is likely to memorize an image that is repeated, so an attack that finds no canary proves little.

    Args:
        train (`Dataset`): training images with the column `image`.
        count (`int`): number of different images to repeat, drawn by the seed.
        repeats (`int`): number of times that each canary occurs in the result, at least 2.
        seed (`int`): random seed of the draw.

    Returns:
        `Dataset`: the training images, followed by the repeats.

    Raises:
        ValueError: for more canaries than images that occur once, and for `repeats` below 2.
    """
    if count == 0:
        return train
    rows = _drawn(train, count, seed)
    if repeats < 2:
        raise ValueError(f"--canary_repeats must be at least 2, but is {repeats}")
    return concatenate_datasets([train, train.select(rows * (repeats - 1))])


def flip_canaries(train: Dataset, count: int, repeats: int, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Flip a coin for each canary: it is trained on, or it is kept out and known.

    From these coins an audit measures a lower bound of epsilon; see [`~memcontrol_hf.metrics.measured_epsilon`].

    Args:
        train (`Dataset`): training images with the column `image`.
        count (`int`): number of different images that are canaries, drawn by the seed.
        repeats (`int`): number of times that each canary that is trained on occurs in the training images, 1 or more.
        seed (`int`): random seed of the draw and of the coins.

    Returns:
        pair of `Dataset`: the training images without the canaries that are kept out, followed by the repeats; and the
        canaries, with the column `included` that says which of them are trained on.

    Raises:
        ValueError: for more canaries than images that occur once, for `repeats` below 1, and where the coins leave no
            training image.
    """
    rows = _drawn(train, count, seed)
    if repeats < 1:
        raise ValueError(f"--canary_repeats must be at least 1, but is {repeats}")
    coins = torch.rand(count, generator=seeded_generator(seed, count, 1)) < 0.5
    included = [row for row, coin in zip(rows, coins) if coin]
    left_out = set(rows) - set(included)
    kept = [row for row in range(len(train)) if row not in left_out]
    if not kept:
        raise ValueError(f"--flip_canaries leaves no training image of {len(train)}: give fewer --canaries")
    canaries = train.select(rows).add_column(INCLUDED, coins.tolist())
    return train.select(kept + included * (repeats - 1)), canaries


def _drawn(train: Dataset, count: int, seed: int) -> list[int]:
    """The rows of the canaries, in order: `count` of those whose image occurs once."""
    digests = [pixel_digest(image) for image in train["image"]]
    counts = Counter(digests)
    rows = [row for row, digest in enumerate(digests) if counts[digest] == 1]
    if not 0 < count <= len(rows):
        raise ValueError(
            f"--canaries must lie between 0 and {len(rows)}, the training images that occur once: {count}"
        )
    order = torch.randperm(len(rows), generator=seeded_generator(seed, count)).tolist()[:count]
    return [rows[i] for i in sorted(order)]


def load_canaries(folder: str) -> Dataset:
    """Read the canaries that a training with `--flip_canaries` left in `private/split/canaries`.

    Raises:
        ValueError: for a folder that holds no data set with the columns `image` and `included`.
    """
    try:
        canaries = load_from_disk(folder)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(f"--canaries {folder!r}: {first_line(error)}") from None
    if not isinstance(canaries, Dataset) or not {"image", INCLUDED} <= {*canaries.column_names}:
        raise ValueError(
            f"--canaries {folder!r} holds no images with a column {INCLUDED!r}: give the folder "
            "private/split/canaries of a training with --flip_canaries"
        )
    return canaries
