"""The verdicts: which runs are compared at which points, the tests of the differences, and both kinds of intervals.

A difference in a seed is a weighted sum of figures: each point of a run, which is a piece and a step, has a weight.
At equal steps the weights are 1 and -1. At matched quality a run's weight is spread over the two points between which
its loss passes the common loss. So the figures of part of the images can be put in the place of those of all.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr

from common.intervals import Interval, holm, t_interval, t_test

from .rows import ALL, BASE, EQUAL, FOUND, FULL, OWN_RATE, RANDOMS, ROWS, SHARES, TRANSFERRED, WORST, piece_of

ATTACKS = ("auc_loss", "auc_clid")
LOSS = "loss"
MARGIN = 0.03
"""The largest difference in an AUC that counts as none."""
LEVEL = 0.05
CONFIRMED, REFUTED, NONE, UNDECIDED, UNMATCHED = (
    "confirmed",
    "refuted",
    "no difference as large as .03",
    "undecided",
    "no common quality",
)
ABOVE = (0.0005, 0.001, 0.002)
"""How far above the lowest common loss two runs are compared, too, without a verdict: does the place decide?"""
DRAWS = 1000
"""Number of draws of the bootstrap over images."""
NORMAL = 1.96
"""The factor of the standard deviation in a 95 % interval."""

Runs = Mapping[str, Mapping[str, Any]]
Weights = dict[tuple[str, int], float]


class Comparison(NamedTuple):
    """Two rows of a claim, one minus the others.

    Args:
        claim: The claim.
        one: A row.
        others: Rows; the differences to them are averaged within a seed.
        second: Whether the comparison is in the second family.
    """

    claim: str
    one: str
    others: tuple[str, ...]
    second: bool = False


CAPACITY = "Less capacity, less memorization"
CLAIMS = (
    Comparison("PEFT memorizes less than full fine-tuning", ALL, (FULL,)),
    Comparison("The found mask beats all blocks, stopped early or not", FOUND, (ALL,)),
    Comparison("The found mask beats random masks of its size", FOUND, RANDOMS),
    Comparison("Which blocks are trained matters", FOUND, (WORST,)),
    Comparison("The found mask beats RWA in all blocks", FOUND, ("all+rwa",)),
    Comparison("The found mask beats threshold mitigation in all blocks", FOUND, ("all+threshold",)),
    Comparison("The found mask beats DP-SGD in all blocks", FOUND, ("all+dp_sgd",)),
    Comparison("A mask carries over to another data set", TRANSFERRED, RANDOMS),
    Comparison("RWA on top of the found mask helps", "found+rwa", (FOUND,), second=True),
    Comparison("Threshold mitigation on top of the found mask helps", "found+threshold", (FOUND,), second=True),
    Comparison("The other set's mask is better than the own", TRANSFERRED, (FOUND,), second=True),
    Comparison("The found mask at its own rate beats all blocks", OWN_RATE, (ALL,), second=True),
)


@dataclass
class Tested:
    """A tested figure of a comparison.

    Args:
        figure: Name of the figure.
        mean, low, high: Mean over seeds with the ends of its 95 % t interval.
        seeds: Number of seeds.
        p: Two-sided p-value of the paired t-test.
        p_holm: The same, corrected within the family.
        image_low, image_high: Ends of the 95 % interval over seeds and images; `None` where images are not drawn.
    """

    figure: str
    mean: float
    low: float
    high: float
    seeds: int
    p: float
    p_holm: float = 1.0
    image_low: float | None = None
    image_high: float | None = None


# ---- points of curves ----


def steps_of(run: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """The points of a run, by the number of steps, in their order."""
    return {step: run["points"][str(step)] for step in sorted(map(int, run["points"]))}


def lowest_loss(run: Mapping[str, Any]) -> float:
    """The lowest held-out loss on the curve of a run."""
    return min(point[LOSS] for point in steps_of(run).values())


def first_loss(run: Mapping[str, Any]) -> float:
    """The held-out loss at the first measurement of a run."""
    return next(iter(steps_of(run).values()))[LOSS]


def place(run: Mapping[str, Any], loss: float) -> dict[int, float]:
    """Where a run's held-out loss first falls to `loss`: weights of one or two steps, which add up to 1.

    Args:
        run: The run; `loss` lies between its first loss and its lowest.
    """
    points = list(steps_of(run).items())
    for (step, point), (later, next_point) in pairwise(points):
        if point[LOSS] <= loss:
            return {step: 1.0}
        if next_point[LOSS] <= loss:
            share = (point[LOSS] - loss) / (point[LOSS] - next_point[LOSS])
            return {step: 1 - share, later: share}
    return {points[-1][0]: 1.0}


def matched(runs: Runs, one: str, other: str, above: float = 0.0) -> Weights | None:
    """One run minus another at the lowest loss that both reach, or so far above it.

    Returns:
        `None` when they have no common quality there.
    """
    pair = runs[one], runs[other]
    loss = max(map(lowest_loss, pair)) + above
    if loss > min(map(first_loss, pair)):
        return None
    places = [place(run, loss) for run in pair]
    return {(one, step): share for step, share in places[0].items()} | {
        (other, step): -share for step, share in places[1].items()
    }


def interpolation_errors(runs: Runs, data: str, method: str, seeds: Iterable[int]) -> dict[str, Interval]:
    """How much more memorization is interpolated than measured, where a measured step is left out: means over seeds.

    Of each run, the steps between others count, as long as its loss falls. The gaps are twice as wide there as where
    the verdicts interpolate.
    """
    by_seed: dict[str, list[float]] = {figure: [] for figure in ATTACKS}
    for seed in seeds:
        errors: dict[str, list[float]] = {figure: [] for figure in ATTACKS}
        for row in ROWS:
            points = steps_of(runs[piece_of("runs", data, method, row, seed)])
            for before, step, after in zip(points, [*points][1:], [*points][2:]):
                if not points[before][LOSS] > points[step][LOSS] > points[after][LOSS]:
                    break
                beside = place(
                    {"points": {str(other): points[other] for other in (before, after)}}, points[step][LOSS]
                )
                for figure, found in errors.items():
                    interpolated = sum(weight * points[other][figure] for other, weight in beside.items())
                    found.append(interpolated - points[step][figure])
        for figure, found in errors.items():
            by_seed[figure] += [fmean(found)] if found else []
    return {figure: interval for figure, values in by_seed.items() if (interval := t_interval(values))}


def mean_weights(weights: Sequence[Weights]) -> Weights:
    """The mean of several weighted sums."""
    mean: Weights = {}
    for terms in weights:
        for point, weight in terms.items():
            mean[point] = mean.get(point, 0.0) + weight / len(weights)
    return mean


def value(runs: Runs, weights: Weights, figure: str) -> float:
    """The weighted sum of a figure."""
    return sum(weight * runs[piece]["points"][str(step)][figure] for (piece, step), weight in weights.items())


# ---- both kinds of intervals ----


class Images:
    """AUCs of drawn images.

    Args:
        runs: The runs of one data set.
        draws: Number of draws.
    """

    def __init__(self, runs: Runs, draws: int = DRAWS) -> None:
        self.runs, self.draws = runs, draws
        generator = np.random.default_rng(0)
        self._aucs: dict[tuple[str, int, str], np.ndarray] = {}
        point = next((point for run in runs.values() for point in run["points"].values()), None)
        if point is not None:
            sizes = point["members"], len(point["ranks_loss"]) - point["members"]
            self._counts = [generator.multinomial(size, [1 / size] * size, draws).astype(float) for size in sizes]

    def auc(self, piece: str, step: int, figure: str) -> np.ndarray:
        """The AUC in each draw of images, `[draws]`."""
        key = piece, step, figure
        if key not in self._aucs:
            point = self.runs[piece]["points"][str(step)]
            ranks, members = np.asarray(point[figure.replace("auc", "ranks")], dtype=int), point["members"]
            inside, outside = ranks[:members, None], ranks[None, members:]
            wins = (inside > outside) + 0.5 * (inside == outside)
            counts = self._counts
            self._aucs[key] = ((counts[0] @ wins) * counts[1]).sum(1) / wins.size
        return self._aucs[key]

    def interval(self, by_seed: Sequence[Weights], figure: str) -> tuple[float, float]:
        """The 95 % interval of the mean over seeds, for other seeds and other images; of two seeds or more.

        Half of its width is that of the t interval over seeds and that of a bootstrap over images, which draws the
        same images for all seeds, added in squares. So it is never narrower than the t interval.
        """
        over_seeds = t_interval([value(self.runs, weights, figure) for weights in by_seed])
        drawn = np.mean(
            [
                sum(weight * self.auc(piece, step, figure) for (piece, step), weight in terms.items())
                for terms in by_seed
            ],
            axis=0,
        )
        half = math.hypot(over_seeds.half, NORMAL * drawn.std())
        return over_seeds.mean - half, over_seeds.mean + half


# ---- tests ----


def test_of(figure: str, values: Sequence[float]) -> Tested | None:
    """The paired t-test of differences against 0; `None` for fewer than two."""
    if (tested := t_test(values)) is None:
        return None
    interval, p = tested
    return Tested(figure, *interval, p)


def verdict(tests: Sequence[Tested]) -> str:
    """The verdict on "one memorizes less": by corrected tests of both attacks, or by their intervals."""
    if any(test.p_holm < LEVEL and test.mean > 0 for test in tests):
        return REFUTED
    if all(test.p_holm < LEVEL and test.mean < 0 for test in tests):
        return CONFIRMED
    return NONE if all(test.low > -MARGIN and test.high < MARGIN for test in tests) else UNDECIDED


def seeds_of(runs: Runs, data: str, method: str, rows: Iterable[str], seeds: Iterable[int]) -> list[int]:
    """The seeds in which all of some rows are finished."""
    rows = list(rows)
    return [seed for seed in seeds if all(piece_of("runs", data, method, row, seed) in runs for row in rows)]


def rank_correlations(
    runs: Runs, data: str, method: str, seeds: Iterable[int], rows: Sequence[str], by: str, figures: Sequence[str]
) -> dict[str, list[float]]:
    """Spearman's rank correlation of `by` with each figure over rows after `EQUAL` steps, in each finished seed.

    Args:
        by: `parameters`, or a figure.
    """
    found: dict[str, list[float]] = {figure: [] for figure in figures}
    for seed in seeds_of(runs, data, method, rows, seeds):
        of_seed = [runs[piece_of("runs", data, method, row, seed)] for row in rows]
        points = [{**run, **(steps_of(run).get(EQUAL) or steps_of(run)[0])} for run in of_seed]
        for figure in figures:
            correlation = spearmanr([point[by] for point in points], [point[figure] for point in points])
            found[figure].append(float(correlation.statistic))
    return found


def capacity(runs: Runs, data: str, method: str, seeds: Iterable[int]) -> dict[str, Any]:
    """The rank correlation of parameters with memorization after `EQUAL` steps, in each seed, as a comparison."""
    rows = (BASE, *RANDOMS, *SHARES, ALL, FULL)
    found = rank_correlations(runs, data, method, seeds, rows, "parameters", ATTACKS)
    tests = [test for figure in ATTACKS if (test := test_of(figure, found[figure]))]
    return {"claim": CAPACITY, "kind": "correlation", "left_out": 0, "tests": tests}


def reward(runs: Runs, data: str, method: str, seeds: Iterable[int]) -> dict[str, Interval]:
    """The rank correlations of the authors' reward with quality and memorization over all rows: means over seeds."""
    rows = [row for row in ROWS if row != OWN_RATE]  # which can have the runs of the found mask
    found = rank_correlations(runs, data, method, seeds, rows, "max_norm", (LOSS, *ATTACKS))
    return {figure: interval for figure, values in found.items() if (interval := t_interval(values))}


def compare(
    runs: Runs,
    images: Images | None,
    data: str,
    method: str,
    asked: Comparison,
    seeds: Iterable[int],
    above: float = 0.0,
) -> dict[str, Any]:
    """The tests of a comparison at matched quality, and its differences at equal steps.

    Args:
        images: For the intervals over images, which are left out without it.
        above: How far above the lowest common loss two runs are compared.
    """
    equal: list[Weights] = []
    pairs: list[list[Weights]] = []
    lowest: list[float] = []
    left_out = 0
    for seed in seeds_of(runs, data, method, (asked.one, *asked.others), seeds):
        one, *others = (piece_of("runs", data, method, row, seed) for row in (asked.one, *asked.others))
        equal.append(mean_weights([{(one, EQUAL): 1.0, (other, EQUAL): -1.0} for other in others]))
        lowest.append(lowest_loss(runs[one]) - fmean(lowest_loss(runs[other]) for other in others))
        found = [matched(runs, one, other, above) for other in others]
        left_out += found.count(None)
        pairs.append([weights for weights in found if weights is not None])
    total = left_out + sum(map(len, pairs))
    by_seed = [mean_weights(found) for found in pairs if found]
    result = {
        "claim": asked.claim,
        "one": asked.one,
        "others": list(asked.others),
        "second": asked.second,
        "kind": "matched",
        "left_out": left_out,
        "pairs": total,
        "equal": [
            asdict(test)
            for figure in (LOSS, *ATTACKS)
            if (test := test_of(figure, [value(runs, weights, figure) for weights in equal]))
        ],
    }
    if 2 * left_out > total or len(by_seed) < 2:
        test = test_of(LOSS, lowest)
        return result | {"kind": UNMATCHED, "tests": [test] if test else []}
    tests = [test_of(figure, [value(runs, weights, figure) for weights in by_seed]) for figure in ATTACKS]
    for test in tests if images else ():
        test.image_low, test.image_high = images.interval(by_seed, test.figure)
    return result | {"tests": tests}


def judge(runs: Runs, data: str, method: str, seeds: Sequence[int], above: float = 0.0) -> list[dict[str, Any]]:
    """All comparisons of a data set and a method with two finished seeds, and their verdicts.

    Args:
        above: How far above the lowest common loss two runs are compared. Above 0, there are no intervals over images.
    """
    images = (
        None if above else Images({piece: run for piece, run in runs.items() if piece.startswith(f"runs/{data}-")})
    )
    compared = [compare(runs, images, data, method, asked, seeds, above) for asked in CLAIMS]
    families = [
        [capacity(runs, data, method, seeds), *(row for row in compared if not row["second"])],
        [row for row in compared if row["second"]],
    ]
    return [row for family in families for row in corrected(family)]


def corrected(family: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The comparisons of a family that have tests, with p-values corrected for all of these, and their verdicts."""
    tests = [test for row in family for test in row["tests"]]
    for test, p in zip(tests, holm([test.p for test in tests])):
        test.p_holm = p
    return [{**row, "verdict": _verdict(row), "tests": [*map(asdict, row["tests"])]} for row in family if row["tests"]]


def changed_without(judged: Sequence[Mapping[str, Any]], one: str) -> dict[str, str]:
    """Verdicts of the second family that would be others if the comparison of the row `one` were not counted in it.

    Args:
        judged: What [`judge`] returns.
    """
    left = [
        {**row, "tests": [Tested(**test) for test in row["tests"]]}
        for row in judged
        if row.get("second") and row["one"] != one
    ]
    now = {row["claim"]: row["verdict"] for row in corrected(left)}
    return {
        row["claim"]: now[row["claim"]] for row in judged if now.get(row["claim"], row["verdict"]) != row["verdict"]
    }


def _verdict(row: Mapping[str, Any]) -> str:
    if row["kind"] == UNMATCHED:
        test = row["tests"][0]
        if test.p_holm >= LEVEL:
            return UNMATCHED
        return f"{UNMATCHED}: {'learns more' if test.mean < 0 else 'learns less'}"
    if row["kind"] == "correlation":  # a positive correlation is the claim
        return verdict(
            [
                Tested(test.figure, -test.mean, -test.high, -test.low, test.seeds, test.p, test.p_holm)
                for test in row["tests"]
            ]
        )
    return verdict(row["tests"])


def mean_points(runs: Runs, data: str, method: str, row: str, seeds: Iterable[int]) -> dict[str, dict[str, Interval]]:
    """The mean curve of a row: each figure at each step with its 95 % t interval over the finished seeds."""
    finished = [runs[piece_of("runs", data, method, row, seed)] for seed in seeds_of(runs, data, method, [row], seeds)]
    if len(finished) < 2:
        return {}
    figures = (LOSS, *ATTACKS, "auc_pia", "max_norm")
    return {
        str(step): {figure: t_interval([steps_of(run)[step][figure] for run in finished]) for figure in figures}
        for step in steps_of(finished[0])
    }


def parameters_of(runs: Runs, data: str, method: str, row: str, seeds: Iterable[int]) -> float:
    """The mean number of parameters that a row trains, over its finished seeds."""
    finished = seeds_of(runs, data, method, [row], seeds)
    return fmean(runs[piece_of("runs", data, method, row, seed)]["parameters"] for seed in finished)
