"""The settings of a screening, which are checked when they are made."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ScreeningSettings:
    """The settings of a screening.

    Args:
        steps (`int`): Number of steps of each run, at least `every`.
        every (`int`): Number of steps for each probe, at least 1.
        learning_rate (`float`): Learning rate of the runs, above 0.
        seeds (`int`): Number of runs, each with a seed of its own; at least 1.
        seed (`int`): Random seed of the first run.

    Raises:
        ValueError: names the value, what is allowed, and what to do.
    """

    steps: int
    every: int
    learning_rate: float
    seeds: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("every", "seeds", "steps"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} of a screening must be at least 1, but is {value}: give {name}=")
        if self.steps < self.every:
            raise ValueError(
                f"a screening of {self.steps} steps has no probe every {self.every} steps: give more steps, or a "
                "smaller every"
            )
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"the learning rate of a screening must be positive, but is {self.learning_rate}")

    @property
    def run_seeds(self) -> list[int]:
        """The random seed of each run."""
        return [self.seed + number for number in range(self.seeds)]

    @property
    def arguments(self) -> dict[str, Any]:
        """The training arguments that the settings say."""
        return {"max_steps": self.steps, "learning_rate": self.learning_rate}

    @property
    def stretches(self) -> dict[int, int]:
        """The steps that are probed, counted from 0, and how many steps each of them stands for.

        The training is cut into stretches of `every` steps, the last one perhaps shorter, and the step in the middle
        of each is probed (the midpoint rule: the first steps of a stretch lower the loss more than the last ones).
        """
        sizes = {start: min(self.every, self.steps - start) for start in range(0, self.steps, self.every)}
        return {start + (size - 1) // 2: size for start, size in sizes.items()}
