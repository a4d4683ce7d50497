"""How well screenings of one training predict what masks learn and memorize, and where the zero of `memorizes` lies.

    python training_scripts/studies/screening_predicts.py               # the demo: about two minutes for each training
    python training_scripts/studies/screening_predicts.py --data elpv   # needs docs/results/trial_table_elpv.parquet
    python training_scripts/studies/screening_predicts.py --collect     # runs nothing: judge what is finished

A screening says how far each block lowers the loss of validation images (`learns`), and how much further it lowers the
loss of training images (`memorizes`). Training and validation images need not be equally hard, so that the zero of
`memorizes` is open. Five readings of it are compared:

- `raw`: as measured.
- `clipped`: negative figures count as 0, as `Screening.masks` reads them.
- `ratio`: `trained - κ · learns`, clipped, with κ the least ratio of the two among blocks that learn: the block that
  favours training images least is taken to memorize nothing.
- `crossed`: two trainings, each on one half of the training images, with the other half in the place of the validation
  images; the mean of both, clipped. Each image is once trained on and once not, so that its difficulty cancels.
- `swapped`: a second training on the validation images, with the training images in their place; the mean, clipped.

They are judged by Spearman's rank correlation, over the masks of the trial table (`trial_table.py`), of the sum over a
mask's blocks with what was measured of the mask. Intervals are 95 % bootstrap intervals over masks.
"""

import argparse
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import DatasetDict
from scipy.stats import bootstrap, spearmanr
from transformers import logging as transformers_logging

from common.pages import read_results, table, write_results
from common.pieces import Job, Pieces, add_part_flag, exit_if_missing
from common.trainers import demo_trainer
from memcontrol_hf.data import first_rows
from memcontrol_hf.flags import ScriptArguments
from memcontrol_hf.from_flags import training_arguments
from memcontrol_hf.images import pixel_digest
from memcontrol_hf.randomness import seeded_generator
from memcontrol_hf.report.plots import plot_screening
from paper_table.data_sets import DATA
from paper_table.data_sets import images as images_of
from trial_table import GROUPS

TRAININGS = ("plain", "swapped", "half A", "half B")
READINGS = ("raw", "clipped", "ratio", "crossed", "swapped")
MEASURED = {
    "membership AUC": "audit_membership_auc_loss",
    "CLiD": "audit_membership_auc_clid",
    "PIA": "audit_membership_auc_pia",
    "copies": "audit_copy_share",
    "minus amd": "audit_amd",
}
Blocks = dict[str, float]


def splits(data: DatasetDict, training: str) -> dict[str, Any]:
    """What a training is trained on, and the images in the place of the validation images."""
    train, validation = data["train"], data["validation"]
    if training == "plain":
        return {"train": train, "validation": validation}
    if training == "swapped":
        return {"train": validation, "validation": train}
    digests = [pixel_digest(image) for image in train["image"]]
    distinct = first_rows(digests)
    order = torch.randperm(len(distinct), generator=seeded_generator(0)).tolist()
    half = {digests[distinct[place]] for place in order[: len(order) // 2]}
    rows = [[row for row, digest in enumerate(digests) if (digest in half) == inside] for inside in (True, False)]
    a, b = (train.select(part) for part in rows)
    return {"train": a, "validation": b} if training == "half A" else {"train": b, "validation": a}


def screen(args: argparse.Namespace, training: str, seed: int) -> dict[str, Any]:
    """One screening of one training."""
    script = ScriptArguments(
        output_dir=str(args.output_dir / "runs"), method=args.method, max_train_steps=args.steps, seed=seed
    )
    trainer = demo_trainer(splits(images_of(args.data, None), training), args.method, training_arguments(script))
    device = trainer.args.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {**trainer.screen(args.steps, args.every, args.learning_rate).to_dict(), "device": name}


def readings(pieces: Pieces, seed: int) -> dict[str, Blocks]:
    """The readings of what each block memorizes, and `learns`."""
    found = {training: pieces.read(f"{training}-{seed}") for training in TRAININGS}
    plain = found["plain"]
    trained = {block: plain["learns"][block] + plain["memorizes"][block] for block in plain["learns"]}
    least = 0.05 * max(plain["learns"].values())
    kappa = min(trained[b] / learnt for b, learnt in plain["learns"].items() if learnt > least)
    mean = {
        name: {b: (one["memorizes"][b] + other["memorizes"][b]) / 2 for b in trained}
        for name, one, other in (
            ("crossed", found["half A"], found["half B"]),
            ("swapped", plain, found["swapped"]),
        )
    }
    ratio = {block: trained[block] - kappa * plain["learns"][block] for block in trained}
    values = {"clipped": plain["memorizes"], "ratio": ratio, **mean}
    clipped = {name: {b: max(value, 0.0) for b, value in blocks.items()} for name, blocks in values.items()}
    return {"learns": plain["learns"], "raw": plain["memorizes"], **clipped}


def by_group(blocks: Blocks) -> list[float]:
    """The sum over the blocks of each of the trial table's groups."""
    return [sum(v for block, v in blocks.items() if re.search(pattern, block)) for pattern in GROUPS.values()]


def correlation(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """Spearman's rank correlation over masks, with its bootstrap interval."""

    def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
        return spearmanr(x, y).statistic

    drawn = bootstrap(
        (predicted, measured),
        rank_correlation,
        paired=True,
        vectorized=False,
        n_resamples=999,
        method="percentile",
        rng=0,
    )
    return {
        "rho": float(rank_correlation(predicted, measured)),
        "low": float(drawn.confidence_interval.low),
        "high": float(drawn.confidence_interval.high),
    }


def judge(pieces: Pieces, seeds: list[int], trials: pd.DataFrame) -> list[dict[str, Any]]:
    """The correlations: a row for each learning rate of the masks, reading and measure, for the mean over seeds."""
    per_seed = [readings(pieces, seed) for seed in seeds]
    names = per_seed[0].keys()
    means = {name: np.mean([by_group(found[name]) for found in per_seed], axis=0) for name in names}
    singles = {name: [np.array(by_group(found[name])) for found in per_seed] for name in names}
    rows = []
    for rate, runs in trials.groupby("learning_rate"):
        masks = runs[[f"mask.{group}" for group in GROUPS]].to_numpy(float)
        runs, masks = runs[masks.any(1)], masks[masks.any(1)]
        pairs = [("learns", "loss on validation", -runs["loss"])]
        pairs += [
            (reading, name, -runs[column] if column == "audit_amd" else runs[column])
            for reading in ("parameters", *READINGS)
            for name, column in MEASURED.items()
        ]
        size = runs["trainable_parameters"].to_numpy(float)
        pairs += [
            ("parameters", name, runs[column] * (-1 if column == "audit_amd" else 1))
            for name, column in MEASURED.items()
        ]
        for reading, name, measured in pairs:
            predicted = size if reading == "parameters" else masks @ means[reading]
            row = {
                "masks_rate": rate,
                "reading": reading,
                "measure": name,
                **correlation(predicted, measured.to_numpy()),
            }
            if reading in singles:
                each = [spearmanr(masks @ single, measured).statistic for single in singles[reading]]
                row |= {"lowest_seed": float(min(each)), "highest_seed": float(max(each))}
            rows.append(row)
    return rows


def render(content: dict[str, Any]) -> str:
    """The page of one data set's correlations."""
    settings, rows = content["settings"], content["rows"]
    devices = sorted({screening["device"] for screening in content["screenings"].values()})
    lines = [
        f"# What screenings predict: {DATA[settings['data']].title}",
        "",
        f"`{content['command']}`",
        "",
        f"Spearman's rank correlation over {content['masks']} masks of six groups of blocks, with 95 % bootstrap "
        f"intervals over masks, of the mean over {len(settings['seeds'])} screening seed(s) of {settings['steps']} "
        f"steps at the learning rate {settings['learning_rate']:g}, run on: {', '.join(devices)}. In brackets: lowest "
        "and highest seed by itself.",
        "",
    ]
    for rate in sorted({row["masks_rate"] for row in rows}):
        at_rate = {(row["reading"], row["measure"]): row for row in rows if row["masks_rate"] == rate}
        measures = list(MEASURED)
        head = [f"masks at {rate:g}", *measures, "loss on validation"]
        cells_of_rows = []
        for reading in ("parameters", *READINGS, "learns"):
            cells = []
            for name in (*measures, "loss on validation"):
                row = at_rate.get((reading, name))
                text = "" if row is None else f"{row['rho']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
                if row and "lowest_seed" in row:
                    text += f" [{row['lowest_seed']:.2f}, {row['highest_seed']:.2f}]"
                cells.append(text)
            cells_of_rows.append([reading, *cells])
        lines += table(head, cells_of_rows)
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, default="demo", help="data set (default: demo)")
    parser.add_argument("--method", default="attention", help="method of train_memcontrol.py (default: attention)")
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="rate of the screening (default: 3e-4)")
    parser.add_argument("--steps", type=int, default=80, help="steps of the screening (default: 80)")
    parser.add_argument("--every", type=int, default=4, help="steps from probe to probe (default: 4)")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2], help="screening seeds (default: 0 1 2)")
    add_part_flag(parser)
    parser.add_argument("--collect", action="store_true", help="run nothing: judge what is finished")
    parser.add_argument("--output_dir", type=Path, help="folder of the finished screenings")
    parser.add_argument("--docs_dir", type=Path, default=Path("docs/results"), help="folder of the results")
    args = parser.parse_args(argv)
    args.output_dir = args.output_dir or Path("outputs", f"screening_{args.data}")
    file = args.docs_dir / f"screening_{args.data}.json"
    settings = {name: getattr(args, name) for name in ("data", "method", "learning_rate", "steps", "every")}
    pieces, failed = Pieces(args.output_dir, settings), []
    pieces.restore(read_results(file).get("screenings", {}))
    if not args.collect:
        transformers_logging.set_verbosity_error()
        jobs = [(training, seed) for seed in args.seed for training in TRAININGS]
        failed = pieces.work(
            [
                Job(
                    f"{training}-{seed}",
                    f"{args.data}, {training}, seed {seed}",
                    partial(screen, args, training, seed),
                )
                for training, seed in args.part.of(jobs)
            ]
        )
    seeds = [seed for seed in args.seed if all(f"{training}-{seed}" in pieces for training in TRAININGS)]
    measured = Path(
        "docs/trial_table.parquet" if args.data == "demo" else f"docs/results/trial_table_{args.data}.parquet"
    )
    if seeds and measured.exists():
        runs = pd.read_parquet(measured)
        content = {
            "command": f"python training_scripts/studies/screening_predicts.py --data {args.data}",
            "settings": settings | {"seeds": seeds},
            "masks": int(runs[runs["learning_rate"] == runs["learning_rate"].min()].shape[0] - 1),
            "rows": judge(pieces, seeds, runs),
            "screenings": {f"{t}-{s}": pieces.read(f"{t}-{s}") for s in seeds for t in TRAININGS},
        }
        write_results(file, content, render(content))
        plot_screening(content["screenings"][f"plain-{seeds[0]}"], file.with_suffix(".png"))
        print(render(content))
    exit_if_missing(failed)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
