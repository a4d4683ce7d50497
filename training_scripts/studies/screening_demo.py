"""How well one screening of the demo predicts the masks of the table of real trials.

    python training_scripts/studies/screening_demo.py             # two minutes on one thread
    python training_scripts/studies/screening_demo.py --seeds 3

A screening trains the attention weights of all blocks once, and says what each block learns and memorizes. Summed over
the blocks of a mask, the figures predict what a fine-tune of that mask does. `docs/trial_table.parquet` holds 63 masks
of six groups of blocks that were really tuned and attacked; Spearman's rank correlation over these masks compares the
two. Writes `docs/results/screening_demo.json`.
"""

import argparse
import dataclasses
import json
import re
import time
from pathlib import Path

import pandas as pd
import torch
from transformers import logging as transformers_logging

from common.trainers import demo_trainer
from memcontrol_hf import Screening, demo_dataset
from memcontrol_hf.flags import ScriptArguments
from memcontrol_hf.from_flags import training_arguments
from trial_table import GROUPS
from trials.columns import masks, read
from trials.rewards import correlations

PREDICTIONS = {
    "predicted_loss": ("loss",),
    "predicted_memorization": ("audit_membership_auc_loss", "audit_membership_auc_clid"),
    "trainable_parameters": ("loss", "audit_membership_auc_loss", "audit_membership_auc_clid"),
}
"""Prediction for a mask -> measured columns of the table that the prediction is compared with."""


def screen(args: argparse.Namespace) -> Screening:
    """Screen the demo."""
    script = ScriptArguments(output_dir=str(args.output_dir), method="attention", max_train_steps=args.steps)
    arguments = dataclasses.replace(script, seed=args.seed, lr_scheduler=args.lr_scheduler)
    trainer = demo_trainer(demo_dataset(), "attention", training_arguments(arguments))
    return trainer.screen(args.steps, args.every, args.learning_rate, args.seeds)


def predictions(screening: Screening, runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with the columns `predicted_loss` and `predicted_memorization`.

    Args:
        screening: Screening of the single blocks.
        runs: The table, whose masks are over `GROUPS` of blocks.
    """
    groups = {f"mask.{group}": re.compile(pattern) for group, pattern in GROUPS.items()}
    predicted = [
        screening.predict(
            {b: any(row[group] and p.search(b) for group, p in groups.items()) for b in screening.learns}
        )
        for row in runs[masks(runs)].to_dict("records")
    ]
    learns, memorizes = zip(*predicted, strict=True)
    return runs.assign(predicted_loss=[-value for value in learns], predicted_memorization=memorizes)


def compare(screening: Screening, runs: pd.DataFrame) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Rank correlations over masks with 95 % bootstrap intervals: learning rate -> prediction -> column -> figures."""
    results = {}
    for rate, masks_at_rate in predictions(screening, runs).groupby("learning_rate"):
        results[f"{rate:g}"] = {
            prediction: correlations(masks_at_rate, False, [prediction], outcomes)[prediction]
            for prediction, outcomes in PREDICTIONS.items()
        }
    return results


def main(argv: list[str] | None = None) -> None:
    """Screen, compare, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80, help="steps of each run (default: 80, as in the table)")
    parser.add_argument("--every", type=int, default=4, help="steps for each probe (default: 4)")
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="learning rate (default: 3e-4)")
    parser.add_argument("--lr_scheduler", default="constant", help="schedule (default: constant, as in the table)")
    parser.add_argument("--seeds", type=int, default=1, help="runs, each with a seed of its own (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the first run (default: 0)")
    parser.add_argument(
        "--table", type=Path, default=Path("docs/trial_table.parquet"), help="table that trial_table.py wrote"
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs/screening_demo"), help="folder of the trainer, left empty"
    )
    parser.add_argument(
        "--results", type=Path, default=Path("docs/results/screening_demo.json"), help="file of the results"
    )
    args = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    started = time.perf_counter()
    screening = screen(args)
    results = {
        "command": "python training_scripts/studies/screening_demo.py",
        "seconds": round(time.perf_counter() - started, 1),
        "lr_scheduler": args.lr_scheduler,
        "correlations": compare(screening, read(args.table)),
        "screening": screening.to_dict(),
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for row in screening.table():
        print("  ".join(f"{cell:>26}" for cell in row))
    for rate, by_prediction in results["correlations"].items():
        for prediction, by_outcome in by_prediction.items():
            for outcome, figure in by_outcome.items():
                print(f"{rate:>6}  {prediction:24} {outcome:28} {figure['rho']:+.3f} ({figure['low']:+.3f} to "
                      f"{figure['high']:+.3f})")  # fmt: skip
    print(args.results)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
