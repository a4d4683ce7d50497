"""What the search asks of a trainer, and the kinds of functions that a caller may give to the search."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import optuna
from transformers import TrainerCallback

from ..screening import Screening
from ..search_space import SearchSpace

HpSpace = Callable[[optuna.Trial], dict[str, Any]]
"""From a trial to its hyperparameters: `mask`, and any fields of the training arguments."""

ComputeObjective = Callable[[dict[str, float]], float | Sequence[float]]
"""From the figures of an evaluation to the value of each objective."""

HpName = Callable[[optuna.Trial], str]
"""From a trial to the name of its run in trackers."""


class SearchArguments(Protocol):
    """The training arguments that the search reads; all of them but `objectives` are transformers' own."""

    output_dir: str
    seed: int
    learning_rate: float
    objectives: list[str]
    world_size: int
    process_index: int
    n_gpu: int


class SearchableTrainer(Protocol):
    """A `transformers.Trainer` whose trials can be searched."""

    args: SearchArguments
    search_space: SearchSpace

    @property
    def trainable_parameters(self) -> int:
        """Number of parameters that the current mask trains."""

    @property
    def trainable_percent(self) -> float:
        """The same number in percent of all parameters."""

    def apply_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Set the mask and the arguments of the next run."""

    def train_and_evaluate(self) -> dict[str, float]:
        """Run one trial with the current mask and arguments, and return its figures."""

    def obstacle_to_screening(self, steps: int | None = None) -> str | None:
        """Why the trainer cannot be screened, with what to do; `None` when it can."""

    def screen(self, steps: int | None = None, *, learning_rate: float | None = None, seeds: int = 1) -> Screening:
        """Train all blocks together, and read off what each block learns and what it memorizes."""

    def evaluate_mid_training(self, metrics: list[str]) -> dict[str, float]:
        """Measure the model for a callback that interrupts a training."""

    def recipe(self) -> dict[str, Any]:
        """The arguments that build this trainer again in another process; all of them can be pickled."""

    def add_callback(self, callback: TrainerCallback) -> None:
        """As in transformers."""

    def remove_callback(self, callback: TrainerCallback) -> None:
        """As in transformers."""

    def is_world_process_zero(self) -> bool:
        """As in transformers."""
