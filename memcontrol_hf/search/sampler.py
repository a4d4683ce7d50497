"""Which hyperparameters the next trial gets: known ones first, then those that a sampler draws."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from ..search_space import SearchSpace
from .protocol import HpSpace

REPEATS = "repeats"
"""The attribute of a trial that repeats a killed one: the number of the killed trial."""

SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=4),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=8),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed, n_startup_trials=4, deterministic_objective=True),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}
"""The samplers by name, each made from a seed."""


def check_sampler(name: str) -> None:
    """Raise `ValueError` for a name that is none of `SAMPLERS`."""
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: use one of {', '.join(SAMPLERS)}")


class SeededSampler(BaseSampler):
    """Known trials first, then a sampler that is made anew for each trial and seeded by the trial's number.

    A search that was interrupted therefore goes on as if it had not been, and workers that share a study neither draw
    the same parameters nor begin the same known trial twice. A trial that was killed is repeated under the next
    number. Such repeats are left out where this sampler numbers the trials, so that later trials are drawn as without
    the kill. `nsga2` alone draws other trials then, as Optuna does not count a repeat among a generation.

    Args:
        make (`Callable`):
            Function from a seed to a sampler that keeps its state in the study, as all of `SAMPLERS` do.
        seed (`int`):
            Random seed of the search.
        known (list of `dict`):
            Parameters of the first trials; a parameter that is left out is drawn.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int, known: Sequence[Mapping[str, Any]] = ()) -> None:
        self._make, self._seed, self._known = make, seed, known
        self._sampler = make(seed)
        self._number = 0  # number of the current trial, without repeats

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        trials = study.get_trials(deepcopy=False)
        first = trial
        while REPEATS in first.user_attrs:
            first = trials[first.user_attrs[REPEATS]]
        self._number = first.number - sum(REPEATS in t.user_attrs for t in trials[: first.number])
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


def mask_and_rate(space: SearchSpace, low: float, high: float) -> HpSpace:
    """The default `hp_space`: a mask over all blocks, and a learning rate between `low` and `high`."""

    def suggest(trial: optuna.Trial) -> dict[str, Any]:
        rate = low if low == high else trial.suggest_float("learning_rate", low, high, log=True)
        return {"mask": space.suggest(trial), "learning_rate": rate}

    return suggest


def check_known(known: Sequence[Mapping[str, Any]], space: SearchSpace, low: float, high: float) -> None:
    """Raise `ValueError` for parameters of known trials that [`mask_and_rate`] does not suggest."""
    for params in known:
        mask, others = {}, {}
        for name, value in params.items():
            (mask if name.startswith("mask.") else others)[name.removeprefix("mask.")] = value
        rate = others.pop("learning_rate", low)
        if others:
            raise ValueError(
                f"enqueue has {', '.join(others)}: only learning_rate, and mask.BLOCK for each block, are searched "
                "without an hp_space"
            )
        if not low <= rate <= high:
            raise ValueError(
                f"enqueue has the learning rate {rate:g}, but those of learning_rate_range go from {low:g} to {high:g}"
            )
        try:
            space.check(mask)
        except ValueError as error:
            raise ValueError(f"enqueue: {error}") from None


def middle_rate(low: float, high: float) -> float:
    """The geometric mean of a range of learning rates: the rate of a screening, and of trials that are known."""
    return math.sqrt(low * high)


def known_trials(masks: Iterable[Mapping[str, bool]], low: float, high: float) -> list[dict[str, Any]]:
    """Parameters of the trials of some masks at the [`middle_rate`], which is none where the rate is fixed."""
    rate = {} if low == high else {"learning_rate": middle_rate(low, high)}
    return [{f"mask.{name}": on for name, on in mask.items()} | rate for mask in masks]


def known_masks(
    space: SearchSpace, low: float, high: float, masks: Sequence[Mapping[str, bool]] = ()
) -> list[dict[str, Any]]:
    """[`known_trials`] with all blocks on, with all blocks off, and with the masks that are given."""
    return known_trials([space.mask(True), space.mask(False), *map(space.check, masks)], low, high)
