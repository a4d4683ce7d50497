"""Whether a mask of single singular values leaks less than one of whole modules, at as many parameters of SV-DIFF.

    python training_scripts/studies/screening_singular.py              # twenty minutes on one core
    python training_scripts/studies/screening_singular.py --collect    # run nothing: judge what is finished

With each seed one training of the demo with SV-DIFF in all modules is probed as in a screening, but the fall of the
losses is allocated to each singular value's shift instead of to each block. The sums over a module are the screening
by module, from the same probes, so that both kinds of masks know the same.

Two masks of modules are taken from the front. Beside each stand as many single singular values: those with the lowest
price, which is what a shift memorizes for each unit that it learns (the rule of `Screening.masks`), and those that
learn most. All are fine-tuned with the same rate, steps and seed, and measured on the held-out images.

Each finished piece is a file in `--output_dir`, so the same command goes on where it stopped. Writes
docs/results/screening_singular.json and .md.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import logging as transformers_logging

from common.intervals import paired_difference
from common.pages import publish_results, read_results, runs_of, table
from common.pieces import Job, Pieces, add_piece_flags, exit_if_missing, open_pieces
from common.trainers import demo_trainer
from memcontrol_hf import MemControlConfig, MemControlTrainer, demo_dataset
from memcontrol_hf.flags import ScriptArguments
from memcontrol_hf.from_flags import training_arguments
from memcontrol_hf.screening.result import Screening
from memcontrol_hf.screening.run import run_screening
from memcontrol_hf.screening.settings import ScreeningSettings
from screened.fine_tunes import fine_tune, measure

COMMAND = "python training_scripts/studies/screening_singular.py"
METHOD, RATE, STEPS, EVERY = "svdiff", 3e-2, 80, 4
SCREENING_SEED = 3000  # of the first screening: no fine-tune has it
MASKS = {"larger": 2, "smaller": 4}
"""Masks of modules that are compared: their places among six along the front, the largest first."""
KINDS = {
    "modules": "whole modules",
    "price": "single singular values, of the lowest price",
    "learns": "single singular values, which learn most",
}
ALL = "all"
FIGURES = ("loss", "auc_loss", "auc_clid", "auc_pia")

Figures = dict[str, Any]


def chosen(screening: Screening, kind: str, size: str) -> dict[str, list[int]]:
    """Which singular values are tuned, by the name of the module."""
    if kind == ALL:
        return {name: [*range(length)] for name, length in screening.parameters.items()}
    mask = screening.masks(6)[MASKS[size]]
    whole = {name: [*range(screening.parameters[name])] for name, on in mask.items() if on}
    number = sum(map(len, whole.values()))
    if kind == "modules":
        return whole
    if kind == "price":
        return screening.cheapest_singular_values(number)
    learning = {name: of["learns"] for name, of in screening.singular_values.items()}
    free = {name: {"learns": learns, "memorizes": [0.0] * len(learns)} for name, learns in learning.items()}
    return replace(screening, singular_values=free).cheapest_singular_values(number)


def jobs(pieces: Pieces, seeds: Sequence[int]) -> list[Job]:
    """The screening, all singular values, and each kind and size, seed by seed."""
    data = demo_dataset()
    script = ScriptArguments(output_dir=str(pieces.folder / "runs"), method=METHOD, max_train_steps=STEPS)

    def trainer(singular_values: dict[str, list[int]] | None = None) -> MemControlTrainer:
        config = MemControlConfig(method=METHOD, singular_values=singular_values)
        return demo_trainer(data, config, training_arguments(script), "module")

    def screen(seed: int) -> Figures:
        settings = ScreeningSettings(steps=STEPS, every=EVERY, learning_rate=RATE, seeds=1, seed=SCREENING_SEED + seed)
        return run_screening(trainer(), settings, singular_values=True).to_dict()

    def run(kind: str, size: str, seed: int) -> Figures:
        tuned = trainer(chosen(Screening.from_dict(pieces.read(f"screening/{seed}")), kind, size))
        fine_tune(tuned, tuned.search_space.mask(True), RATE, seed)
        figures = measure(tuned, data, seed)
        return {name: figures[name] for name in ("parameters", *FIGURES)}

    found = []
    for seed in seeds:
        screening = Job(f"screening/{seed}", f"screening, seed {seed}", partial(screen, seed))
        runs = [(f"{ALL}/{seed}", ALL, "")]
        runs += [(f"{size}-{kind}/{seed}", kind, size) for size in MASKS for kind in KINDS]
        missing = [
            Job(piece, piece, partial(run, kind, size, seed), (screening.piece,))
            for piece, kind, size in runs
            if piece not in pieces
        ]
        found += [screening, *missing] if missing else []
    return found


def render(content: Figures) -> str:
    """The page."""
    lines = [
        "# Masks of single singular values",
        "",
        f"`{content['command']}`",
        "",
        f"SV-DIFF on the demo, {STEPS} steps at the rate {RATE:g}, measured on 256 held-out images, which nothing saw."
        " With each seed one training with all singular values tuned says what each of them learns and memorizes; the "
        "sums over modules give the masks of modules. Beside each of these stand as many single singular values. The "
        "lowest price is the least `memorizes` for each unit of `learns`.",
        "",
        "Means over seeds. AUCs are of attacks that tell training images from held-out images; .5 is guessing.",
        "",
    ]
    head = ["mask", "seeds", "parameters", "held-out loss", "membership AUC", "CLiD", "PIA"]
    titles = {ALL: "all singular values"} | {
        f"{size}-{kind}": f"{size}: {title}" for size in MASKS for kind, title in KINDS.items()
    }
    rows = []
    for name, title in titles.items():
        if found := list(runs_of(content["pieces"], name).values()):
            means = {figure: np.mean([run[figure] for run in found]) for figure in ("parameters", *FIGURES)}
            cells = [f"{means['loss']:.4f}", *(f"{means[figure]:.3f}" for figure in FIGURES[1:])]
            rows.append([title, str(len(found)), f"{means['parameters']:,.0f}", *cells])
    lines += table(head, rows, numbers=True)
    rows = []
    for size in MASKS:
        for kind in ("price", "learns"):
            pair = [runs_of(content["pieces"], f"{size}-{of}") for of in (kind, "modules")]
            cells = [_difference(*pair, figure) for figure in FIGURES]
            if all(cells):
                rows.append([f"{size}: {KINDS[kind]}", *cells])
    if rows:
        lines += ["Differences from the whole modules of the same size, paired by seed, with 95 % t intervals:", ""]
        lines += table(["mask", *head[3:]], rows, numbers=True)
    return "\n".join(lines).rstrip() + "\n"


def _difference(ones: Mapping[int, Figures], others: Mapping[int, Figures], figure: str) -> str:
    values = ({seed: run[figure] for seed, run in runs.items()} for runs in (ones, others))
    found = paired_difference(*values)
    return found.cell(4) if found else ""


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    add_piece_flags(parser, "screening_singular")
    args = parser.parse_args(argv)
    file, failed = args.docs_dir / "screening_singular.json", []
    pieces = open_pieces(parser, args.output_dir, {"method": METHOD, "learning_rate": RATE, "steps": STEPS})
    pieces.restore(read_results(file).get("pieces", {}))
    if not args.collect:
        transformers_logging.set_verbosity_error()
        failed = pieces.work(jobs(pieces, args.seed))
    names = [ALL, *(f"{size}-{kind}" for size in MASKS for kind in KINDS)]
    finished = {piece: pieces.read(piece) for name in names for piece in pieces.names(name)}
    content = {"command": COMMAND, "pieces": finished}
    publish_results(file, content, render)
    exit_if_missing(failed)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
