"""What a filter takes from an adapter that memorized: how much of what it learned, and how much of what it memorized.

    python training_scripts/studies/filter_remedy.py    # about 10 minutes on one core

A LoRA in all blocks of the demo's base is trained far too long on 24 images. `memcontrol filter` then makes other
adapters of it: with a smaller effect, without the blocks that a screening names, and without spectral channels. Each
adapter, the unfiltered one and the frozen base are attacked: on the training images and on 256 held-out images.

Each finished adapter is a file in `--output_dir`, so the same command goes on where it stopped. Writes
docs/results/filter_remedy.json and .md. On a new machine the command takes up the finished adapters from there.
"""

import argparse
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import logging as transformers_logging

from common.audits import attack_scores
from common.intervals import Interval, paired_difference, t_interval
from common.pages import publish_results, read_results, table
from common.pieces import Job, add_piece_flags, exit_if_missing, open_pieces
from common.trainers import demo_trainer
from memcontrol_hf import MemControlTrainingArguments, demo_dataset, demo_pipeline, metrics
from memcontrol_hf.adapters import load_adapter
from memcontrol_hf.audit import AuditSettings
from memcontrol_hf.audit.attacks import compare_with_training_images, evaluator_of
from memcontrol_hf.data import EncodedImages, first_rows
from memcontrol_hf.encoders import load_encoder
from memcontrol_hf.families import family_of
from memcontrol_hf.images import pixel_digest
from memcontrol_hf.publish.filter import filter_adapter
from memcontrol_hf.randomness import Purpose

COMMAND = "python training_scripts/studies/filter_remedy.py"
IMAGES = 24
TRAINED = {"method": "lora", "max_train_steps": 200, "learning_rate": 3e-3, "images": IMAGES}
BASE, UNFILTERED, SCREENED = "frozen base", "unfiltered", "--screening"
FILTERS: dict[str, dict[str, Any]] = {
    **{f"--shrink {factor:g}": {"shrink": factor} for factor in (0.75, 0.5, 0.25)},
    SCREENED: {},
    **{f"--spectral {share:g}": {"spectral": share, "pipeline": "demo"} for share in (0.25, 0.5, 0.75)},
}
COLUMNS = {
    "loss": "held-out loss",
    "auc_loss": "AUC by the loss",
    "auc_clid": "AUC by CLiD",
    "nearest_share": "nearest share",
}

# ---- the work ----


def train(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Make the memorizing adapter of a seed, and the screening of the same images."""
    once = demo_dataset()["train"]
    once = once.select(first_rows(pixel_digest(image) for image in once["image"]))
    data = {**demo_dataset(), "train": once.select(range(IMAGES))}
    arguments = MemControlTrainingArguments(
        output_dir=str(adapter_folder(args, seed)),
        resolution=64,
        per_device_train_batch_size=8,
        max_steps=TRAINED["max_train_steps"],
        learning_rate=TRAINED["learning_rate"],
        caption_dropout=0.1,
        save_strategy="no",
        report_to="none",
        seed=seed,
    )
    trainer = demo_trainer(data, TRAINED["method"], arguments)
    trainer.screen(steps=50).to_json(args.output_dir / f"screening-{seed}.json")
    trainer.train()
    trainer.save_model()
    return {"trainable_percent": trainer.trainable_percent}


def adapter_folder(args: argparse.Namespace, seed: int) -> Path:
    """The folder of the memorizing adapter of a seed."""
    return args.output_dir / f"adapter-{seed}"


@cache
def encoded() -> tuple[EncodedImages, EncodedImages]:
    """The training and the held-out images beside their latents and conditions, which no adapter changes."""
    data, family = demo_dataset(), family_of(demo_pipeline())
    once = data["train"].select(first_rows(pixel_digest(image) for image in data["train"]["image"]))
    return tuple(EncodedImages(of, 64).encoded_by(family) for of in (once.select(range(IMAGES)), data["held_out"]))


@torch.no_grad()
def measure(args: argparse.Namespace, name: str, seed: int) -> dict[str, float | str]:
    """Attack the frozen base, the unfiltered adapter or a filtered one."""
    pipeline, said = demo_pipeline(), ""
    if name == UNFILTERED:
        load_adapter(pipeline, adapter_folder(args, seed))
    elif name != BASE:
        folder = args.output_dir / f"{name.removeprefix('--').replace(' ', '-')}-{seed}"
        how = {"screening": args.output_dir / f"screening-{seed}.json"} if name == SCREENED else FILTERS[name]
        said = filter_adapter(adapter_folder(args, seed), folder, **how).partition(": ")[2]
        load_adapter(pipeline, folder)
    members, others = encoded()
    settings = AuditSettings(resolution=64, inference_steps=10, guidance_scale=3.0, images_per_prompt=4, seed=seed)
    evaluator, encoder = evaluator_of(pipeline, settings), load_encoder("demo")
    scores = [
        attack_scores(evaluator.family, evaluator.denoiser, images, purpose, seed)
        for images, purpose in ((members, Purpose.AUDIT_MEMBERS), (others, Purpose.AUDIT_NONMEMBERS))
    ]
    generated = evaluator.images(members, members.distinct, Purpose.AUDIT_SAMPLES, settings.images_per_prompt)
    near = compare_with_training_images(
        generated, encoder(generated), settings.images_per_prompt, members, others, settings, encoder, range(IMAGES)
    )
    return {
        "loss": -scores[1]["loss"].mean().item(),
        **{f"auc_{attack}": metrics.membership(*(of[attack] for of in scores)).auc for attack in ("loss", "clid")},
        "nearest_share": near.figures["nearest_share"].value,
        "filter": said,
    }


# ---- the page ----


def render(content: dict[str, Any]) -> str:
    """The page."""
    settings, measured = content["settings"], content["measured"]
    rows, costs = [], []
    by_seed = {
        name: {column: {int(seed): of[column] for seed, of in runs.items()} for column in COLUMNS}
        for name, runs in measured.items()
    }
    for name, columns in by_seed.items():
        cells = (t_interval(list(values.values())) for values in columns.values())
        rows.append([f"`{name}`" if name.startswith("--") else name, *map(_plain, cells)])
    for name in FILTERS:
        differences = (paired_difference(by_seed[name][column], by_seed[UNFILTERED][column]) for column in COLUMNS)
        costs.append([f"`{name}`", *(str(difference or "–") for difference in differences)])
    against = []
    for name in FILTERS:
        if "shrink" not in FILTERS[name]:
            differences = (
                paired_difference(by_seed[name][column], shrunk_as_far(by_seed, name, column))
                for column in COLUMNS
                if column != "loss"
            )
            against.append([f"`{name}`", *(str(difference or "–") for difference in differences)])
    screened = [run["filter"].count("attentions.") for run in measured[SCREENED].values()]
    lines = [
        "# What a filter takes from an adapter that memorized",
        "",
        f"`{settings['command']}`",
        "",
        f"A LoRA of rank 4 in the attention of all 16 blocks of the demo's base is trained on {settings['images']} "
        f"images: {settings['max_train_steps']} steps of batch size 8 at learning rate {settings['learning_rate']:g}, "
        f"with {len(measured[BASE])} seeds. `memcontrol filter` makes the other adapters of it, without data. All of "
        "them are measured on the training images and on 256 held-out images. *Nearest share*: the share of images, "
        "generated from training captions, that are nearer to a training image than to any of as many held-out "
        "images: compare with the frozen base. Mean over the seeds, with its 95 % t interval.",
        "",
        *table(["adapter", *COLUMNS.values()], rows, numbers=True),
        "The difference to the unfiltered adapter, of the same seed:",
        "",
        *table(["adapter", *COLUMNS.values()], costs, numbers=True),
        "The difference to an adapter of the same seed that is shrunk to the same held-out loss, interpolated between "
        "the shrunk adapters, the unfiltered one and the frozen base:",
        "",
        *table(["adapter", *list(COLUMNS.values())[1:]], against, numbers=True),
        f"`--screening` leaves out the blocks that are off in the middle mask of a screening on the same images "
        f"({', '.join(map(str, screened))} of 16 blocks). `--spectral` removes 1, 2 or 3 of the 4 channels of each "
        "matrix: those that are aligned least with the base.",
    ]
    return "\n".join(lines) + "\n"


def shrunk_as_far(by_seed: dict[str, dict[str, dict[int, float]]], name: str, column: str) -> dict[int, float]:
    """A figure of an adapter that is shrunk until it has the held-out loss of another adapter, for each finished seed.

    Args:
        by_seed: Adapter -> column -> seed -> figure.
        name: The other adapter.
        column: The figure.
    """
    shrunk = [UNFILTERED, *(other for other, how in FILTERS.items() if "shrink" in how), BASE]
    figures = {}
    finished = set.intersection(*(set(by_seed[other]["loss"]) for other in (name, *shrunk)))
    for seed in sorted(finished):
        points = sorted((by_seed[other]["loss"][seed], by_seed[other][column][seed]) for other in shrunk)
        figures[seed] = float(np.interp(by_seed[name]["loss"][seed], *zip(*points)))
    return figures


def _plain(interval: Interval | None) -> str:
    if interval is None:  # fewer than two seeds are finished
        return "–"
    return f"{interval.mean:.3f} ({interval.low:.3f} to {interval.high:.3f})"


# ---- the command ----


def main(argv: list[str] | None = None) -> None:
    """Do what is missing, then render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, at least 2 (default: 3)")
    add_piece_flags(parser, "filter_remedy")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error(f"--seeds must be at least 2, which an interval needs, but is {args.seeds}")
    transformers_logging.set_verbosity_error()
    results = args.docs_dir / "filter_remedy.json"
    settings = {**TRAINED, "command": COMMAND}
    pieces = open_pieces(parser, args.output_dir, TRAINED)
    committed = read_results(results)
    for name, runs in committed.get("measured", {}).items():
        pieces.restore({f"{name}/{seed}": run for seed, run in runs.items()})
    names = (BASE, UNFILTERED, *FILTERS)
    if not args.collect:
        jobs = []
        for seed in range(args.seeds):
            adapter = Job(f"adapter/{seed}", f"training, seed {seed}", partial(train, args, seed))
            parts = [
                Job(f"{name}/{seed}", f"{name}, seed {seed}", partial(measure, args, name, seed), (adapter.piece,))
                for name in names
            ]
            missing = [part for part in parts if part.piece not in pieces]
            jobs += [adapter, *missing] if missing else []
        exit_if_missing(pieces.work(jobs))
    measured = {name: {Path(piece).name: pieces.read(piece) for piece in pieces.names(name)} for name in names}
    content = {"settings": settings, "measured": measured}
    publish_results(results, content, render)


if __name__ == "__main__":
    main()
