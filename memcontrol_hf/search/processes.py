"""The processes that share each trial. The first of them owns the study; all of them call the same methods."""

import atexit
import dataclasses
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

import optuna
import torch
from accelerate.utils import broadcast_object_list
from optuna.trial import TrialState
from transformers.trainer_utils import BestRun

from ..error_lines import first_line
from .front import NoRunError, best_runs
from .protocol import HpName, HpSpace
from .settings import SearchSettings
from .storage import open_storage
from .study import Outcome, PlannedTrial, SharedStudy

_AGREEMENT = timedelta(minutes=5)  # how long the processes of a trial wait for each other after it
_Value = TypeVar("_Value")


def from_first(value: _Value, world_size: int) -> _Value:
    """The value that the first process has, on all of them."""
    message = [value]
    if world_size > 1:
        broadcast_object_list(message)
    return message[0]


def reason_in_words(error: BaseException) -> str:
    """Why a training failed, as a report may say it: the text of PyTorch names this machine's processes."""
    return "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error)


def _end(group: "torch.distributed.ProcessGroup") -> None:
    """End a group of gloo, and the default one if it is of gloo, too, at the end of the process.

    Their threads can abort a process that has done its work, and the launch with it, when they outlive Python
    (https://github.com/pytorch/pytorch/pull/179291).
    """
    with suppress(ValueError):  # it has ended before
        torch.distributed.destroy_process_group(group)
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


class Processes:
    """What the processes of a trial have to agree on; a single process agrees with itself."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._group = None
        if world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo", timeout=_AGREEMENT)
            atexit.register(_end, self._group)

    def first_error(self, error: str | None) -> str | None:
        """The first error that a process had, if any.

        Raises:
            RuntimeError: when a process does not say how the training ended for it. The text is the error of this
                process, if it had one.
        """
        if self._group is None:
            return error
        errors: list[str | None] = [None] * self.world_size
        try:
            torch.distributed.all_gather_object(errors, error, group=self._group)
        except RuntimeError as raised:
            raise RuntimeError(error or f"another process is missing: {first_line(raised)}") from None
        return next((f"{e} (process {i})" for i, e in enumerate(errors) if e is not None), None)

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in at least one process."""
        if self._group is None:
            return flag
        flags = torch.tensor(int(flag))
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(flags)


class SearchProcesses(Processes):
    """The processes of a search, as one of them sees the others.

    Args:
        settings ([`SearchSettings`]):
            Settings of the search.
        address (`str`):
            Storage of the study.
        world_size (`int`):
            Number of processes that share each trial.
        shared ([`SharedStudy`], *optional*):
            The study, in the first process; `None` in the others.
    """

    def __init__(self, settings: SearchSettings, address: str, world_size: int, shared: SharedStudy | None) -> None:
        super().__init__(world_size)
        self._settings, self._address, self._shared = settings, address, shared

    def next(self, hp_space: HpSpace, hp_name: HpName | None) -> PlannedTrial | None:
        """The trial that the processes run next; `None` at the end of the search. See [`SharedStudy.next`]."""
        return from_first(self._shared.next(hp_space, hp_name) if self._shared else None, self.world_size)

    def record(self, outcome: Outcome) -> None:
        """Record how the trial ended; when it failed in one process, it has failed.

        Raises:
            RuntimeError: when the trial failed in one process alone, and the others, which wait for that process in
                the middle of a step, cannot be told. The trial is recorded as failed then. The launcher ends the
                others; with `--max_restarts` it starts all of them again, and the search goes on.
        """
        if not outcome.in_all_processes and (error := self._failure(outcome)):
            outcome = dataclasses.replace(outcome, state=TrialState.FAIL, reason=error)
        if self._shared:
            self._shared.record(outcome)

    def _failure(self, outcome: Outcome) -> str | None:
        """The first error that a process had in the trial, if any."""
        try:
            return self.first_error(outcome.reason or None)
        except RuntimeError as reason:
            number = outcome.trial.number
            study = optuna.load_study(study_name=self._settings.study_name, storage=open_storage(self._address))
            SharedStudy(study, self._settings).fail(number, str(reason))
            raise RuntimeError(f"trial {number} failed in one process alone: {reason}") from None

    def queue_again(self, trial: PlannedTrial, interrupt: BaseException) -> None:
        """Have a trial repeated that Ctrl-C, say, ended."""
        if self._shared:
            self._shared.queue_again(trial.number, interrupt)

    def dominating_trials(self, values: list[float]) -> list[int]:
        """The trials that dominated the current one at this point; see [`SharedStudy.dominating_trials`]."""
        return from_first(self._shared.dominating_trials(values) if self._shared else [], self.world_size)

    def best(self) -> BestRun | list[BestRun]:
        """The best run of the study, or with several objectives the runs of the Pareto front.

        `run_summary` is the study in the first process. In the others it has no trials, and tells the directions.

        Raises:
            NoRunError: when there is none.
        """
        runs, why_none = [], None
        if self._shared:
            runs = best_runs(self._shared.study)
            why_none = None if runs else self._shared.why_no_run()
        if self.world_size > 1:
            plain, why_none = from_first(([run._replace(run_summary=None) for run in runs], why_none), self.world_size)
            if not self._shared:
                directions = self._settings.directions
                runs = [run._replace(run_summary=optuna.create_study(directions=directions)) for run in plain]
        if not runs:
            raise NoRunError(why_none)
        return runs[0] if len(self._settings.directions) == 1 else runs
