"""The Optuna study that any number of processes work on: asking for trials, and recording how they ended."""

import copy
import logging
import math
import time
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from .front import complete_trials, dominates, is_frozen_base, pareto_front, selects_nothing, signs_of
from .protocol import HpName, HpSpace
from .sampler import REPEATS, SAMPLERS, SeededSampler
from .settings import SearchSettings, named_values
from .storage import check_study, open_storage
from .suggestions import all_suggested, plain
from .worker import STARTED, is_alive, seconds_of_a_trial, this_worker, wait_for_names

logger = logging.getLogger(__name__)

OVER_BUDGET = "over the budget"
"""The beginning of the reason of a trial that would train too many parameters."""

_BUDGET = "memorization_budget"  # the attribute of a study, and the constraint of its trials
_KILLED, _SURPLUS = "its process ended", "another process had begun the last trial"
_NOT_SUGGESTED = "no hyperparameters were suggested"
# The reasons of trials that do not count: they were lost, or never begun.
_NOT_COUNTED = (_KILLED, _SURPLUS, OVER_BUDGET)
# A search ends before its budget when it has `n_trials` times so many trials that do not count: almost every mask was
# tried already, or is too large.
_MOST_NOT_COUNTED = 20


@dataclass
class PlannedTrial:
    """A trial that is to be run: its number in the study, the name of its run in trackers, and its hyperparameters."""

    number: int
    name: str
    hyperparameters: dict[str, Any]


@dataclass
class Outcome:
    """How a trial ended.

    Args:
        trial ([`PlannedTrial`]):
            The trial.
        state (`TrialState`):
            `COMPLETE`, `FAIL` or `PRUNED`.
        reason (`str`):
            Why the trial failed or was stopped.
        in_all_processes (`bool`):
            Whether all processes that share the trial are known to have this outcome.
        values (list of `float`):
            Value of each objective; this and what follows are known of a complete trial only.
        figures (`dict[str, float]`):
            All figures that were measured.
        trainable_parameters (`int`):
            Number of parameters that the mask trained.
        trainable_percent (`float`):
            The same number in percent of all parameters.
        learning_rate (`float`):
            Learning rate of the training.
        seconds (`float`):
            Duration of training and measuring.
    """

    trial: PlannedTrial
    state: TrialState
    reason: str = ""
    in_all_processes: bool = False
    values: Sequence[float] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    trainable_parameters: int = 0
    trainable_percent: float = 0.0
    learning_rate: float = 0.0
    seconds: float = 0.0


class _BudgetedStudy(optuna.Study):
    """A study that judges all of its trials by one memorization budget, whatever the budget was when they ran.

    Optuna keeps constraints with each trial. A budget that was changed on the way would therefore not count for the
    earlier trials, and Gaussian processes refuse trials of which some have a constraint and some have none.
    """

    budget: float | None = None

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        """As in Optuna, where everything that reads trials calls this method: samplers, `get_trials` and `trials`."""
        sign = signs_of(self)[-1]
        return [self._judged(trial, sign) for trial in super()._get_trials(deepcopy, states, use_cache)]

    def _judged(self, trial: FrozenTrial, sign: int) -> FrozenTrial:
        if trial.state != TrialState.COMPLETE:
            return trial
        trial = copy.copy(trial)
        # Earlier versions kept the constraint.
        trial.system_attrs = {name: x for name, x in trial.system_attrs.items() if name != f"constraints:{_BUDGET}"}
        if self.budget is not None:
            trial.set_constraint(_BUDGET, sign * (trial.values[1] - self.budget))
        return trial


class SharedStudy:
    """An Optuna study that several workers share through its storage, as one of these workers sees it.

    The attributes that a study and its trials carry are a file format, by which later commands go on with a search:

    - study: `settings`, `memorization_budget`, `screening` (what [`~memcontrol_hf.screening.Screening.to_dict`] gives,
      or a `failure`), and `repeat N of trial M` (see [`~memcontrol_hf.search.repeat_runs`])
    - trial: `worker`, `started` (seconds since 1970), `hyperparameters`, `figures`, `trainable_parameters`,
      `trainable_percent`, `learning_rate` (neither `started` nor `learning_rate` in earlier versions); `same_as` (the
      number of the earlier trial whose figures it has), `repeats` (the number of the killed trial), `on_the_way`
      (figures in the middle of the training, for pruning) and `failure` (the reason)

    Args:
        study (`optuna.Study`): the study; [`SharedStudy.open`] opens or creates one.
        settings ([`SearchSettings`]): the settings of the search.
    """

    def __init__(self, study: optuna.Study, settings: SearchSettings) -> None:
        self.study = study
        self.settings = settings
        self._trial: optuna.Trial | None = None  # the trial that this worker runs now
        self._stopped = False  # whether the sampler has said that its space is used up

    @classmethod
    def open(cls, settings: SearchSettings, address: str) -> "SharedStudy":
        """Go on with the study at `address`, or create it; trials whose process was killed are queued again.

        Args:
            settings ([`SearchSettings`]):
                Settings of the search.
            address (`str`):
                Storage of the study; see [`~memcontrol_hf.search.open_storage`].

        Raises:
            ValueError: when the study was made with other settings, and when the storage cannot be opened.
        """
        check_study(address, settings.study_name, settings.settings or {}, only_study=settings.storage is None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = optuna.create_study(
                storage=open_storage(address),
                study_name=settings.study_name,
                directions=settings.directions,
                load_if_exists=True,
            )._storage
            study = _BudgetedStudy(settings.study_name, storage)
            if not study.trials:
                study.set_user_attr("settings", dict(settings.settings or {}))
                if settings.objectives is not None:
                    study.set_metric_names(list(settings.objectives))
        _check_objectives(study, settings)
        study.budget = settings.memorization_budget
        study.set_user_attr(_BUDGET, study.budget)
        wait_for_names(study)  # one that is killed before that is given up after some seconds
        shared = cls(study, settings)
        shared.queue_again_what_died()
        return shared

    # ---- before the first trial ----

    def has_trials(self) -> bool:
        """Whether a trial was begun, by any worker."""
        return bool(self._trials())

    def try_first(self, known: Sequence[Mapping[str, Any]], seed: int) -> None:
        """Let the study begin with known trials, and draw the others by the sampler of the settings.

        Args:
            known (list of `dict`): parameters of the first trials.
            seed (`int`): random seed of a sampler that is given by its name.
        """
        sampler = self.settings.sampler
        if isinstance(sampler, str):
            sampler = SeededSampler(SAMPLERS[sampler], seed, known)
        self.study.sampler = sampler
        if not isinstance(sampler, SeededSampler):
            for params in known:
                self.study.enqueue_trial(dict(params), skip_if_exists=True)

    # ---- asking for trials ----

    def next(self, hp_space: HpSpace, hp_name: HpName | None = None) -> PlannedTrial | None:
        """Ask for the trial that this worker is to run next; `None` when enough are finished or under way.

        A trial that repeats an earlier one, as any trial with all blocks off repeats the frozen base, is recorded with
        the earlier trial's figures at no cost, and the next one is asked for.
        """
        while (trial := self._ask()) is not None:
            if (planned := self._plan(trial, hp_space, hp_name)) is None:
                continue
            hyperparameters = planned.hyperparameters
            trial.set_user_attr("hyperparameters", dict(hyperparameters))
            earlier = self.earlier_same_trial(hyperparameters)
            if earlier is None:
                self._trial = trial
                return planned
            for attribute in ("trainable_parameters", "trainable_percent", "learning_rate"):
                trial.set_user_attr(attribute, earlier.user_attrs.get(attribute))
            trial.set_user_attr("same_as", earlier.number)
            self._finish(trial, earlier.values, earlier.user_attrs["figures"])
        return None

    def _ask(self) -> optuna.Trial | None:
        """The next trial, or `None` when enough are finished or under way."""
        trials, n_trials = self._trials(), self.settings.n_trials
        counted = sum(map(_counts, trials))
        if counted >= n_trials or len(trials) - counted >= _MOST_NOT_COUNTED * n_trials:
            return None
        if self._stopped or _used_up(trials):
            return None
        with self._heeding_the_sampler():
            trial = self.study.ask()
        trial.set_user_attr(STARTED, time.time())
        trial.set_user_attr("worker", this_worker())
        before = [t for t in self._trials() if t.number < trial.number]
        if sum(_counts(t) or t.state == TrialState.WAITING for t in before) >= n_trials:
            self.fail(trial.number, _SURPLUS)  # another worker asked at the same moment
            return None
        return trial

    def _plan(self, trial: optuna.Trial, hp_space: HpSpace, hp_name: HpName | None) -> PlannedTrial | None:
        """The trial with its hyperparameters; `None` when these could not be suggested, so that it has ended."""
        try:
            name = hp_name(trial) if hp_name else f"trial-{trial.number}"
            return PlannedTrial(trial.number, name, plain(hp_space(trial)))
        except optuna.TrialPruned as pruned:
            trial.set_user_attr("failure", f"{_NOT_SUGGESTED}: {pruned or 'pruned by hp_space'}")
            with self._heeding_the_sampler():
                self.study.tell(trial, state=TrialState.PRUNED)
        except Exception as error:
            reason = f"{_NOT_SUGGESTED}: {type(error).__name__}: {error}"
            logger.warning(f"trial {trial.number} failed: {reason}")
            self.fail(trial.number, reason)
        except BaseException as interrupt:
            self.queue_again(trial.number, interrupt)
            raise
        return None

    @contextmanager
    def _heeding_the_sampler(self) -> Iterator[None]:
        """Samplers whose space is used up call `study.stop`, which works inside of `study.optimize` alone."""

        def stop() -> None:
            self._stopped = True

        self.study.stop = stop
        try:
            yield
        finally:
            del self.study.stop

    def earlier_same_trial(self, hyperparameters: Mapping[str, Any]) -> FrozenTrial | None:
        """The first finished trial with the same hyperparameters, or with no block on, if these have none."""
        off = selects_nothing(hyperparameters)
        for trial in complete_trials(self.study):
            same = trial.user_attrs.get("hyperparameters") == hyperparameters
            if "same_as" not in trial.user_attrs and (same or (off and is_frozen_base(trial))):
                return trial
        return None

    def dominating_trials(self, values: Sequence[float]) -> list[int]:
        """Record the figures of this worker's trial in the middle of its training, and compare them.

        Args:
            values (list of `float`): figures of the trial, lower is better in each.

        Returns:
            list of `int`: numbers of the trials that dominated this one at the same point of their training.
        """
        self._trial.set_user_attr("on_the_way", values)
        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        others = [t for t in self.study.get_trials(deepcopy=False, states=states) if t.user_attrs.get("on_the_way")]
        points = np.array([values, *(other.user_attrs["on_the_way"] for other in others)])
        return [other.number for other, better in zip(others, dominates(points)[0, 1:]) if better]

    # ---- recording how trials ended ----

    def record(self, outcome: Outcome) -> None:
        """Record and log how this worker's trial ended. A trial that cannot be recorded has failed.

        The outcome of a trial that another worker has given up, since it took so long, is not recorded.
        """
        number = outcome.trial.number
        if self._is_finished(number):
            logger.warning(
                f"trial {number} took so long that another worker has given it up and runs it again: what it gave "
                "here is not used. A longer --trial_timeout prevents this"
            )
            return
        try:
            self._record(outcome)
        except Exception as error:
            with suppress(Exception):
                self.fail(number, f"it could not be recorded: {type(error).__name__}: {error}")
            raise

    def _is_finished(self, number: int) -> bool:
        return self._trials()[number].state.is_finished()

    def _record(self, outcome: Outcome) -> None:
        number, n_trials = outcome.trial.number, self.settings.n_trials
        if outcome.state == TrialState.PRUNED:
            with self._heeding_the_sampler():
                self.study.tell(self._trial, state=TrialState.PRUNED)
            logger.info(f"trial {number} of {n_trials}: {outcome.reason}")
        elif outcome.state == TrialState.FAIL:
            self.fail(number, outcome.reason)
            if not outcome.reason.startswith(_NOT_COUNTED):
                logger.warning(f"trial {number} failed: {outcome.reason}")
        else:
            self._record_complete(outcome)
            mask = outcome.trial.hyperparameters.get("mask", {})
            logger.info(
                f"trial {number} of {n_trials}: {sum(mask.values())} of {len(mask)} blocks, "
                f"{outcome.trainable_percent:.3g} % of the parameters, learning rate {outcome.learning_rate:.2g}: "
                f"{named_values(outcome.values, self.settings.objectives)} ({outcome.seconds:.0f} s)"
            )

    def _record_complete(self, outcome: Outcome) -> None:
        trial = self._trial
        trial.set_user_attr("trainable_parameters", outcome.trainable_parameters)
        trial.set_user_attr("trainable_percent", outcome.trainable_percent)
        trial.set_user_attr("learning_rate", outcome.learning_rate)
        self._finish(trial, outcome.values, outcome.figures)

    def _finish(
        self,
        trial: optuna.Trial,
        values: Sequence[float],
        figures: Mapping[str, float],
    ) -> None:
        """Record a trial as complete; figures that are not finite are left out, since JSON has none."""
        trial.set_user_attr("figures", {name: value for name, value in figures.items() if math.isfinite(value)})
        with self._heeding_the_sampler():
            self.study.tell(trial, values)

    def fail(self, number: int, reason: str) -> bool:
        """Record a trial as failed, and return whether it was not finished already."""
        try:
            self.study._storage.set_trial_user_attr(self._trials()[number]._trial_id, "failure", reason)
            with self._heeding_the_sampler():
                self.study.tell(number, state=TrialState.FAIL)
        except (UpdateFinishedTrialError, ValueError):  # another process has finished it
            return False
        return True

    # ---- what killed processes leave behind ----

    def queue_again_what_died(self, dead: Sequence[Any] = ()) -> None:
        """Record trials whose process was killed as failed, and queue their parameters again.

        Args:
            dead (list, *optional*): identity of a worker that is known to be dead, as [`this_worker`] gave it there.
        """
        timeout = seconds_of_a_trial(self.study, self.settings.trial_timeout)
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            ended = bool(dead) and trial.user_attrs.get("worker") == dead
            if ended or not is_alive(trial, timeout):
                self.queue_again(trial.number)

    def queue_again(self, number: int, interrupt: BaseException | None = None) -> None:
        """Record a trial as failed and queue its parameters again, unless the trial was finished already.

        Args:
            number (`int`): number of the trial.
            interrupt (`BaseException`, *optional*): what ended the trial, where that is known: Ctrl-C, say.
        """
        trial = self._trials()[number]
        if self.fail(number, f"{_KILLED}: {type(interrupt).__name__}" if interrupt else _KILLED):
            # What was drawn is kept, unless it was killed in the middle: the sampler draws all of them again then.
            drawn = trial.params if "hyperparameters" in trial.user_attrs else {}
            params = {**trial.system_attrs.get("fixed_params", {}), **drawn}
            self.study.enqueue_trial(params, user_attrs={REPEATS: number})

    # ---- the study as a whole ----

    def why_no_run(self) -> str:
        """Why the study has no run that could be chosen."""
        complete, budget = complete_trials(self.study), self.settings.memorization_budget
        if complete and budget is not None and not pareto_front(self.study):
            nearest = min((t.values[1] for t in complete), key=lambda value: abs(value - budget))
            return f"no trial is within the memorization budget of {budget:g}; the nearest has {nearest:.4g}"
        reasons = {trial.user_attrs.get("failure", "unknown") for trial in self._trials()}
        return f"no trial of the study {self.study.study_name!r} succeeded: {'; '.join(sorted(reasons))}"

    def _trials(self) -> list[FrozenTrial]:
        """All trials by number. They are not copied, so they must only be read."""
        return self.study.get_trials(deepcopy=False)


def _check_objectives(study: optuna.Study, settings: SearchSettings) -> None:
    """Raise `ValueError` when a study has other objectives or directions: Optuna would go on with its own."""
    directions = [direction.name.lower() for direction in study.directions]
    names = study.metric_names if settings.objectives is not None else None
    for what, kept, given in (
        ("directions", directions, [getattr(given, "name", given).lower() for given in settings.directions]),
        ("objectives", names, settings.objectives),
    ):
        if kept is not None and list(kept) != list(given):
            raise ValueError(
                f"the study {study.study_name!r} was made with the {what} {', '.join(kept)}, not {', '.join(given)}: "
                "use the same to go on with it, or give another study_name or output_dir"
            )


def _counts(trial: FrozenTrial) -> bool:
    """Whether a trial counts towards `n_trials`."""
    if trial.state == TrialState.FAIL:
        return not trial.user_attrs.get("failure", "").startswith(_NOT_COUNTED)
    return trial.state == TrialState.RUNNING or (trial.state.is_finished() and "same_as" not in trial.user_attrs)


def _used_up(trials: Sequence[FrozenTrial]) -> bool:
    """Whether the last trial did not count, and no other trial could: each combination has been suggested."""
    if not trials or _counts(trials[-1]) or any(not trial.state.is_finished() for trial in trials):
        return False
    without = (_KILLED, _SURPLUS, _NOT_SUGGESTED)
    return all_suggested([t for t in trials if not t.user_attrs.get("failure", "").startswith(without)])
