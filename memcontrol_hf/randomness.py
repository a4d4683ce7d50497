"""Seeds: one generator for each random draw, and every purpose that draws are seeded for."""

import numpy as np
import torch


def seeded_generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on a tuple of non-negative integers and on nothing else.

    Each image of each purpose gets one, so that no number depends on the batch, on the order of the draws, or on how
    many processes share the work.
    """
    sequence = np.random.SeedSequence((len(key), *key))  # the length, since numpy takes (1,) and (1, 0) for the same
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))
