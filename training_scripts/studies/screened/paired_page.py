"""The page and the picture of screening_paired.py."""

from pathlib import Path
from typing import Any

from common.intervals import Interval, t_interval
from common.pages import table
from common.plots import legend_above, plot_panels

from .verdicts import ALL, BASE, FIGURES, RANDOM, SAME, SEEDS, SUGGESTED, Pieces, beaten, by_seed, random_names

COMMAND = "python training_scripts/studies/screening_paired.py"
TITLES = {
    "loss": "held-out loss",
    "auc_loss": "membership AUC",
    "auc_clid": "CLiD",
    "auc_pia": "PIA",
    "fid": "fid",
}
KINDS = {
    BASE: ("frozen base", [BASE]),
    ALL: ("all blocks", [ALL]),
    SUGGESTED: ("suggested mask", [SUGGESTED]),
    **{same: (f"{RANDOM} random masks of as many {same}", random_names(same)) for same in SAME},
}


def render(content: dict[str, Any]) -> str:
    """The page."""
    pieces, settings = content["pieces"], content["settings"]
    lines = [
        "# The mask of a screening against all blocks and random masks",
        "",
        f"`{content['command']}`, then with `--fid 1000`",
        "",
        f"Attention weights of the demo, {settings['steps']} steps at the rate {settings['learning_rate']:g}. With "
        "each seed, one screening on the validation images suggests a mask: the knee of its front, by the rule with "
        "which a search selects a run. This mask, all blocks and random masks are fine-tuned with the same seed, and "
        "measured on 256 held-out images, which nothing saw. A random mask of as many parameters has those of the "
        "suggested mask within an eighth, mostly in fewer and larger blocks; a random mask of as many blocks has more "
        "parameters. The three AUCs are of attacks that tell training images from held-out images; .5 is guessing.",
        "",
        f"Finished seeds: {_finished(pieces)}.",
        "",
        "Means over seeds with the half widths of their 95 % t intervals; random masks are averaged within their seed "
        "first. fid is of the images that `--fid` asks for, and of the first random mask of a seed.",
        "",
        *table(["", "seeds", "blocks", "parameters", *TITLES.values()], _means(pieces), numbers=True),
        "## Differences",
        "",
        "The suggested mask minus the other, paired by seed, with 95 % t intervals. Verdicts are those of two-sided "
        "paired t-tests at 5 %, with the p-values corrected for the number of all differences in the table (Holm).",
        "",
        *table(
            ["suggested mask minus", "figure", "seeds", "difference", "p (Holm)", "verdict"], _differences(content)
        ),
    ]
    for same in SAME:
        if (found := beaten(pieces, same))["masks"]:
            lines += [
                f"Of {found['masks']} random masks of as many {same}, {found['loss']} have a lower held-out loss than "
                f"the suggested mask of their seed, {found['clid']} a lower AUC by CLiD, and {found['both']} both.",
                "",
            ]
    lines += ["## The masks", "", *table(["seed", "blocks that are on"], _masks(pieces))]
    return "\n".join([*lines, "![Held-out loss and attacks of each fine-tune](screening_paired.png)"]) + "\n"


def _finished(pieces: Pieces) -> str:
    counts = {f"random masks of as many {same}": by_seed(pieces, random_names(same), "loss") for same in SAME}
    counts["fid"] = by_seed(pieces, [SUGGESTED, ALL], "fid")
    return ", ".join(f"{len(seeds)} of {SEEDS} for {what}" for what, seeds in counts.items())


def _means(pieces: Pieces) -> list[list[str]]:
    rows = []
    for title, names in KINDS.values():
        counts = [by_seed(pieces, names, figure) for figure in ("blocks", "parameters")]
        if not counts[0]:
            continue
        cells = [f"{sum(values.values()) / len(values):,.3g}" for values in counts[:1]]
        cells += [f"{sum(values.values()) / len(values):,.0f}" for values in counts[1:]]
        for figure in FIGURES:
            values = [*by_seed(pieces, names[:1] if figure == "fid" else names, figure).values()]
            interval, digits = t_interval(values), 3 if figure == "fid" else 4
            text = "" if interval is None else f"{interval.mean:.{digits}f} ± {interval.half:.{digits}f}"
            of_seeds = f" ({len(values)} seeds)" if 1 < len(values) < len(counts[0]) else ""
            cells.append(text + of_seeds)
        rows.append([title, str(len(counts[0])), *cells])
    return rows


def _differences(content: dict[str, Any]) -> list[list[str]]:
    rows = []
    for row in content["verdicts"]:
        digits = 3 if row["figure"] == "fid" else 4
        verdict = "no difference is shown" if row["p_holm"] >= 0.05 else "lower" if row["mean"] < 0 else "higher"
        cells = [str(row["seeds"]), Interval.of(row).cell(digits), f"{row['p_holm']:.2g}", verdict]
        rows.append([KINDS[row["other"]][0], TITLES[row["figure"]], *cells])
    return rows


def _masks(pieces: Pieces) -> list[list[str]]:
    masks = {seed: pieces[f"fine_tunes/{SUGGESTED}-{seed}"]["mask"] for seed in by_seed(pieces, [SUGGESTED], "loss")}
    return [[str(seed), ", ".join(block.replace(".attentions", "") for block in mask)] for seed, mask in masks.items()]


def plot(pieces: Pieces, file: Path) -> None:
    """Draw what each fine-tune learned and leaks."""
    figure, panels = plot_panels((9, 4), 2)
    for axes, measure in zip(panels, ("auc_loss", "auc_clid")):
        for title, names in KINDS.values():
            if not by_seed(pieces, names, "loss"):
                continue
            points = [(by_seed(pieces, [name], "loss"), by_seed(pieces, [name], measure)) for name in names]
            x, y = ([value for values in side for value in values.values()] for side in zip(*points))
            axes.scatter(x, y, s=12 if len(names) > 1 else 28, alpha=0.7, label=title)
        axes.set_xlabel("held-out loss")
        axes.set_ylabel(f"AUC of the attack by {'the loss' if measure == 'auc_loss' else TITLES[measure]}")
    legend_above(figure, panels[0])
    figure.savefig(file)
