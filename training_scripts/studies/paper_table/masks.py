"""Random masks that are compared with searched masks."""

import random
from collections.abc import Mapping

import numpy as np

from memcontrol_hf import MemControlTrainer


def block_sizes(trainer: MemControlTrainer) -> dict[str, int]:
    """The number of parameters that each block trains."""
    sizes = {}
    for block in trainer.search_space.blocks:
        trainer.set_mask({block: True})
        sizes[block] = trainer.trainable_parameters
    return sizes


def random_mask(sizes: Mapping[str, int], like: Mapping[str, bool], seed: int) -> dict[str, bool]:
    """A random mask that differs from `like` and trains as many parameters up to 5 %, or the nearest of 1,000 draws.

    Args:
        sizes: Number of parameters that each block trains.
        like: Mask whose size is wanted.
        seed: Random seed of the draw.
    """
    generator, wanted = random.Random(seed), sum(sizes[block] for block, on in like.items() if on)
    nearest, off_by = dict(like), float("inf")
    for _ in range(1000):
        blocks = generator.sample(list(sizes), len(sizes))
        totals = np.cumsum([sizes[block] for block in blocks])
        count = int(np.abs(totals - wanted).argmin()) + 1
        mask = {block: block in blocks[:count] for block in sizes}
        distance = abs(int(totals[count - 1]) - wanted)
        if mask != like and distance < off_by:
            nearest, off_by = mask, distance
        if off_by <= 0.05 * wanted:
            break
    return nearest
