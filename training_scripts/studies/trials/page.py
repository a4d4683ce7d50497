"""The page and the plot of the analysis."""

from pathlib import Path
from typing import Any

import numpy as np

from common.pages import table
from common.plots import plot_panels

from .replay import PLAIN
from .rewards import OUTCOMES, REWARDS


def render(results: dict[str, Any]) -> str:
    """The page of the results, in Markdown."""
    rates = ", ".join(f"{rate:g}" for rate in results["rates"])
    lines = [
        "# What the table of real trials says",
        "",
        f"`{results['command']}` analyzes [{results['runs']} of {results['runs_in_all']} runs](trial_table.parquet) "
        "that `python training_scripts/studies/trial_table.py` trained on the demo. A run tunes the whole attention "
        f"weights in some of {results['groups']} groups of blocks for {results['steps']} steps, with seed 0 and one "
        f"of the learning rates {rates}. The runs are made in a random order.",
        "",
        "## Which reward?",
        "",
        "Spearman's rank correlation of each cheap reward with what the attacks of the audit find (95 % bootstrap "
        "interval over the runs). A reward is measured against validation images, an attack against held-out images. "
        "1: the reward ranks the runs as the attack does. 0: the reward says nothing. Below 0: the reward prefers the "
        "runs that leak. –: all runs have the same value.",
        "",
        *rewards_section(results, "all", "Over all runs"),
        *rewards_section(results, "masks", "Over masks: ranks within each learning rate"),
        *(samplers_section(results["replay"]) if "replay" in results else []),
        *(pruning_section(results) if results["pruning"] else []),
    ]
    return "\n".join(lines)


def rewards_section(results: dict[str, Any], kind: str, title: str) -> list[str]:
    """The correlations of the rewards with the outcomes."""

    def cell(ranked: dict[str, float] | None) -> str:
        return "–" if ranked is None else f"{ranked['rho']:.2f} ({ranked['low']:.2f} to {ranked['high']:.2f})"

    rows = []
    for reward, name in REWARDS.items():
        cells = [cell(results["correlations"][kind][reward][outcome]) for outcome in OUTCOMES]
        seconds = results["seconds"].get(reward)
        rows.append([name, *cells, "" if seconds is None else f"{seconds:.0f}"])
    return [f"### {title}", "", *table(["reward", *OUTCOMES.values(), "CPU seconds"], rows)]


def samplers_section(replay: dict[str, Any]) -> list[str]:
    """What each sampler finds."""
    counts = list(replay["samplers"][PLAIN]["share"])
    rows = []
    for name, found in replay["samplers"].items():
        shares = [f"{s['median']:.3f} ({s['low']:.3f} to {s['high']:.3f})" for s in found["share"].values()]
        needed = found["trials_to_goal"]
        trials = f"{needed['median']:g} ({needed['low']:g} to {needed['high']:g})"
        rows.append([name, str(found["searches"]), *shares, trials])
    return [
        "## Which sampler?",
        "",
        "Share of the hypervolume of the table's front that a search has found: median over searches with its 95 % "
        f"bootstrap interval. The last column counts the trials that a sampler needs to reach {replay['goal']:.3f}, "
        f"which is the share of {PLAIN} search after {counts[-1]} trials ({int(counts[-1]) + 1}: not reached).",
        "",
        "![](trials_replay.png)",
        "",
        *table(["sampler", "searches", *(f"after {count}" for count in counts), "trials needed"], rows),
    ]


def pruning_section(results: dict[str, Any]) -> list[str]:
    """What rules that stop trials early lose and save."""
    return [
        "## Stop trials early?",
        "",
        f"Searches of {results['pruned_trials']} random trials of the table. A trial is measured on the way by its "
        "membership AUC and its fid (or, without sampling, by its loss on validation images). The trial is stopped "
        "when so many earlier trials were better in both at that point. Wrong: the share of the stopped trials that "
        "would have been on the front. All figures are means over the searches; hypervolume and seconds are shares of "
        "the same search without stopping.",
        "",
        *table(
            ["after", "quality", "dominated by", "stopped", "of them wrong", "hypervolume kept", "seconds"],
            [
                [
                    f"{row['after']:.0%} of the steps",
                    row["quality"],
                    str(row["dominators"]),
                    f"{row['stopped']:.0%}",
                    f"{row['wrong']:.0%}",
                    f"{row['hypervolume']:.1%}",
                    f"{row['seconds']:.0%}",
                ]
                for row in results["pruning"]
            ],
        ),
    ]


def plot(shares: dict[str, np.ndarray], file: Path) -> None:
    """Draw medians and quartiles of the shares `[seeds, trials]` of each sampler against the number of trials."""
    figure, (axes,) = plot_panels((6.4, 4.2))
    for name, of_sampler in shares.items():
        trials = np.arange(1, of_sampler.shape[1] + 1)
        low, median, high = np.quantile(of_sampler, (0.25, 0.5, 0.75), axis=0)
        (line,) = axes.plot(trials, median, label=name)
        axes.fill_between(trials, low, high, alpha=0.12, color=line.get_color(), linewidth=0)
    axes.set(xlabel="trials", ylabel="share of the front's hypervolume", xlim=(1, None), ylim=(None, 1.005))
    axes.legend(title="median, quartiles")
    figure.savefig(file)
