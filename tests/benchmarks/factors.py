"""The decomposition of a base's weights: read from the disk by a second process, beside computing it."""

import os
import tempfile
from collections.abc import Iterator
from typing import Any

import torch

from memcontrol_hf.tuners import svd

from .timing import alternate, clock, compared

WIDTHS = {320: 5, 640: 5, 1280: 6}
"""Attention blocks of Stable Diffusion 1.5 by their number of channels."""

TEXT = 768
"""Features of a token of a caption in Stable Diffusion 1.5."""


def shapes(width: int) -> dict[tuple[int, int], int]:
    """Shapes of the weights of one attention block, and how many weights have each.

    Two projections at its ends, four in its self-attention, two and two in its cross-attention, and the two maps of
    the feed-forward layer.
    """
    return {(width, width): 8, (width, TEXT): 2, (8 * width, width): 1, (width, 4 * width): 1}


def rows(pairs: int) -> Iterator[dict[str, Any]]:
    """The rows of the page: one for the blocks of each width, whose weights of one shape take the same time.

    Args:
        pairs: At most so many turns of each side; a decomposition of the largest takes seconds, so three do.
    """
    before = os.environ.get("MEMCONTROL_SVD_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MEMCONTROL_SVD_CACHE"] = folder
        try:
            for width, count in WIDTHS.items():
                yield _row(width, count, min(pairs, 3))
        finally:
            os.environ.pop("MEMCONTROL_SVD_CACHE")
            os.environ |= {} if before is None else {"MEMCONTROL_SVD_CACHE": before}


def _row(width: int, count: int, pairs: int) -> dict[str, Any]:
    totals: dict[str, list[float]] = {"from the disk": [0.0] * pairs, "computed": [0.0] * pairs}
    for shape, of_shape in shapes(width).items():
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        svd.svd_factors(weight.clone())  # puts the factors on the disk
        sides = {
            "from the disk": lambda weight=weight: svd.svd_factors(weight.clone()),
            "computed": lambda weight=weight: svd._decomposed(weight),
        }
        for side, values in alternate(sides, pairs, clock(torch.device("cpu"))).items():
            totals[side] = [total + count * of_shape * value for total, value in zip(totals[side], values)]
    name = f"SV-DIFF's decomposition, the {count} blocks of {width} channels in Stable Diffusion 1.5"
    return compared(name, 0.1, totals)
