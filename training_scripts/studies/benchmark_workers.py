"""How many more trials an hour two workers finish than one, with one core each.

    python training_scripts/benchmark_workers.py

Searches of the demo, on a new journal file each, by one process and by two in turn. All blocks are on in every trial,
so that trials cost the same, and the learning rate is drawn. Measured from the first trial's beginning to the last
one's end, so without what starting Python takes. Writes `docs/workers.json` and `docs/workers.md`.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import optuna
import torch

from memcontrol_hf.search import open_storage


def work(folder: str, trials: int) -> None:
    """One worker: trials of a shared study until there are enough."""
    from transformers import logging as transformers_logging

    from memcontrol_hf import MemControlTrainer, demo_dataset, demo_pipeline
    from memcontrol_hf.flags import METHODS, ScriptArguments
    from memcontrol_hf.from_flags import training_arguments

    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    config, (low, high) = METHODS["svdiff"]
    data = demo_dataset()
    trainer = MemControlTrainer(
        pipeline=demo_pipeline(),
        peft_config=config,
        args=training_arguments(ScriptArguments(output_dir=folder)),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
    )
    everything = trainer.search_space.mask(True)
    trainer.hyperparameter_search(
        lambda trial: {"mask": everything, "learning_rate": trial.suggest_float("learning_rate", low, high)},
        n_trials=trials,
        enqueue=[],
        sampler="random",
    )


def trials_per_hour(workers: int, trials: int) -> float:
    """Of one search by so many processes, each on one core."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--work", folder, "--trials", str(trials)]
        processes = [
            subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
            for _ in range(workers)
        ]  # fmt: skip
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit("a worker failed; run it alone to see why: " + " ".join(command))
        (study,) = optuna.get_all_study_summaries(open_storage(f"{folder}/study.journal"))
        study = optuna.load_study(study_name=study.study_name, storage=open_storage(f"{folder}/study.journal"))
        done = [t for t in study.trials if t.state.name == "COMPLETE"]
        seconds = (max(t.datetime_complete for t in done) - min(t.datetime_start for t in done)).total_seconds()
        assert len(done) == trials and len({t.user_attrs["worker"][1] for t in done}) == workers
        return 3600 * trials / seconds


def as_markdown(result: dict) -> str:
    """The page of a result."""
    one, two = result["trials_per_hour"]["1"], result["trials_per_hour"]["2"]
    return "\n".join(
        [
            "# Two workers beside one",
            "",
            f"`{result['command']}`, PyTorch {result['torch']} on a machine of {result['cores']} cores. Searches of "
            f"{result['trials']} trials of the demo, by one process and by two in turn, one thread each.",
            "",
            "| search | trials an hour, one worker | two workers | ratio |",
            "|---|---:|---:|---:|",
            *(f"| {i} | {a:.0f} | {b:.0f} | {b / a:.2f} |" for i, (a, b) in enumerate(zip(one, two), 1)),
            "",
            f"Median of the ratios: {statistics.median(b / a for a, b in zip(one, two)):.2f}.",
            "",
        ]
    )


def main() -> None:
    """Measure in turn and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8, help="of each search")
    parser.add_argument("--repeats", type=int, default=3, help="searches by one, and by two")
    parser.add_argument("--output_dir", type=Path, default=Path("docs"), help="for workers.{json,md}")
    parser.add_argument("--work", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work, args.trials)
    found: dict[str, list[float]] = {"1": [], "2": []}
    for _ in range(args.repeats):
        for workers in (1, 2):
            found[str(workers)].append(trials_per_hour(workers, args.trials))
            print(f"{workers} worker(s): {found[str(workers)][-1]:.0f} trials an hour", flush=True)
    result = {
        "command": "python training_scripts/benchmark_workers.py",
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "trials": args.trials,
        "trials_per_hour": found,
    }
    (args.output_dir / "workers.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (args.output_dir / "workers.md").write_text(as_markdown(result), encoding="utf-8")
    print(as_markdown(result))


if __name__ == "__main__":
    main()
