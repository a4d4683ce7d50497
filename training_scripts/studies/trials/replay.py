"""Which sampler? Each sampler searches the table of real trials, instead of training, many times."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import optuna
import pandas as pd

from common.intervals import bootstrap_median
from memcontrol_hf.screening import Screening
from memcontrol_hf.search import SAMPLERS, SeededSampler
from memcontrol_hf.search.screened import screened_trials

from .columns import OBJECTIVES, masks

PLAIN = "plain random"
"""Optuna's random sampler without the queued trials and without free repeats."""

SCREENED = "screened "
"""The beginning of the name of a sampler that is preceded by the masks of a screening."""

SLOW = ("gp", "nsga2")
"""Samplers that replay a twentieth of the searches: `gp` fits a model, `nsga2` draws many repeats."""


def hypervolume(values: np.ndarray, reference: np.ndarray) -> float:
    """The area that points dominate.

    Args:
        values: Points `[N, 2]`; both coordinates are minimized.
        reference: Upper corner of the area `[2]`.
    """
    area, best = 0.0, reference[1]
    for x, y in sorted(values.tolist()):
        if x < reference[0] and y < best:
            area, best = area + (reference[0] - x) * (best - y), y
    return area


def hypervolumes(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The hypervolume of the first 1, 2, ..., N points `[N, 2]`: `[N]`."""
    return np.array([hypervolume(values[:count], reference) for count in range(1, len(values) + 1)])


class Table:
    """The runs that a replay looks up.

    Args:
        runs: The table, as [`~trials.columns.read`] returns it.
        objectives: Columns of the two objectives, which are minimized.
        screenings: Screenings of the groups, which searches take in turn.
    """

    def __init__(
        self, runs: pd.DataFrame, objectives: Sequence[str] = OBJECTIVES, screenings: Sequence[Screening] = ()
    ) -> None:
        self.groups, self.screenings = masks(runs), screenings
        self.rates = sorted(runs["learning_rate"].unique())
        self.values = {
            (*(bool(on) for on in mask), rate): np.array(objectives)
            for *mask, rate, objectives in zip(
                *(runs[group] for group in self.groups),
                runs["learning_rate"],
                runs[list(objectives)].to_numpy(),
                strict=True,
            )
        }
        off = (False,) * len(self.groups)  # the learning rate of the frozen base does not matter
        base = (*off, self.rates[0])
        self.values |= {(*off, rate): self.values[base] for rate in self.rates if base in self.values}
        all_values = np.array(list(self.values.values()))
        self.reference = all_values.max(0)
        self.area = hypervolume(all_values, self.reference)

    @property
    def missing(self) -> int:
        """The number of runs that are not finished yet."""
        return 2 ** len(self.groups) * len(self.rates) - len(self.values)

    def queued(self) -> list[dict[str, Any]]:
        """The trials that a search queues first: all groups on, and all groups off."""
        return [dict.fromkeys(self.groups, on) | {"learning_rate": self.rates[0]} for on in (True, False)]

    def screened(self, seed: int) -> list[dict[str, Any]]:
        """The trials of a screening, at the two rates of the table, in the order in which a search tries them."""
        low, high = self.rates[0], self.rates[-1]
        trials = screened_trials(self.screenings[seed % len(self.screenings)], low, high)
        lowest = min(trial["learning_rate"] for trial in trials)
        return [
            {name.removeprefix("mask."): value for name, value in trial.items()}
            | {"learning_rate": low if trial["learning_rate"] == lowest else high}
            for trial in trials
        ]

    def ask(self, trial: optuna.Trial) -> tuple:
        """The key in `values` of what a sampler suggests."""
        mask = [trial.suggest_categorical(group, [False, True]) for group in self.groups]
        return (*mask, trial.suggest_categorical("learning_rate", self.rates))


def replay(table: Table, name: str, trials: int, seed: int) -> np.ndarray:
    """One search of the table.

    Args:
        name: Name of a sampler, or `PLAIN`, or `SCREENED` and the name of a sampler.
        trials: Number of trials. A trial that repeats another is free, as in `run_search`; with `PLAIN` it counts.

    Returns:
        The share of the table's hypervolume that the search has after each trial: `[trials]`.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    make: Callable[[int], optuna.samplers.BaseSampler] = SAMPLERS[name.split()[-1]]
    known = [*table.queued(), *(table.screened(seed) if name.startswith(SCREENED) else [])]
    sampler = make(seed) if name == PLAIN else SeededSampler(make, seed, known)
    study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
    seen, found = set(), []
    # As in `run_search`, the search ends before its budget where nearly all runs are tried. A Gaussian process takes
    # seconds for each of hundreds of repeats, so it stops sooner.
    for _ in range((2 if name == "gp" else 20) * trials):
        trial = study.ask()
        key = table.ask(trial)
        values = table.values[key]
        identity = key if any(key[:-1]) else None  # the learning rate of the frozen base does not matter
        if name == PLAIN or identity not in seen:
            found.append(values)
        seen.add(identity)
        study.tell(trial, values.tolist())
        if len(found) == trials:
            break
    areas = hypervolumes(np.array(found), table.reference) / table.area
    return np.pad(areas, (0, trials - len(areas)), mode="edge")


def replays(table: Table, samplers: list[str], seeds: int, trials: int, workers: int) -> dict[str, np.ndarray]:
    """Many searches with plain random search and each sampler.

    Args:
        seeds: Number of searches of a sampler; slow samplers have a twentieth.
        workers: Number of processes.

    Returns:
        sampler -> shares of the hypervolume `[seeds, trials]`.
    """
    shares = {}
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:  # a fork of a process with threads can hang
        for name in (PLAIN, *samplers):
            count = max(2, seeds // 20) if name in SLOW else seeds
            shares[name] = np.array(list(pool.map(partial(replay, table, name, trials), range(count))))
            print(f"{name}: {count} searches", flush=True)
    return shares


def first_to_reach(shares: np.ndarray, goal: float) -> np.ndarray:
    """The trial with which each search `[seeds, trials]` reaches the goal, or `trials + 1`: `[seeds]`."""
    reached = shares >= goal - 1e-12
    return np.where(reached.any(1), reached.argmax(1) + 1, shares.shape[1] + 1)


def summary(
    shares: dict[str, np.ndarray], counts: list[int], screenings: int = 0, screened_trials: int = 0
) -> dict[str, Any]:
    """Medians over searches.

    Args:
        shares: sampler -> shares of the hypervolume `[seeds, trials]`.
        counts: Numbers of trials after which the shares are reported, the number of all trials last.
        screenings: Number of screenings, which the searches of a screened sampler take in turn.
        screened_trials: Number of first trials that are the same in all searches of a screening: up to there, one
            search of each screening is reported.

    Returns:
        `goal`, the median share of plain random search after the last trial, and for each sampler its shares and the
        number of trials that it needs to reach the goal.
    """
    goal = float(np.median(shares[PLAIN][:, -1]))

    def different(name: str, count: int) -> np.ndarray:
        return shares[name][: screenings if name.startswith(SCREENED) and count <= screened_trials else None]

    return {
        "goal": goal,
        "samplers": {
            name: {
                "searches": len(of_sampler),
                "share": {str(count): bootstrap_median(different(name, count)[:, count - 1]) for count in counts},
                "trials_to_goal": bootstrap_median(first_to_reach(of_sampler, goal)),
            }
            for name, of_sampler in shares.items()
        },
    }
