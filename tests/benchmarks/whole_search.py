"""A whole search beside the published order of work, composed of what was measured elsewhere.

Nobody waits for 64 trials in the published order. The row multiplies two things: how many trials a screened search
takes to come as far as plain random search with 64 trials (docs/results/real_searches.json, the screening counted),
and what a trial takes on either side (the row of a trial by the default objectives).
"""

from pathlib import Path
from typing import Any

import numpy as np

import real_searches
from common.pages import read_results

from .timing import RESAMPLES

SEARCHES = Path(__file__).parents[2] / "docs" / "results" / "real_searches.json"
RANDOM_TRIALS = real_searches.KINDS[real_searches.RANDOM].trials
NAME = "a whole search, composed, the demo"


def trials_of_screened_searches() -> np.ndarray:
    """Trials of each screened search, as docs/results/real_searches.md counts them; `inf` where it never got there."""
    found = real_searches.shares(read_results(SEARCHES)["pieces"], "block")
    needed, reached = real_searches.trials_needed(found, "screened", real_searches.random_goal(found))
    return np.where(reached, needed, np.inf)


def composed(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The row of the page. Its interval resamples the searches, and the pairs of trials beside them.

    Args:
        seconds: Seconds of a trial on both sides, pair by pair; this package's first.
    """
    trials, draw = trials_of_screened_searches(), np.random.default_rng(0)
    ours, theirs = map(np.array, seconds.values())
    searches = draw.integers(len(trials), size=(RESAMPLES, len(trials)))
    pairs = draw.integers(len(ours), size=(RESAMPLES, len(ours)))

    def search(some_trials: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        took = np.median(some_trials, axis=-1) * np.median(ours, axis=-1)
        return took, RANDOM_TRIALS * np.median(theirs, axis=-1)

    us, them = search(trials, ours, theirs)
    drawn, beside = search(trials[searches], ours[pairs], theirs[pairs])
    low, high = np.quantile(drawn / beside, (0.025, 0.975), method="inverted_cdf")  # which knows infinity
    return {
        "name": NAME,
        "goal": 0.1,
        "pairs": len(ours),
        "medians": {"screened": float(us), "published order": float(them)},
        "ratio": float(us / them),
        "low": float(low),
        "high": float(high),
        "trials": {"screened": float(np.median(trials)), "published order": RANDOM_TRIALS},
        "searches": {"all": len(trials), "never": int(np.isinf(trials).sum())},
    }
