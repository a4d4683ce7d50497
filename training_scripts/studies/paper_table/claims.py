"""The claims of the paper, judged from the intervals of differences; nothing here is decided by hand."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr

from common.intervals import Interval, paired_difference, student_quantile, t_interval

from .data_sets import DATA
from .rows import ADDED, MAIN, PEFT, ROWS, SEARCHED

CONFIRMED, NOT_CONFIRMED, UNDECIDED = "confirmed", "not confirmed", "undecided at this size"
NOT_RUN = "not run yet"
# Two attacks decide: the searches lower the first on the training images, and no search sees the second. Where a row
# shall also be as good as another row, its fid may be worse by this share of the other row's fid.
MEMORIZATION, UNSEEN, QUALITY, MARGIN = "audit_membership_auc_loss", "audit_membership_auc_clid", "fid", 0.1
# The columns that a comparison shows; lower is better in all columns but amd.
COMPARED = {
    MEMORIZATION: "membership AUC",
    UNSEEN: "the same by CLiD",
    QUALITY: "fid",
    "canaries_best": "canaries by the best attack, %",
    "audit_copy_similarity": "copy similarity",
    "audit_extraction_rate_calibrated": "extracted, calibrated",
    "amd": "amd",
}

Figures = dict[str, Any]
"""The columns of one run."""

Runs = dict[str, dict[int, Figures]]
"""The runs of one data set: row -> seed -> figures."""


class Claim(NamedTuple):
    """A claim of the paper about pairs of rows.

    Args:
        text: The claim.
        pairs: Pairs of rows. The first row of each pair shall memorize less than the second.
        quality: Whether the first row shall also not have a worse fid than the second.
    """

    text: str
    pairs: tuple[tuple[str, str], ...]
    quality: bool = True


CAPACITY = "Less capacity, less memorization"
CLAIMS = (
    Claim("PEFT memorizes less than full fine-tuning", tuple((name, "full") for name in PEFT), quality=False),
    Claim(
        "A searched mask beats the same method in all blocks",
        tuple((f"memcontrol-{name}", name) for name in SEARCHED),
    ),
    Claim("A searched mask beats a random one of its size", (("memcontrol-svdiff", "random-svdiff"),)),
    Claim(
        "MemControl beats RWA and threshold mitigation",
        tuple(
            (f"memcontrol-{name}", f"{name}+{added}") for name in ("svdiff", "difffit", "attention") for added in ADDED
        ),
    ),
    Claim(
        "MemControl with a mitigation beats MemControl alone",
        tuple((f"memcontrol-svdiff+{added}", "memcontrol-svdiff") for added in ADDED),
    ),
    Claim(
        "A mask carries over to another data set",
        (("transfer-mask", "svdiff"), ("transfer-mask", "transfer-random")),
    ),
)


class Limit(NamedTuple):
    """An interval of a difference, and the value that the interval shall lie below."""

    interval: Interval | None
    below: float


class Comparison(NamedTuple):
    """What a claim rests on.

    Args:
        title: Title of the line on the page.
        intervals: An interval for each of the columns `COMPARED`; `None` with fewer than two seeds.
        limits: The intervals that decide.
    """

    title: str
    intervals: tuple[Interval | None, ...]
    limits: tuple[Limit, ...]


class Judged(NamedTuple):
    """The verdict on a claim for one data set, with the comparisons that decided."""

    verdict: str
    comparisons: list[Comparison]


def verdict(limits: Sequence[Limit]) -> str:
    """Confirmed: all intervals lie below their limits. Not confirmed: one lies above. Undecided otherwise."""
    if any(interval is None for interval, _ in limits):
        return NOT_RUN
    if any(interval.low > below for interval, below in limits):
        return NOT_CONFIRMED
    return CONFIRMED if all(interval.high < below for interval, below in limits) else UNDECIDED


def outlook(limits: Sequence[Limit]) -> str:
    """How many seeds would decide an undecided comparison, and how, if means and spreads stay as they are."""
    if verdict(limits) != UNDECIDED:
        return "–"

    def seeds_needed(interval: Interval, below: float) -> float:
        spread = interval.half / student_quantile(interval.seeds) * interval.seeds**0.5
        halves = ((seeds, student_quantile(seeds) * spread / seeds**0.5) for seeds in range(2, 1001))
        return next((seeds for seeds, half in halves if half < abs(interval.mean - below)), np.inf)

    against = [seeds_needed(*limit) for limit in limits if limit.interval.mean > limit.below]
    if against:
        count, then = min(against), NOT_CONFIRMED
    else:
        count, then = max(seeds_needed(*limit) for limit in limits), CONFIRMED
    return f"{count}: {then}" if count < np.inf else "more than 1000"


def overall(verdicts: Sequence[str]) -> str:
    """The verdict on a claim: confirmed in all of its comparisons, not confirmed when one speaks against it."""
    for first in (NOT_RUN, NOT_CONFIRMED, UNDECIDED):
        if first in verdicts:
            return first
    return CONFIRMED


def runs_by_row(results: dict[str, Any], data: str) -> Runs:
    """The finished runs of a data set."""
    runs: Runs = {}
    for figures in results["runs"]:
        if figures["data"] == data:
            runs.setdefault(figures["row"], {})[figures["seed"]] = figures
    return runs


def difference(runs: Runs, one: str, other: str, column: str) -> Interval | None:
    """A column of one row minus the same column of another row, paired by seed."""
    values = ({seed: figures.get(column) for seed, figures in runs.get(row, {}).items()} for row in (one, other))
    return paired_difference(*values)


def compare(runs: Runs, one: str, other: str, quality: bool) -> Comparison:
    """One row minus another. Two attacks decide and, with `quality`, fid."""
    intervals = {column: difference(runs, one, other, column) for column in COMPARED}
    limits = [Limit(intervals[MEMORIZATION], 0.0), Limit(intervals[UNSEEN], 0.0)]
    if quality:
        fids = [figures[QUALITY] for figures in runs.get(other, {}).values()]
        limits.append(Limit(intervals[QUALITY], MARGIN * float(np.mean(fids)) if fids else 0.0))
    return Comparison(f"{ROWS[one].title} − {ROWS[other].title}", tuple(intervals.values()), tuple(limits))


def capacity_correlation(runs: Runs, column: str) -> Interval | None:
    """Spearman's correlation of the trainable share with a column, over rows without a mitigation; seeds averaged."""
    rows = [name for name in MAIN if not ROWS[name].mitigation and name in runs]
    correlations = []
    for seed in sorted({seed for name in rows for seed in runs[name]}):
        figures = [runs[name][seed] for name in rows if runs[name].get(seed, {}).get(column) is not None]
        values = [run[column] for run in figures]
        if len(figures) >= 4 and len(set(values)) > 1:
            correlations.append(spearmanr([run["trainable_percent"] for run in figures], values).statistic)
    interval = t_interval(correlations)
    return interval and interval._replace(low=max(interval.low, -1.0), high=min(interval.high, 1.0))


def judge_capacity(runs: Runs) -> Judged:
    """The claim that rows memorize less when they train less: the correlation with both attacks lies above 0."""
    correlations = {column: capacity_correlation(runs, column) for column in COMPARED}
    negated = [
        interval and Interval(-interval.mean, -interval.high, -interval.low, interval.seeds)
        for interval in (correlations[MEMORIZATION], correlations[UNSEEN])
    ]
    limits = tuple(Limit(interval, 0.0) for interval in negated)
    title = "rank correlation with trainable %"
    return Judged(verdict(limits), [Comparison(title, tuple(correlations.values()), limits)])


def judge(results: dict[str, Any]) -> dict[str, dict[str, Judged]]:
    """All claims: text of the claim -> data set -> verdict."""
    judged: dict[str, dict[str, Judged]] = {CAPACITY: {}} | {claim.text: {} for claim in CLAIMS}
    for data in DATA:
        runs = runs_by_row(results, data)
        judged[CAPACITY][data] = judge_capacity(runs)
        for claim in CLAIMS:
            comparisons = [compare(runs, one, other, claim.quality) for one, other in claim.pairs]
            judged[claim.text][data] = Judged(
                overall([verdict(comparison.limits) for comparison in comparisons]), comparisons
            )
    return judged
