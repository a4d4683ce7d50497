"""How many seeds a comparison needs, from the spread of the comparisons that were made.

    python training_scripts/studies/power.py    # seconds

The spread is the standard deviation over seeds of paired differences in docs/results/paper_table.parquet and
docs/results/screening_paired.json. The number of seeds is that with which a two-sided paired t-test finds a true
difference of .03 in an AUC with a probability of 80 %. Writes docs/results/power.json and .md.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import chi2, norm
from scipy.stats import t as student

from claimed.judged import CLAIMS
from common.pages import publish_results, read_results, table
from screened.verdicts import ALL, RANDOM, SAME, SUGGESTED, by_seed, random_names

COMMAND = "python training_scripts/studies/power.py"
DIFFERENCE, POWER, LEVEL = 0.03, 0.8, 0.05
QUANTILES = (np.arange(2000) + 0.5) / 2000
ATTACKS = {"loss": "membership AUC", "clid": "CLiD"}
COMPARISONS = len(ATTACKS) * (1 + sum(not claim.second for claim in CLAIMS))
"""Number of tests in the first family of the design for one data set and method (docs/results/design.md), by which
Holm's correction divides the level of the strictest; the claim of capacity is a correlation, none of `CLAIMS`."""
PAIRS = (
    ("svdiff", "full"),
    ("attention", "full"),
    ("lora", "full"),
    ("memcontrol-svdiff", "svdiff"),
    ("memcontrol-attention", "attention"),
    ("memcontrol-svdiff", "random-svdiff"),
    ("attention+rwa", "attention"),
    ("svdiff+threshold", "svdiff"),
)
"""Rows of the table of results that are compared by seed."""


def power(seeds: int, spread: float, level: float) -> float:
    """The probability that a two-sided paired t-test finds a true difference of `DIFFERENCE`.

    Args:
        seeds: Number of pairs, at least 2.
        spread: Standard deviation of the differences.
        level: Probability of a false alarm.
    """
    freedom, shift = seeds - 1, DIFFERENCE / spread * seeds**0.5
    # scipy's noncentral t is not reliable for a large shift: the mean of the normal over the chi-squared instead.
    limit = student.ppf(1 - level / 2, freedom) * np.sqrt(chi2.ppf(QUANTILES, freedom) / freedom)
    return float((norm.sf(limit - shift) + norm.cdf(-limit - shift)).mean())


def seeds_needed(spread: float, level: float) -> int:
    """The smallest number of seeds with a power of `POWER`."""
    return next(seeds for seeds in range(2, 10_000) if power(seeds, spread, level) >= POWER)


def differences(docs: Path) -> dict[str, dict[str, list[float]]]:
    """Paired differences by seed: comparison -> attack -> differences."""
    runs = pd.read_parquet(docs / "results" / "paper_table.parquet")

    def figures(data: str, row: str) -> pd.DataFrame:
        return runs[(runs["data"] == data) & (runs["row"] == row)].set_index("seed").sort_index()

    found: dict[str, dict[str, list[float]]] = {}
    for data in ("demo", "elpv"):
        for one, other in PAIRS:
            found[f"{data}: {one} minus {other}"] = {
                attack: (figures(data, one)[column] - figures(data, other)[column]).dropna().tolist()
                for attack in ATTACKS
                for column in [f"audit_membership_auc_{attack}"]
            }
    pieces = read_results(docs / "results" / "screening_paired.json").get("pieces", {})
    randoms = random_names(SAME[0])
    for title, names in (
        ("all blocks", [ALL]),
        ("one random mask of its size", randoms[:1]),
        (f"mean of {RANDOM} random masks of its size", randoms),
    ):
        found[f"demo: suggested mask minus {title}"] = {}
        for attack in ATTACKS:
            own, theirs = (by_seed(pieces, kind, f"auc_{attack}") for kind in ([SUGGESTED], names))
            values = [own[seed] - theirs[seed] for seed in own if seed in theirs]
            found[f"demo: suggested mask minus {title}"][attack] = values
    return found


def render(content: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# How many seeds a comparison needs",
        "",
        f"`{content['command']}`",
        "",
        f"A true difference of {DIFFERENCE:g} in an AUC is found with a probability of {POWER:.0%} by a two-sided "
        f"paired t-test at {LEVEL:.0%}, and at the strictest level of Holm's correction for {COMPARISONS} comparisons "
        f"({LEVEL / COMPARISONS:.2g}), with so many seeds. The spread of three seeds is rough: its 95 % interval "
        "reaches from half to six times of it.",
        "",
    ]
    rows = [
        [
            name,
            ATTACKS[attack],
            str(found["seeds"]),
            f"{found['mean']:+.3f}",
            f"{found['spread']:.3f}",
            str(found["needed"]),
            str(found["needed_corrected"]),
        ]
        for name, attacks in content["comparisons"].items()
        for attack, found in attacks.items()
    ]
    head = ["comparison", "attack", "seeds so far", "difference", "spread", "seeds needed", "with Holm's correction"]
    return "\n".join([*lines, *table(head, rows)]).rstrip() + "\n"


def main(argv: list[str] | None = None) -> None:
    """Compute, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs_dir", type=Path, default=Path("docs"), help="folder of the results")
    args = parser.parse_args(argv)
    comparisons: dict[str, dict[str, Any]] = {}
    for name, attacks in differences(args.docs_dir).items():
        if few := [attack for attack, values in attacks.items() if len(values) < 2]:
            parser.error(f"{name}, {', '.join(few)}: fewer than two seeds are finished, which a spread needs")
        comparisons[name] = {}
        for attack, values in attacks.items():
            spread = statistics.stdev(values)
            comparisons[name][attack] = {
                "seeds": len(values),
                "mean": statistics.fmean(values),
                "spread": spread,
                "needed": seeds_needed(spread, LEVEL),
                "needed_corrected": seeds_needed(spread, LEVEL / COMPARISONS),
            }
    content = {"command": COMMAND, "comparisons": comparisons}
    publish_results(args.docs_dir / "results" / "power.json", content, render)


if __name__ == "__main__":
    main()
