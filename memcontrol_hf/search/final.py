"""After the trials: the finalists are repeated, and one process takes the final fine-tune."""

import atexit
import logging
import time
from collections.abc import Sequence

import numpy as np
import optuna
import psutil
from accelerate.utils.memory import clear_device_cache
from optuna.trial import FrozenTrial, TrialState
from transformers.trainer_utils import BestRun

from ..tracking import start_tracking
from .claims import FINAL, SILENCE, Claim, holders, is_held, last_sign_of_life
from .front import NoRunError
from .loop import is_of_machine, objective_values
from .processes import Processes, from_first
from .protocol import ComputeObjective, SearchableTrainer
from .settings import named_values
from .worker import is_alive, seconds_of_a_trial, this_worker

logger = logging.getLogger(__name__)


class _RepeatFailed(Exception):
    """A repeat failed in at least one of its processes."""


def repeat_runs(
    trainer: SearchableTrainer,
    runs: Sequence[BestRun],
    repeats: int,
    compute_objective: ComputeObjective | None = None,
) -> list[BestRun]:
    """Train and measure runs again with seeds that the search never saw.

    The front of noisy trials is optimistic: it holds the trials that were lucky. The study keeps the repeats, so a
    second call makes only those that are missing.

    Args:
        runs (list of `BestRun`):
            Runs in the order of [`~memcontrol_hf.search.rank_runs`].
        repeats (`int`):
            Number of repeats of each run.
        compute_objective (`Callable`, *optional*):
            The `compute_objective` of the search; `args.objectives` by default.

    Returns:
        list of `BestRun`: the same runs, whose objectives are the means of the repeats alone. A run of which a repeat
        failed is left out.

    Raises:
        NoRunError: when all runs failed.
        OSError: when a file cannot be read or written; the repeats that were made are kept.
    """
    processes, seed = Processes(trainer.args.world_size), trainer.args.seed
    repeated, reasons = [], []
    try:
        for run in runs:
            values = []
            try:
                for number in range(1, repeats + 1):
                    new_seed = seed + 1000 * number
                    values.append(_repeat(trainer, run, number, new_seed, processes, compute_objective))
            except _RepeatFailed as failure:
                reasons.append(str(failure))
                continue
            mean = np.mean(values, axis=0).tolist()
            repeated.append(run._replace(objective=mean if len(mean) > 1 else mean[0]))
    finally:
        trainer.args.seed = seed
    if reasons and not repeated:
        raise NoRunError(f"no finalist could be repeated: {'; '.join(reasons)}")
    return repeated


def _repeat(
    trainer: SearchableTrainer,
    run: BestRun,
    number: int,
    seed: int,
    processes: Processes,
    compute_objective: ComputeObjective | None,
) -> list[float]:
    """The objectives of one repeat, which is made unless the study holds it already."""
    study, args, key = run.run_summary, trainer.args, f"repeat {number} of trial {run.run_id}"
    values = from_first(study.user_attrs.get(key), args.world_size)
    if values is not None:
        return values
    args.seed, error = seed, None
    name = f"trial-{run.run_id}-repeat-{number}"
    config = {**run.hyperparameters, "objectives": list(args.objectives)}
    try:
        start_tracking(trainer, study.study_name, name, "repeat", config)
        trainer.apply_hyperparameters(run.hyperparameters)
        values = objective_values(trainer.train_and_evaluate(), args.objectives, compute_objective)
    except Exception as raised:
        if is_of_machine(raised):
            raise
        error = f"{type(raised).__name__}: {raised}"
        clear_device_cache(garbage_collection=True)
    if error := processes.first_error(error):
        logger.warning(f"trial {run.run_id} is left out, since {key} failed: {error}")
        raise _RepeatFailed(f"{key}: {error}")
    if trainer.is_world_process_zero():
        study.set_user_attr(key, values)
        logger.info(f"{key}: {named_values(values, None if compute_objective else args.objectives)}")
    return values


def claim_final(
    trainer: SearchableTrainer,
    runs: BestRun | Sequence[BestRun],
    timeout: float | None = None,
    poll_seconds: float = 2.0,
) -> bool:
    """Claim the final fine-tune for this trainer; exactly one of those that work on a study gets it.

    The call waits until no trial runs any more. When the process that has the fine-tune is killed, the next process
    that claims it gets it; on another machine, when there was no sign of life for
    [`~memcontrol_hf.search.claims.SILENCE`]. When that process has finished, only a process that was started later
    gets it. The process that has the fine-tune may claim it again.

    Args:
        runs (`BestRun` or list of `BestRun`):
            Runs as `hyperparameter_search` returned them.
        timeout (`float`, *optional*):
            The `trial_timeout` of the search.
        poll_seconds (`float`):
            Seconds between two looks at the study.

    Returns:
        `bool`: whether this trainer is to do the final fine-tune.
    """
    study = (runs if isinstance(runs, BestRun) else runs[0]).run_summary
    first, world_size, said = trainer.is_world_process_zero(), trainer.args.world_size, False
    # All processes go through each round: none may wait for the first one longer than its backend allows.
    while running := from_first(_running(study, timeout) if first else {}, world_size):
        if first and not said:
            logger.info(
                f"waiting for trial {', '.join(map(str, running))} of another process on "
                f"{', '.join(sorted({*running.values()}))}; if it is gone, or has another name now, end this one and "
                "give --trial_timeout"
            )
            said = True
        time.sleep(poll_seconds)
    return from_first(first and _claim_final_run(study), world_size)


def _running(study: optuna.Study, timeout: float | None) -> dict[int, str]:
    """The trials that run now, with the names of their machines."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    timeout = seconds_of_a_trial(study, timeout)
    alive = [trial for trial in trials if is_alive(trial, timeout)]
    return {trial.number: trial.user_attrs.get("worker", ["an unknown machine"])[0] for trial in alive}


def _claim_final_run(study: optuna.Study) -> bool:
    """Claim the final fine-tune by a trial of a study of its own, whose numbers are given once."""
    if (claim := Claim.make(study, FINAL, _keeps_final_run)) is not None:
        atexit.register(claim.release)  # after the final fine-tune, or an error
        return True
    if holder := holders(study, FINAL):
        logger.info(
            f"{holder}, which works on this study too, does the final fine-tune. If it was killed, the same command "
            f"does the final fine-tune, on another machine {SILENCE / 60:g} minutes after the last sign of life"
        )
    else:
        logger.info("another process that works on this study has done the final fine-tune")
    return False


def _keeps_final_run(claim: FrozenTrial) -> bool:
    """Whether an earlier claim is another process's that is alive, or has finished since this process was started."""
    if claim.user_attrs.get("worker") == this_worker():
        return False
    if claim.state == TrialState.COMPLETE:
        return last_sign_of_life(claim) > psutil.Process().create_time()
    return is_held(claim)
