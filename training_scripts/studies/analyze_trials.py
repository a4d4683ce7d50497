"""What the table of real trials says: which reward a search should look at, and which sampler finds most.

    python training_scripts/trial_table.py       # hours: makes docs/trial_table.parquet
    python training_scripts/analyze_trials.py    # minutes

Writes `docs/trials.json` and `docs/trials.md`, and with a complete table `docs/trials_replay.png`.

1. The rank correlation, over runs, of each cheap reward with what the attacks of the audit find against held-out
   images that no reward saw: over all runs, and over masks alone (ranks within each learning rate).
2. Each sampler searches the table instead of training, many times: the hypervolume of (fid, membership AUC) it has
   after each trial, as a share of that of the table's own front. A trial that repeats another is free, as it is in
   `run_search`; in `plain random`, Optuna's sampler with nothing of ours, it is not.
3. Trials that are dominated on the way are stopped: how many, how many of them wrongly, and what it saves.
"""

import argparse
import json
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
from scipy.stats import bootstrap, rankdata
from trial_table import STAGES

from memcontrol_hf.search import SAMPLERS, SeededSampler, dominates

OBJECTIVES = ["fid", "membership_auc"]
REWARDS = {
    "membership_auc": "membership AUC by the loss, validation images (the default)",
    "stage0_membership_auc": "the same, halfway through the training",
    "loss_gap": "loss on validation minus on training images",
    "trainable_parameters": "trainable parameters",
    "noise_norm": "noise norm on training images, mean of all timesteps",
    **{f"noise_norm_{t}_train": f"noise norm at timestep {t}" for t in (100, 300, 500, 700, 900)},
    **{f"noise_norm_{t}_auc": f"membership AUC by the noise norm at timestep {t}" for t in (100, 300, 500, 700, 900)},
    "audit_trajectory_norm_auc": "membership AUC by the noise norm along trajectories, the audit's own",
    "negative_amd": "minus amd, of the audit's own images",
}
OUTCOMES = {
    "audit_membership_auc_loss": "membership, loss",
    "audit_membership_auc_clid": "membership, CLiD",
    "audit_membership_auc_pia": "membership, PIA",
    "audit_copy_share": "copies",
    "audit_extraction_rate_calibrated": "extracted, calibrated",
    "audit_nearest_share": "nearer to training",
    "canaries": "canaries caught by the best attack",
}
COSTS = {"membership_auc": "seconds_membership_auc", "loss_gap": "seconds_membership_auc"} | {
    name: "seconds_noise_norm" for name in REWARDS if name.startswith("noise_norm")
}
PLAIN = "plain random"
SLOW = ("gp", "nsga2")  # by its model; by trials that repeat others, which are free but many


def read(table: Path) -> pd.DataFrame:
    """The table, with the columns that follow from others."""
    runs = pd.read_parquet(table)
    runs["loss_gap"] = runs["loss"] - runs["loss_train"]
    runs["noise_norm"] = runs[[f"noise_norm_{t}_train" for t in (100, 300, 500, 700, 900)]].mean(axis=1)
    runs["negative_amd"] = -runs["audit_amd"]
    runs["canaries"] = runs[[c for c in runs if c.startswith("canaries_")]].max(axis=1)
    return runs


# ---- which reward? ----


def correlations(
    runs: pd.DataFrame,
    within_rates: bool,
    rewards: Collection[str] = tuple(REWARDS),
    outcomes: Collection[str] = tuple(OUTCOMES),
) -> dict[str, dict[str, dict[str, float] | None]]:
    """Spearman's rho of each reward with each outcome, and its 95 % bootstrap interval over the runs.

    `None` where it is not there: the outcome, or the reward, is the same in all runs.
    """
    trained = runs[[c for c in runs if c.startswith("mask.")]].any(axis=1)
    runs = runs[trained]  # the frozen base has no stages
    groups = [g for _, g in runs.groupby("learning_rate")] if within_rates else [runs]

    sizes = [len(group) for group in groups]
    draws = np.random.default_rng(0).integers(sum(sizes), size=(999, sum(sizes)))
    draws = np.vstack([np.arange(sum(sizes)), draws])  # the runs themselves first

    def ranks(column: str) -> np.ndarray:
        """Of each draw, standardized: `[1000, N]`; NaN where all are the same."""
        values = np.concatenate([rankdata(group[column]) / (len(group) + 1) for group in groups])
        ranked = rankdata(values[draws], axis=1)
        ranked -= ranked.mean(1, keepdims=True)
        norms = np.linalg.norm(ranked, axis=1, keepdims=True)
        return np.divide(ranked, norms, out=np.full_like(ranked, np.nan), where=norms > 0)

    def rho(x: np.ndarray, y: np.ndarray) -> dict[str, float] | None:
        drawn = (x * y).sum(1)
        if np.isnan(drawn[0]):
            return None
        low, high = np.nanquantile(drawn[1:], (0.025, 0.975))
        return {"rho": float(drawn[0]), "low": float(low), "high": float(high)}

    of_outcomes = {outcome: ranks(outcome) for outcome in outcomes}
    return {
        reward: {outcome: rho(x, y) for outcome, y in of_outcomes.items()}
        for reward, x in ((reward, ranks(reward)) for reward in rewards)
    }


# ---- which sampler? ----


def hypervolume(values: np.ndarray, reference: np.ndarray) -> float:
    """The area that points dominate: `[N, 2]`, both minimized."""
    area, best = 0.0, reference[1]
    for x, y in sorted(values.tolist()):
        if x < reference[0] and y < best:
            area, best = area + (reference[0] - x) * (best - y), y
    return area


def hypervolumes(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """That of the first 1, 2, ..., N points: `[N]`."""
    return np.array([hypervolume(values[:count], reference) for count in range(1, len(values) + 1)])


class Table:
    """The trials that a replay looks up."""

    def __init__(self, runs: pd.DataFrame) -> None:
        self.groups = [c for c in runs if c.startswith("mask.")]
        self.rates = sorted(runs["learning_rate"].unique())
        self.values = {
            (*(bool(on) for on in mask), rate): np.array(objectives)
            for *mask, rate, objectives in zip(
                *(runs[g] for g in self.groups), runs["learning_rate"], runs[OBJECTIVES].to_numpy(), strict=True
            )
        }
        off = (False,) * len(self.groups)  # any rate of the frozen base is the frozen base
        base = (*off, self.rates[0])
        self.values |= {(*off, rate): self.values[base] for rate in self.rates if base in self.values}
        all_values = np.array(list(self.values.values()))
        self.reference = all_values.max(0)
        self.area = hypervolume(all_values, self.reference)

    @property
    def missing(self) -> int:
        """How many runs are not made yet."""
        return 2 ** len(self.groups) * len(self.rates) - len(self.values)

    def known(self) -> list[dict]:
        """All on and all off, as a search queues them."""
        return [dict.fromkeys(self.groups, on) | {"learning_rate": self.rates[0]} for on in (True, False)]

    def ask(self, trial: optuna.Trial) -> tuple:
        mask = [trial.suggest_categorical(group, [False, True]) for group in self.groups]
        return (*mask, trial.suggest_categorical("learning_rate", self.rates))


def replay(table: Table, name: str, trials: int, seed: int) -> np.ndarray:
    """One search: the share of the front's hypervolume after each trial, `[trials]`."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    make: Callable[[int], optuna.samplers.BaseSampler] = SAMPLERS[name.split()[-1]]
    sampler = make(seed) if name == PLAIN else SeededSampler(make, seed, table.known())
    study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
    seen, found = set(), []
    # As `run_search`: where nearly all is tried, the search ends before its budget. A Gaussian process takes seconds
    # for each of hundreds of repeats, and stops sooner.
    for _ in range((2 if name == "gp" else 20) * trials):
        trial = study.ask()
        key = table.ask(trial)
        values = table.values[key]
        identity = key if any(key[:-1]) else None  # any rate of the frozen base is the frozen base
        if name == PLAIN or identity not in seen:
            found.append(values)
        seen.add(identity)
        study.tell(trial, values.tolist())
        if len(found) == trials:
            break
    areas = hypervolumes(np.array(found), table.reference) / table.area
    return np.pad(areas, (0, trials - len(areas)), mode="edge")


def replays(table: Table, samplers: list[str], seeds: int, trials: int, workers: int) -> dict[str, np.ndarray]:
    """Of each sampler the shares `[seeds, trials]`; those that are slow with a twentieth of the seeds."""
    of = {}
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:  # a fork of a process with threads can hang
        for name in (PLAIN, *samplers):
            count = max(2, seeds // 20) if name in SLOW else seeds
            of[name] = np.array(list(pool.map(partial(replay, table, name, trials), range(count))))
            print(f"{name}: {count} searches", flush=True)
    return of


def first_to_reach(shares: np.ndarray, goal: float) -> np.ndarray:
    """The trial with which each search reaches the goal, one beyond the last where it does not: `[seeds]`."""
    reached = shares >= goal - 1e-12
    return np.where(reached.any(1), reached.argmax(1) + 1, shares.shape[1] + 1)


# ---- stop early? ----


def pruned(stage_values: np.ndarray, dominators: int) -> np.ndarray:
    """Which trials, in their order, are dominated at a stage by so many earlier ones: `[N, 2]` -> bool `[N]`."""
    return np.tril(dominates(stage_values), -1).sum(1) >= dominators


def pruning(runs: pd.DataFrame, trials: int, seeds: int) -> list[dict[str, float | str | int]]:
    """For each rule: what searches of so many random trials stop, lose and save; means over the seeds."""
    runs = runs[runs["stage0_fid"].notna()] if "stage0_fid" in runs else runs[:0]
    if len(runs) < trials:
        return []
    measuring = runs["seconds_fid"] + runs["seconds_membership_auc"]
    training = runs["seconds_train_with_stages"] - len(STAGES) * measuring
    values = runs[OBJECTIVES].to_numpy()
    reference = values.max(0)
    draws = [np.random.default_rng(seed).permutation(len(runs))[:trials] for seed in range(seeds)]
    fronts = [~dominates(values[draw]).any(1) for draw in draws]
    areas = [hypervolume(values[draw], reference) for draw in draws]
    without = (training + measuring).to_numpy()
    rows = []
    for stage, share in enumerate(STAGES):
        for quality, cost in (("fid", measuring), ("loss", runs["seconds_membership_auc"])):
            at_stage = runs[[f"stage{stage}_{quality}", f"stage{stage}_membership_auc"]].to_numpy()
            looked = (training * share + cost).to_numpy()
            going_on = (training * (1 - share) + measuring).to_numpy()
            for dominators in (1, 2, 3, 5):
                found = []
                for draw, front, area in zip(draws, fronts, areas):
                    stopped = pruned(at_stage[draw], dominators)
                    kept = hypervolume(values[draw][~stopped], reference) / area
                    seconds = (looked[draw].sum() + going_on[draw][~stopped].sum()) / without[draw].sum()
                    wrong = (stopped & front).sum() / max(1, stopped.sum())
                    found.append((stopped.mean(), wrong, kept, seconds))
                means = dict(zip(("stopped", "wrong", "hypervolume", "seconds"), np.mean(found, 0).tolist()))
                rows.append({"after": share, "quality": quality, "dominators": dominators, **means})
    return rows


def median_interval(values: np.ndarray) -> dict[str, float]:
    """The median with its 95 % bootstrap interval."""
    drawn = bootstrap((values,), np.median, n_resamples=999, method="percentile", rng=0)
    low, high = drawn.confidence_interval
    return {"median": float(np.median(values)), "low": float(low), "high": float(high)}


def summary(of: dict[str, np.ndarray], counts: list[int]) -> dict:
    """Medians over seeds, and how many trials each sampler needs for what plain random has after the last."""
    goal = float(np.median(of[PLAIN][:, -1]))
    return {
        "goal": goal,
        "samplers": {
            name: {
                "searches": len(shares),
                "share": {str(count): median_interval(shares[:, count - 1]) for count in counts},
                "trials_to_goal": median_interval(first_to_reach(shares, goal)),
            }
            for name, shares in of.items()
        },
    }


# ---- what is written ----


def as_markdown(result: dict) -> str:
    """The page of a result."""

    def cell(of: dict | None) -> str:
        return "–" if of is None else f"{of['rho']:.2f} ({of['low']:.2f} to {of['high']:.2f})"

    lines = [
        "# What the table of real trials says",
        "",
        f"`{result['command']}`, from [{result['runs']} of {result['runs_in_all']} runs]"
        "(trial_table.parquet) that `python training_scripts/trial_table.py` trained on the demo: whole attention "
        f"weights of some of {result['groups']} groups of blocks, {result['steps']} steps, seed 0, learning rates "
        f"{', '.join(f'{rate:g}' for rate in result['rates'])}. The runs are made in a random order.",
        "",
        "## Which reward?",
        "",
        "Spearman's rank correlation of each cheap reward, measured against validation images, with what the attacks "
        "of the audit find against held-out images (95 % bootstrap interval over the runs). 1: it ranks the runs as "
        "the attack does; 0: it says nothing; below 0: it prefers the ones that leak. –: the same in all runs.",
    ]
    for kind, title in (("all", "Over all runs"), ("masks", "Over masks: ranks within each learning rate")):
        lines += ["", f"### {title}", "", f"| reward | {' | '.join(OUTCOMES.values())} | CPU seconds |"]
        lines += ["|---|" + "---|" * (len(OUTCOMES) + 1)]
        for reward, said in REWARDS.items():
            cells = " | ".join(cell(result["correlations"][kind][reward][outcome]) for outcome in OUTCOMES)
            seconds = result["seconds"].get(reward)
            lines.append(f"| {said} | {cells} | {'' if seconds is None else f'{seconds:.0f}'} |")
    if "replay" in result:
        replay, counts = result["replay"], list(result["replay"]["samplers"][PLAIN]["share"])
        lines += [
            "",
            "## Which sampler?",
            "",
            f"Share of the hypervolume of the table's front, median over searches with its 95 % bootstrap interval, "
            f"and the trials that are needed for the {replay['goal']:.3f} that {PLAIN} search has after "
            f"{counts[-1]} ({int(counts[-1]) + 1}: not reached).",
            "",
            "![](trials_replay.png)",
            "",
            f"| sampler | searches | {' | '.join(f'after {count}' for count in counts)} | trials needed |",
            "|---|---|" + "---|" * (len(counts) + 1),
        ]
        for name, of in replay["samplers"].items():
            shares = " | ".join(f"{s['median']:.3f} ({s['low']:.3f} to {s['high']:.3f})" for s in of["share"].values())
            needed = of["trials_to_goal"]
            lines.append(
                f"| {name} | {of['searches']} | {shares} | {needed['median']:g} ({needed['low']:g} to "
                f"{needed['high']:g}) |"
            )
    if result["pruning"]:
        lines += [
            "",
            "## Stop trials early?",
            "",
            f"Searches of {result['pruned_trials']} random trials of the table. A trial is measured on the way, by "
            "membership AUC and fid (or, without sampling, by the loss on validation images), and stopped when so "
            "many earlier trials were better there in both. Wrong: the share of those stopped that would have been on "
            "the front. Means over the searches; hypervolume and seconds beside the same search without stopping.",
            "",
            "| after | quality | dominated by | stopped | of them wrong | hypervolume kept | seconds |",
            "|---|---|---|---|---|---|---|",
            *(
                f"| {row['after']:.0%} of the steps | {row['quality']} | {row['dominators']} | {row['stopped']:.0%} | "
                f"{row['wrong']:.0%} | {row['hypervolume']:.1%} | {row['seconds']:.0%} |"
                for row in result["pruning"]
            ),
        ]
    return "\n".join(lines) + "\n"


def plot(of: dict[str, np.ndarray], file: Path) -> None:
    """Medians and quartiles of the shares, against the number of trials."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, shares in of.items():
        trials = np.arange(1, shares.shape[1] + 1)
        low, median, high = np.quantile(shares, (0.25, 0.5, 0.75), axis=0)
        (line,) = axes.plot(trials, median, label=name)
        axes.fill_between(trials, low, high, alpha=0.12, color=line.get_color(), linewidth=0)
    axes.set(xlabel="trials", ylabel="share of the front's hypervolume", xlim=(1, None), ylim=(None, 1.005))
    axes.grid(alpha=0.3)
    axes.legend(title="median, quartiles")
    figure.savefig(file)


def main(argv: list[str] | None = None) -> None:
    """Correlate, replay, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=Path("docs/trial_table.parquet"), help="of trial_table.py")
    parser.add_argument("--seeds", type=int, default=200, help="searches of each sampler")
    parser.add_argument("--trials", type=int, default=64, help="trials of each search")
    parser.add_argument("--pruned_trials", type=int, default=32, help="trials of each search that stops some early")
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS), help="beside plain random")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--output_dir", type=Path, default=Path("docs"), help="for trials.{json,md} and the picture")
    args = parser.parse_args(argv)
    if not args.table.is_file():
        parser.error(f"there is no {args.table}: make it with training_scripts/trial_table.py")
    runs = read(args.table)
    table = Table(runs)
    some = "" if args.samplers == list(SAMPLERS) else f" --samplers {' '.join(args.samplers)}"
    result = {
        "command": f"python training_scripts/analyze_trials.py{some}",
        "runs": len(runs),
        "runs_in_all": len(runs) + table.missing,
        "groups": len(table.groups),
        "rates": [float(rate) for rate in table.rates],
        "steps": int(runs["steps"].max()),
        "correlations": {"all": correlations(runs, False), "masks": correlations(runs, True)},
        "pruning": pruning(runs, args.pruned_trials, args.seeds),
        "pruned_trials": args.pruned_trials,
        "seconds": {reward: float(runs[column].median()) for reward, column in COSTS.items()},
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if table.missing:
        print(f"{table.missing} runs are missing: no sampler is replayed")
    else:
        of = replays(table, args.samplers, args.seeds, args.trials, args.workers)
        result["replay"] = summary(of, [n for n in (4, 8, 16, 32, 64) if n <= args.trials])
        plot(of, args.output_dir / "trials_replay.png")
    (args.output_dir / "trials.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (args.output_dir / "trials.md").write_text(as_markdown(result), encoding="utf-8")
    print(f"{args.output_dir / 'trials.md'}")


if __name__ == "__main__":
    main()
