"""What `hp_space` suggests: hyperparameters as the study can keep them, and whether it has suggested all there is."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial


def plain(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters as JSON gives them back; numbers of NumPy and tensors of one number become numbers.

    Raises:
        TypeError: names a value that a study cannot keep.
    """
    if not isinstance(hyperparameters, Mapping):
        raise TypeError(f"hp_space must return a dictionary of hyperparameters, but returned {hyperparameters!r}")

    def number(value: Any) -> Any:
        if getattr(value, "size", None) == 1 or (callable(getattr(value, "numel", None)) and value.numel() == 1):
            return value.item()
        raise TypeError(f"a study cannot keep the hyperparameter {value!r}, a {type(value).__name__}")

    return json.loads(json.dumps(dict(hyperparameters), default=number))


def all_suggested(trials: Sequence[FrozenTrial]) -> bool:
    """Whether trials have every combination of values that a `hp_space` suggests.

    A parameter may be suggested for some values of earlier parameters only. Parameters of infinitely many values are
    never used up, and of a `hp_space` that asks the trial for nothing, nothing is known.

    Args:
        trials (list of `FrozenTrial`): trials for which `hp_space` returned.
    """
    return bool(trials) and all(trial.params for trial in trials) and _used_up([_path(trial) for trial in trials])


def _path(trial: FrozenTrial) -> list[tuple[str, float, float]]:
    """The way of a trial through the tree of suggestions: parameter, which of its values, number of its values."""
    return [(name, *_which(trial.distributions[name], value)) for name, value in trial.params.items()]


def _used_up(paths: list[list[tuple[str, float, float]]]) -> bool:
    """Whether ways through a tree, each from this node on, lead to all of its leaves."""
    if not all(paths):
        return True  # a leaf
    (name, _, count), children = paths[0][0], defaultdict(list)
    for (other, index, _), *rest in paths:
        if other == name and 0 <= index < count:
            children[index].append(rest)
    return len(children) == count and all(map(_used_up, children.values()))


def _which(distribution: BaseDistribution, value: Any) -> tuple[float, float]:
    """Which of the values of a distribution a value is, counted from 0, and how many values there are."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.to_internal_repr(value), len(distribution.choices)
    if distribution.single():
        return 0, 1
    if distribution.step is None:
        return 0, math.inf
    steps = [round((number - distribution.low) / distribution.step) for number in (value, distribution.high)]
    return steps[0], steps[1] + 1
