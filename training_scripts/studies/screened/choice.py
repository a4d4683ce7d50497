"""The masks that are compared: the one that a screening suggests, and random ones of its size."""

import itertools
import random
from collections.abc import Mapping

from transformers.trainer_utils import BestRun

from memcontrol_hf.screening import Screening
from memcontrol_hf.search import select_run

TOLERANCE = 1 / 8
"""How far the parameters of a random mask may be from those of the mask it is compared with, as a share of these."""

Mask = dict[str, bool]


def suggested_mask(screening: Screening) -> Mask:
    """The knee of a screening's front: the rule by which a search without a budget selects a run, without trials.

    [`~memcontrol_hf.search.select_run`] reads the knee off the figures of trials. Here it reads the knee off what the
    additive model of the screening predicts of all masks of its front, beside the frozen base.
    """
    off = dict.fromkeys(screening.learns, False)
    runs = []
    for mask in [off, *screening.masks(len(off))]:
        learns, memorizes = screening.predict(mask)
        runs.append(BestRun(str(len(runs)), (-learns, memorizes), {"mask": mask}))
    return select_run(runs).hyperparameters["mask"]


def random_masks(mask: Mask, parameters: Mapping[str, int], same: str, count: int, seed: int) -> list[Mask]:
    """Different random masks of the size of a mask, which is none of them.

    Args:
        mask: The mask over the blocks.
        parameters: Number of trained parameters of each block.
        same: `"parameters"` draws from all masks whose number of parameters differs by at most `TOLERANCE`, `"blocks"`
            from all masks with as many blocks.
        count: Number of masks.
        seed: Random seed.
    """
    goal = sum(parameters[block] for block, on in mask.items() if on)

    def fits(blocks: tuple[str, ...]) -> bool:
        if same == "blocks":
            return len(blocks) == sum(mask.values())
        return abs(sum(parameters[block] for block in blocks) - goal) <= TOLERANCE * goal

    sizes = range(1, len(mask) + 1)
    subsets = itertools.chain.from_iterable(itertools.combinations(mask, size) for size in sizes)
    fitting = [{block: block in blocks for block in mask} for blocks in subsets if fits(blocks)]
    fitting.remove(mask)
    return random.Random(seed).sample(fitting, count)
