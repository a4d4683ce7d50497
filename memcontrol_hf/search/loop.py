"""The search: trials are asked for, run and recorded, until the study holds enough of them.

transformers' own Optuna backend loses the study of a multi-objective search, cannot queue known masks, and hangs the
other processes of a distributed trial when one is stopped; hence this loop.
"""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import torch
from accelerate.utils.memory import clear_device_cache
from optuna.trial import TrialState
from transformers.trainer_utils import BestRun

from ..progress import bar
from ..tracking import start_tracking
from .callbacks import Dominated, PruningCallback, TimeoutCallback
from .processes import SearchProcesses
from .protocol import ComputeObjective, HpName, HpSpace, SearchableTrainer
from .sampler import check_known, known_masks, mask_and_rate
from .screened import is_to_be_screened, screened_trials, screening_of_study
from .settings import SearchSettings
from .storage import storage_address
from .study import OVER_BUDGET, Outcome, PlannedTrial, SharedStudy


def run_search(
    trainer: SearchableTrainer,
    hp_space: HpSpace | None,
    compute_objective: ComputeObjective | None,
    n_trials: int,
    direction: str | Sequence[str],
    hp_name: HpName | None,
    *,
    delegate: Callable[[SharedStudy], None] | None = None,
    **options: Any,
) -> BestRun | list[BestRun]:
    """Search the hyperparameters of a trainer: the loop behind `MemControlTrainer.hyperparameter_search`.

    Args:
        trainer ([`~memcontrol_hf.search.protocol.SearchableTrainer`]):
            The trainer that runs the trials.
        hp_space (`Callable`, *optional*):
            Function from a trial to its hyperparameters; by default the mask over all blocks, and the learning rate.
        compute_objective (`Callable`, *optional*):
            Function from the figures to the objectives; the trainer's `args.objectives` by default.
        n_trials (`int`):
            Number of finished trials that the study shall hold in the end.
        direction (`str` or list of `str`):
            `"minimize"` or `"maximize"` for each objective.
        hp_name (`Callable`, *optional*):
            Function from a trial to the name of its run in trackers.
        delegate (`Callable`, *optional*):
            Function that gets the study before this process asks for a trial, and may have others run the trials.
        **options:
            Fields of [`~memcontrol_hf.search.SearchSettings`].

    Returns:
        `BestRun` or list of `BestRun`: the best run, or with several objectives the runs of the Pareto front.

    Raises:
        ValueError: before the first trial, for wrong settings, and for a study that was made with other settings; and
            after the first trial, when `compute_objective` does not return a value for each direction.
        NoRunError: when no trial succeeded.
        RuntimeError: when a trial failed in one of several processes alone.
    """
    args, space = trainer.args, trainer.search_space
    settings = SearchSettings(n_trials, direction, args.objectives if compute_objective is None else None, **options)
    rates, screen = settings.learning_rate_range, is_to_be_screened(trainer, settings, hp_space)
    known = list(known_masks(space, *rates) if settings.enqueue is None else settings.enqueue)
    if hp_space is None:
        hp_space = mask_and_rate(space, *rates)
        check_known(known, space, *rates)
    address, shared = storage_address(settings.storage, args.output_dir), None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if args.process_index == 0:
        shared = SharedStudy.open(settings, address)
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        if delegate is not None:
            delegate(shared)
    screening = screening_of_study(trainer, settings, shared) if screen else None
    if shared:
        shared.try_first([*known, *screened_trials(screening, *rates)], args.seed)
    processes = SearchProcesses(settings, address, args.world_size, shared)
    timeout = TimeoutCallback(settings.trial_timeout, processes)
    pruning = PruningCallback(settings.prune_at, trainer, processes)
    trainer.add_callback(timeout)
    trainer.add_callback(pruning)
    shown = None
    try:
        while (trial := processes.next(hp_space, hp_name)) is not None:
            shown = bar(text="search", total=n_trials, initial=trial.number) if shown is None else shown
            shown.update(trial.number - shown.n)
            timeout.start()
            try:
                outcome = run_trial(trainer, trial, settings, compute_objective)
            except BaseException as interrupt:  # Ctrl-C, say; an error of the trial is an outcome
                processes.queue_again(trial, interrupt)
                raise
            processes.record(outcome)
    finally:
        if shown is not None:
            shown.close()
        trainer.remove_callback(timeout)
        trainer.remove_callback(pruning)
    return processes.best()


def run_trial(
    trainer: SearchableTrainer,
    trial: PlannedTrial,
    settings: SearchSettings,
    compute_objective: ComputeObjective | None = None,
) -> Outcome:
    """Train and measure one trial; an error of the trial is its outcome, and is not raised.

    Raises:
        OSError: when a file cannot be read or written.
    """
    started, limit = time.perf_counter(), settings.max_trainable_percent
    config = {**trial.hyperparameters, "objectives": list(trainer.args.objectives)}
    try:
        trainer.apply_hyperparameters(trial.hyperparameters)
        if limit is not None and (percent := trainer.trainable_percent) > limit:
            reason = f"{OVER_BUDGET}: {percent:.3g} % of the parameters are trainable"
            return Outcome(trial, TrialState.FAIL, reason, in_all_processes=True)
        start_tracking(trainer, settings.study_name, trial.name, "trial", config)
        figures = {name: float(value) for name, value in trainer.train_and_evaluate().items()}
        values = objective_values(figures, trainer.args.objectives, compute_objective)
    except Dominated as stop:
        return Outcome(trial, TrialState.PRUNED, str(stop), in_all_processes=True)
    except Exception as error:
        if is_of_machine(error):
            raise
        clear_device_cache(garbage_collection=True)
        return Outcome(trial, TrialState.FAIL, f"{type(error).__name__}: {error}")
    if len(values) != len(settings.directions):
        raise ValueError(
            f"compute_objective returned {len(values)} value(s) for {len(settings.directions)} direction(s): return "
            "one for each direction, or give as many directions"
        )
    return Outcome(
        trial,
        TrialState.COMPLETE,
        values=values,
        figures=figures,
        trainable_parameters=trainer.trainable_parameters,
        trainable_percent=trainer.trainable_percent,
        learning_rate=trainer.args.learning_rate,
        seconds=time.perf_counter() - started,
    )


def is_of_machine(error: Exception) -> bool:
    """Whether an error, such as a full disk or an image that is gone, is no fault of the hyperparameters of a run."""
    return isinstance(error, OSError) and not isinstance(error, TimeoutError)


def objective_values(
    figures: dict[str, float], objectives: Sequence[str], compute_objective: ComputeObjective | None
) -> list[float]:
    """The values of the objectives, from the figures of an evaluation.

    Args:
        figures (`dict[str, float]`):
            Figures by the names that the Trainer gives them, which begin with `eval_`.
        objectives (list of `str`):
            Metrics that are the objectives, unless there is a `compute_objective`.
        compute_objective (`Callable`, *optional*):
            Function from the figures to the objectives.

    Raises:
        ValueError: when a value is not finite; Optuna would keep such a value, even on the front.
    """
    if compute_objective is None:
        values = [figures[f"eval_{name}"] for name in objectives]
    else:
        values = torch.as_tensor(compute_objective(figures), dtype=torch.float64).flatten().tolist()
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"an objective is not finite: {values}")
    return values
