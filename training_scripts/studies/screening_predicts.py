"""How well screenings predict what masks learn and memorize, and where the zero of `memorizes` lies.

    python training_scripts/studies/screening_predicts.py               # the demo: about two minutes for each seed
    python training_scripts/studies/screening_predicts.py --data elpv   # needs docs/results/trial_table_elpv.parquet
    python training_scripts/studies/screening_predicts.py --collect     # runs nothing: judge what is finished

A screening says how far each block lowers the loss of unseen images (`learns`), and how much further it lowers the
loss of the images that it is trained on (`memorizes`). Seen and unseen images need not be equally hard, so that the
zero of `memorizes` is open. Five readings of it are compared; negative figures count as 0 in each:

- `one way`: what [`MemControlTrainer.screen`] does: one training, with validation images as the unseen ones.
- `drawn`: the same training, but the timestep of each probed row is drawn by itself instead of stratified.
- `ratio`: `trained - κ · learns` of the first, with κ the least ratio of the two among blocks that learn: the block
  that favours the images it is trained on least is taken to memorize nothing.
- `crossed`: the mean of two trainings, each on one half of the training images, with the other half as unseen ones.
  Each image is once seen and once unseen, so that its difficulty cancels.
- `swapped`: the mean of the first and of a training on the validation images, with the training images as unseen ones.

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
from transformers import logging as transformers_logging

from common.intervals import rank_correlation, spearman
from common.pages import publish_results, read_results, table
from common.pieces import Job, Pieces, add_part_flag, exit_if_missing, open_pieces
from common.trainers import demo_trainer
from memcontrol_hf import MemControlTrainer
from memcontrol_hf.data import EncodedImages
from memcontrol_hf.flags import ScriptArguments
from memcontrol_hf.from_flags import training_arguments
from memcontrol_hf.randomness import seeded_generator
from memcontrol_hf.report.plots import plot_screening
from memcontrol_hf.screening.estimates import estimate
from memcontrol_hf.screening.probes import ProbeImages
from memcontrol_hf.screening.run import all_blocks_aside, train_and_probe
from memcontrol_hf.screening.settings import ScreeningSettings
from paper_table.data_sets import DATA
from paper_table.data_sets import images as images_of
from trial_table import GROUPS

TRAININGS = ("one way", "drawn", "half A", "half B", "swapped")
READINGS = ("one way", "drawn", "ratio", "crossed", "swapped")
MEASURED = {
    "membership AUC": "audit_membership_auc_loss",
    "CLiD": "audit_membership_auc_clid",
    "PIA": "audit_membership_auc_pia",
    "copies": "audit_copy_share",
    "minus amd": "audit_amd",
}
Blocks = dict[str, float]


def screen(args: argparse.Namespace, training: str, seed: int) -> dict[str, Any]:
    """The figures of one screening, or of a training that takes its place."""
    script = ScriptArguments(
        output_dir=str(args.output_dir / "runs"), method=args.method, max_train_steps=args.steps, seed=seed
    )
    data = images_of(args.data, None)
    trainer = demo_trainer(data, args.method, training_arguments(script))
    if training == "one way":
        screening = trainer.screen(args.steps, args.every, args.learning_rate)
    else:
        settings = ScreeningSettings(args.steps, args.every, args.learning_rate, seeds=1, seed=seed)
        seen, unseen = images_seen_and_unseen(trainer, training)
        probe_images = DrawnTimesteps if training == "drawn" else ProbeImages
        with all_blocks_aside(trainer, settings):
            one = train_and_probe(trainer, settings, seed, seen, unseen, probe_images)
        screening = estimate(list(trainer.search_space.blocks), [one], settings, {})
    device = trainer.args.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {**screening.to_dict(), "device": name}


def images_seen_and_unseen(trainer: MemControlTrainer, training: str) -> tuple[EncodedImages, EncodedImages]:
    """What a training is trained on, and what it is compared with."""
    train, validation = trainer.train_dataset, trainer.encode(trainer.eval_dataset)
    if training in ("drawn", "swapped"):
        return (train, validation) if training == "drawn" else (validation, train)
    order = torch.randperm(len(train.distinct), generator=seeded_generator(0)).tolist()
    in_a = {train.digests[train.distinct[place]] for place in order[: len(order) // 2]}
    a, b = (
        [row for row, digest in enumerate(train.digests) if (digest in in_a) == inside] for inside in (True, False)
    )
    halves = train.select(a), train.select(b)
    return halves if training == "half A" else halves[::-1]


class DrawnTimesteps(ProbeImages):
    """Probes whose rows each draw a timestep by themselves, as in training."""

    def timesteps(self, step: int) -> dict[int, torch.Tensor]:
        keys = {row: (self._seed, self._purpose, step, row) for row in self.rows(step)}
        return {row: self._family.noise.sample_timestep(seeded_generator(*key)) for row, key in keys.items()}


def readings(pieces: Pieces, seed: int) -> dict[str, Blocks]:
    """The readings of what each block memorizes, and `learns`."""
    found = {training: pieces.read(f"{training}-{seed}") for training in TRAININGS}
    memorizes, learns = {name: found[name]["memorizes"] for name in TRAININGS}, found["one way"]["learns"]
    trained = {block: learns[block] + memorizes["one way"][block] for block in learns}
    least = 0.05 * max(learns.values())
    kappa = min(trained[block] / learnt for block, learnt in learns.items() if learnt > least)
    memorizes |= {
        "ratio": {block: trained[block] - kappa * learns[block] for block in learns},
        "crossed": {block: (memorizes["half A"][block] + memorizes["half B"][block]) / 2 for block in learns},
        "swapped": {block: (memorizes["one way"][block] + memorizes["swapped"][block]) / 2 for block in learns},
    }
    clipped = {name: {block: max(value, 0.0) for block, value in memorizes[name].items()} for name in READINGS}
    return {"learns": learns, **clipped}


def restore(pieces: Pieces, settings: dict[str, Any], file: Path) -> None:
    """Take up the screenings that the results hold, if they were made with the same settings but for the seeds."""
    results = read_results(file)
    if results and {**results["settings"], "seeds": None} == {**settings, "seeds": None}:
        pieces.restore(results["screenings"])


def finished_screenings(pieces: Pieces) -> tuple[dict[str, Any], list[int]]:
    """All finished trainings, whatever seeds were asked for, and the seeds of which all trainings are finished."""
    seeds = sorted({int(file.stem.rpartition("-")[2]) for file in pieces.folder.glob("*-*.json")})
    names = {seed: [f"{training}-{seed}" for training in TRAININGS] for seed in seeds}
    finished = {name: pieces.read(name) for of_seed in names.values() for name in of_seed if name in pieces}
    return finished, [seed for seed in seeds if finished.keys() >= set(names[seed])]


def by_group(blocks: Blocks) -> list[float]:
    """The sum over the blocks of each of the trial table's groups."""
    return [sum(v for block, v in blocks.items() if re.search(pattern, block)) for pattern in GROUPS.values()]


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
        for reading, name, measured in pairs:
            predicted = size if reading == "parameters" else masks @ means[reading]
            if (found := rank_correlation(predicted, measured.to_numpy())) is None:  # no copy is found in any run, say
                continue
            row = {"masks_rate": rate, "reading": reading, "measure": name, **found}
            if reading in singles:
                each = [spearman(masks @ single, measured.to_numpy()) for single in singles[reading]]
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
    pieces, failed = open_pieces(parser, args.output_dir, settings), []
    restore(pieces, settings, file)
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
    finished, seeds = finished_screenings(pieces)
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
            "screenings": finished,
        }
        publish_results(file, content, render)
        plot_screening(content["screenings"][f"one way-{seeds[0]}"], file.with_suffix(".png"))
    exit_if_missing(failed)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
