"""Real trials, to compare searches and rewards by: each mask of a coarsened space at two learning rates.

    python training_scripts/studies/trial_table.py
    python training_scripts/studies/trial_table.py --data elpv  # into docs/results/trial_table_elpv.parquet
    python training_scripts/studies/trial_table.py --data elpv --learning_rate 3e-4  # half of it
    python training_scripts/studies/trial_table.py --part 1/2   # and --part 2/2 on another machine

Each run fine-tunes the attention weights of some of six groups of blocks. It is measured by what a search may use
(cheap rewards against the validation images, also at two stages of the training), and by the attacks of the audit
against held-out images.

Each finished run is a file in `--output_dir`, so the same command goes on where it stopped, and processes with one
output folder share the work. `docs/trial_table.parquet` holds all finished runs, one row each; on a new machine the
command takes them up from there. The runs come in a seeded random order, so the runs that are finished before the end
are a random sample.
"""

import argparse
import dataclasses
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from datasets import DatasetDict
from transformers import TrainerCallback
from transformers import logging as transformers_logging

from common.audits import audit_trainer, canaries_caught
from common.pieces import Job, Pieces, add_part_flag, exit_if_missing, open_pieces
from common.trainers import demo_trainer
from memcontrol_hf import MemControlTrainer, metrics
from memcontrol_hf.flags import ScriptArguments
from memcontrol_hf.from_flags import audit_settings, training_arguments
from paper_table.data_sets import DATA
from paper_table.data_sets import images as images_of
from trials.columns import NOISE_TIMESTEPS, STAGES

GROUPS = {
    "down.0": r"^down_blocks\.0\.attentions",
    "down.1": r"^down_blocks\.1\.attentions",
    "down.2, mid": r"^(down_blocks\.2|mid_block)\.attentions",
    "up.1": r"^up_blocks\.1\.attentions",
    "up.2": r"^up_blocks\.2\.attentions",
    "up.3": r"^up_blocks\.3\.attentions",
}
RATES = (3e-4, 1e-3)

Figures = dict[str, float | bool | int]


class Run(NamedTuple):
    """A row of the table.

    Args:
        mask: Whether each of the `GROUPS` is tuned.
        learning_rate: Learning rate of the fine-tune.
        steps: Steps of the fine-tune.
        seed: Random seed of fine-tune, measures and audit.
    """

    mask: tuple[bool, ...]
    learning_rate: float
    steps: int
    seed: int

    @property
    def piece(self) -> str:
        """The name of the file with the result."""
        return f"{''.join('01'[on] for on in self.mask)}-{self.learning_rate:g}-{self.steps}-{self.seed}"

    def columns(self) -> Figures:
        """The columns that say what was run."""
        mask = {f"mask.{name}": on for name, on in zip(GROUPS, self.mask)}
        return mask | {"learning_rate": self.learning_rate, "steps": self.steps, "seed": self.seed}


class Stages(TrainerCallback):
    """Measures the cheap rewards at some steps of a training.

    Args:
        trainer: The trainer that measures.
        steps: Steps after which the rewards are measured.
    """

    def __init__(self, trainer: MemControlTrainer, steps: list[int]) -> None:
        self.trainer, self.steps = trainer, steps
        self.figures: Figures = {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            figures = self.trainer.evaluate_mid_training(["fid", "membership_auc"])
            stage = self.steps.index(state.global_step)
            self.figures |= {f"stage{stage}_{name.removeprefix('eval_')}": value for name, value in figures.items()}


def plan(steps: int, seeds: list[int], rates: Sequence[float] = RATES) -> list[Run]:
    """The runs of the table in their random order, seed by seed."""
    masks = itertools.product((False, True), repeat=len(GROUPS))
    runs = [
        Run(mask, rate, steps, seed)
        for seed, mask, rate in itertools.product(seeds, list(masks), rates)
        if any(mask) or rate == rates[0]  # the frozen base has no learning rate
    ]
    random.Random(0).shuffle(runs)
    return sorted(runs, key=lambda run: run.seed)


def measure(run: Run, trainer: MemControlTrainer, data: DatasetDict) -> Figures:
    """Fine-tune and measure one run: one row of the table."""
    row = run.columns()
    trainer.args.seed = run.seed
    mask = dict(zip(GROUPS.values(), run.mask))
    trainer.apply_hyperparameters({"mask": mask, "learning_rate": run.learning_rate})
    row["trainable_parameters"] = trainer.trainable_parameters
    if any(run.mask):
        train(trainer, row)
    for name in ("membership_auc", "fid"):
        with timed(row, name):
            row |= {key.removeprefix("eval_"): value for key, value in trainer.evaluate(metrics=[name]).items()}
    measure_noise_norms(trainer, data, run.seed, row)
    attack(trainer, data, run.seed, row)
    return row


@contextmanager
def timed(row: Figures, name: str) -> Iterator[None]:
    """Put the CPU seconds of some work into the column `seconds_<name>`."""
    started = time.process_time()
    yield
    row[f"seconds_{name}"] = time.process_time() - started


def train(trainer: MemControlTrainer, row: Figures) -> None:
    """Fine-tune, and put the rewards at the stages into the row."""
    stages = Stages(trainer, [round(share * trainer.args.max_steps) for share in STAGES])
    trainer.add_callback(stages)
    try:
        with timed(row, "train_with_stages"):
            trainer.train()
    finally:
        trainer.remove_callback(stages)  # the trainer is that of all runs
    row |= stages.figures


def measure_noise_norms(trainer: MemControlTrainer, data: DatasetDict, seed: int, row: Figures) -> None:
    """Put the noise norms of training and validation images, and how well they tell the two apart, into the row."""
    splits = {"train": trainer.train_dataset, "validation": trainer.encode(data["validation"])}
    with timed(row, "noise_norm"):
        norms = {
            name: metrics.noise_norm(
                trainer.model,
                images.encoded[images.distinct]["latents"],
                images.encoded[images.distinct]["prompt_embeds"],
                trainer.family.null_condition(),
                trainer.family,
                NOISE_TIMESTEPS,
                [(seed, purpose, i) for i in images.distinct],
            )
            for purpose, (name, images) in enumerate(splits.items())
        }
    for k, timestep in enumerate(NOISE_TIMESTEPS):
        row |= {f"noise_norm_{timestep}_{name}": of_split[:, k].mean().item() for name, of_split in norms.items()}
        row[f"noise_norm_{timestep}_auc"] = metrics.membership(norms["train"][:, k], norms["validation"][:, k]).auc


def attack(trainer: MemControlTrainer, data: DatasetDict, seed: int, row: Figures) -> None:
    """Put the measures of the audit against held-out images into the row."""
    settings = dataclasses.replace(
        audit_settings(ScriptArguments(seed=seed)),
        num_prompts=24,  # the twelve repeated images, and as many others
        images_per_prompt=8,
        num_quality_images=72,
    )
    held_out = data["held_out"].select(range(128))
    with timed(row, "audit"):
        audit = audit_trainer(trainer, data["train"], held_out, settings)
    row |= {f"audit_{name}": measure["model"]["value"] for name, measure in audit["measures"].items()}
    row |= canaries_caught(audit)


def restore(pieces: Pieces, table: Path) -> None:
    """Take up the runs that are in the table already."""
    rows = pd.read_parquet(table).to_dict("records") if table.exists() else []
    for row in rows:
        run = Run(tuple(row[f"mask.{name}"] for name in GROUPS), row["learning_rate"], row["steps"], row["seed"])
        pieces.restore({run.piece: row})


def collect(runs: list[Run], pieces: Pieces, table: Path) -> None:
    """Write all finished runs, those that were not asked for after the others, into one Parquet file."""
    planned = [run.piece for run in runs if run.piece in pieces]
    others = sorted({file.stem for file in pieces.folder.glob("*-*.json")} - set(planned))
    rows = [pieces.read(piece) for piece in (*planned, *others)]
    table.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(table, index=False)
    print(f"{len(planned)} of {len(runs)} runs, and {len(others)} others: {table}")


def run_trainer(steps: int, folder: Path, data: DatasetDict) -> MemControlTrainer:
    """The trainer of all runs."""
    script = ScriptArguments(output_dir=str(folder), max_train_steps=steps, method="attention")
    return demo_trainer(data, script.method, training_arguments(script), list(GROUPS.values()))


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, default="demo", help="data set of the runs (default: demo)")
    parser.add_argument("--max_train_steps", type=int, default=80, help="steps of each run (default: 80)")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="seeds; each run has each seed (default: 0)")
    parser.add_argument(
        "--learning_rate", type=float, nargs="+", default=list(RATES), help="learning rates (default: 3e-4 1e-3)"
    )
    add_part_flag(parser)
    parser.add_argument("--collect", action="store_true", help="run nothing: collect what is finished")
    parser.add_argument("--output_dir", type=Path, help="folder of the finished runs (outputs/trial_table)")
    parser.add_argument("--results", type=Path, help="file of the table (docs/trial_table.parquet)")
    args = parser.parse_args(argv)
    name = "trial_table" if args.data == "demo" else f"trial_table_{args.data}"
    args.output_dir = args.output_dir or Path("outputs", name)
    args.results = args.results or Path("docs" if args.data == "demo" else "docs/results", f"{name}.parquet")
    pieces = open_pieces(parser, args.output_dir, {"data": args.data})
    runs, failed = plan(args.max_train_steps, args.seed, args.learning_rate), []
    restore(pieces, args.results)
    if not args.collect:
        transformers_logging.set_verbosity_error()
        data = images_of(args.data, None)
        trainer = run_trainer(args.max_train_steps, args.output_dir, data)
        failed = pieces.work(
            [Job(run.piece, run.piece, partial(measure, run, trainer, data)) for run in args.part.of(runs)]
        )
    collect(runs, pieces, args.results)
    exit_if_missing(failed)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
