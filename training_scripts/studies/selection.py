"""Is a mask selected better by figures that an additive model has shrunk? Searches of the table of real trials.

    python training_scripts/studies/selection.py    # half a minute

A search looks twelve random trials up in docs/trial_table.parquet and selects one: the knee of its front, by the
figures on validation images. These are taken as they are, or as the trials' additive model has them (ridge regression
on the bits of the mask and the logarithm of the rate, its penalty by leave-one-out cross-validation), or as the mean
of both. What was selected is judged by figures that the search did not see: the audit's on held-out images. Writes
docs/results/selection.json and .md.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from optuna.study._multi_objective import _is_pareto_front
from transformers.trainer_utils import BestRun

from common.intervals import bootstrap_median
from common.pages import publish_results, table
from memcontrol_hf.search import select_run
from trials.columns import masks

COMMAND = "python training_scripts/studies/selection.py"
TRIALS, SEARCHES = 12, 400
CASES = {
    "loss": ("loss", "audit_membership_auc_clid"),
    "fid": ("audit_fid", "audit_membership_auc_clid"),
}
"""Quality reward -> the figures by which the selection is judged. The table holds no loss on held-out images; that on
validation images differs from it by much less than masks differ."""
WAYS = {"raw": 0.0, "mean of both": 0.5, "model": 1.0}
"""Way to select -> weight of the additive model."""


def additive(inputs: np.ndarray, values: np.ndarray) -> np.ndarray:
    """What ridge regression says of the trials that it was fitted to.

    Args:
        inputs: Bits of the masks and logarithm of the rates `[N, D]`.
        values: A figure for each trial `[N]`.

    Returns:
        The fitted values `[N]`, with the penalty whose leave-one-out error is the smallest.
    """
    left, scales, _ = np.linalg.svd(inputs - inputs.mean(0), full_matrices=False)
    centred, best = values - values.mean(), (np.inf, values)
    for penalty in np.logspace(-2, 2, 13):
        hat = (left * (scales**2 / (scales**2 + penalty))) @ left.T
        fitted = hat @ centred
        error = float((((centred - fitted) / (1 - np.diag(hat) - 1 / len(values))) ** 2).mean())
        best = min(best, (error, fitted + values.mean()), key=lambda found: found[0])
    return best[1]


def depths(values: np.ndarray) -> np.ndarray:
    """How far each trial lies above the line between the ends of the front, after both figures are scaled to it.

    Args:
        values: Quality and memorization of the trials `[N, 2]`, which are minimized.
    """
    front = values[_is_pareto_front(values, assume_unique_lexsorted=False)]
    span = front.max(0) - front.min(0)
    return ((values - front.min(0)) / np.where(span > 0, span, 1)).sum(1) - 1


def knee(values: np.ndarray) -> int:
    """The trial that a search selects; the last one is the frozen base, which is never selected."""
    front = np.flatnonzero(_is_pareto_front(values, assume_unique_lexsorted=False)).tolist()
    base = len(values) - 1
    runs = [BestRun(str(place), values[place].tolist(), {"mask": {"trained": place != base}}) for place in front]
    return int(select_run(runs).run_id) if front != [base] else 0


def regrets(runs: pd.DataFrame, quality: str) -> dict[str, np.ndarray]:
    """How much deeper the best trial lies, by the figures that judge, than the selected one: way -> `[SEARCHES]`."""
    groups = masks(runs)
    trained, base = runs[runs[groups].any(axis=1)], runs[~runs[groups].any(axis=1)]
    drawn, found = np.random.default_rng(0), {name: [] for name in WAYS}
    for _ in range(SEARCHES):
        trials = pd.concat([trained.iloc[drawn.choice(len(trained), TRIALS, replace=False)], base])
        inputs = np.c_[trials[groups].to_numpy(float), np.log(trials["learning_rate"].to_numpy(float))]
        seen = trials[[quality, "membership_auc"]].to_numpy(float)
        model = np.c_[additive(inputs, seen[:, 0]), additive(inputs, seen[:, 1])]
        judged = depths(trials[list(CASES[quality])].to_numpy(float))
        for name, weight in WAYS.items():
            selected = knee((1 - weight) * seen + weight * model)
            found[name].append(judged[selected] - judged[:-1].min())
    return {name: np.array(values) for name, values in found.items()}


def render(content: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# Which figures select a mask",
        "",
        f"`{content['command']}`",
        "",
        f"{SEARCHES} searches of {TRIALS} random trials of the [trial table](../trial_table.parquet). The regret of a "
        "selection is how much deeper below the line between the ends of the front the best trial of the search lies, "
        "by the audit's figures on held-out images; 0 is the best, and 1 is the distance of the line to the corner. "
        "Means and medians, with 95 % bootstrap intervals of the medians.",
        "",
    ]
    for quality, ways in content["regret"].items():
        rows = [
            [name, f"{found['mean']:.3f}", "{median:.3f} ({low:.3f} to {high:.3f})".format(**found)]
            for name, found in ways.items()
        ]
        lines += [f"## Searched by {quality} and membership AUC", ""]
        lines += [f"Judged by {' and '.join(f'`{name}`' for name in CASES[quality])}.", ""]
        if quality in CASES[quality]:
            lines += [
                f"The table holds no {quality} on held-out images, so this judge is the same {quality} on validation "
                "images by which the searches selected. This can favour the selection by the raw figures.",
                "",
            ]
        lines += table(["selected by", "mean regret", "median regret"], rows, numbers=True)
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str] | None = None) -> None:
    """Search the table, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs_dir", type=Path, default=Path("docs/results"), help="folder of the results")
    args = parser.parse_args(argv)
    runs = pd.read_parquet("docs/trial_table.parquet")
    content: dict[str, Any] = {"command": COMMAND, "regret": {}}
    for quality in CASES:
        content["regret"][quality] = {
            name: {"mean": float(values.mean()), **bootstrap_median(values)}
            for name, values in regrets(runs, quality).items()
        }
    publish_results(args.docs_dir / "selection.json", content, render)


if __name__ == "__main__":
    main()
