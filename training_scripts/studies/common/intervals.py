"""Confidence intervals of means, of paired differences, of medians and of rank correlations."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import bootstrap, spearmanr, ttest_1samp
from scipy.stats import t as student


class Interval(NamedTuple):
    """A mean over seeds with the ends of its 95 % interval."""

    mean: float
    low: float
    high: float
    seeds: int

    @classmethod
    def of(cls, test: Mapping[str, Any]) -> "Interval":
        """The interval of a test that was stored with the names of these fields."""
        return cls(*(test[name] for name in cls._fields))

    @property
    def half(self) -> float:
        """Half of the width of a symmetric interval."""
        return self.high - self.mean

    def cell(self, digits: int) -> str:
        """The mean and the interval with so many digits after the point."""
        return f"{self.mean:+.{digits}f} ({self.low:+.{digits}f} to {self.high:+.{digits}f})"

    def __str__(self) -> str:
        return f"{self.mean:+.3g} ({self.low:+.3g} to {self.high:+.3g})"


def student_quantile(seeds: int) -> float:
    """The factor of the standard error in a 95 % t interval of so many values."""
    return float(student.ppf(0.975, seeds - 1))


def t_interval(values: Sequence[float]) -> Interval | None:
    """The mean with its 95 % t interval; `None` for fewer than two values.

    Raises:
        ValueError: A value is NaN, which has no interval.
    """
    if any(map(math.isnan, values)):
        raise ValueError(f"{sum(map(math.isnan, values))} of {len(values)} values are NaN: they have no interval")
    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    half = student_quantile(len(values)) * (statistics.stdev(values) / len(values) ** 0.5)
    return Interval(mean, mean - half, mean + half, len(values))


def t_test(values: Sequence[float]) -> tuple[Interval, float] | None:
    """The mean with its 95 % t interval, and the two-sided p-value of its difference from 0.

    Returns:
        `None` for fewer than two values. Values that are all 0 have a p-value of 1.

    Raises:
        ValueError: A value is NaN.
    """
    if (interval := t_interval(values)) is None:
        return None
    return interval, float(ttest_1samp(values, 0).pvalue) if any(values) else 1.0


def paired_difference(one: Mapping[int, float | None], other: Mapping[int, float | None]) -> Interval | None:
    """The mean of `one` minus `other` with its 95 % t interval, over the seeds that have both values.

    Args:
        one, other: A value for each seed; `None` where there is no value.
    """
    pairs = [(one[seed], other[seed]) for seed in sorted(one.keys() & other.keys())]
    return t_interval([a - b for a, b in pairs if a is not None and b is not None])


FEW = 6
"""Fewer values have no 95 % interval of their median: the lowest and the highest of five miss it in 6 % of cases."""


def bootstrap_median(values: np.ndarray) -> dict[str, float]:
    """The median of values `[N]` with its 95 % bootstrap interval: `median`, `low`, `high`.

    With fewer than `FEW` values, `low` and `high` are the lowest and the highest value.
    """
    if len(values) < FEW:
        low, high = values.min(), values.max()
    else:
        low, high = bootstrap((values,), np.median, n_resamples=999, method="percentile", rng=0).confidence_interval
    return {"median": float(np.median(values)), "low": float(low), "high": float(high)}


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation of pairs `[N]`; 0 where all `x` or all `y` are the same."""
    return float(spearmanr(x, y).statistic) if np.ptp(x) and np.ptp(y) else 0.0


def rank_correlation(x: np.ndarray, y: np.ndarray) -> dict[str, float] | None:
    """Spearman's rank correlation of pairs `[N]` with its 95 % bootstrap interval: `rho`, `low`, `high`.

    Returns:
        `None` where all `x` or all `y` are the same. A draw of the bootstrap in which they are the same counts as 0.
    """
    if not (np.ptp(x) and np.ptp(y)):
        return None
    drawn = bootstrap((x, y), spearman, paired=True, vectorized=False, n_resamples=999, method="percentile", rng=0)
    low, high = drawn.confidence_interval
    return {"rho": spearman(x, y), "low": float(low), "high": float(high)}


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm, Scandinavian Journal of Statistics 1979, 6:65), in the same order."""
    corrected, largest = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected
