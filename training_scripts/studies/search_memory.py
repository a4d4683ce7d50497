"""Whether a long search keeps memory, file descriptors, threads or temporary files: what it holds after each trial.

    python training_scripts/studies/search_memory.py    # three minutes on one core

One process runs 50 trials of two steps on the demo, over the mask and the learning rate. What it holds is read when a
trial has been measured. Writes docs/results/search_memory.json and .md.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import psutil
from scipy.stats import linregress
from transformers import logging as transformers_logging

from common.pages import publish_results, table
from common.trainers import demo_trainer
from memcontrol_hf import demo_dataset
from memcontrol_hf.flags import ScriptArguments
from memcontrol_hf.from_flags import training_arguments

COMMAND = "python training_scripts/studies/search_memory.py"
SETTLED = 10
"""Trials after which allocators and caches have what they need."""

IMAGES = 24  # of each split: more would take longer, and no more memory

HELD = {
    "rss_mib": "resident memory, MiB",
    "descriptors": "file descriptors",
    "threads": "threads",
    "temporary": "temporary files",
    "children": "child processes",
}


def held(temporary: str) -> dict[str, float]:
    """What this process holds now."""
    process = psutil.Process()
    return {
        "rss_mib": process.memory_info().rss / 2**20,
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "temporary": sum(len(files) for _, _, files in os.walk(temporary)),
        "children": len(process.children(recursive=True)),
    }


def measure(trials: int) -> list[dict[str, float]]:
    """What the process holds after each trial of a search."""
    transformers_logging.set_verbosity_error()
    after = []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as temporary:
        tempfile.tempdir = temporary
        flags = ScriptArguments(
            output_dir=folder, search_max_steps=2, max_train_steps=2, objectives=["loss", "membership_auc"]
        )
        data = {name: images.select(range(IMAGES)) for name, images in demo_dataset().items()}
        trainer = demo_trainer(data, "attention", training_arguments(flags))

        def objective(figures: dict[str, float]) -> list[float]:
            after.append(held(temporary))
            print(len(after), after[-1], flush=True)
            return [figures["eval_loss"], figures["eval_membership_auc"]]

        trainer.hyperparameter_search(
            n_trials=trials,
            compute_objective=objective,
            direction=["minimize", "minimize"],
            sampler="random",
            learning_rate_range=(1e-4, 1e-3),
            screen=False,
        )
        tempfile.tempdir = None
    return after


def render(content: dict[str, Any]) -> str:
    """The page."""
    after = content["after"]
    rows = []
    for name, title in HELD.items():
        values = [held[name] for held in after]
        settled = values[SETTLED:]
        fit = linregress(range(len(settled)), settled) if len(set(settled)) > 1 else None
        slope = f"{fit.slope:+.2f} ± {1.96 * fit.stderr:.2f}" if fit else "0"
        rows.append([title, *(f"{values[i]:.0f}" for i in (0, SETTLED, len(values) // 2, -1)), slope])
    head = [
        "what is held",
        "after trial 1",
        f"{SETTLED + 1}",
        f"{len(after) // 2 + 1}",
        f"{len(after)}",
        "a trial more",
    ]
    return "\n".join(
        [
            "# What a search holds after each trial",
            "",
            f"`{content['command']}`: {len(after)} trials of two steps on the demo, in one process, on the CPU.",
            "",
            *table(head, rows),
            f"The last column is the slope over the trials after the first {SETTLED}, with 1.96 standard errors of a "
            "straight line.",
            "",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """Measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50, help="number of trials (default: 50)")
    parser.add_argument("--docs_dir", type=Path, default=Path("docs/results"), help="folder of the results")
    args = parser.parse_args(argv)
    if args.trials < SETTLED + 3:
        parser.error(f"--trials must be at least {SETTLED + 3}, which a slope needs, but is {args.trials}")
    content = {"command": COMMAND, "after": measure(args.trials)}
    publish_results(args.docs_dir / "search_memory.json", content, render)


if __name__ == "__main__":
    main()
