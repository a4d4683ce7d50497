"""Early stopping on a memorization metric."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import TrainerCallback, TrainerState

from .base import Mitigation

if TYPE_CHECKING:
    from ..trainer import MemControlTrainer


@dataclass
class EarlyStop(Mitigation):
    """Stops when a memorization metric passes a limit (https://huggingface.co/papers/2505.17638: memorization sets in
    after quality does, at a time that grows with the number of images).

    The metric compares the training images with the validation images, which after that are no longer unseen: final
    figures are for the held-out images.

    - Cost: an evaluation each `every` steps. For `membership_auc` and `noise_norm` these are `eval_num_timesteps`
      forward passes (twice as many for `noise_norm`) for each image; `amd` samples images.
    - Against: what the metric sees, up to `every` steps late.
    - Not against: other attacks, and a few images that are memorized early (repeated ones), which a mean hides.

    Args:
        metric (`str`):
            `membership_auc`, `noise_norm` or `amd`.
        limit (`float`, *optional*):
            The worst value that is allowed; 0.6 for `membership_auc`, to be given for the others.
        every (`int`):
            Steps between two looks.
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

    def passed(self, value: float) -> bool:
        """Whether a value of the metric is worse than the limit."""
        return value < self.limit if self.metric == "amd" else value > self.limit

    def stopped(self, state: TrainerState) -> bool:
        """Whether a run stopped at this state, say that of a checkpoint."""
        looks = [log[f"eval_{self.metric}"] for log in state.log_history
                 if log["step"] == state.global_step and f"eval_{self.metric}" in log]  # fmt: skip
        return bool(looks) and state.global_step % self.every == 0 and self.passed(looks[-1])


class EarlyStopCallback(TrainerCallback):
    """Looks at the metric of an [`EarlyStop`] while a trainer trains."""

    def __init__(self, early_stop: EarlyStop, trainer: "MemControlTrainer"):
        self.early_stop = early_stop
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.early_stop.every:
            return
        figures = self.trainer.evaluate_mid_training([self.early_stop.metric])
        if self.early_stop.passed(figures[f"eval_{self.early_stop.metric}"]):
            control.should_training_stop = True
