"""What a screening costs beside a training of as many steps: seconds of CPU and peak memory, each in its own process.

    python training_scripts/studies/benchmark_screening.py    # twenty minutes on one core

Both sides train all blocks on the demo's images, alternately. Loading and encoding are not counted in the seconds;
they are in the peak. A screening also measures two losses before and after its training, at a price that does not
depend on the number of steps: that is why there are two lengths. Writes docs/results/benchmark_screening.json and .md;
pairs of runs that are there already are not run again.
"""

import argparse
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from transformers import logging as transformers_logging

from common.memory import peak_memory
from common.pages import publish_results, read_results, table
from common.trainers import demo_trainer
from memcontrol_hf import demo_dataset
from memcontrol_hf.flags import ScriptArguments
from memcontrol_hf.from_flags import training_arguments

COMMAND = "python training_scripts/studies/benchmark_screening.py"
SIDES = ("training", "screening")
METHODS = ("attention", "lora", "svdiff")
STEPS = (40, 80)

Run = dict[str, Any]


def run(method: str, side: str, steps: int) -> Run:
    """Measure one run in a process of its own."""
    found: Run = {"method": method, "side": side, "steps": steps, "load": os.getloadavg()[0]}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        found |= pool.apply(work, (method, side, steps))
    print(found, flush=True)
    return found


def work(method: str, side: str, steps: int) -> dict[str, float]:
    """Train or screen, in a fresh process."""
    transformers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(ScriptArguments(output_dir=folder, max_train_steps=steps, method=method))
        trainer = demo_trainer(demo_dataset(), method, arguments)
        trainer.encode(trainer.eval_dataset)
        started = time.process_time()
        _, peak = peak_memory(partial(trainer.screen, steps) if side == "screening" else trainer.train)
        seconds = time.process_time() - started
    return {"seconds": seconds, "peak_mib": peak}


def values_of(runs: list[Run], method: str, side: str, steps: int, quantity: str) -> list[float]:
    """What was measured in the runs of one kind, in their order."""
    return [run[quantity] for run in runs if (run["method"], run["side"], run["steps"]) == (method, side, steps)]


def render(content: dict[str, Any]) -> str:
    """The page."""
    runs, rows = content["runs"], []
    loads = sorted(run["load"] for run in runs if "load" in run)
    for method, steps in itertools.product(METHODS, sorted({run["steps"] for run in runs})):
        for quantity, unit in (("seconds", "s"), ("peak_mib", "MiB")):
            values = [values_of(runs, method, side, steps, quantity) for side in SIDES]
            if ratios := sorted(b / a for a, b in zip(*values)):
                medians = [f"{statistics.median(of_side):.0f} {unit}" for of_side in values]
                ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
                name = f"{method}, {steps} steps, {'CPU' if unit == 's' else 'peak memory'}"
                rows.append([name, str(len(ratios)), *medians, ratio])
    lines = [
        "# What a screening costs",
        "",
        f"`{content['command']}`",
        "",
        "Trainings of batch size 32 on the demo with every block on, and the same with probes every 4 steps; each in "
        "a process of its own with one thread, alternately. Medians, and the median ratio within a pair (lowest to "
        f"highest). Other work ran on the {content['cores']} cores: the load average was {loads[0]:.1f} to "
        f"{loads[-1]:.1f}, {statistics.median(loads):.1f} in the median.",
        "",
        *table(["", "pairs", *SIDES, "ratio"], rows),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help="steps of the runs (default: 40 80)")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of each method (default: 3)")
    parser.add_argument("--docs_dir", type=Path, default=Path("docs/results"), help="folder of the results")
    args = parser.parse_args(argv)
    file = args.docs_dir / "benchmark_screening.json"
    content = {"command": COMMAND, "cores": os.cpu_count(), "runs": read_results(file).get("runs", [])}
    for repeat, method, steps in itertools.product(range(args.repeats), METHODS, args.steps):
        if len(values_of(content["runs"], method, SIDES[-1], steps, "seconds")) <= repeat:
            content["runs"] += [run(method, side, steps) for side in SIDES]
            publish_results(file, content, render)


if __name__ == "__main__":
    main()
