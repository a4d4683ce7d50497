"""From the finished trials of a study to the Pareto front, and from the front to one run."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState
from transformers.trainer_utils import BestRun

from .settings import check_budget


class NoRunError(RuntimeError):
    """A study holds no run that could be chosen."""


def complete_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that gave figures. They are not copied, so they must only be read."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def signs_of(study: optuna.Study) -> list[int]:
    """For each objective 1 where lower is better, and -1 where higher is better."""
    return [1 if direction.name == "MINIMIZE" else -1 for direction in study.directions]


def dominates(values: np.ndarray) -> np.ndarray:
    """Whether point `j` dominates point `i`: not worse in any objective and better in at least one.

    Args:
        values (`np.ndarray`): points `[N, M]` of `M` objectives; lower is better in each.

    Returns:
        `np.ndarray`: bool `[N, N]`, with `i` in the rows and `j` in the columns.
    """
    return (values[None] <= values[:, None]).all(2) & (values[None] < values[:, None]).any(2)


def pareto_front(study: optuna.Study) -> list[FrozenTrial]:
    """The finished trials within the memorization budget that no other dominates; with one objective, the best trials.

    The study's own `best_trials` would not do: a study that Optuna loads does not know the budget.
    """
    signs = np.array(signs_of(study))
    trials = complete_trials(study)
    if (budget := study.user_attrs.get("memorization_budget")) is not None:
        trials = [trial for trial in trials if signs[1] * trial.values[1] <= signs[1] * budget]
    values = np.array([trial.values for trial in trials]).reshape(-1, len(signs)) * signs
    return [trial for trial, dominated in zip(trials, dominates(values).any(1)) if not dominated]


def best_runs(study: optuna.Study) -> list[BestRun]:
    """The trials of [`pareto_front`] as runs, each once: a trial that repeats another is left out."""
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


def is_frozen_base(trial_or_run: FrozenTrial | BestRun) -> bool:
    """Whether a finished trial or a run has no block on, so that nothing was trained."""
    return selects_nothing(
        trial_or_run.hyperparameters
        if isinstance(trial_or_run, BestRun)
        else trial_or_run.user_attrs["hyperparameters"]
    )


def selects_nothing(hyperparameters: Mapping[str, Any]) -> bool:
    """Whether hyperparameters have a mask with no block on."""
    return not any(hyperparameters.get("mask", {"": True}).values())


def select_run(runs: BestRun | Sequence[BestRun], memorization_budget: float | None = None) -> BestRun:
    """Pick one run of a search over (quality, memorization): the first of [`rank_runs`].

    Returns:
        `BestRun`: a run that trained something; the frozen base has nothing to publish.

    Raises:
        ValueError: when no run on the front trained anything, or none is within the budget.
    """
    return rank_runs(runs, memorization_budget)[0]


def rank_runs(
    runs: BestRun | Sequence[BestRun],
    memorization_budget: float | None = None,
    front: Sequence[BestRun] | None = None,
) -> list[BestRun]:
    """Sort the runs that trained something, the best choice first.

    Args:
        runs (list of `BestRun`):
            The Pareto front, as `hyperparameter_search` returns it; the first objective is the quality, the second the
            memorization.
        memorization_budget (`float`, *optional*):
            Worst memorization that is allowed: the runs within the budget are sorted by their quality. Without a
            budget, the runs are sorted by their distance to the knee of the front: after both objectives are scaled to
            [0, 1], how far a run is below the line between the two ends of the front (Das 1999, Structural
            Optimization 18:107).
        front (list of `BestRun`, *optional*):
            The runs by which both objectives are scaled, where `runs` are the repeats of a part of the front; `runs`
            by default.

    Raises:
        ValueError: when no run trained anything, or none is within the budget.
    """
    runs = [runs] if isinstance(runs, BestRun) else list(runs)
    trained = [run for run in runs if not is_frozen_base(run)]
    if not trained:
        raise ValueError(f"the frozen base alone is on the Pareto front: {_why_nothing_else(runs[0].run_summary)}")
    if isinstance(trained[0].objective, float):
        return trained
    study = trained[0].run_summary
    signs = signs_of(study) if study else [1] * len(trained[0].objective)
    if memorization_budget is not None:
        return _within_budget(trained, signs, memorization_budget)
    costs, scale = (_costs(given, signs) for given in (runs, runs if front is None else front))
    span = scale.max(0) - scale.min(0)
    scaled = (costs - scale.min(0)) / np.where(span > 0, span, 1)
    # The ends of the front lie on the plane of equal sums; the knee is deepest below it.
    depth = {id(run): total for run, total in zip(runs, scaled.sum(1))}
    return sorted(trained, key=lambda run: depth[id(run)])


def _costs(runs: Sequence[BestRun], signs: Sequence[int]) -> np.ndarray:
    """The objectives of runs, `[N, M]`; lower is better in each."""
    return np.array([[s * value for s, value in zip(signs, run.objective)] for run in runs])


def _why_nothing_else(study: optuna.Study | None) -> str:
    """Why no trial that trained anything is on the front."""
    trials = study.get_trials(deepcopy=False) if study else []
    failed = [trial for trial in trials if trial.state == TrialState.FAIL and "failure" in trial.user_attrs]
    if not failed or any(trial.state == TrialState.COMPLETE and not is_frozen_base(trial) for trial in trials):
        return "no trial that trained anything was better in any objective"
    rates = [trial.params["learning_rate"] for trial in failed if "learning_rate" in trial.params]
    between = f", with learning rates from {min(rates):.2g} to {max(rates):.2g}" if rates else ""
    return (
        f"all {len(failed)} trials that trained anything failed{between}. The first: {failed[0].user_attrs['failure']}"
    )


def _within_budget(runs: Sequence[BestRun], signs: Sequence[int], budget: float) -> list[BestRun]:
    """The runs whose second objective is within the budget, by their first objective."""
    check_budget(budget, signs)
    within = [run for run in runs if signs[1] * run.objective[1] <= signs[1] * budget]
    if not within:
        lowest = min(runs, key=lambda run: signs[1] * run.objective[1]).objective[1]
        raise ValueError(
            f"no run is within the memorization budget of {budget:g}: the best on the front has "
            f"{lowest:.4g}. Allow more, or search more trials or smaller learning rates"
        )
    return sorted(within, key=lambda run: signs[0] * run.objective[0])
