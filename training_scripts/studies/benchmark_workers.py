"""How many more trials an hour two workers finish than one, with one core each.

    python training_scripts/studies/benchmark_workers.py

Searches of the demo, each with a new journal file, by one process and by two in turn. All blocks are on in every
trial, so that trials cost the same; the learning rate is drawn. The time is measured from the beginning of the first
trial to the end of the last, so the start of Python does not count. Writes `docs/workers.json` and `docs/workers.md`.
"""

import argparse
import logging
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import optuna
import torch
from transformers import logging as transformers_logging

from common.pages import publish_results, table
from common.trainers import demo_trainer
from memcontrol_hf import demo_dataset
from memcontrol_hf.flags import ScriptArguments
from memcontrol_hf.from_flags import METHODS, training_arguments
from memcontrol_hf.search import open_storage

COMMAND = "python training_scripts/studies/benchmark_workers.py"
METHOD = "svdiff"


def work(folder: str, trials: int) -> None:
    """One worker: do trials of a shared study until there are enough."""
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    low, high = METHODS[METHOD][1]
    flags = ScriptArguments(output_dir=folder, objectives=["fid", "membership_auc"])
    trainer = demo_trainer(demo_dataset(), METHOD, training_arguments(flags))
    all_blocks = trainer.search_space.mask(True)
    trainer.hyperparameter_search(
        lambda trial: {"mask": all_blocks, "learning_rate": trial.suggest_float("learning_rate", low, high)},
        n_trials=trials,
        enqueue=[],
        sampler="random",
    )


def trials_per_hour(workers: int, trials: int) -> float:
    """The speed of one search by several processes, each on one core.

    Raises:
        SystemExit: A worker failed, or did no trial.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--work", folder, "--trials", str(trials)]
        one_core = {**os.environ, "OMP_NUM_THREADS": "1"}
        silent = subprocess.DEVNULL
        processes = [subprocess.Popen(command, env=one_core, stdout=silent, stderr=silent) for _ in range(workers)]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit(f"a worker failed; run it alone to see why: {' '.join(command)}")
        storage = open_storage(f"{folder}/study.journal")
        (summary,) = optuna.get_all_study_summaries(storage)
        study = optuna.load_study(study_name=summary.study_name, storage=storage)
        done = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    active = {trial.user_attrs["worker"][1] for trial in done}
    if (len(done), len(active)) != (trials, workers):
        raise SystemExit(
            f"{len(active)} of {workers} workers finished {len(done)} of {trials} trials: give more --trials"
        )
    start, end = min(trial.datetime_start for trial in done), max(trial.datetime_complete for trial in done)
    return 3600 * trials / (end - start).total_seconds()


def render(results: dict[str, Any]) -> str:
    """The page, in Markdown."""
    pairs = list(zip(results["trials_per_hour"]["1"], results["trials_per_hour"]["2"]))
    return "\n".join(
        [
            "# Two workers beside one",
            "",
            f"`{results['command']}`, PyTorch {results['torch']} on a machine of {results['cores']} cores: searches "
            f"of {results['trials']} trials of the demo, by one process and by two in turn, with one thread each.",
            "",
            *table(
                ["search", "trials an hour, one worker", "two workers", "ratio"],
                [
                    [str(i), f"{one:.0f}", f"{two:.0f}", f"{two / one:.2f}"]
                    for i, (one, two) in enumerate(pairs, start=1)
                ],
                numbers=True,
            ),
            f"Median of the ratios: {statistics.median(two / one for one, two in pairs):.2f}.",
            "",
        ]
    )


def main() -> None:
    """Measure in turn and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8, help="trials of each search (default: 8)")
    parser.add_argument("--repeats", type=int, default=3, help="searches by one worker, and by two (default: 3)")
    parser.add_argument("--output_dir", type=Path, default=Path("docs"), help="folder of workers.json and workers.md")
    parser.add_argument("--work", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work, args.trials)
    speeds: dict[str, list[float]] = {"1": [], "2": []}
    for _ in range(args.repeats):
        for workers in (1, 2):
            speeds[str(workers)].append(trials_per_hour(workers, args.trials))
            print(f"{workers} worker(s): {speeds[str(workers)][-1]:.0f} trials an hour", flush=True)
    results = {
        "command": COMMAND,
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "trials": args.trials,
        "trials_per_hour": speeds,
    }
    publish_results(args.output_dir / "workers.json", results, render)


if __name__ == "__main__":
    main()
