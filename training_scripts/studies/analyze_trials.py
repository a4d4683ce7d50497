"""What the table of real trials says: which reward a search should use, which sampler finds most, when to stop trials.

    python training_scripts/studies/trial_table.py       # hours: makes docs/trial_table.parquet
    python training_scripts/studies/analyze_trials.py    # minutes

Writes `docs/trials.json` and `docs/trials.md`, and with a complete table `docs/trials_replay.png`.

1. Rewards: the rank correlation, over runs, of each cheap reward with what the attacks of the audit find against
   held-out images that no reward saw; over all runs, and over masks alone (ranks within each learning rate).
2. Samplers: each sampler searches the table instead of training, many times. After each trial the hypervolume of
   (fid, membership AUC) is compared with the hypervolume of the whole table. A trial that repeats another trial is
   free, as in `run_search`; with `plain random`, which is Optuna's own sampler, repeats count.
3. Stopping: trials that are dominated on the way are stopped. How many are stopped, how many of them wrongly, and how
   much time that saves.
"""

import argparse
from pathlib import Path

from common.pages import write_results
from memcontrol_hf.search import SAMPLERS
from trials.columns import read
from trials.page import plot, render
from trials.pruning import pruning
from trials.replay import Table, replays, summary
from trials.rewards import COSTS, correlations

COMMAND = "python training_scripts/studies/analyze_trials.py"
REPORTED_TRIALS = (4, 8, 16, 32, 64)


def analyze(args: argparse.Namespace) -> dict:
    """The results; with a complete table, the plot of the samplers is drawn too."""
    runs = read(args.table)
    table = Table(runs)
    chosen = "" if args.samplers == list(SAMPLERS) else f" --samplers {' '.join(args.samplers)}"
    results = {
        "command": f"{COMMAND}{chosen}",
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
    if table.missing:
        print(f"{table.missing} runs are missing: no sampler is replayed")
    else:
        shares = replays(table, args.samplers, args.seeds, args.trials, args.workers)
        counts = [count for count in REPORTED_TRIALS if count < args.trials]
        results["replay"] = summary(shares, [*counts, args.trials])
        plot(shares, args.output_dir / "trials_replay.png")
    return results


def main(argv: list[str] | None = None) -> None:
    """Correlate, replay, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--table", type=Path, default=Path("docs/trial_table.parquet"), help="table that trial_table.py wrote"
    )
    parser.add_argument("--seeds", type=int, default=200, help="searches of each sampler (default: 200)")
    parser.add_argument("--trials", type=int, default=64, help="trials of each search (default: 64)")
    parser.add_argument(
        "--pruned_trials", type=int, default=32, help="trials of each search that stops some early (default: 32)"
    )
    parser.add_argument(
        "--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS), help="samplers beside plain random search"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("docs"), help="folder of trials.json, trials.md and the plot"
    )
    args = parser.parse_args(argv)
    if not args.table.is_file():
        parser.error(f"there is no {args.table}: make it with training_scripts/studies/trial_table.py")
    if args.trials < REPORTED_TRIALS[0]:
        parser.error(f"--trials must be at least {REPORTED_TRIALS[0]}, but is {args.trials}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results = analyze(args)
    write_results(args.output_dir / "trials.json", results, render(results))
    print(args.output_dir / "trials.md")


if __name__ == "__main__":
    main()
