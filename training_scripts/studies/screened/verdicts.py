"""Paired differences of the suggested mask to all blocks and to random masks, with intervals over seeds."""

from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

from common.intervals import holm, t_test

BASE, ALL, SUGGESTED = "base", "all", "suggested"
SAME = ("parameters", "blocks")
RANDOM = 5
"""Number of random masks of each kind and seed."""
SEEDS = 10
"""Number of seeds of the whole study."""

FIGURES = ("loss", "auc_loss", "auc_clid", "auc_pia", "fid")

Pieces = Mapping[str, Mapping[str, Any]]


def random_names(same: str) -> list[str]:
    """The fine-tunes of the random masks that have as many parameters, or blocks, as the suggested mask."""
    return [f"{same}{number}" for number in range(1, RANDOM + 1)]


def by_seed(pieces: Pieces, names: list[str], figure: str) -> dict[int, float]:
    """A figure of each seed in which all fine-tunes of these names have it: the mean over the names."""
    folder = "fid" if figure == "fid" else "fine_tunes"
    seeds = sorted(int(piece.split("/")[1]) for piece in pieces if piece.startswith("screenings/"))
    found = {seed: [pieces.get(f"{folder}/{name}-{seed}", {}).get(figure) for name in names] for seed in seeds}
    return {seed: fmean(values) for seed, values in found.items() if None not in values}


def others() -> Iterator[tuple[str, list[str], str]]:
    """What the suggested mask is compared with: name, fine-tunes, and the one of these that fid is measured of."""
    yield ALL, [ALL], ALL
    for same in SAME:
        yield same, random_names(same), random_names(same)[0]


def verdicts(pieces: Pieces) -> list[dict[str, Any]]:
    """The differences, suggested mask minus the other, each with its 95 % t interval and a two-sided p-value.

    The p-values are of paired t-tests, corrected for the number of all differences (Holm, Scandinavian Journal of
    Statistics 1979, 6:65).
    """
    rows = []
    for other, names, of_fid in others():
        for figure in FIGURES:
            theirs = by_seed(pieces, [of_fid] if figure == "fid" else names, figure)
            own = by_seed(pieces, [SUGGESTED], figure)
            seeds = sorted(own.keys() & theirs.keys())
            if (tested := t_test([own[seed] - theirs[seed] for seed in seeds])) is not None:
                interval, p = tested
                rows.append({"other": other, "figure": figure, **interval._asdict(), "p": p})
    for row, corrected in zip(rows, holm([row["p"] for row in rows])):
        row["p_holm"] = corrected
    return rows


def beaten(pieces: Pieces, same: str) -> dict[str, int]:
    """How many random masks have a lower loss than the suggested mask of their seed, a lower AUC by CLiD, and both."""
    pairs = [
        (fine_tune, pieces[f"fine_tunes/{SUGGESTED}-{seed}"])
        for seed in by_seed(pieces, [SUGGESTED, *random_names(same)], "loss")
        for fine_tune in (pieces[f"fine_tunes/{name}-{seed}"] for name in random_names(same))
    ]
    loss, clid = ([one[figure] < own[figure] for one, own in pairs] for figure in ("loss", "auc_clid"))
    return {
        "masks": len(pairs),
        "loss": sum(loss),
        "clid": sum(clid),
        "both": sum(a and b for a, b in zip(loss, clid)),
    }
