"""Whether random words in the captions of a training only hide what an attack without these captions still finds.

    python training_scripts/studies/caption_attacks.py              # ten minutes on one core
    python training_scripts/studies/caption_attacks.py --collect    # run nothing: judge what is finished

Random word addition (RWA) trains no image with its own caption alone, and the attacks of an audit ask with this
caption. So an attacker who knows of it may ask otherwise. All attention blocks are fine-tuned on the demo, with and
without RWA, at the learning rates of the study of the claims. Both models are attacked with the captions, with none,
and with captions to which words were added as in the training; training and held-out images have the same kind.

Each finished piece is a file in `--output_dir`, so the same command goes on where it stopped. Writes
docs/results/caption_attacks.json and .md.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import logging as transformers_logging

from common.intervals import paired_difference
from common.pages import publish_results, read_results, runs_of, table
from common.pieces import Job, Pieces, add_piece_flags, exit_if_missing, open_pieces
from common.trainers import demo_trainer
from memcontrol_hf import MemControlTrainer, demo_dataset
from memcontrol_hf.flags import ScriptArguments
from memcontrol_hf.from_flags import training_arguments
from memcontrol_hf.mitigations.captions import RandomWordAddition
from memcontrol_hf.randomness import Purpose, seeded_generator
from screened.fine_tunes import fine_tune, held_out_scores, losses_and_attacks

COMMAND = "python training_scripts/studies/caption_attacks.py"
STEPS = 80
ROWS = {"plain": ([], 10**-3.0), "rwa": (["rwa"], 10**-3.5)}
"""The mitigations of each row, and its learning rate, which the study of the claims chose on validation images."""
TITLES = {"plain": "all blocks", "rwa": "all blocks with RWA"}
CAPTIONS = {"own": "its caption", "none": "no caption", "words": "its caption and random words, as in training"}
ATTACKS = {"loss": "membership AUC", "pia": "PIA"}

Figures = dict[str, Any]


def asked_with(kind: str, images: Dataset, trainer: MemControlTrainer) -> Dataset:
    """The images with the captions that the attack asks with."""
    if kind == "own":
        return images
    words = RandomWordAddition()
    texts = [
        "" if kind == "none" else words.caption(text, {}, trainer.pipeline.tokenizer, _generator(row))
        for row, text in enumerate(images["text"])
    ]
    return images.remove_columns("text").add_column("text", texts)


def _generator(row: int) -> torch.Generator:
    return seeded_generator(0, Purpose.NONMEMBERS, row)


def attacked(trainer: MemControlTrainer, images: dict[str, Dataset], seed: int) -> Figures:
    """The AUC of each attack with each kind of caption, and the loss of the held-out images with their own."""
    figures = {}
    for kind in CAPTIONS:
        train, held_out = (asked_with(kind, images[split], trainer) for split in ("train", "held_out"))
        found = losses_and_attacks(*held_out_scores(trainer, {"held_out": held_out}, seed, train))
        figures[kind] = {name: found[f"auc_{name}"] for name in ATTACKS}
        if kind == "own":
            figures["held_out_loss"] = found["loss"]
    return figures


def jobs(pieces: Pieces, seeds: Sequence[int]) -> list[Job]:
    """A fine-tune of each row with each seed."""
    data = demo_dataset()

    def run(row: str, seed: int) -> Figures:
        mitigations, rate = ROWS[row]
        folder = str(pieces.folder / "runs")
        script = ScriptArguments(output_dir=folder, max_train_steps=STEPS, mitigation=mitigations)
        trainer = demo_trainer(data, "attention", training_arguments(script))
        fine_tune(trainer, trainer.search_space.mask(True), rate, seed)
        return attacked(trainer, data, seed)

    return [Job(f"{row}/{seed}", f"{row}/{seed}", partial(run, row, seed)) for seed in seeds for row in ROWS]


def render(content: Figures) -> str:
    """The page."""
    lines = [
        "# Attacks with other captions",
        "",
        f"`{content['command']}`",
        "",
        f"All attention blocks, {STEPS} steps on the demo, each row at its own best learning rate. AUCs of attacks "
        "that tell training from held-out images; both are asked with the same kind of caption. .5 is guessing.",
        "",
    ]
    rows = []
    for row, title in TITLES.items():
        if runs := list(runs_of(content["pieces"], row).values()):
            loss = f"{np.mean([run['held_out_loss'] for run in runs]):.4f}"
            for kind, caption in CAPTIONS.items():
                aucs = [f"{np.mean([run[kind][attack] for run in runs]):.3f}" for attack in ATTACKS]
                rows.append([title, str(len(runs)), loss, caption, *aucs])
    lines += table(["fine-tune", "seeds", "held-out loss", "asked with", *ATTACKS.values()], rows)
    rows = []
    for kind, caption in CAPTIONS.items():
        cells = [_difference(content, kind, attack) for attack in ATTACKS]
        if all(cells):
            rows.append([caption, *cells])
    if rows:
        lines += ["With RWA minus without it, paired by seed, with 95 % t intervals:", ""]
        lines += table(["asked with", *ATTACKS.values()], rows)
    return "\n".join(lines).rstrip() + "\n"


def _difference(content: Figures, kind: str, attack: str) -> str:
    pair = (runs_of(content["pieces"], row) for row in ("rwa", "plain"))
    values = ({seed: run[kind][attack] for seed, run in runs.items()} for runs in pair)
    found = paired_difference(*values)
    return found.cell(3) if found else ""


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, nargs="+", default=list(range(5)), help="seeds (default: 0 to 4)")
    add_piece_flags(parser, "caption_attacks")
    args = parser.parse_args(argv)
    file, failed = args.docs_dir / "caption_attacks.json", []
    pieces = open_pieces(parser, args.output_dir, {"steps": STEPS})
    pieces.restore(read_results(file).get("pieces", {}))
    if not args.collect:
        transformers_logging.set_verbosity_error()
        failed = pieces.work(jobs(pieces, args.seed))
    finished = {piece: pieces.read(piece) for row in ROWS for piece in pieces.names(row)}
    publish_results(file, {"command": COMMAND, "pieces": finished}, render)
    exit_if_missing(failed)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
