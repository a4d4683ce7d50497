"""The masks that are compared: the one that a screening suggests, and random ones of its size."""

import random
from collections.abc import Mapping
from itertools import combinations

from memcontrol_hf.screening import Screening

TOLERANCE = 1 / 8
"""How far the parameters of a random mask may be from those of the mask it is compared with, as a share of these."""

Mask = dict[str, bool]


def size(mask: Mask, parameters: Mapping[str, int]) -> int:
    """The number of parameters that a mask trains."""
    return sum(parameters[block] for block, on in mask.items() if on)


def masks_of_size(parameters: Mapping[str, int], goal: float, least: int = 1) -> list[Mask]:
    """All masks whose number of parameters differs from `goal` by at most `TOLERANCE`, the masks of few blocks first.

    Args:
        parameters: Number of trained parameters of each block.
        goal: Number of parameters that is wanted.
        least: Number of masks that are needed; the tolerance is doubled until there are so many.
    """
    tolerance = TOLERANCE * goal
    while True:
        subsets = (subset for count in range(1, len(parameters) + 1) for subset in combinations(parameters, count))
        fitting = [
            dict.fromkeys(parameters, False) | dict.fromkeys(subset, True)
            for subset in subsets
            if abs(sum(parameters[block] for block in subset) - goal) <= tolerance
        ]
        if len(fitting) >= min(least, 2 ** len(parameters) - 1):
            return fitting
        tolerance *= 2


def random_masks(mask: Mask, parameters: Mapping[str, int], same: str, count: int, seed: int) -> list[Mask]:
    """Different random masks of the size of a mask, which is none of them.

    Args:
        mask: The mask over the blocks.
        parameters: Number of trained parameters of each block.
        same: `"parameters"` draws from [`masks_of_size`], `"blocks"` from all masks with as many blocks.
        count: Number of masks.
        seed: Random seed.
    """
    if same == "blocks":
        subsets = combinations(mask, sum(mask.values()))
        fitting = [dict.fromkeys(mask, False) | dict.fromkeys(subset, True) for subset in subsets]
    else:
        fitting = masks_of_size({block: parameters[block] for block in mask}, size(mask, parameters), count + 1)
    fitting.remove(mask)
    return random.Random(seed).sample(fitting, count)


def worst_mask(mask: Mask, screening: Screening) -> Mask:
    """The mask of the size of a mask that the screening's additive model calls worst, and that is another one.

    The worst mask has the largest share of all that is memorized, less its share of all that is learned.
    """
    learned, memorized = screening.predict(dict.fromkeys(mask, True))

    def badness(candidate: Mask) -> float:
        learns, memorizes = screening.predict(candidate)
        return memorizes / max(memorized, 1e-12) - learns / max(learned, 1e-12)

    fitting = masks_of_size(screening.parameters, size(mask, screening.parameters), 2)
    return max((candidate for candidate in fitting if candidate != mask), key=badness)
