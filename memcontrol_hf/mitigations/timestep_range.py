"""A mitigation that trains in a part of the noise schedule alone."""

from dataclasses import dataclass

import torch

from .base import Mitigation


@dataclass
class TimestepRange(Mitigation):
    """Draws the timesteps of training from a range of the noise schedule (https://huggingface.co/papers/2601.21348).

    The paper finds that uniformly drawn timesteps bias training towards memorization, and that less is memorized when
    training is shifted towards the later steps of sampling, which have little noise. The paper's abstract was read,
    not its formulas: it draws timesteps from a distribution whose width it changes, while here every timestep in the
    range has the probability that it has in the whole schedule, and no other is drawn. Which part memorizes most is
    not settled: https://huggingface.co/papers/2602.17846 finds it at medium noise. No range is the default, therefore:
    try several, and audit the result.

    A row draws its timestep by its own generator, so that batch size, number of processes and an interruption change
    nothing. Evaluation and attacks measure the whole schedule.

    - Cost: no forward pass.
    - Against: what would be memorized at the timesteps that are left out.
    - Not against: memorization at the other timesteps, which get more of the steps. At the timesteps that are left out
      the adapter is not trained, and learns only what carries over.

    Args:
        low (`float`):
            Lower end of the range, as a share of the schedule: 0 is almost no noise, 1 almost only noise.
        high (`float`):
            Upper end of the range, above `low`.
    """

    usage = "timestep_range:low=0.2,high=0.8 or one of both, shares of the schedule between 0 and 1, low below high"
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"low is {self.low} and high is {self.high}")
        if (self.low, self.high) == (0, 1):
            raise ValueError("low is 0 and high is 1, which is the whole schedule")

    def timestep(self, timestep, noise, generator):
        share = torch.rand((), generator=generator, dtype=torch.double).item()
        return noise.timestep_at(self.low + (self.high - self.low) * share)
