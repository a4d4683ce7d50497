"""A study as the report holds it."""

from collections import Counter
from typing import Any

import numpy as np
import optuna

from ..search import complete_trials, pareto_front


def search_summary(study: optuna.Study, sampler: str, objectives: list[str]) -> dict[str, Any]:
    """A study as the report holds it: its objectives, and mask size and values of every finished trial."""
    front = {trial.number for trial in pareto_front(study)}
    trials = [
        {
            "number": trial.number,
            "values": trial.values,
            "learning_rate": trial.user_attrs["hyperparameters"]["learning_rate"],
            "blocks": sum(trial.user_attrs["hyperparameters"]["mask"].values()),
            "trainable_percent": trial.user_attrs["trainable_percent"],
            "on_front": trial.number in front,
        }
        for trial in complete_trials(study)
    ]
    ended = Counter(trial.state.name for trial in study.trials)
    return {
        "study_name": study.study_name,
        "sampler": sampler,
        "objectives": objectives,
        "directions": [d.name.lower() for d in study.directions],
        "failed_trials": ended["FAIL"],
        "pruned_trials": ended["PRUNED"],
        "trials": trials,
        "block_effects": block_effects(study),
    }


def block_effects(study: optuna.Study) -> dict[str, list[float]]:
    """What a block does to each objective: the mean over the finished trials with it on, minus that of the others.

    Blocks that were always on, or always off, are left out. Optuna's importances would not say which way.

    Returns:
        `dict[str, list[float]]`: block name -> one difference for each objective, in its units.
    """
    trials = complete_trials(study)
    masks = [t.user_attrs["hyperparameters"]["mask"] for t in trials]
    values = np.array([t.values for t in trials])
    effects = {}
    for name in masks[0] if masks else ():
        on = np.array([mask[name] for mask in masks])
        if on.any() and not on.all():
            effects[name] = (values[on].mean(0) - values[~on].mean(0)).tolist()
    return effects
