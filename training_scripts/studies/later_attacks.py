"""The controls of the attacks that joined the audit later: do they fire where something was memorized, and only there?

    python training_scripts/studies/later_attacks.py

The models are those of `audit_controls.py`: the full fine-tune that memorized the demo's training images, and the
frozen base.

1. Membership. Each image is scored once by each model, under noise of its own. The positive control compares the
   training images with the held-out images by the scores of the fine-tune, the negative control by those of the base.
2. Embeddings. For 16 training and 32 held-out images (16 by the base) an embedding is searched, and the images that
   come back are compared.
3. Partial copies, in images that are generated from the captions of the training images, and in images of the base
   into each of which a quarter of a training image was pasted.

For the false alarms, the held-out images are divided in two halves in 20 draws, and one half stands in the place of
the training images, by the scores and images of the fine-tune: there is nothing to find.

Each finished part is a file in `--output_dir`, so the same command goes on where it stopped. Writes
docs/results/later_attacks.json and .md. On a new machine the command takes up the finished parts from there.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import logging as transformers_logging

from audit_controls import BASE, MEMORIZING, adapter_folder, audit_settings, fine_tune
from common.pages import read_results, write_results
from common.pieces import Job, exit_if_missing, open_pieces
from later.page import DRAWS, SEARCHED, halves, render
from memcontrol_hf import demo_dataset, demo_pipeline
from memcontrol_hf.adapters import load_adapter
from memcontrol_hf.audit import FALSE_ALARMS
from memcontrol_hf.audit.attacks import evaluator_of
from memcontrol_hf.audit.embedding import nearest_found, one_of_each_unit
from memcontrol_hf.audit.membership import scores_of
from memcontrol_hf.data import EncodedImages
from memcontrol_hf.encoders import load_encoder
from memcontrol_hf.evaluation import Evaluator
from memcontrol_hf.families import family_of
from memcontrol_hf.metrics import comparable, copy_similarity, extraction, partial_copies
from memcontrol_hf.randomness import Purpose

COMMAND = "python training_scripts/studies/later_attacks.py"

# ---- the work ----


def attacked(args: argparse.Namespace, adapted: bool) -> tuple[Evaluator, EncodedImages, EncodedImages]:
    """What measures a model, and the training and held-out images as the model encodes them."""
    data, pipeline = demo_dataset(), demo_pipeline()
    if adapted:
        load_adapter(pipeline, adapter_folder(args))
    sets = (EncodedImages(data[name], 64).encoded_by(family_of(pipeline)) for name in ("train", "held_out"))
    return evaluator_of(pipeline, audit_settings(args.seed)), *sets


def score(args: argparse.Namespace, adapted: bool) -> dict[str, Any]:
    """The scores of all images by a model: attack -> scores of the training and of the held-out images."""
    scores = scores_of(*attacked(args, adapted))
    return {attack: [of_set.tolist() for of_set in of_sets] for attack, of_sets in scores.items()}


def search(args: argparse.Namespace, adapted: bool) -> dict[str, Any]:
    """The calibrated distances of what comes back by a search, of some training and held-out images."""
    evaluator, train, held_out = attacked(args, adapted)
    settings, searched = audit_settings(args.seed), 2 * SEARCHED if adapted else SEARCHED
    rows, other_rows = (
        one_of_each_unit(images, args.seed, count) for images, count in ((train, SEARCHED), (held_out, searched))
    )
    references = held_out.pixels([row for row in held_out.distinct if row not in other_rows])
    return {
        name: nearest_found(evaluator, images, of, references, settings).calibrated_distance.tolist()
        for name, images, of in (("train", train, rows), ("held_out", held_out, other_rows))
    }


def copies(args: argparse.Namespace, adapted: bool) -> dict[str, Any]:
    """Partial copies in a model's images of the training captions; for the base also in images with a pasted part."""
    evaluator, train, held_out = attacked(args, adapted)
    rows = train.distinct
    images = evaluator.images(train, rows, Purpose.AUDIT_SAMPLES, 4)
    found = {"generated": whole_and_partial(images, train, held_out, rows)}
    if not adapted:
        pasted, half = images.clone(), images.shape[-1] // 2
        originals = train.pixels(rows)
        order = torch.randperm(len(pasted), generator=torch.Generator().manual_seed(args.seed)).tolist()
        for image, place in zip(pasted, order):
            y, x = half * (place % 2), half * (place // 2 % 2)
            image[:, y : y + half, x : x + half] = originals[place % len(rows), :, y : y + half, x : x + half]
        return found | {"pasted": whole_and_partial(pasted, train, held_out, rows)}
    alarms, reals = [], held_out.features(comparable)
    fresh = comparable(evaluator.images(held_out, held_out.distinct, Purpose.AUDIT_SAMPLES))
    for number in range(DRAWS):
        half, other = halves(len(reals), number)
        alarms.append(partial_copies(fresh[half], reals[half], reals[other], FALSE_ALARMS).share)
    return found | {"alarms": alarms}


def whole_and_partial(
    images: torch.Tensor, train: EncodedImages, held_out: EncodedImages, rows: list[int]
) -> dict[str, Any]:
    """The shares of partial and of whole copies among 4 images of each row, and of extracted rows."""
    encoder = load_encoder("demo")
    parts = partial_copies(
        comparable(images), train.features(comparable), held_out.features(comparable), FALSE_ALARMS, per_prompt=4
    )
    wholes = copy_similarity(
        encoder(images), train.features(encoder), held_out.features(encoder), FALSE_ALARMS, per_prompt=4
    )
    references = held_out.pixels(held_out.distinct)
    taken = extraction(images.unflatten(0, (len(rows), 4)), train.pixels(rows), held_out=references)
    return {
        "partial_copy_share": [parts.share, *parts.interval],
        "copy_share": [wholes.share, *wholes.interval],
        "extraction_rate_calibrated": [taken.calibrated_rate, *taken.calibrated_interval],
    }


# ---- the command ----


def main(argv: list[str] | None = None) -> None:
    """Do what is missing, then render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("outputs/audit_controls"),
        help="folder of the adapter and the finished parts; with that of audit_controls.py its adapter is used",
    )
    parser.add_argument("--docs_dir", type=Path, default=Path("docs/results"), help="folder of the results")
    args = parser.parse_args(argv)
    args.max_train_steps, args.learning_rate, args.seed = 600, 1e-3, 0
    transformers_logging.set_verbosity_error()
    results = args.docs_dir / "later_attacks.json"
    fine_tuned = {name: getattr(args, name) for name in ("max_train_steps", "learning_rate", "seed")}
    pieces = open_pieces(parser, args.output_dir, fine_tuned)
    committed = read_results(results)
    parts = {"scores": score, "search": search, "copies": copies}
    pieces.restore(
        {
            _piece(name, part): committed[name][part]
            for name in (MEMORIZING, BASE)
            for part in parts
            if part in committed.get(name, {})
        }
    )
    tune = Job("fine_tune", "fine-tune", partial(fine_tune, args))
    jobs = [
        Job(_piece(name, part), f"{part}, {name}", partial(make, args, adapted), (tune.piece,) if adapted else ())
        for name, adapted in ((BASE, False), (MEMORIZING, True))
        for part, make in parts.items()
    ]
    missing = [job for job in jobs if job.piece not in pieces]
    exit_if_missing(pieces.work([tune, *missing] if any(job.needs for job in missing) else missing))
    content = {"settings": fine_tuned | {"command": COMMAND}}
    content |= {name: {part: pieces.read(_piece(name, part)) for part in parts} for name in (MEMORIZING, BASE)}
    write_results(results, content, render(content))


def _piece(name: str, part: str) -> str:
    return f"later/{part}-{'memorizing' if name == MEMORIZING else 'base'}"


if __name__ == "__main__":
    main()
