"""The outer level: ask and tell over one Optuna study, which is shared through its storage.

transformers' own Optuna backend loses the study of a multi-objective search, cannot queue known masks, and hangs the
other processes of a distributed trial when one is stopped; hence this loop.
"""

import atexit
import logging
import math
import socket
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import optuna
import psutil
import torch
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, OperationalError, ProgrammingError, SQLAlchemyError
from transformers import TrainerCallback
from transformers.trainer_utils import BestRun

from ..tracking import start_tracking

if TYPE_CHECKING:
    from ..search_space import SearchSpace
    from ..trainer import MemControlTrainer

logger = logging.getLogger(__name__)

# Why a trial that was not finished does not count: it is lost, or was never begun.
_KILLED, _SURPLUS, _OVER = "its process ended", "another process had begun the last trial", "over the budget"
_REPEATS = "repeats"  # the attribute of a trial that repeats a killed one: that one's number
_FINAL = "-final"  # ends the name of the study by which one process takes the final fine-tune
_AGREEMENT = timedelta(minutes=5)  # how long the processes of a trial wait for each other after it
# What an objective that needs sampling is judged by on the way.
_STAND_INS = {"fid": "loss", "amd": "membership_auc"}
_BEATEN = 2  # by so many others a trial is stopped there: docs/trials.md has what one more or less would lose and save

SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=4),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=8),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed, n_startup_trials=4, deterministic_objective=True),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}


class NoRunError(RuntimeError):
    """A study holds no run that could be chosen."""


class SeededSampler(BaseSampler):
    """Known trials first, then a sampler that is made anew for each trial, seeded by the trial's number.

    So a search that was interrupted goes on as if it had not been, and workers that share a study neither draw the
    same nor begin the same known trial twice. A trial that was killed is repeated under the next number; such repeats
    are left out where trials are numbered here, so that the later ones are drawn as without the kill. Of `SAMPLERS`,
    `nsga2` alone draws others then, as Optuna does not count a repeat among a generation.

    Args:
        make (`Callable`): from a seed to a sampler; one that keeps its state in the study, as all of `SAMPLERS` do.
        seed (`int`): of the search.
        known (list of `dict`): the parameters of the first trials; what one leaves out is drawn.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int, known: Sequence[Mapping[str, Any]] = ()) -> None:
        self._make, self._seed, self._known = make, seed, known
        self._sampler = make(seed)
        self._number = 0  # of the present trial, without repeats

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        trials = study.get_trials(deepcopy=False)
        first = trial
        while _REPEATS in first.user_attrs:
            first = trials[first.user_attrs[_REPEATS]]
        self._number = first.number - sum(_REPEATS in t.user_attrs for t in trials[: first.number])
        state = np.random.SeedSequence([self._seed, self._number]).generate_state(1)
        self._sampler = self._make(int(state[0]) % 2**31)
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        if self._number < len(self._known):
            return {}
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, name: str, distribution: Any) -> Any:
        known = self._known[self._number] if self._number < len(self._known) else {}
        return known[name] if name in known else self._sampler.sample_independent(study, trial, name, distribution)

    def after_trial(self, study, trial, state, values) -> None:
        self._sampler.after_trial(study, trial, state, values)


def check_sampler(name: str) -> None:
    """Raise `ValueError` for a sampler that is none of `SAMPLERS`."""
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: use one of {', '.join(SAMPLERS)}")


def public_address(storage: str) -> str:
    """A storage to be shown: without the password of a database."""
    try:
        return make_url(storage).set(query={}).render_as_string() if "://" in storage else storage
    except ArgumentError:
        return storage.partition("://")[0] + "://..."


def open_storage(storage: str) -> BaseStorage:
    """A journal file by its path, a gRPC proxy by `grpc://host:port`, a database by its address.

    Raises:
        ValueError: for a database that cannot be opened.
    """
    if storage.startswith("grpc://"):
        address = urlsplit(storage)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return GrpcStorageProxy(host=address.hostname, port=address.port or 13000)
    if "://" not in storage:
        Path(storage).parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(storage))
    for attempt in range(2):
        try:
            return RDBStorage(storage)
        except (SQLAlchemyError, ImportError) as error:
            if attempt or not isinstance(error, (IntegrityError, ProgrammingError, OperationalError)):
                reason = str(error).splitlines()[0]
                raise ValueError(f"cannot open the storage {public_address(storage)}: {reason}") from None
            time.sleep(2)  # another process makes the tables at this moment


def check_study(
    storage: str, study_name: str, settings: Mapping[str, Any], alone: bool = False, later: Sequence[str] = ()
) -> None:
    """See that a study, where there is one already, was made with these settings.

    Args:
        storage, study_name (`str`): as of [`run_search`].
        settings (`dict`): what the study shall be made with.
        alone (`bool`): whether the storage may hold no other study, as that of an output folder.
        later (list of `str`): settings that are not known yet.

    Raises:
        ValueError: names the settings that differ, or the studies that the storage holds instead.
    """
    if "://" not in storage and not Path(storage).exists():
        return
    opened = open_storage(storage)
    names = [n for n in optuna.get_all_study_names(opened) if not n.endswith(_FINAL)]
    if study_name not in names:
        if names and alone:
            raise ValueError(
                f"{public_address(storage)} holds another study ({', '.join(names)}), not {study_name!r}: "
                "give another --output_dir, or that --study_name"
            )
        return
    stored = optuna.load_study(study_name=study_name, storage=opened).user_attrs.get("settings")
    if not stored or not settings:
        return
    names = [name for name in {**stored, **settings} if name not in later]
    differing = [name for name in names if stored.get(name) != settings.get(name)]
    if differing:
        changes = ", ".join(f"{name} was {stored.get(name)!r} and is {settings.get(name)!r}" for name in differing)
        raise ValueError(
            f"the study {study_name!r} in {public_address(storage)} was made with other settings: {changes}. "
            "Use the same settings to go on with it, or another --output_dir or --study_name"
        )


def run_search(
    trainer: "MemControlTrainer",
    hp_space: Callable[[optuna.Trial], dict[str, Any]] | None,
    compute_objective: Callable[[dict[str, float]], Sequence[float]] | None,
    n_trials: int,
    direction: str | Sequence[str],
    hp_name: Callable[[optuna.Trial], str] | None,
    *,
    learning_rate_range: tuple[float, float] = (1e-5, 1e-3),
    sampler: str | BaseSampler = "tpe",
    storage: str | None = None,
    study_name: str = "memcontrol",
    settings: Mapping[str, Any] | None = None,
    enqueue: Sequence[Mapping[str, Any]] | None = None,
    memorization_budget: float | None = None,
    max_trainable_percent: float | None = None,
    trial_timeout: float | None = None,
    prune_at: float | None = None,
    delegate: Callable[[optuna.Study], None] | None = None,
) -> BestRun | list[BestRun]:
    """The loop behind [`MemControlTrainer.hyperparameter_search`]; see there for the first arguments.

    Args:
        learning_rate_range (`tuple[float, float]`):
            Of the default `hp_space`, searched on a logarithmic scale; a fixed rate when both ends are equal.
        sampler (`str` or Optuna sampler):
            One of `SAMPLERS`; multivariate TPE by default. A sampler of your own is used as it is, so two workers need
            two that are seeded differently.
        storage (`str`, *optional*):
            A journal file, the address of a database, or `grpc://host:port` of a gRPC proxy; `study.journal` in the
            output folder by default. Any number of processes may work on one study.
        study_name (`str`):
            Its name in the storage, and of the group of runs in trackers.
        settings (`dict`, *optional*):
            What the study is made with, JSON-able; going on with other settings is refused.
        enqueue (list of `dict`, *optional*):
            Parameters of trials that come first; by default all blocks on, and all off (the frozen base).
        memorization_budget (`float`, *optional*):
            The worst value of the second objective that is allowed: a constraint, which the sampler learns. Trials
            over it are not on the front.
        max_trainable_percent (`float`, *optional*):
            A mask that trains more of the denoiser's parameters is not tried, and does not count.
        trial_timeout (`float`, *optional*):
            Seconds after which the training of a trial is stopped; the trial has failed then. A trial of another
            machine that runs for twice as long is given up.
        prune_at (`float`, *optional*):
            A share of a trial's steps. There it is measured without sampling an image (by the `loss` on validation
            images instead of `fid`, by `membership_auc` instead of `amd`), and stopped when two other trials were
            better in all of it. It counts, and is on no front.
        delegate (`Callable`, *optional*):
            Gets the study before this process asks for a trial, and may have others do the trials.

    Raises:
        ValueError: before the first trial, for an unknown sampler, settings that differ, or `n_trials` below 1.
        NoRunError: when no trial succeeded.
        RuntimeError: when a trial failed in one of several processes alone.
    """
    if n_trials < 1:
        raise ValueError(f"n_trials must be at least 1, but got {n_trials}")
    args, space = trainer.args, trainer.search_space
    low, high = learning_rate_range
    if not 0 < low <= high:
        raise ValueError(f"the learning rates must be positive and in order, but got {low} to {high}")
    alone, storage = storage is None, storage or str(Path(args.output_dir) / "study.journal")
    directions = [direction] if isinstance(direction, str) else list(direction)
    if memorization_budget is not None and len(directions) < 2:
        raise ValueError("a memorization budget needs a second objective, the memorization")
    if prune_at is not None and not 0 < prune_at < 1:
        raise ValueError(f"prune_at must be a share of the steps between 0 and 1, but got {prune_at}")
    if prune_at is not None and compute_objective is not None:
        raise ValueError("prune_at knows the objectives of the arguments alone: leave compute_objective out")
    if compute_objective is None and len(directions) != len(args.objectives):
        raise ValueError(
            f"direction has {len(directions)} value(s) for the {len(args.objectives)} objectives "
            f"{', '.join(args.objectives)}: give one for each, or a compute_objective, or other objectives"
        )
    if isinstance(sampler, str):
        check_sampler(sampler)

    def default_hp_space(trial: optuna.Trial) -> dict[str, Any]:
        rate = low if low == high else trial.suggest_float("learning_rate", low, high, log=True)
        return {"mask": space.suggest(trial), "learning_rate": rate}

    hp_space = hp_space or default_hp_space
    known = known_masks(space, low, high) if enqueue is None else enqueue
    study = None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if args.process_index == 0:
        check_study(storage, study_name, settings or {}, alone)
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        if isinstance(sampler, str):
            sampler = SeededSampler(SAMPLERS[sampler], args.seed, known)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(
                storage=open_storage(storage),
                sampler=sampler,
                study_name=study_name,
                directions=directions,
                load_if_exists=True,
            )
            if not study.trials:
                study.set_user_attr("settings", dict(settings or {}))
                if compute_objective is None:
                    study.set_metric_names(args.objectives)
            study.set_user_attr("memorization_budget", memorization_budget)
        if not isinstance(sampler, SeededSampler):
            for params in known:
                study.enqueue_trial(dict(params), skip_if_exists=True)
        queue_again_what_died(study, trial_timeout)
        if delegate is not None:
            delegate(study)
    processes = _Processes(args.world_size)
    timeout, pruning = _Timeout(trial_timeout, processes), _Pruning(trainer, prune_at, study)
    trainer.add_callback(timeout)
    trainer.add_callback(pruning)
    try:
        while True:
            trial, hyperparameters = _next_trial(study, n_trials, hp_space) if study else (None, None)
            message = [(trial.number, hyperparameters) if trial else None]
            if args.world_size > 1:
                broadcast_object_list(message)
            if message[0] is None:
                break
            number, hyperparameters = message[0]
            name = hp_name(trial) if hp_name and trial else f"trial-{number}"
            started, error, values, figures = time.perf_counter(), None, [], {}
            timeout.start()
            pruning.trial = trial
            try:
                trainer.apply_hyperparameters(hyperparameters)
                if max_trainable_percent is not None and trainer.trainable_percent > max_trainable_percent:
                    if trial:
                        reason = f"{_OVER}: {trainer.trainable_percent:.3g} % of the parameters are trainable"
                        _fail(study, trial.number, reason)
                    continue
                start_tracking(trainer, study_name, name, "trial", hyperparameters)
                figures = trainer.train_and_evaluate()
                values = _objectives(trainer, figures, compute_objective)
            except _Dominated as raised:
                if trial:
                    study.tell(trial, state=TrialState.PRUNED)
                    logger.info(f"trial {number} of {n_trials}: {raised}")
                continue
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"
                clear_device_cache(garbage_collection=True)
            except BaseException as raised:
                if trial:
                    _queue_again(study, trial.number, f"{_KILLED}: {type(raised).__name__}")
                raise
            if error := processes.failure(error, number, storage, study_name):
                if trial:
                    _fail(study, trial.number, error)
                    logger.warning(f"trial {number} failed: {error}")
                continue
            if trial:
                trial.set_user_attr("trainable_parameters", trainer.trainable_parameters)
                trial.set_user_attr("trainable_percent", trainer.trainable_percent)
                if memorization_budget is not None:
                    sign = 1 if study.directions[1].name == "MINIMIZE" else -1
                    trial.set_constraint("memorization_budget", sign * (values[1] - memorization_budget))
                _tell(study, trial, values, hyperparameters, figures)
                mask, seconds = hyperparameters.get("mask", {}), time.perf_counter() - started
                logger.info(
                    f"trial {number} of {n_trials}: {sum(mask.values())} of {len(mask)} blocks, "
                    f"{trainer.trainable_percent:.3g} % of the parameters, learning rate {args.learning_rate:.2g}: "
                    f"{', '.join(f'{value:.4g}' for value in values)} ({seconds:.0f} s)"
                )
    finally:
        trainer.remove_callback(timeout)
        trainer.remove_callback(pruning)
    runs = best_runs(study) if study else []
    if args.world_size > 1:  # the study stays with the process that owns it; the others get its directions
        message = [[run._replace(run_summary=None) for run in runs]]
        broadcast_object_list(message)
        if study is None:
            runs = [run._replace(run_summary=optuna.create_study(directions=directions)) for run in message[0]]
    if not runs:
        raise NoRunError(_why_none(study, study_name, memorization_budget))
    return runs[0] if len(directions) == 1 else runs


def complete_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that gave figures, not copied: they are to be read only."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def dominates(values: np.ndarray) -> np.ndarray:
    """Whether point j is lower than point i in something and higher in nothing: `[N, M]` -> bool `[N, N]`."""
    return (values[None] <= values[:, None]).all(2) & (values[None] < values[:, None]).any(2)


def pareto_front(study: optuna.Study) -> list[FrozenTrial]:
    """The finished trials that no other beats, of those within the memorization budget; of one objective, the best.

    Not the study's own `best_trials`: these keep the budget of the command that ran the trial.
    """
    signs = np.array([1 if direction.name == "MINIMIZE" else -1 for direction in study.directions])
    trials = complete_trials(study)
    if (budget := study.user_attrs.get("memorization_budget")) is not None:
        trials = [trial for trial in trials if signs[1] * trial.values[1] <= signs[1] * budget]
    values = np.array([trial.values for trial in trials]).reshape(-1, len(signs)) * signs
    return [trial for trial, beaten in zip(trials, dominates(values).any(1)) if not beaten]


def best_runs(study: optuna.Study) -> list[BestRun]:
    """The best run, or those of the Pareto front; each once."""
    return [
        BestRun(
            run_id=str(best.number),
            objective=best.values[0] if len(study.directions) == 1 else best.values,
            hyperparameters=best.user_attrs["hyperparameters"],
            run_summary=study,
        )
        for best in pareto_front(study)
        if "same_as" not in best.user_attrs
    ]


def _why_none(study: optuna.Study | None, study_name: str, budget: float | None) -> str:
    complete = complete_trials(study) if study else []
    if complete and budget is not None and not pareto_front(study):
        lowest = min((t.values[1] for t in complete), key=lambda value: abs(value - budget))
        return f"no trial is within the memorization budget of {budget:g}; the nearest has {lowest:.4g}"
    reasons = {t.user_attrs.get("failure", "unknown") for t in study.trials} if study else set()
    return f"no trial of the study {study_name!r} succeeded: {'; '.join(sorted(reasons))}"


def known_masks(
    space: "SearchSpace", low: float, high: float, masks: Sequence[Mapping[str, bool]] = ()
) -> list[dict[str, Any]]:
    """Masks as the parameters of trials at the middle of the learning rates: all on, all off, and those given."""
    rate = {} if low == high else {"learning_rate": math.sqrt(low * high)}
    all_masks = [space.mask(True), space.mask(False), *(space.check(mask) for mask in masks)]
    return [{f"mask.{name}": on for name, on in mask.items()} | rate for mask in all_masks]


# ---- trials ----


def _next_trial(
    study: optuna.Study, n_trials: int, hp_space: Callable[[optuna.Trial], dict[str, Any]]
) -> tuple[optuna.Trial | None, dict[str, Any] | None]:
    """The next trial that is to be run, and its hyperparameters; `None` when enough are finished or under way.

    One that repeats another, as any with all blocks off repeats the frozen base, gets that one's values for nothing.
    """
    while (trial := _ask(study, n_trials)) is not None:
        hyperparameters = hp_space(trial)
        twin = _twin(study, hyperparameters)
        if twin is None:
            return trial, hyperparameters
        for name in ("figures", "trainable_parameters", "trainable_percent"):
            trial.set_user_attr(name, twin.user_attrs[name])
        trial.set_user_attr("same_as", twin.number)
        for name, value in twin.constraints.items():
            trial.set_constraint(name, value)
        _tell(study, trial, twin.values, hyperparameters, twin.user_attrs["figures"])
    return None, None


def _counts(trial: FrozenTrial) -> bool:
    """Whether a trial took, or takes, its share of the budget."""
    if trial.state == TrialState.FAIL:
        return not trial.user_attrs.get("failure", "").startswith((_KILLED, _SURPLUS, _OVER))
    return trial.state == TrialState.RUNNING or (trial.state.is_finished() and "same_as" not in trial.user_attrs)


def _ask(study: optuna.Study, n_trials: int) -> optuna.Trial | None:
    """The next trial, or `None` when enough are finished or under way."""
    trials = study.get_trials(deepcopy=False)
    counted = sum(map(_counts, trials))
    # Where almost every mask is tried already, or too large, the search ends before its budget.
    if counted >= n_trials or len(trials) - counted >= 20 * n_trials:
        return None
    trial = study.ask()
    trial.set_user_attr("worker", this_worker())
    before = [t for t in study.get_trials(deepcopy=False) if t.number < trial.number]
    if sum(_counts(t) or t.state == TrialState.WAITING for t in before) >= n_trials:
        _fail(study, trial.number, _SURPLUS)  # another worker asked at the same moment
        return None
    return trial


def _twin(study: optuna.Study, hyperparameters: Mapping[str, Any]) -> FrozenTrial | None:
    """The first finished trial that had the same hyperparameters, or no block on as these have none."""
    off = _selects_nothing(hyperparameters)
    for trial in complete_trials(study):
        same = trial.user_attrs.get("hyperparameters") == hyperparameters
        if "same_as" not in trial.user_attrs and (same or (off and is_frozen_base(trial))):
            return trial
    return None


def queue_again_what_died(study: optuna.Study, timeout: float | None, dead: Sequence[Any] = ()) -> None:
    """Trials whose process was killed: recorded as failed, their parameters queued again.

    Args:
        timeout (`float`, *optional*): the search's `trial_timeout`.
        dead (list, *optional*): a worker that is known to be dead, as [`this_worker`] named it there.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        ended = bool(dead) and trial.user_attrs.get("worker") == dead
        if ended or not _alive(trial, timeout):
            _queue_again(study, trial.number, _KILLED)


def _queue_again(study: optuna.Study, number: int, reason: str) -> None:
    """Record a trial as failed, and have its parameters tried again; unless it was finished already."""
    trial = study.get_trials(deepcopy=False)[number]
    if _fail(study, number, reason):
        params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        study.enqueue_trial(params, user_attrs={_REPEATS: number})


def this_worker() -> list[Any]:
    """Which process this is: its machine, its number, and when it was started."""
    process = psutil.Process()
    return [socket.gethostname(), process.pid, process.create_time()]


def _alive(trial: FrozenTrial, timeout: float | None = None) -> bool:
    """Whether the process of a running trial is still there."""
    age = datetime.now() - trial.datetime_start
    if "worker" not in trial.user_attrs:  # killed, or about to say who it is
        return age < timedelta(seconds=10)
    host, pid, created = trial.user_attrs["worker"]
    if host != socket.gethostname():  # another machine's: nothing can be known from here
        return timeout is None or age < timedelta(seconds=2 * timeout)
    try:
        return psutil.Process(pid).create_time() == created
    except psutil.NoSuchProcess:
        return False


def _fail(study: optuna.Study, number: int, reason: str) -> bool:
    """Record a trial as failed; whether it was not finished already."""
    trial_id = study.get_trials(deepcopy=False)[number]._trial_id
    try:
        study._storage.set_trial_user_attr(trial_id, "failure", reason)
        study.tell(number, state=TrialState.FAIL)
    except (UpdateFinishedTrialError, ValueError):  # by another process
        return False
    return True


def _objectives(
    trainer: "MemControlTrainer",
    figures: dict[str, float],
    compute_objective: Callable[[dict[str, float]], Sequence[float]] | None,
) -> list[float]:
    """The objectives of a run; `ValueError` where one is not finite: Optuna would keep it, even on the front."""
    if compute_objective is None:
        values = [figures[f"eval_{name}"] for name in trainer.args.objectives]
    else:
        values = compute_objective(figures)
        values = [values] if isinstance(values, (float, int)) else list(values)
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"an objective is not finite: {values}")
    return values


def _tell(
    study: optuna.Study,
    trial: optuna.Trial,
    values: Sequence[float],
    hyperparameters: Mapping[str, Any],
    figures: Mapping[str, float],
) -> None:
    trial.set_user_attr("hyperparameters", dict(hyperparameters))
    trial.set_user_attr("figures", {k: v for k, v in figures.items() if math.isfinite(v)})
    study.tell(trial, values)


class _Processes:
    """The processes that share a trial; how it ended for one of them, all of them are told."""

    def __init__(self, world_size: int) -> None:
        self._group = None
        if world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo", timeout=_AGREEMENT)

    def failure(self, error: str | None, number: int, storage: str, study_name: str) -> str | None:
        """The first error that a process had, if any.

        Raises:
            RuntimeError: when one failed and the others, who wait for it in the middle of a step, cannot be told. The
                trial is recorded as failed then. The launcher ends the others; with `--max_restarts` it starts all of
                them again, and the search goes on.
        """
        try:
            return self.first(error)
        except RuntimeError as raised:
            reason = error or f"a process of the trial is missing: {str(raised).splitlines()[0]}"
            _fail(optuna.load_study(study_name=study_name, storage=open_storage(storage)), number, reason)
            raise RuntimeError(f"trial {number} failed in one process alone: {reason}") from None

    def first(self, error: str | None) -> str | None:
        """The first error that a process had, if any; `RuntimeError` when one of them does not say."""
        if self._group is None:
            return error
        errors: list[str | None] = [None] * torch.distributed.get_world_size(self._group)
        torch.distributed.all_gather_object(errors, error, group=self._group)
        return next((f"{e} (process {i})" for i, e in enumerate(errors) if e is not None), None)

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in a process."""
        if self._group is None:
            return flag
        flags = torch.tensor(int(flag))
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(flags)


class _Timeout(TrainerCallback):
    """Ends the training of a trial that takes too long, in all of its processes at the same step."""

    def __init__(self, seconds: float | None, processes: _Processes) -> None:
        self.seconds, self._processes = seconds, processes
        self.start()

    def start(self) -> None:
        """A trial begins."""
        self._started = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if self.seconds and self._processes.any(time.monotonic() - self._started > self.seconds):
            raise TimeoutError(f"its training took longer than {self.seconds:g} s")


class _Dominated(Exception):
    """A trial was beaten on the way; all of its processes raise this at the same step."""


class _Pruning(TrainerCallback):
    """Ends the training of a trial that others have beaten in everything at the same step.

    Optuna's pruners know one objective. Here those that need no sampling are compared, lower is better for each.
    """

    def __init__(self, trainer: "MemControlTrainer", share: float | None, study: optuna.Study | None) -> None:
        self._trainer, self._share, self._study = trainer, share, study
        self._metrics = list(dict.fromkeys(_STAND_INS.get(name, name) for name in trainer.args.objectives))
        self.trial: optuna.Trial | None = None

    def on_step_end(self, args, state, control, **kwargs):
        if self._share is None or state.global_step != max(1, round(self._share * state.max_steps)):
            return
        figures = self._trainer.look(self._metrics)
        message = [self._beaten_by([figures[f"eval_{name}"] for name in self._metrics]) if self.trial else []]
        if args.world_size > 1:
            broadcast_object_list(message)
        if len(message[0]) >= _BEATEN:
            others = " and ".join(map(str, message[0][:_BEATEN]))
            raise _Dominated(f"stopped after {state.global_step} steps, where the trials {others} were better")

    def _beaten_by(self, values: list[float]) -> list[int]:
        """The trials that were at this point better than the current one in something, and worse in nothing."""
        self.trial.set_user_attr("on_the_way", values)
        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        return [
            other.number
            for other in self._study.get_trials(deepcopy=False, states=states)
            if (before := other.user_attrs.get("on_the_way"))
            and before != values
            and all(b <= v for b, v in zip(before, values))
        ]


# ---- after the trials ----


def repeat_runs(
    trainer: "MemControlTrainer",
    runs: Sequence[BestRun],
    repeats: int,
    compute_objective: Callable[[dict[str, float]], Sequence[float]] | None = None,
) -> list[BestRun]:
    """Train and measure runs again with seeds that the search never saw.

    The front of noisy trials is optimistic: it holds those that were lucky. Repeats are kept in the study, so a second
    call makes only those that are missing.

    Args:
        runs (list of `BestRun`): as [`~memcontrol_hf.search.rank_runs`] gives them.
        repeats (`int`): how often each is repeated.
        compute_objective (`Callable`, *optional*): that of the search; `args.objectives` by default.

    Returns:
        list of `BestRun`: the same with the means of the repeats alone as objectives, without those that failed.

    Raises:
        NoRunError: when all of them failed.
    """
    args, repeated, seed, reasons = trainer.args, [], trainer.args.seed, []
    processes = _Processes(args.world_size)
    try:
        for run in runs:
            study, values, error = run.run_summary, [], None
            for number in range(1, repeats + 1):
                key = f"repeat {number} of trial {run.run_id}"
                known = [study.user_attrs.get(key)]
                if args.world_size > 1:
                    broadcast_object_list(known)
                if known[0] is None:
                    args.seed = seed + 1000 * number
                    name = f"trial-{run.run_id}-repeat-{number}"
                    try:
                        start_tracking(trainer, study.study_name, name, "repeat", run.hyperparameters)
                        trainer.apply_hyperparameters(run.hyperparameters)
                        figures = trainer.train_and_evaluate()
                        known = [_objectives(trainer, figures, compute_objective)]
                    except Exception as raised:
                        error = f"{type(raised).__name__}: {raised}"
                        clear_device_cache(garbage_collection=True)
                    if error := processes.first(error):
                        reasons.append(f"{key}: {error}")
                        logger.warning(f"trial {run.run_id} is left out, since {key} failed: {error}")
                        break
                    if trainer.is_world_process_zero():
                        study.set_user_attr(key, known[0])
                        logger.info(f"{key}: {', '.join(f'{value:.4g}' for value in known[0])}")
                values.append(known[0])
            if not error:
                mean = np.mean(values, axis=0).tolist()
                repeated.append(run._replace(objective=mean if len(mean) > 1 else mean[0]))
    finally:
        args.seed = seed
    if reasons and not repeated:
        raise NoRunError(f"no finalist could be repeated: {'; '.join(reasons)}")
    return repeated


def claim_final(
    trainer: "MemControlTrainer",
    runs: BestRun | Sequence[BestRun],
    timeout: float | None = None,
    poll_seconds: float = 2.0,
) -> bool:
    """Whether this trainer is to do the final fine-tune: of all that work on a study, exactly one is.

    It waits until no trial runs any more. When the process that took the fine-tune was killed, the next that asks gets
    it; when that one has finished, only a process that was started later does. Whoever has it may ask again.

    Args:
        runs (`BestRun` or list of them): as `hyperparameter_search` returned them.
        timeout (`float`, *optional*): the search's `trial_timeout`.
        poll_seconds (`float`): how often it looks.
    """
    study = (runs if isinstance(runs, BestRun) else runs[0]).run_summary
    claimed = [trainer.is_world_process_zero() and _claim(study, timeout, poll_seconds)]
    if trainer.args.world_size > 1:
        broadcast_object_list(claimed)
    return claimed[0]


def _claim(study: optuna.Study, timeout: float | None, poll_seconds: float) -> bool:
    while running := [t for t in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) if _alive(t, timeout)]:
        where = {trial.user_attrs.get("worker", ["an unknown machine"])[0] for trial in running}
        logger.info(
            f"waiting for trial {', '.join(str(t.number) for t in running)} of another process on {', '.join(where)}; "
            "if it is gone, or has another name now, end this one and give --trial_timeout"
        )
        time.sleep(poll_seconds)
    worker = this_worker()
    started = datetime.fromtimestamp(worker[-1])
    final = optuna.create_study(storage=study._storage, study_name=study.study_name + _FINAL, load_if_exists=True)
    claim = final.ask()  # its number is given once
    claim.set_user_attr("worker", worker)
    for other in final.get_trials(deepcopy=False):
        if (
            other.number < claim.number
            and other.user_attrs.get("worker") != worker
            and (
                (other.state == TrialState.RUNNING and _alive(other))
                or (other.state == TrialState.COMPLETE and other.datetime_complete > started)
            )
        ):
            final.tell(claim, state=TrialState.FAIL)
            return False
    atexit.register(_release, final, claim.number)
    return True


def _release(final: optuna.Study, number: int) -> None:
    """The process that took the final fine-tune ends, after it or by an error."""
    final.tell(number, 0.0)


def is_frozen_base(trial_or_run: FrozenTrial | BestRun) -> bool:
    """Whether a trial or run has no block on: nothing was trained."""
    return _selects_nothing(
        trial_or_run.hyperparameters
        if isinstance(trial_or_run, BestRun)
        else trial_or_run.user_attrs["hyperparameters"]
    )


def _selects_nothing(hyperparameters: Mapping[str, Any]) -> bool:
    return not any(hyperparameters.get("mask", {"": True}).values())
