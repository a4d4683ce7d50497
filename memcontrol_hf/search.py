"""The outer level: ask and tell over one Optuna study, which is shared through its storage.

transformers' own Optuna backend loses the study of a multi-objective search, cannot queue known masks, and hangs the
other processes of a distributed trial when one is stopped; hence this loop.
"""

import logging
import math
import socket
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import psutil
from accelerate.utils import broadcast_object_list
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from transformers.trainer_utils import BestRun

from .tracking import start_tracking

if TYPE_CHECKING:
    from .trainer import MemControlTrainer

logger = logging.getLogger(__name__)

_KILLED = "its process ended"

SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=4),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=8),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}


def check_sampler(name: str) -> None:
    """Raise `ValueError` for a sampler that is none of `SAMPLERS`."""
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: use one of {', '.join(SAMPLERS)}")


def open_storage(storage: str) -> BaseStorage | str:
    """A journal file by its path; the address of a database as it is."""
    return storage if "://" in storage else JournalStorage(JournalFileBackend(storage))


def check_study(storage: str, study_name: str, settings: Mapping[str, Any], alone: bool = False) -> None:
    """See that a study, where there is one already, was made with these settings.

    Args:
        storage, study_name (`str`): as of [`run_search`].
        settings (`dict`): what the study shall be made with.
        alone (`bool`): whether the storage may hold no other study, as that of an output folder.

    Raises:
        ValueError: names the settings that differ, or the studies that the storage holds instead.
    """
    if "://" not in storage and not Path(storage).exists():
        return
    names = optuna.get_all_study_names(open_storage(storage))
    if study_name not in names:
        if names and alone:
            raise ValueError(
                f"{storage} holds another study ({', '.join(names)}), not {study_name!r}: "
                "give another --output_dir, or that --study_name"
            )
        return
    stored = optuna.load_study(study_name=study_name, storage=open_storage(storage)).user_attrs.get("settings")
    if not stored or not settings:
        return
    differing = [name for name in {**stored, **settings} if stored.get(name) != settings.get(name)]
    if differing:
        changes = ", ".join(f"{name} was {stored.get(name)!r} and is {settings.get(name)!r}" for name in differing)
        raise ValueError(
            f"the study {study_name!r} in {storage} was made with other settings: {changes}. "
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
    sampler: str | optuna.samplers.BaseSampler = "tpe",
    storage: str | None = None,
    study_name: str = "memcontrol",
    settings: Mapping[str, Any] | None = None,
    enqueue: Sequence[Mapping[str, Any]] | None = None,
) -> BestRun | list[BestRun]:
    """The loop behind [`MemControlTrainer.hyperparameter_search`]; see there for the first arguments.

    Args:
        learning_rate_range (`tuple[float, float]`):
            Of the default `hp_space`, searched on a logarithmic scale; a fixed rate when both ends are equal.
        sampler (`str` or Optuna sampler):
            One of `SAMPLERS`; multivariate TPE by default.
        storage (`str`, *optional*):
            A journal file or the address of a database; `study.journal` in the output folder by default.
        study_name (`str`):
            Its name in the storage, and of the group of runs in trackers.
        settings (`dict`, *optional*):
            What the study is made with, JSON-able; going on with other settings is refused.
        enqueue (list of `dict`, *optional*):
            Parameters of trials that come first; by default all blocks on, and all off (the frozen base).

    Raises:
        ValueError: before the first trial, for an unknown sampler, settings that differ, or `n_trials` below 1.
    """
    if n_trials < 1:
        raise ValueError(f"n_trials must be at least 1, but got {n_trials}")
    args, space = trainer.args, trainer.search_space
    low, high = learning_rate_range
    if not 0 < low <= high:
        raise ValueError(f"the learning rates must be positive and in order, but got {low} to {high}")
    alone, storage = storage is None, storage or str(Path(args.output_dir) / "study.journal")
    directions = [direction] if isinstance(direction, str) else list(direction)
    if isinstance(sampler, str):
        check_sampler(sampler)

    def default_hp_space(trial: optuna.Trial) -> dict[str, Any]:
        rate = low if low == high else trial.suggest_float("learning_rate", low, high, log=True)
        return {"mask": space.suggest(trial), "learning_rate": rate}

    def default_objective(figures: dict[str, float]) -> list[float]:
        return [figures[f"eval_{name}"] for name in args.objectives]

    hp_space, compute_objective = hp_space or default_hp_space, compute_objective or default_objective
    study = None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if args.process_index == 0:
        check_study(storage, study_name, settings or {}, alone)
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(
                storage=open_storage(storage),
                sampler=SAMPLERS[sampler](args.seed) if isinstance(sampler, str) else sampler,
                study_name=study_name,
                directions=directions,
                load_if_exists=True,
            )
            if not study.trials:
                study.set_user_attr("settings", dict(settings or {}))
                study.set_metric_names(args.objectives)
        _queue_again_what_died(study)
        for params in _known_masks(space, low, high) if enqueue is None else enqueue:
            study.enqueue_trial(dict(params), skip_if_exists=True)

    while True:
        trial = _ask(study, n_trials) if study else None
        message = [(trial.number, hp_space(trial)) if trial else None]
        if args.world_size > 1:
            broadcast_object_list(message)
        if message[0] is None:
            break
        number, hyperparameters = message[0]
        name = hp_name(trial) if hp_name and trial else f"trial-{number}"
        start_tracking(trainer, study_name, name, "trial", hyperparameters)
        started = time.perf_counter()
        try:
            trainer.apply_hyperparameters(hyperparameters)
            figures = trainer.train_and_evaluate()
            values = compute_objective(figures)
        except BaseException as error:
            if trial:
                _fail(study, trial, f"{type(error).__name__}: {error}")
            if args.world_size > 1 or not isinstance(error, Exception):
                raise  # the other processes of this trial wait for this one
            logger.warning(f"trial {number} failed: {type(error).__name__}: {error}")
            continue
        if trial:
            values = [values] if isinstance(values, float) else list(values)
            _tell(study, trial, values, hyperparameters, figures, trainer)
            mask, seconds = hyperparameters.get("mask", {}), time.perf_counter() - started
            logger.info(
                f"trial {number} of {n_trials}: {sum(mask.values())} of {len(mask)} blocks, "
                f"{trainer.trainable_percent:.3g} % of the parameters, learning rate {args.learning_rate:.2g}: "
                f"{', '.join(f'{value:.4g}' for value in values)} ({seconds:.0f} s)"
            )
    runs = [
        BestRun(
            run_id=str(best.number),
            objective=best.values[0] if len(directions) == 1 else best.values,
            hyperparameters=best.user_attrs["hyperparameters"],
            run_summary=study,
        )
        for best in (study.best_trials if study else [])
    ]
    if args.world_size > 1:  # the study itself stays with the process that owns it
        message = [[run._replace(run_summary=None) for run in runs]]
        broadcast_object_list(message)
        runs = runs or message[0]
    if not runs:
        reasons = {t.user_attrs.get("failure", "unknown") for t in study.trials} if study else set()
        raise RuntimeError(f"no trial of the study {study_name!r} succeeded: {'; '.join(sorted(reasons))}")
    return runs[0] if len(directions) == 1 else runs


def _known_masks(space: Any, low: float, high: float) -> list[dict[str, Any]]:
    """All on, at the middle of the learning rates, and all off, as parameters of trials."""
    rate = {} if low == high else {"learning_rate": math.sqrt(low * high)}
    return [{f"mask.{name}": on for name in space.blocks} | rate for on in (True, False)]


def _ask(study: optuna.Study, n_trials: int) -> optuna.Trial | None:
    """The next trial, or `None` when enough are finished or under way; those that a kill ended do not count."""
    trials = study.get_trials(deepcopy=False)
    counted = [
        t.state in (TrialState.COMPLETE, TrialState.RUNNING)
        or (t.state == TrialState.FAIL and t.user_attrs.get("failure") != _KILLED)
        for t in trials
    ]
    if sum(counted) >= n_trials:
        return None
    trial = study.ask()
    process = psutil.Process()
    trial.set_user_attr("worker", [socket.gethostname(), process.pid, process.create_time()])
    return trial


def _queue_again_what_died(study: optuna.Study) -> None:
    """Trials whose process on this machine was killed: recorded as failed, their parameters queued again."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if not _alive(trial):
            study._storage.set_trial_user_attr(trial._trial_id, "failure", _KILLED)
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial({**trial.system_attrs.get("fixed_params", {}), **trial.params})


def _alive(trial: FrozenTrial) -> bool:
    if "worker" not in trial.user_attrs:  # killed, or about to say who it is
        return datetime.now() - trial.datetime_start < timedelta(seconds=10)
    host, pid, created = trial.user_attrs["worker"]
    if host != socket.gethostname():
        return True  # another machine's: nothing can be known from here
    try:
        return psutil.Process(pid).create_time() == created
    except psutil.NoSuchProcess:
        return False


def _fail(study: optuna.Study, trial: optuna.Trial, reason: str) -> None:
    trial.set_user_attr("failure", reason)
    study.tell(trial, state=TrialState.FAIL)


def _tell(
    study: optuna.Study,
    trial: optuna.Trial,
    values: Sequence[float],
    hyperparameters: Mapping[str, Any],
    figures: Mapping[str, float],
    trainer: "MemControlTrainer",
) -> None:
    trial.set_user_attr("hyperparameters", dict(hyperparameters))
    trial.set_user_attr("figures", {k: v for k, v in figures.items() if math.isfinite(v)})
    trial.set_user_attr("trainable_parameters", trainer.trainable_parameters)
    trial.set_user_attr("trainable_percent", trainer.trainable_percent)
    if all(math.isfinite(value) for value in values):
        study.tell(trial, values)
    else:  # Optuna would keep an infinite value, even on the front
        _fail(study, trial, f"an objective is not finite: {values}")


def is_frozen_base(trial_or_run: FrozenTrial | BestRun) -> bool:
    """Whether a trial or run has no block on: nothing was trained."""
    hyperparameters = (
        trial_or_run.hyperparameters
        if isinstance(trial_or_run, BestRun)
        else trial_or_run.user_attrs["hyperparameters"]
    )
    return not any(hyperparameters.get("mask", {"": True}).values())
