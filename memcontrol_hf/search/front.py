"""From the Pareto front to one run."""

from collections.abc import Sequence

import numpy as np
from transformers.trainer_utils import BestRun

from .loop import is_frozen_base


def select_run(runs: BestRun | Sequence[BestRun], memorization_budget: float | None = None) -> BestRun:
    """Pick one run of a search over (quality, memorization): the first of [`rank_runs`].

    Returns:
        `BestRun`: never the frozen base, which has nothing to publish.

    Raises:
        ValueError: when no run that trained anything is on the front, or none is within the budget.
    """
    return rank_runs(runs, memorization_budget)[0]


def rank_runs(runs: BestRun | Sequence[BestRun], memorization_budget: float | None = None) -> list[BestRun]:
    """The runs that trained anything, the one to be picked first.

    Args:
        runs (list of `BestRun`):
            The Pareto front, as `hyperparameter_search` returns it; the first objective is the quality, the second the
            memorization.
        memorization_budget (`float`, *optional*):
            The worst memorization that is allowed: the runs within it, by their quality. Without it, by how near they
            are to the knee of the front: after scaling both objectives to [0, 1], how far below the line between the
            front's two ends (Das 1999, Structural Optimization 18:107).

    Raises:
        ValueError: when there is none, or none is within the budget.
    """
    runs = [runs] if isinstance(runs, BestRun) else list(runs)
    trained = [run for run in runs if not is_frozen_base(run)]
    if not trained:
        raise ValueError(
            "the frozen base alone is on the Pareto front: no trial that trained anything was better in any objective"
        )
    if isinstance(trained[0].objective, float):
        return trained
    study = trained[0].run_summary
    signs = [1 if d.name == "MINIMIZE" else -1 for d in study.directions] if study else [1] * len(trained[0].objective)
    if memorization_budget is not None:
        if len(signs) < 2:
            raise ValueError("a memorization budget needs a second objective, the memorization")
        within = [run for run in trained if signs[1] * run.objective[1] <= signs[1] * memorization_budget]
        if not within:
            lowest = min(trained, key=lambda run: signs[1] * run.objective[1]).objective[1]
            raise ValueError(
                f"no run is within the memorization budget of {memorization_budget:g}: the best on the front has "
                f"{lowest:.4g}. Allow more, or search more trials or smaller learning rates"
            )
        return sorted(within, key=lambda run: signs[0] * run.objective[0])
    costs = np.array([[s * value for s, value in zip(signs, run.objective)] for run in runs])
    span = costs.max(0) - costs.min(0)
    scaled = (costs - costs.min(0)) / np.where(span > 0, span, 1)
    # The ends of the front lie on the plane of equal sums; the knee is deepest below it.
    depth = {id(run): total for run, total in zip(runs, scaled.sum(1))}
    return sorted(trained, key=lambda run: depth[id(run)])
