"""The page of the claims with all figures, the picture, and what the page of one screen shares with it."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

from common.intervals import Interval
from common.pages import table
from common.plots import legend_above, plot_panels
from paper_table.data_sets import DATA

from .judged import ABOVE, ATTACKS, LEVEL, LOSS, REFUTED, changed_without
from .rows import (
    ALL,
    BASE,
    EQUAL,
    FOUND,
    FULL,
    METHODS,
    OWN_RATE,
    RANDOMS,
    RATE_SEED,
    ROWS,
    SEEDS,
    STEPS,
    TRANSFERRED,
    WORST,
)

COMMAND = "python training_scripts/studies/claims.py"
TITLES = {
    LOSS: "held-out loss",
    "auc_loss": "membership AUC",
    "auc_clid": "CLiD",
    "auc_pia": "PIA",
    "max_norm": "max_norm",
}
PICTURED = {
    BASE: ("frozen base", "black", "x"),
    FULL: ("full fine-tune", "tab:blue", "o"),
    ALL: ("all blocks", "tab:red", "o"),
    FOUND: ("found mask", "tab:green", "D"),
    "randoms": (f"{len(RANDOMS)} random masks of its size", "tab:gray", "s"),
    WORST: ("worst mask of its size", "tab:brown", "v"),
    TRANSFERRED: ("mask found on the other set", "tab:olive", "D"),
    "all+rwa": ("all blocks with RWA", "tab:orange", "^"),
    "all+threshold": ("all blocks with threshold", "tab:pink", "^"),
    "all+dp_sgd": ("all blocks with DP-SGD", "tab:purple", "^"),
    "found+rwa": ("found mask with RWA", "tab:cyan", "^"),
}

SAME_RUNS = "its rate is that of all blocks: the runs of the third line"

Content = Mapping[str, Any]
Row = Mapping[str, Any]

SHOWN = 3
"""Number of finished seeds from which on a data set and a method are shown: intervals of two span the whole scale."""


def groups(content: Content) -> dict[str, str]:
    """The data sets and methods that are shown, with their titles."""
    return {
        f"{data}-{method}": f"{DATA[data].title}, {title}"
        for method, title in METHODS.items()
        for data in DATA
        if content["seeds"].get(f"{data}-{method}", 0) >= SHOWN
    }


def change(row: Row, test: Mapping[str, Any]) -> str:
    """A mean difference, or a mean correlation, with its interval, which ends at 1 for a correlation."""
    interval = Interval.of(test)
    if row["kind"] == "correlation":
        interval = interval._replace(low=max(-1.0, interval.low), high=min(1.0, interval.high))
    return interval.cell(4 if test["figure"] == LOSS else 3)


def p_value(p: float) -> str:
    """A p-value with one digit more than needed to read it."""
    return f"{p:.2g}" if p >= 0.0001 else "< .0001"


def against(row: Row) -> list[Mapping[str, Any]]:
    """The tests that show the opposite of a claim, which is more memorization, or a negative correlation."""
    sign = -1 if row["kind"] == "correlation" else 1
    return [test for test in row["tests"] if test["p_holm"] < LEVEL and sign * test["mean"] > 0]


def deciding(row: Row) -> str:
    """The figure that a verdict rests on: the weaker of the two tests, or the stronger of those against a claim."""
    if row["verdict"] == REFUTED:
        test = min(against(row), key=lambda test: test["p_holm"])
    else:
        test = max(row["tests"], key=lambda test: test["p_holm"])
    title, p, interval = TITLES[test["figure"]], p_value(test["p_holm"]), Interval.of(test)
    if row["kind"] == "correlation":
        return f"correlation with {title} {change(row, test)}, p {p}"
    return f"{title} {interval.mean:+.3f} ± {interval.half:.3f}, p {p}"


def preliminary(content: Content, name: str) -> str:
    """How many seeds are finished, in words."""
    count = content["seeds"][name]
    return f"{count} of {SEEDS} seeds: preliminary" if count < SEEDS else f"{count} seeds"


def is_copy(content: Content, name: str, row: Row) -> bool:
    """Whether a comparison has the runs of another line: the rate chosen for the found mask is that of all blocks."""
    if row.get("one") != OWN_RATE:
        return False
    pieces = content["pieces"]
    rates = [pieces.get(f"rates/{name}/{one}-{RATE_SEED}", {}).get("learning_rate") for one in (ALL, OWN_RATE)]
    return None not in rates and rates[0] == rates[1]


def listed(parts: list[str]) -> str:
    """The parts as one would say them: a, b and c."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


# ---- all figures ----


def render(content: Content) -> str:
    """The page `docs/results/claims.md`."""
    lines = [
        "# The claims: all figures",
        "",
        f"`{COMMAND}`; the [design](design.md) says what was run and how it is judged, and is older than the first "
        f"run. Each run has {STEPS[-1]} steps of batch size 32.",
        "",
    ]
    files = {names[0]: file for file, names in pictures(content).items()}
    for name, title in groups(content).items():
        lines += [f"## {title}", "", f"{preliminary(content, name).capitalize()}.", ""]
        if name in files:
            lines += [
                f"![Membership AUC and CLiD against held-out loss, for each row of the method]({files[name]})",
                "",
            ]
        lines += _rows_table(content["curves"][name])
        lines += _verdict_table(content, name)
        lines += _above_table(content, name)
        lines += _equal_table(content["verdicts"][name])
    lines += ["## The authors' reward", "", *_reward_table(content)]
    lines += ["## Learning rates", "", *_rates_table(content)]
    return "\n".join(lines).rstrip() + "\n"


def _cell(interval: list[float], digits: int) -> str:
    mean, _, high, _ = interval
    return f"{mean:.{digits}f} ± {high - mean:.{digits}f}"


def _rows_table(curves: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = []
    for row, curve in curves.items():
        points, lowest = curve["points"], min(curve["points"], key=lambda step: curve["points"][step][LOSS][0])
        equal = points.get(str(EQUAL)) or points["0"]
        rows.append(
            [
                ROWS[row].title,
                str(equal[LOSS][3]),
                f"{curve['parameters']:,.0f}",
                _cell(equal[LOSS], 4),
                *(_cell(equal[figure], 3) for figure in (*ATTACKS, "auc_pia")),
                _cell(equal["max_norm"], 2),
                f"{points[lowest][LOSS][0]:.4f} at {lowest}",
            ]
        )
    head = ["row", "seeds", "parameters", *TITLES.values(), "lowest loss, at step"]
    return [
        f"After {EQUAL} steps, means over seeds with the half widths of their 95 % t intervals. `max_norm` is the "
        "authors' reward on the validation images; the paper takes lower for less memorized.",
        "",
        *table(head, rows, numbers=True),
    ]


def _verdict_table(content: Content, name: str) -> list[str]:
    rows, verdicts = [], content["verdicts"][name]
    for row in verdicts:
        verdict = SAME_RUNS if is_copy(content, name, row) else row["verdict"]
        for test in row["tests"]:
            images = "" if test["image_low"] is None else f"{test['image_low']:+.3f} to {test['image_high']:+.3f}"
            left_out = f"{row['left_out']} of {row['pairs']}" if row.get("pairs") else ""
            rows.append(
                [
                    row["claim"] if test is row["tests"][0] else "",
                    TITLES[test["figure"]],
                    str(test["seeds"]),
                    change(row, test),
                    images,
                    p_value(test["p_holm"]),
                    left_out,
                    verdict if test is row["tests"][0] else "",
                ]
            )
    head = [
        "claim",
        "figure",
        "seeds",
        "difference (95 %)",
        "over seeds and images",
        "p (Holm)",
        "pairs left out",
        "verdict",
    ]
    return [
        "At matched quality: the row that the claim favours minus the other. The tests are conditional on the images; "
        "the wider intervals add, by a bootstrap, what other images would change. The first line has rank "
        "correlations instead of differences; where there is no common quality, the difference is that of the lowest "
        "losses. The four comparisons at the end are a family of their own.",
        "",
        *table(head, rows),
        *(_copies(verdicts) if any(is_copy(content, name, row) for row in verdicts) else []),
    ]


def _copies(verdicts: list[Mapping[str, Any]]) -> list[str]:
    """What the runs of another line count for in the correction of their family."""
    changed = [f'*{claim}* would be "{verdict}"' for claim, verdict in changed_without(verdicts, OWN_RATE).items()]
    return [
        "The last line has the runs of the third one, and so no verdict of its own. Its tests are counted in the "
        "correction of its family, as designed, which makes the other p-values there larger: without them, "
        f"{listed(changed) if changed else 'no verdict would be another'}.",
        "",
    ]


def _above_table(content: Content, name: str) -> list[str]:
    """What the same comparisons say a little above the lowest common loss."""
    verdicts = [row for row in content["verdicts"][name] if row["kind"] == "matched"]
    by_loss = {above: {row["claim"]: row for row in content["above"][name][str(above)]} for above in ABOVE}
    rows = [
        [row["claim"], _at(row), *(_at(found[row["claim"]]) for found in by_loss.values())]
        for row in verdicts
        if not is_copy(content, name, row)
    ]
    interpolation = content["interpolation"][name]
    errors = [f"{TITLES[figure]} {Interval(*interpolation[figure]).cell(3)}" for figure in ATTACKS]
    head = ["claim", "at the lowest common loss", *(f"{above} above it" for above in ABOVE)]
    return [
        "How much the place decides at which two curves are compared. Near its lowest loss a run goes on to memorize "
        "while its loss hardly changes, and it is measured at five steps only. So here the same differences are taken "
        "at slightly higher losses, too: membership AUC and CLiD, with what the rule of the verdicts would say there.",
        "",
        *table(head, rows),
        "Between two measured steps, memorization is interpolated linearly. Where a measured step is left out and "
        f"interpolated from the steps beside it, over gaps twice as wide, this gives {listed(errors)} more than was "
        "measured.",
        "",
    ]


def _at(row: Row) -> str:
    if row["kind"] != "matched":
        return row["verdict"]
    differences = ", ".join(f"{test['mean']:+.3f}" for test in row["tests"])
    return f"{differences}: {row['verdict']}"


def _equal_table(verdicts: list[Mapping[str, Any]]) -> list[str]:
    rows = [[row["claim"], *(change(row, test) for test in row["equal"])] for row in verdicts if row.get("equal")]
    head = ["claim", *(TITLES[figure] for figure in (LOSS, *ATTACKS))]
    return [f"At equal steps ({EQUAL}), the same differences, without a verdict:", "", *table(head, rows)]


def _reward_table(content: Content) -> list[str]:
    """How the authors' reward ranks the rows of a seed, beside how each figure ranks them."""
    figures = (LOSS, *ATTACKS)
    rows = [
        [title, *(Interval(*content["rewards"][name][figure]).cell(2) for figure in figures)]
        for name, title in groups(content).items()
    ]
    return [
        f"Rank correlation of `max_norm` with other figures over all rows of a seed after {EQUAL} steps: the mean "
        "over seeds with its 95 % t interval. The paper takes a low `max_norm` for little memorization, which would "
        "be +1 in the columns of the attacks; +1 in the column of the held-out loss says that it ranks the rows by "
        "how much they learned.",
        "",
        *table(["", *(TITLES[figure] for figure in figures)], rows),
    ]


def _rates_table(content: Content) -> list[str]:
    rows = []
    for piece, found in sorted(content["pieces"].items()):
        if not piece.startswith("rates/"):
            continue
        _, group, row = piece.split("/")
        tried = ", ".join(f"{rate:.2g}: {loss:.4f}" for rate, loss in zip(found["rates"], found["losses"]))
        inside = min(found["rates"]) < found["learning_rate"] < max(found["rates"])
        rows.append(
            [
                group,
                ROWS[row.rpartition("-")[0]].title,
                f"{found['learning_rate']:.2g}",
                tried,
                "yes" if inside else "**no**",
            ]
        )
    return table(["data and method", "row", "chosen", "lowest validation loss by rate", "inside"], rows)


# ---- the picture ----


def pictures(content: Content) -> dict[str, list[str]]:
    """The file of each picture, and the data sets with the method of it that it shows: a method each."""
    shown = list(groups(content))
    by_method = {method: [name for name in shown if name.endswith(f"-{method}")] for method in METHODS}
    first = next(iter(METHODS))
    return {
        "claims.png" if method == first else f"claims_{method}.png": names
        for method, names in by_method.items()
        if names
    }


def plot(content: Content, names: Sequence[str], file: Path) -> None:
    """Memorization against held-out loss along the training: a row of panels for each data set with its method.

    The axes are those of the means; the intervals of few seeds reach beyond them.
    """
    figure, panels = plot_panels((5.2 * len(ATTACKS), 4.6 * len(names) + 0.8), len(ATTACKS), len(names))
    for axes, (name, attack) in zip(panels, product(names, ATTACKS)):
        curves, corners = content["curves"][name], []
        for row, (title, color, marker) in PICTURED.items():
            drawn = [curves[one] for one in (RANDOMS if row == "randoms" else (row,)) if one in curves]
            for number, curve in enumerate(drawn):
                points = [curve["points"][step] for step in sorted(curve["points"], key=int)]
                (x, x_half), (y, y_half) = (
                    zip(*((point[of][0], point[of][2] - point[of][0]) for point in points)) for of in (LOSS, attack)
                )
                corners += zip(x, y)
                halves = (None, None) if row == "randoms" else (y_half, x_half)
                style = {"alpha": 0.35 if row == "randoms" else 0.9, "linewidth": 1.2, "markersize": 4}
                label = title if number == 0 else None
                axes.errorbar(x, y, *halves, color=color, marker=marker, elinewidth=0.6, label=label, **style)
        axes.set_title(groups(content)[name], fontsize=10)
        losses, aucs = zip(*corners)
        margin = 0.05 * (max(aucs) - min(aucs))
        axes.set_ylim(min(aucs) - margin, max(aucs) + margin)
        axes.set_xscale("log")  # the frozen base is far from all others
        axes.set_xlim(0.97 * min(losses), 1.03 * max(losses))
        axes.xaxis.set_major_locator(FixedLocator([0.08, 0.1, 0.12, 0.14, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5]))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("held-out loss (left: learned more)")
        axes.set_ylabel(f"{TITLES[attack]} (.5: guessing)")
    legend_above(figure, panels[0])
    figure.savefig(file)
