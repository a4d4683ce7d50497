"""Screening: one training with every block on says what each block learns and what it memorizes.

Reading a stored screening needs no PyTorch. What takes part in the training is imported by its own name: `run` makes
the trainings, `probes` multiplies the steps with gradients, `estimates` adds the products up, and `aside` leaves no
trace of the training.
"""

from .other_trainers import other_trainers
from .result import SCREENING_VERSION, Screening

__all__ = ["SCREENING_VERSION", "Screening", "other_trainers"]
