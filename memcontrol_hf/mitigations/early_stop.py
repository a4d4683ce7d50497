"""Early stopping on a memorization metric."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import TrainerCallback, TrainerState

from .base import Mitigation

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainingArguments

    from ..families import Family


@dataclass
class EarlyStop(Mitigation):
    """Stops the training when a memorization metric passes a limit (https://huggingface.co/papers/2505.17638).

    The paper finds that a model first learns to generate well and memorizes later, at a step that grows with the
    number of images.

    The metric compares the training images with the validation images. The validation images are therefore no longer
    unseen, and final figures have to be measured on the held-out images.

    - Cost: one evaluation every `every` steps. `membership_auc` takes `eval_num_timesteps` forward passes for each
      image, and `noise_norm` twice as many; `amd` samples images.
    - Against: memorization that the metric shows, up to `every` steps late.
    - Not against: other attacks, and a few images that are memorized early (repeated ones), which a mean hides.

    Args:
        metric (`str`):
            Metric: `membership_auc`, `noise_norm` or `amd`.
        limit (`float`, *optional*):
            Worst value that is allowed; 0.6 by default for `membership_auc`, required for the other metrics.
        every (`int`):
            Number of steps between two evaluations.
    """

    usage = (
        "early_stop[:metric=membership_auc,limit=0.6,every=25]; metric is membership_auc, noise_norm or amd, limit a "
        "number (to be given for noise_norm and amd), every a whole number of at least 1"
    )
    metric: str = "membership_auc"
    limit: float | None = None
    every: int = 25

    def __post_init__(self) -> None:
        if self.metric not in ("membership_auc", "noise_norm", "amd"):
            raise ValueError(f"metric is {self.metric}")
        if self.limit is None and self.metric == "membership_auc":
            self.limit = 0.6
        if self.limit is None or not math.isfinite(self.limit):
            raise ValueError(f"limit is {self.limit}")
        if self.every < 1:
            raise ValueError(f"every is {self.every}")

    @property
    def measured(self) -> tuple[str, ...]:
        return (self.metric,)

    def check(self, family: "Family", images: "Dataset", args: "TrainingArguments", tunes_text: bool) -> None:
        if self.metric in family.not_applicable:
            reason = family.not_applicable[self.metric]
            raise ValueError(f"early_stop cannot go by {self.metric}: {reason}; give another metric=")
        if 0 < args.max_steps < self.every:
            raise ValueError(
                f"early_stop looks every {self.every} steps, but there are {args.max_steps}: give another every="
            )

    def callback(self, measure: Callable[[list[str]], dict[str, float]]) -> TrainerCallback:
        return EarlyStopCallback(self, measure)

    def passed(self, value: float) -> bool:
        """Whether a value of the metric is worse than the limit."""
        return value < self.limit if self.metric == "amd" else value > self.limit

    def stopped(self, state: TrainerState) -> bool:
        """Whether a run stopped at this state, for example at the state in a checkpoint."""
        values = [log[f"eval_{self.metric}"] for log in state.log_history
                  if log["step"] == state.global_step and f"eval_{self.metric}" in log]  # fmt: skip
        return bool(values) and state.global_step % self.every == 0 and self.passed(values[-1])


class EarlyStopCallback(TrainerCallback):
    """Measures the metric of an [`EarlyStop`] every `every` steps, and stops the training when it passes the limit.

    Args:
        early_stop ([`EarlyStop`]): metric, limit, and number of steps between two measurements.
        measure (`Callable`): function from names of metrics to figures, whose names begin with `eval_`.
    """

    def __init__(self, early_stop: EarlyStop, measure: Callable[[list[str]], dict[str, float]]):
        self._early_stop, self._measure = early_stop, measure

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self._early_stop.every:
            return
        figures = self._measure([self._early_stop.metric])
        if self._early_stop.passed(figures[f"eval_{self._early_stop.metric}"]):
            control.should_training_stop = True
