"""The plots of a search and of an audit, as PNG."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from ..masks import block_map
from ..search import block_effects, complete_trials, is_frozen_base, pareto_front
from .report import ALL_ON, FROZEN_BASE


def plot_search(
    study: optuna.Study,
    objectives: list[str],
    path: str | Path,
    selected: int | None = None,
    distances: Mapping[str, list[float]] | None = None,
) -> None:
    """Draw a search as a PNG: its trials with the Pareto front, their history, and its blocks over the denoiser.

    Args:
        selected (`int`, *optional*): number of the trial that was chosen.
        distances (`dict`, *optional*): of the audit, for a fourth panel; see [`plot_distances`].
    """
    figure, (front, history, blocks, *further) = _figure(3 if distances is None else 4)
    _draw_front(figure, front, study, objectives, selected)
    _draw_history(history, study, objectives, selected)
    _draw_blocks(figure, blocks, study, objectives, selected)
    if distances is not None:
        _draw_distances(*further, distances)
    figure.savefig(path)


def _draw_front(figure: Any, axes: Any, study: optuna.Study, objectives: list[str], selected: int | None) -> None:
    trials = complete_trials(study)
    front = sorted(pareto_front(study), key=lambda t: t.values)
    y = [t.values[min(1, len(objectives) - 1)] for t in trials]
    x = [t.values[0] if len(objectives) > 1 else t.number for t in trials]
    place = {t.number: (a, b) for t, a, b in zip(trials, x, y)}
    if len(objectives) > 1:
        axes.plot(*zip(*(place[t.number] for t in front)), color="tab:blue", lw=1, zorder=1, label="Pareto front")
    sizes = [t.user_attrs["trainable_percent"] for t in trials]
    points = axes.scatter(x, y, c=sizes, cmap="viridis_r", s=55, zorder=2, edgecolor="black", linewidth=0.5)
    figure.colorbar(points, label="trainable parameters (%)")
    for trial in trials:
        mask = trial.user_attrs["hyperparameters"]["mask"]
        name = FROZEN_BASE if is_frozen_base(trial) else ALL_ON if all(mask.values()) else None
        if name:
            axes.annotate(name, place[trial.number], xytext=(7, 7), textcoords="offset points", fontsize=9)
    if selected is not None:
        axes.scatter(*place[selected], s=190, facecolor="none", edgecolor="tab:red", linewidth=2, zorder=3)
        axes.annotate(
            "selected", place[selected], xytext=(9, -14), textcoords="offset points", fontsize=9, color="tab:red"
        )
    directions = [d.name.lower() for d in study.directions]
    better = {"minimize": "lower is better", "maximize": "higher is better"}
    if len(objectives) > 1:
        axes.set_xlabel(f"{objectives[0]} ({better[directions[0]]})")
        axes.legend(loc="best", fontsize=9)
    else:
        axes.set_xlabel("trial")
    axes.set_ylabel(f"{objectives[-1]} ({better[directions[-1]]})")
    axes.set_title(f"{len(trials)} trials of {study.study_name}")
    axes.margins(0.18, 0.12)
    axes.grid(alpha=0.3)


def _draw_history(axes: Any, study: optuna.Study, objectives: list[str], selected: int | None) -> None:
    """The objectives of each trial, one after the other: the first on the left axis, a second on the right."""
    trials = complete_trials(study)
    for i, (name, color) in enumerate(zip(objectives[:2], ("tab:blue", "tab:orange"))):
        side = axes.twinx() if i else axes
        side.plot([t.number for t in trials], [t.values[i] for t in trials], "o-", ms=4, lw=0.8, color=color)
        side.set_ylabel(name, color=color)
        side.tick_params(axis="y", colors=color)
    if selected is not None:
        axes.axvline(selected, color="tab:red", lw=1, ls="--", label="selected")
        axes.legend(fontsize=9)
    axes.set_xlabel("trial")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title("History")
    axes.grid(alpha=0.3)


def _draw_blocks(figure: Any, axes: Any, study: optuna.Study, objectives: list[str], selected: int | None) -> None:
    """The blocks in the way of the data: which are selected, and the effect of each on the objectives."""
    effects = block_effects(study)
    masks = {t.number: t.user_attrs["hyperparameters"]["mask"] for t in complete_trials(study)}
    names = list(masks[min(masks)])
    signs = [1 if d.name == "MINIMIZE" else -1 for d in study.directions]
    rows = [[effects[n][i] * signs[i] if n in effects else math.nan for n in names] for i in range(len(objectives))]
    largest = [max((abs(v) for v in row if math.isfinite(v)), default=0) or 1 for row in rows]
    shades = [[value / most for value in row] for row, most in zip(rows, largest)]
    image = axes.imshow([[math.nan] * len(names), *shades], cmap="RdYlGn_r", vmin=-1, vmax=1, aspect="auto")
    figure.colorbar(image, ticks=[-1, 1]).ax.set_yticklabels(["better\nwith it", "worse\nwith it"], fontsize=9)
    labels = ["selected", *(f"{name}\n(up to {most:.2g})" for name, most in zip(objectives, largest))]
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    on = [place for place, name in enumerate(names) if selected is not None and masks[selected][name]]
    axes.bar(on, 0.7, width=0.8, bottom=-0.35, color="black")
    parts = block_map(dict.fromkeys(names, True))
    ends = np.cumsum([len(blocks) for _, blocks in parts])
    starts = ends - [len(blocks) for _, blocks in parts]
    axes.set_xticks((starts + ends - 1) / 2, [part for part, _ in parts], rotation=30, ha="right", fontsize=9)
    for end in ends[:-1]:
        axes.axvline(end - 0.5, color="black", lw=1)
    axes.set_title("What a block does: mean of the trials with it, minus without")


def plot_distances(distances: Mapping[str, list[float]], path: str | Path) -> None:
    """Draw how near generated images are to training images and to as many held-out ones, as a PNG.

    Args:
        distances (`dict`): `edges` of the bins, and the counts `train` and `held_out`: `audit["distances"]`.
    """
    figure, (axes,) = _figure(1)
    _draw_distances(axes, distances)
    figure.savefig(path)


def _figure(panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(panels, 2)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(7 * columns, 4.6 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]


def _draw_distances(axes: Any, distances: Mapping[str, list[float]]) -> None:
    for name, color in (("train", "tab:red"), ("held_out", "tab:gray")):
        label = {"train": "training images", "held_out": "held-out images, as many"}[name]
        axes.stairs(distances[name], distances["edges"], fill=True, alpha=0.45, color=color, label=label)
    axes.set_xlabel("cosine distance to the nearest image of the set")
    axes.set_ylabel("generated images")
    axes.set_title("Generated images: how near to what was trained on")
    axes.legend(fontsize=9)
    axes.grid(alpha=0.3)
