"""Callbacks that end the training of a trial: after too long a time, or when other trials were better."""

import time

from transformers import TrainerCallback

from .processes import Processes, SearchProcesses
from .protocol import SearchableTrainer

# An objective that needs sampling is judged by another metric in the middle of a training.
_STAND_INS = {"fid": "loss", "amd": "membership_auc"}
# So many others have to dominate a trial: docs/trials.md has what one more or one less would lose and save.
_DOMINATING = 2


class TimeoutCallback(TrainerCallback):
    """Ends the training of a trial that takes too long, in all of its processes at the same step."""

    def __init__(self, seconds: float | None, processes: Processes) -> None:
        self.seconds, self._processes = seconds, processes
        self.start()

    def start(self) -> None:
        """Start the clock, as a trial begins."""
        self._started = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if self.seconds and self._processes.any(time.monotonic() - self._started > self.seconds):
            raise TimeoutError(f"its training took longer than {self.seconds:g} s")


class Dominated(Exception):
    """Other trials dominate a trial in the middle of its training. All of its processes raise this at one step."""


class PruningCallback(TrainerCallback):
    """Ends the training of a trial that other trials dominate at the same step.

    Optuna's pruners know one objective. Here metrics that need no sampling are compared; lower is better in each.

    Args:
        share (`float`, *optional*):
            Share of the training's steps after which the trial is measured; `None` lets all trials end.
        trainer ([`SearchableTrainer`]):
            The trainer that runs the trial.
        processes ([`SearchProcesses`]):
            The processes that share the trial.
    """

    def __init__(self, share: float | None, trainer: SearchableTrainer, processes: SearchProcesses) -> None:
        self._share, self._trainer, self._processes = share, trainer, processes
        self._metrics = list(dict.fromkeys(_STAND_INS.get(name, name) for name in trainer.args.objectives))

    def on_step_end(self, args, state, control, **kwargs):
        if self._share is None or state.global_step != max(1, round(self._share * state.max_steps)):
            return
        figures = self._trainer.evaluate_mid_training(self._metrics)
        others = self._processes.dominating_trials([figures[f"eval_{name}"] for name in self._metrics])
        if len(others) >= _DOMINATING:
            named = " and ".join(map(str, others[:_DOMINATING]))
            raise Dominated(f"stopped after {state.global_step} steps, where the trials {named} were better")
