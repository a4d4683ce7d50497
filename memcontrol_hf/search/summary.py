"""A study as the report holds it."""

from collections import Counter
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from .front import complete_trials, pareto_front


def public_study_name(name: str) -> str:
    """The default name of a study as it is, and `unnamed` for a name of the user's own, which may tell of people."""
    return name if name == "memcontrol" else "unnamed"


def search_summary(study: optuna.Study, sampler: str, objectives: list[str]) -> dict[str, Any]:
    """Summarize a study: its objectives, and the mask size and the values of every finished trial."""
    front = {trial.number for trial in pareto_front(study)}
    trials = [
        {
            "number": trial.number,
            "values": trial.values,
            "learning_rate": _learning_rate(trial),
            "blocks": sum(trial.user_attrs["hyperparameters"]["mask"].values()),
            "trainable_percent": trial.user_attrs["trainable_percent"],
            "on_front": trial.number in front,
        }
        for trial in complete_trials(study)
    ]
    ended = Counter(trial.state.name for trial in study.trials)
    return {
        "study_name": public_study_name(study.study_name),
        "sampler": sampler,
        "objectives": objectives,
        "directions": [d.name.lower() for d in study.directions],
        "failed_trials": ended["FAIL"],
        "pruned_trials": ended["PRUNED"],
        "trials": trials,
        "block_effects": block_effects(study),
    }


def _learning_rate(trial: FrozenTrial) -> float | None:
    """The rate that a trial suggested, or else had; `None` where an earlier version has not written it down."""
    return trial.user_attrs["hyperparameters"].get("learning_rate", trial.user_attrs.get("learning_rate"))


def block_effects(study: optuna.Study) -> dict[str, list[float]]:
    """The effect of each block on each objective: the mean over the finished trials with the block on, minus the mean
    over the other finished trials.

    Blocks that were on in all trials, or off in all trials, are left out. Optuna's importances have no sign, so they
    would not say whether a block makes an objective better or worse.

    Returns:
        `dict[str, list[float]]`: block name -> one difference for each objective, in the objective's units.
    """
    trials = complete_trials(study)
    masks = [t.user_attrs["hyperparameters"]["mask"] for t in trials]
    values = np.array([t.values for t in trials])
    effects = {}
    for name in dict.fromkeys(name for mask in masks for name in mask):
        on = np.array([bool(mask.get(name)) for mask in masks])  # a mask may leave out blocks that are off
        if on.any() and not on.all():
            effects[name] = (values[on].mean(0) - values[~on].mean(0)).tolist()
    return effects
