"""Seeds: a generator for each random draw, and every purpose that draws are seeded for."""

from collections.abc import Iterable
from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What a random draw is for. The purpose is part of the draw's key, so that no two purposes share noise.

    The numbers are part of every measured figure: a new purpose takes a new number.
    """

    TRAINING = 0
    TRIAL_ROWS = 1
    MEMBERS = 2
    NONMEMBERS = 3
    EVALUATION_CAPTIONS = 4
    TRAINING_CAPTIONS = 5
    MITIGATIONS = 6
    SCREENING_TRAIN = 7
    SCREENING_VALIDATION = 8

    AUDIT_PROMPTS = 100
    AUDIT_MEMBERS = 101
    AUDIT_NONMEMBERS = 102
    AUDIT_SAMPLES = 103
    AUDIT_QUALITY = 104
    AUDIT_HALVES = 105
    AUDIT_REFERENCES = 106
    AUDIT_TRAJECTORIES = 107
    AUDIT_CANARIES = 108
    AUDIT_EMBEDDINGS = 109
    AUDIT_EMBEDDING_SAMPLES = 110
    AUDIT_ATTRIBUTES = 111
    AUDIT_ATTRIBUTES_HELD_OUT = 112

    TRACKED_IMAGES = 200


def seeded_generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on a tuple of non-negative integers and on nothing else.

    Each image of each purpose gets its own, so that no number depends on the batch, on the order of the draws, or on
    how many processes share the work.
    """
    sequence = np.random.SeedSequence((len(key), *key))  # the length, since numpy takes (1,) and (1, 0) for the same
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))


def row_keys(seed: int, purpose: Purpose, numbers: Iterable[int]) -> list[tuple[int, int, int]]:
    """The key of each row's draws for one purpose: the seed, the purpose and the row's number in its data set."""
    return [(seed, int(purpose), number) for number in numbers]
