"""How many trials a screening saves: searches of the table of real trials, with and without the masks of a screening.

    python training_scripts/studies/screened_replay.py    # two minutes

A search looks a trial up in docs/trial_table.parquet (63 masks of six groups of blocks at two learning rates, and the
frozen base) instead of training. The screenings are those of docs/results/screening_demo.json; searches take them in
turn.
After each trial, the hypervolume that the search has found is compared with that of the whole table. Writes
docs/results/screened_replay.json and .md.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from common.pages import publish_results
from common.pages import table as markdown
from memcontrol_hf.screening import Screening
from screening_predicts import by_group
from trial_table import GROUPS
from trials.columns import read
from trials.replay import SCREENED, Table, replays, summary

COMMAND = "python training_scripts/studies/screened_replay.py"
REPORTED_TRIALS = (4, 5, 6, 8, 12, 16, 32, 64)
QUALITIES = ("loss", "fid")


def of_groups(screening: dict[str, Any]) -> Screening:
    """A stored screening of blocks as one of the table's groups."""
    columns = [f"mask.{group}" for group in GROUPS]
    # A block's negative figure counts as nothing, before the blocks of a group are added up.
    clipped = {block: max(value, 0.0) for block, value in screening["memorizes"].items()}
    sides = {"learns": screening["learns"], "memorizes": clipped}
    sums = {side: dict(zip(columns, by_group(blocks))) for side, blocks in sides.items()}
    unknown = dict.fromkeys(columns, math.nan)
    return Screening(**sums, learns_error=unknown, memorizes_error=unknown, parameters=dict.fromkeys(columns, 1))


def render(content: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# How many trials a screening saves",
        "",
        f"`{content['command']}`",
        "",
        "Share of the hypervolume of the table's front that a search has found after so many trials: median over "
        f"{content['searches']} searches with its 95 % bootstrap interval. All searches but plain random search begin "
        "with all blocks on and all blocks off; a screened search goes on with the masks of its screening, which "
        "costs one trial and a half that are not counted here. The last column counts the trials that are needed to "
        "reach what plain random search has after 64.",
        "",
        f"The first {content['screened_trials']} trials are the same in all screened searches that have the same "
        f"screening, and there are {content['screenings']} screenings. For so many trials, the row of the screened "
        "searches shows the median of the screenings, and in brackets the lowest and the highest of the screenings "
        "instead of an interval. Where both are equal, the masks of all screenings find the same share.",
        "",
    ]
    for quality in QUALITIES:
        replay = content["replay"][quality]
        rows = [
            [
                name,
                *(_interval(found["share"][str(count)]) for count in REPORTED_TRIALS),
                _interval(found["trials_to_goal"], "{:.3g}"),
            ]
            for name, found in replay["samplers"].items()
        ]
        head = [f"{quality} and membership AUC", *map(str, REPORTED_TRIALS), f"trials to {replay['goal']:.3f}"]
        lines += markdown(head, rows)
    return "\n".join(lines).rstrip() + "\n"


def _interval(figure: dict[str, float], form: str = "{:.3f}") -> str:
    median, low, high = (form.format(figure[name]) for name in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def main(argv: list[str] | None = None) -> None:
    """Replay, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=60, help="searches of each kind (default: 60)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--docs_dir", type=Path, default=Path("docs/results"), help="folder of the results")
    args = parser.parse_args(argv)
    runs = read(Path("docs/trial_table.parquet"))
    stored = json.loads(Path("docs/results/screening_demo.json").read_text())["screenings"]
    screenings = [of_groups(found) for name, found in sorted(stored.items()) if name.startswith("one way-")]
    tables = {quality: Table(runs, [quality, "membership_auc"], screenings) for quality in QUALITIES}
    first = tables[QUALITIES[0]]  # the screenings are the same for both
    content: dict[str, Any] = {
        "command": COMMAND,
        "searches": args.seeds,
        "screenings": len(screenings),
        "screened_trials": len(first.queued()) + min(len(first.screened(seed)) for seed in range(len(screenings))),
        "replay": {},
    }
    for quality, trials in tables.items():
        shares = replays(trials, ["tpe", f"{SCREENED}tpe"], args.seeds, max(REPORTED_TRIALS), args.workers)
        content["replay"][quality] = summary(
            shares, list(REPORTED_TRIALS), content["screenings"], content["screened_trials"]
        )
    publish_results(args.docs_dir / "screened_replay.json", content, render)


if __name__ == "__main__":
    main()
