"""The plots of the table: quality against memorization for each data set, and both against size alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from common.intervals import Interval, t_interval
from common.plots import plot_panels
from trials.columns import read

from .claims import MEMORIZATION, QUALITY, Runs, runs_by_row
from .data_sets import DATA
from .rows import MAIN, ROWS, TUNED, Row

BASE_COLOR = "black"
MARKERS = {"rwa": "s", "threshold": "^", "dp_sgd": "D"}  # mitigation -> marker
PANEL = (6.4, 4.6)  # inches


def style(row: Row) -> dict[str, str | None]:
    """How a row is drawn: colour by what is tuned, marker by mitigation, hollow for a searched mask."""
    mitigation = row.mitigation[0].partition(":")[0] if row.mitigation else ""
    return {
        "color": BASE_COLOR if row.mask == "off" else TUNED[row.tuned].color,
        "marker": "x" if row.mask == "random" else MARKERS.get(mitigation, "o"),
        "mfc": "white" if row.mask == "found" else None,
    }


def legend() -> list[Line2D]:
    """An entry for each colour, each marker and the hollow one."""
    entries = {ROWS["base"].title: {"marker": "o", "color": BASE_COLOR}}
    entries |= {tuned.title: {"marker": "o", "color": tuned.color} for tuned in TUNED.values()}
    entries |= {
        "all blocks": {"marker": "o", "color": "gray"},
        "mask of MemControl": {"marker": "o", "color": "gray", "mfc": "white"},
        "random mask": {"marker": "x", "color": "gray"},
        **{f"with {name}": {"marker": marker, "color": "gray"} for name, marker in MARKERS.items()},
    }
    return [Line2D([], [], ls="", label=label, **drawn) for label, drawn in entries.items()]


def interval_or_point(values: Sequence[float]) -> Interval:
    """The 95 % t interval; of one value the value itself."""
    return t_interval(values) or Interval(*[float(np.mean(values))] * 3, len(values))


def plot_data(runs: Runs, file: Path) -> None:
    """Draw memorization against quality for the rows of a data set."""
    figure, (axes,) = plot_panels((8.2, 4.8))
    for name in [name for name in MAIN if name in runs]:
        quality, memorization = (
            interval_or_point([figures[c] for figures in runs[name].values() if figures.get(c) is not None])
            for c in (QUALITY, MEMORIZATION)
        )
        errors = [[[i.mean - i.low], [i.high - i.mean]] for i in (quality, memorization)]
        axes.errorbar(
            quality.mean, memorization.mean, xerr=errors[0], yerr=errors[1], lw=0.5, ms=6, **style(ROWS[name])
        )
    figure.legend(handles=legend(), loc="outside right upper", fontsize=8, frameon=False)
    axes.set(xlabel="fid ↓ (mean, 95 % t interval over seeds)", ylabel="membership AUC, loss ↓")
    figure.savefig(file)


def plot_sweep(trials: Path, file: Path) -> None:
    """Draw memorization and quality against size over the masks of the table of real trials."""
    runs = read(trials)
    runs = runs[runs["trainable_parameters"] > 0]
    figure, panels = plot_panels((2 * PANEL[0], PANEL[1]), 2)
    for axes, column, label in zip(panels, (MEMORIZATION, QUALITY), ("membership AUC, loss ↓", "fid ↓")):
        for rate, at_rate in runs.groupby("learning_rate"):
            axes.scatter(at_rate["trainable_parameters"], at_rate[column], s=12, label=f"learning rate {rate:g}")
        axes.set(xlabel="trainable parameters", ylabel=label)
    panels[0].legend()
    figure.savefig(file)


def plot(results: dict[str, Any], trials: Path, folder: Path) -> None:
    """Draw `paper_table_<data set>.png` and `paper_table_sweep.png`, as far as the results go."""
    for data in DATA:
        runs = runs_by_row(results, data)
        if any(name in runs for name in MAIN):
            plot_data(runs, folder / f"paper_table_{data}.png")
    if results["sweep"] is not None:
        plot_sweep(trials, folder / "paper_table_sweep.png")
