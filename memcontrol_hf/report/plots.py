"""The plots of a search, of an audit and of a screening, drawn from plain dictionaries, as PNG."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..masks import block_map
from .report import ALL_ON, FROZEN_BASE


def plot_search(
    search: Mapping[str, Any],
    mask: Mapping[str, bool],
    path: str | Path,
    selected: int | None = None,
    distances: Mapping[str, list[float]] | None = None,
    screening: Mapping[str, Any] | None = None,
) -> None:
    """Draw a search as a PNG: its trials with the Pareto front, their history, and what each block does.

    Args:
        search (`dict`): Summary of the search: `report.search`.
        mask (`dict[str, bool]`): The selected mask: `report.mask`.
        path (`str`): File to write.
        selected (`int`, *optional*): Number of the trial that was chosen. Without it, no trial and no block is marked.
        distances (`dict`, *optional*): Distances of the audit, for a fourth panel; see [`plot_distances`].
        screening (`dict`, *optional*):
            Screening of the search: `report.screening`. It tells what each block does more surely than the trials.
    """
    figure, (front, history, blocks, *further) = _figure(3 if distances is None else 4)
    _draw_front(figure, front, search, len(mask), selected)
    _draw_history(history, search, selected)
    marked = mask if selected is not None else dict.fromkeys(mask, False)
    if screening is None:
        _draw_blocks(figure, blocks, search, marked)
    else:
        _draw_screening(blocks, screening, marked)
        blocks.legend(fontsize=9)
    if distances is not None:
        _draw_distances(*further, distances)
    figure.savefig(path)


def plot_distances(distances: Mapping[str, list[float]], path: str | Path) -> None:
    """Draw how near generated images are to training images and to as many held-out images, as a PNG.

    Args:
        distances (`dict`): `edges` of the bins and the counts `train` and `held_out`: `report.audit["distances"]`.
        path (`str`): File to write.
    """
    figure, (axes,) = _figure(1)
    _draw_distances(axes, distances)
    figure.savefig(path)


def plot_screening(screening: Mapping[str, Any], path: str | Path) -> None:
    """Draw what each block learns and memorizes as a PNG, the blocks in the order of the data's way through the model.

    Args:
        screening (`dict`): The screening: [`~memcontrol_hf.screening.Screening.to_dict`].
        path (`str`): File to write.
    """
    figure, (axes,) = _figure(1)
    figure.set_size_inches(10, 4.6)
    _draw_screening(axes, screening)
    figure.legend(fontsize=9, loc="outside lower center", ncols=2)
    figure.savefig(path)


def _draw_screening(axes: Axes, screening: Mapping[str, Any], mask: Mapping[str, bool] = MappingProxyType({})) -> None:
    """What each block learns and memorizes, as bars; the blocks that a mask has on are shaded."""
    names = list(screening["learns"])
    for place in (place for place, name in enumerate(names) if mask.get(name)):
        axes.axvspan(place - 0.5, place + 0.5, color="black", alpha=0.08, lw=0, zorder=0)
    sides = (("learns", "tab:green", -0.2, "learns: fall of the loss on validation images"),
             ("memorizes", "tab:red", 0.2, "memorizes: further fall on training images"))  # fmt: skip
    for side, color, shift, label in sides:
        errors = [error or 0 for error in (screening[f"{side}_error"][name] for name in names)]
        places = [place + shift for place in range(len(names))]
        values = [screening[side][name] for name in names]
        axes.bar(places, values, 0.4, yerr=errors, color=color, label=label, error_kw={"lw": 0.8, "alpha": 0.7})
    axes.axhline(0, color="black", lw=0.8)
    axes.set_xlim(-0.5, len(names) - 0.5)
    _label_parts(axes, [(part, len(blocks)) for part, blocks in block_map(dict.fromkeys(names, False))])
    settings = screening["settings"]
    shaded = " (shaded: selected)" if any(mask.values()) else ""
    axes.set_title(
        f"What a block does: {settings['steps']} steps with all on, rate {settings['learning_rate']:.2g}{shaded}",
        fontsize=11,
    )
    axes.set_ylabel("fall of the loss, with standard errors")
    axes.grid(alpha=0.3, axis="y")


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    columns = min(panels, 2)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(7 * columns, 4.6 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]


def _draw_front(figure: Figure, axes: Axes, search: Mapping[str, Any], block_count: int, selected: int | None) -> None:
    """The trials in the plane of two objectives with the Pareto front; one objective is drawn over the trials."""
    trials, objectives, directions = search["trials"], search["objectives"], search["directions"]
    two = len(objectives) > 1
    x = [t["values"][0] if two else t["number"] for t in trials]
    y = [t["values"][1 if two else 0] for t in trials]
    points = {t["number"]: point for t, *point in zip(trials, x, y)}
    if two:
        front = sorted((t for t in trials if t["on_front"]), key=lambda t: t["values"])
        line = zip(*(points[t["number"]] for t in front))
        axes.plot(*line, color="tab:blue", lw=1, zorder=1, label="Pareto front")
    sizes = [t["trainable_percent"] for t in trials]
    dots = axes.scatter(x, y, c=sizes, cmap="viridis_r", s=55, zorder=2, edgecolor="black", linewidth=0.5)
    figure.colorbar(dots, label="trainable parameters (%)")
    names = {0: FROZEN_BASE, block_count: ALL_ON}
    for trial in trials:
        if name := names.get(trial["blocks"]):
            axes.annotate(name, points[trial["number"]], xytext=(7, 7), textcoords="offset points", fontsize=9)
    if selected is not None:
        axes.scatter(*points[selected], s=190, facecolor="none", edgecolor="tab:red", linewidth=2, zorder=3)
        beside = {"xytext": (-11, -12), "textcoords": "offset points", "ha": "right"}  # other names are on the right
        axes.annotate("selected", points[selected], **beside, fontsize=9, color="tab:red")
    better = {"minimize": "lower is better", "maximize": "higher is better"}
    if two:
        axes.set_xlabel(f"{objectives[0]} ({better[directions[0]]})")
        axes.legend(loc="best", fontsize=9)
    else:
        axes.set_xlabel("trial")
    axes.set_ylabel(f"{objectives[-1]} ({better[directions[-1]]})")
    axes.set_title(f"{len(trials)} trials of {search['study_name']}")
    axes.margins(0.18, 0.12)
    axes.grid(alpha=0.3)


def _draw_history(axes: Axes, search: Mapping[str, Any], selected: int | None) -> None:
    """The objectives of each trial, one after the other: the first on the left axis, the second on the right."""
    numbers = [t["number"] for t in search["trials"]]
    for i, (name, color) in enumerate(zip(search["objectives"][:2], ("tab:blue", "tab:orange"))):
        side = axes.twinx() if i else axes
        side.plot(numbers, [t["values"][i] for t in search["trials"]], "o-", ms=4, lw=0.8, color=color)
        side.set_ylabel(name, color=color)
        side.tick_params(axis="y", colors=color)
    if selected is not None:
        axes.axvline(selected, color="tab:red", lw=1, ls="--", label="selected")
        axes.legend(fontsize=9)
    axes.set_xlabel("trial")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title("History")
    axes.grid(alpha=0.3)


def _draw_blocks(figure: Figure, axes: Axes, search: Mapping[str, Any], mask: Mapping[str, bool]) -> None:
    """The blocks in the order of the data's way through the model: which are selected, and what each does."""
    effects, objectives = search["block_effects"], search["objectives"]
    signs = [1 if direction == "minimize" else -1 for direction in search["directions"]]
    rows = [[effects[n][i] * signs[i] if n in effects else math.nan for n in mask] for i in range(len(objectives))]
    largest = [max((abs(v) for v in row if math.isfinite(v)), default=0) or 1 for row in rows]
    shades = [[value / most for value in row] for row, most in zip(rows, largest)]
    image = axes.imshow([[math.nan] * len(mask), *shades], cmap="RdYlGn_r", vmin=-1, vmax=1, aspect="auto")
    figure.colorbar(image, ticks=[-1, 1]).ax.set_yticklabels(["better\nwith it", "worse\nwith it"], fontsize=9)
    labels = ["selected", *(f"{name}\n(up to {most:.2g})" for name, most in zip(objectives, largest))]
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    on = [place for place, name in enumerate(mask) if mask[name]]
    axes.bar(on, 0.7, width=0.8, bottom=-0.35, color="black")
    _label_parts(axes, [(part, len(blocks)) for part, blocks in block_map(mask)])
    axes.set_title("What a block does: mean of the trials with it, minus without")


def _label_parts(axes: Axes, sizes: Sequence[tuple[str, int]]) -> None:
    """Write the name of each part of the model below its blocks, with lines between the parts."""
    start, middles = 0, []
    for part, size in sizes:
        middles.append(start + (size - 1) / 2)
        start += size
        if part != sizes[-1][0]:
            axes.axvline(start - 0.5, color="black", lw=1)
    axes.set_xticks(middles, [part for part, _ in sizes], rotation=30, ha="right", fontsize=9)


def _draw_distances(axes: Axes, distances: Mapping[str, list[float]]) -> None:
    labels = {"train": "training images", "held_out": "held-out images, as many"}
    for name, color in (("train", "tab:red"), ("held_out", "tab:gray")):
        axes.stairs(distances[name], distances["edges"], fill=True, alpha=0.45, color=color, label=labels[name])
    axes.set_xlabel("cosine distance to the nearest image of the set")
    axes.set_ylabel("generated images")
    axes.set_title("Generated images: how near to what was trained on")
    axes.legend(fontsize=9)
    axes.grid(alpha=0.3)
