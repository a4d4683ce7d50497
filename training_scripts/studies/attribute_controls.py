"""The controls of attribute inference: is it found where it was memorized, and only there?

    python training_scripts/studies/attribute_controls.py    # about 4 minutes on one core

Each caption of the demo gets one of two words, drawn by a coin, which nothing in the image shows: of a person who was
not trained on, nobody can tell it. A LoRA in all blocks of the demo's base is trained far too long on 48 images with
these captions. Positive control: the advantage by the LoRA. Negative control: by the frozen base. False alarms: one
half of the held-out images in the place of the training images, in 20 draws, by the LoRA.

Each finished seed is a file in `--output_dir`, so the same command goes on where it stopped. Writes
docs/results/attribute_controls.json and .md. On a new machine the command takes up the finished seeds from there.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from scipy.stats import binom
from transformers import logging as transformers_logging

from common.pages import publish_results, read_results, table
from common.pieces import Job, add_piece_flags, exit_if_missing, open_pieces
from common.trainers import demo_trainer
from memcontrol_hf import MemControlTrainingArguments, demo_dataset, demo_pipeline
from memcontrol_hf.audit import AuditSettings
from memcontrol_hf.audit.attacks import evaluator_of
from memcontrol_hf.audit.attributes import guesses
from memcontrol_hf.data import ATTRIBUTE, EncodedImages, first_rows
from memcontrol_hf.families import family_of
from memcontrol_hf.images import pixel_digest
from memcontrol_hf.metrics import AttributeInferenceResult, attribute_inference
from memcontrol_hf.randomness import Purpose
from memcontrol_hf.sampling import denoiser_in_place

COMMAND = "python training_scripts/studies/attribute_controls.py"
VALUES = ["alpha", "beta"]
TRAINED = {"max_train_steps": 300, "learning_rate": 3e-3, "images": 48}
SETS = ("train", "held_out")
MODEL, BASE = "memorizing LoRA", "frozen base"
DRAWS = 20

# ---- the work ----


def with_coins(images: Dataset, seed: int) -> Dataset:
    """Images whose captions end with a word that a coin chose."""
    coins = torch.randint(2, (len(images),), generator=torch.Generator().manual_seed(seed)).tolist()
    values = [VALUES[coin] for coin in coins]
    texts = [f"{text}, {value}" for text, value in zip(images["text"], values)]
    return images.remove_columns("text").add_column("text", texts).add_column(ATTRIBUTE, values)


@torch.no_grad()
def measure(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train with one seed, and guess the word of each image.

    Returns:
        For each set the true words, and the guesses by the LoRA and by the frozen base, as places in `VALUES`.
    """
    data = demo_dataset()
    once = data["train"].select(first_rows(pixel_digest(image) for image in data["train"]["image"]))
    data["train"] = once.select(range(TRAINED["images"]))
    data = {name: with_coins(images, 10 * seed + number) for number, (name, images) in enumerate(data.items())}
    arguments = MemControlTrainingArguments(
        output_dir=str(args.output_dir / "trainer"),
        resolution=64,
        per_device_train_batch_size=8,
        max_steps=TRAINED["max_train_steps"],
        learning_rate=TRAINED["learning_rate"],
        caption_dropout=0.1,
        save_strategy="no",
        report_to="none",
        seed=seed,
    )
    trainer = demo_trainer(data, "lora", arguments)
    with torch.enable_grad():
        trainer.train()
    found = {}
    for name, purpose in zip(SETS, (Purpose.AUDIT_ATTRIBUTES, Purpose.AUDIT_ATTRIBUTES_HELD_OUT)):
        images = EncodedImages(data[name], 64).encoded_by(family_of(demo_pipeline()))
        of_base = guesses(evaluator_of(demo_pipeline(), settings(seed)), images, VALUES, purpose)
        with denoiser_in_place(trainer.pipeline, trainer.model):
            of_model = guesses(evaluator_of(trainer.pipeline, settings(seed)), images, VALUES, purpose)
        true = [VALUES.index(images.images[row][ATTRIBUTE]) for row in images.distinct]
        found[name] = {"true": true, MODEL: of_model.tolist(), BASE: of_base.tolist()}
    return found


def settings(seed: int) -> AuditSettings:
    """The settings of the audit."""
    return AuditSettings(resolution=64, seed=seed)


# ---- the page ----


def advantage(train: dict[str, list[int]], held_out: dict[str, list[int]], by: str) -> AttributeInferenceResult:
    """The advantage by the guesses of the LoRA or of the base."""
    return attribute_inference(*((of[by], of["true"], range(len(of["true"]))) for of in (train, held_out)))


def draws(held_out: dict[str, list[int]]) -> list[AttributeInferenceResult]:
    """The advantage of one half of the held-out images over the other, in each draw, by the guesses of the LoRA."""
    results = []
    for number in range(DRAWS):
        order = torch.randperm(len(held_out["true"]), generator=torch.Generator().manual_seed(number)).tolist()
        half = len(order) // 2
        halves = [
            {name: [of[i] for i in part] for name, of in held_out.items()} for part in (order[:half], order[half:])
        ]
        results.append(advantage(*halves, MODEL))
    return results


def render(content: dict[str, Any]) -> str:
    """The page."""
    rows, alarms = [], []
    for seed, found in content["seeds"].items():
        of_model, of_base = (advantage(*(found[name] for name in SETS), by) for by in (MODEL, BASE))
        outside = [of for of in draws(found["held_out"]) if not of.interval[0] <= 0 <= of.interval[1]]
        rows.append(
            [seed, f"{of_model.train:.2f}", f"{of_model.held_out:.2f}", *map(_with_interval, (of_model, of_base))]
        )
        alarms.append(len(outside))
    trained = content["settings"]
    allowed = int(binom.ppf(0.99, DRAWS, 0.05))
    lines = [
        "# The controls of attribute inference",
        "",
        f"`{trained['command']}`",
        "",
        "A coin gave each caption of the demo one of two words, which nothing in the image shows. A LoRA of rank 4 in "
        f"the attention of all blocks was trained on {trained['images']} images with these captions, "
        f"{trained['max_train_steps']} steps of batch size 8 at learning rate {trained['learning_rate']:g}. The word "
        "of each image is guessed by the caption under which the image is denoised best. The accuracies are balanced. "
        "The advantage is the accuracy for training images minus that for 256 held-out images, with 95 % intervals.",
        "",
        *table(
            [
                "seed",
                "accuracy, training images",
                "accuracy, held-out images",
                "advantage",
                "by the frozen base",
            ],
            rows,
            numbers=True,
        ),
        f"False alarms: with one half of the held-out images in the place of the training images, in {DRAWS} draws, "
        f"{', '.join(map(str, alarms))} intervals (by seed) leave 0 out. At a nominal level at most {allowed} do in "
        "99 of 100 cases. The draws of a seed divide the same guesses, so they are not independent.",
    ]
    return "\n".join(lines) + "\n"


def _with_interval(result: AttributeInferenceResult) -> str:
    return f"{result.advantage:.2f} ({result.interval[0]:.2f} to {result.interval[1]:.2f})"


# ---- the command ----


def main(argv: list[str] | None = None) -> None:
    """Do what is missing, then render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    add_piece_flags(parser, "attribute_controls")
    args = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    results = args.docs_dir / "attribute_controls.json"
    pieces = open_pieces(parser, args.output_dir, TRAINED)
    committed = read_results(results).get("seeds", {})
    pieces.restore({f"seeds/{seed}": found for seed, found in committed.items()})
    if not args.collect:
        seeds = range(args.seeds)
        exit_if_missing(
            pieces.work([Job(f"seeds/{seed}", f"seed {seed}", partial(measure, args, seed)) for seed in seeds])
        )
    content = {
        "settings": {**TRAINED, "command": COMMAND},
        "seeds": {Path(piece).name: pieces.read(piece) for piece in pieces.names("seeds")},
    }
    publish_results(results, content, render)


if __name__ == "__main__":
    main()
