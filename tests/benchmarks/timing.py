"""Two sides of the same work, measured alternately, and the ratio of their medians with its interval."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap

Clock = Callable[[], float]

RESAMPLES = 2000
"""Number of resampled sets of pairs from which an interval is read."""


def clock(device: torch.device) -> Clock:
    """A clock in seconds that fits a device.

    On a CPU it counts the time that this process computed, which other work on the machine disturbs least; on a GPU it
    is the time on the wall once all work that was given to the GPU is done.
    """
    if device.type != "cuda":
        return time.process_time

    def synchronized() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronized


def alternate(
    sides: dict[str, Callable[..., Any]], pairs: int, now: Clock, prepare: Callable[[], tuple] = tuple
) -> dict[str, list[float]]:
    """Seconds of each side, `pairs` times in turn, after one turn that is not counted.

    Args:
        sides: What is measured, by name. The order is turned round in every second turn.
        pairs: Number of turns.
        now: The clock.
        prepare: Gives the arguments of a side anew for each of its turns; what it does is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(pairs + 1):
        for name in sides if turn % 2 else reversed(sides):
            arguments = prepare()
            started = now()
            sides[name](*arguments)
            if turn:
                seconds[name].append(now() - started)
    return seconds


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """The ratio of two medians with its 95 % interval, by resampling pairs.

    Args:
        ours, theirs: What was measured, pair by pair; at least two pairs.

    Returns:
        `dict`: `ratio`, `low`, `high`.
    """
    interval = bootstrap(
        (ours, theirs),
        lambda a, b, axis: np.median(a, axis=axis) / np.median(b, axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    middle = statistics.median(ours) / statistics.median(theirs)
    return {"ratio": middle, "low": float(interval.low), "high": float(interval.high)}


def compared(name: str, goal: float | None, seconds: dict[str, list[float]], **details: Any) -> dict[str, Any]:
    """A row of the page: both medians and their ratio. The first side is this package's.

    Args:
        name: What is measured.
        goal: Largest ratio that is wanted, if any.
        seconds: Seconds of both sides, pair by pair.
        **details: What else is kept with the row.
    """
    (us, ours), (them, theirs) = seconds.items()
    medians = {us: statistics.median(ours), them: statistics.median(theirs)}
    return {"name": name, "goal": goal, "pairs": len(ours), "medians": medians, **ratio(ours, theirs), **details}
