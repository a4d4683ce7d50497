"""What a screening costs beside a training of as many steps: seconds of CPU and peak memory, each in its own process.

    python training_scripts/studies/benchmark_screening.py    # ten minutes on one core

Both sides train all blocks on the demo's images, alternately. Loading and encoding are not counted in the seconds;
they are in the peak. Writes docs/results/benchmark_screening.json and .md.
"""

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import logging as transformers_logging

from common.pages import table, write_results
from common.trainers import demo_trainer
from memcontrol_hf import demo_dataset
from memcontrol_hf.flags import ScriptArguments
from memcontrol_hf.from_flags import training_arguments

COMMAND = "python training_scripts/studies/benchmark_screening.py"
SIDES = ("training", "screening")
METHODS = ("attention", "lora", "svdiff")


def work(method: str, side: str, steps: int) -> dict[str, float]:
    """Train or screen, in a fresh process."""
    transformers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(ScriptArguments(output_dir=folder, max_train_steps=steps, method=method))
        trainer = demo_trainer(demo_dataset(), method, arguments)
        trainer.encode(trainer.eval_dataset)
        started = time.process_time()
        if side == "screening":
            trainer.screen(steps)
        else:
            trainer.train()
        seconds = time.process_time() - started
    return {"seconds": seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def render(content: dict[str, Any]) -> str:
    """The page."""
    rows = []
    for method in METHODS:
        runs_of_method = [run for run in content["runs"] if run["method"] == method]
        for quantity, unit in (("seconds", "s"), ("peak_mib", "MiB")):
            values = {side: [run[quantity] for run in runs_of_method if run["side"] == side] for side in SIDES}
            ratios = sorted(b / a for a, b in zip(*values.values()))
            medians = [f"{statistics.median(values[side]):.0f} {unit}" for side in SIDES]
            ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            rows.append([f"{method}, {'CPU' if unit == 's' else 'peak memory'}", *medians, ratio])
    lines = [
        "# What a screening costs",
        "",
        f"`{content['command']}`",
        "",
        f"{content['steps']} steps of batch size 32 on the demo with every block on, and the same with probes every "
        f"4 steps; each in a process of its own with one thread, alternately. Medians of {content['repeats']} pairs, "
        "and the median ratio within a pair (lowest to highest).",
        "",
        *table(["", *SIDES, "ratio"], rows),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="steps of each run (default: 40)")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of each method (default: 3)")
    parser.add_argument("--docs_dir", type=Path, default=Path("docs/results"), help="folder of the results")
    args = parser.parse_args(argv)
    content: dict[str, Any] = {"command": COMMAND, "steps": args.steps, "repeats": args.repeats, "runs": []}
    context = multiprocessing.get_context("spawn")
    for _ in range(args.repeats):
        for method in METHODS:
            for side in SIDES:
                with context.Pool(1, maxtasksperchild=1) as pool:
                    content["runs"].append(
                        {"method": method, "side": side, **pool.apply(work, (method, side, args.steps))}
                    )
                print(content["runs"][-1], flush=True)
    write_results(args.docs_dir / "benchmark_screening.json", content, render(content))
    print(render(content))


if __name__ == "__main__":
    main()
