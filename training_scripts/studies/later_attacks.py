"""The controls of the attacks that joined the audit later: do they fire where something was memorized, and only there?

    python training_scripts/studies/later_attacks.py

The models are those of `audit_controls.py`: the full fine-tune that memorized the demo's training images, and the
frozen base. Each image is scored once by each model, under noise of its own. The positive control compares the
training images with the held-out images by the scores of the fine-tune, the negative control by those of the base.
For the false alarms, the held-out images are divided in two halves in 20 draws, and one half stands in the place of
the training images, by the scores of the fine-tune: there is nothing to find.

Each finished part is a file in `--output_dir`, so the same command goes on where it stopped. Writes
docs/results/later_attacks.json and .md. On a new machine the command takes up the finished parts from there.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binom
from transformers import logging as transformers_logging

from audit_controls import BASE, HALF, MEMORIZING, adapter_folder, audit_settings, fine_tune
from audit_controls import COMMAND as CONTROLS
from common.pages import read_results, table, write_results
from common.pieces import Job, Pieces, exit_if_missing
from memcontrol_hf import demo_dataset, demo_pipeline
from memcontrol_hf.adapters import load_adapter
from memcontrol_hf.audit import FALSE_ALARMS
from memcontrol_hf.audit.attacks import evaluator_of
from memcontrol_hf.audit.membership import scores_of
from memcontrol_hf.data import EncodedImages
from memcontrol_hf.families import family_of
from memcontrol_hf.metrics import clopper_pearson, dataset_inference, membership

COMMAND = "python training_scripts/studies/later_attacks.py"
DRAWS = 20
EARLIER = ("loss", "secmi", "pia", "clid")
"""Attacks of the table in audit_controls.md, which are shown for comparison."""

# ---- the work ----


def measure(args: argparse.Namespace, adapted: bool) -> dict[str, Any]:
    """The scores of all images by a model: attack -> scores of the training and of the held-out images."""
    data, pipeline = demo_dataset(), demo_pipeline()
    if adapted:
        load_adapter(pipeline, adapter_folder(args))
    sets = [EncodedImages(data[name], 64).encoded_by(family_of(pipeline)) for name in ("train", "held_out")]
    scores = scores_of(evaluator_of(pipeline, audit_settings(args.seed)), *sets)
    return {attack: [of_set.tolist() for of_set in of_sets] for attack, of_sets in scores.items()}


def with_calibrated(scores: dict[str, Any], base: dict[str, Any]) -> dict[str, list[torch.Tensor]]:
    """The scores as tensors, with those of the loss calibrated by the frozen base."""
    tensors = {attack: [torch.tensor(of_set).double() for of_set in of_sets] for attack, of_sets in scores.items()}
    calibrated = [mine - torch.tensor(of_base).double() for mine, of_base in zip(tensors["loss"], base["loss"])]
    return tensors | {"calibrated": calibrated}


# ---- the page ----


def figures_of(members: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> dict[str, Any]:
    """AUC and rate of each attack, and the p-value of all together."""
    found: dict[str, Any] = {}
    for attack, of_members in members.items():
        outcome = membership(of_members, others[attack])
        found[attack] = {"auc": outcome.auc, "interval": outcome.interval, "tpr": outcome.tpr_at_fpr(FALSE_ALARMS)}
    columns = [torch.stack(list(scores.values()), dim=1) for scores in (members, others)]
    found["p"] = dataset_inference(*columns)
    return found


def controls(content: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The figures of both models, and of each draw."""
    scores = {name: with_calibrated(content[MEMORIZING], content[BASE]) for name in (MEMORIZING,)}
    base = {attack: [torch.tensor(of).double() for of in of_sets] for attack, of_sets in content[BASE].items()}
    scores[BASE] = base
    models = {
        name: figures_of(*({attack: of[side] for attack, of in of_model.items()} for side in (0, 1)))
        for name, of_model in scores.items()
    }
    draws, held_out = [], {attack: of[1] for attack, of in scores[MEMORIZING].items()}
    for number in range(DRAWS):
        order = torch.randperm(len(held_out["loss"]), generator=torch.Generator().manual_seed(number))
        halves = [{attack: of[part] for attack, of in held_out.items()} for part in (order[:HALF], order[HALF:])]
        draws.append(figures_of(*halves))
    return models, draws


def render(content: dict[str, Any]) -> str:
    """The page."""
    models, draws = controls(content)
    attacks = [name for name in models[MEMORIZING] if name != "p"]
    allowed, nominal = int(binom.ppf(0.99, DRAWS, 0.05)), (int(HALF * FALSE_ALARMS) + 1) / (HALF + 1)
    fires = [
        [attack, *(_auc(of[attack]) if attack in of else "no meaning" for of in models.values())] for attack in attacks
    ]
    fires.append(["all together, p-value", *(f"{of['p']:.2g}" for of in models.values())])
    alarms = []
    for attack in attacks:
        outside = sum(not of[attack]["interval"][0] <= 0.5 <= of[attack]["interval"][1] for of in draws)
        rate, tried = statistics.fmean(of[attack]["tpr"] for of in draws), HALF * DRAWS
        low, high = clopper_pearson(rate * tried, tried)
        alarms.append(
            [
                attack,
                f"{statistics.fmean(of[attack]['auc'] for of in draws):.3f}",
                f"{outside} of {DRAWS}",
                f"{rate:.4f} ({low:.4f} to {high:.4f})",
            ]
        )
    small = sum(of["p"] < 0.05 for of in draws)
    lines = [
        "# The controls of later attacks",
        "",
        f"`{content['settings']['command']}`",
        "",
        f"The models of [the audit's controls](../audit_controls.md) (`{CONTROLS}`), and the attacks that joined the "
        "audit after these were measured: `secmi_several` (SecMI at three timesteps of one trajectory, fixed "
        "beforehand), `sima` (SimA, one call of the denoiser), `calibrated` (the loss of the frozen base minus the "
        "loss), and the test of all scores together (`dataset_inference_p`, after CDI). The earlier attacks stand "
        "beside them. No limit of the gate names the later attacks.",
        "",
        "## Positive and negative control",
        "",
        *table(["membership AUC by", *(f"{name} (95 %)" for name in models)], fires),
        f"## False alarms: held-out images as training images, {DRAWS} draws",
        "",
        f"One half of the held-out images, {HALF}, against the other, by the scores of the memorizing model. All "
        "draws divide the same scores, so they are not independent; the nominal figures treat them as independent. At "
        f"a nominal level, at most {allowed} of {DRAWS} intervals leave .5 out in 99 of 100 such studies, and the "
        f"rate is {nominal:.4f}.",
        "",
        *table(["attack", "mean AUC", "draws whose 95 % interval leaves .5 out", "rate at 1 % false alarms"], alarms),
        f"The test of all scores together has a p-value below .05 in {small} of {DRAWS} draws; the smallest is "
        f"{min(of['p'] for of in draws):.2g}.",
    ]
    return "\n".join(lines) + "\n"


def _auc(of: dict[str, Any]) -> str:
    low, high = of["interval"]
    return f"{of['auc']:.3f} ({low:.3f} to {high:.3f})"


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
    try:
        pieces = Pieces(args.output_dir, fine_tuned)
    except ValueError as error:
        parser.error(str(error))
    committed = read_results(results)
    names = {MEMORIZING: "later/memorizing", BASE: "later/base"}
    pieces.restore({names[name]: committed[name] for name in names if name in committed})
    tune = Job("fine_tune", "fine-tune", partial(fine_tune, args))
    jobs = [
        Job(names[BASE], f"scores, {BASE}", partial(measure, args, False)),
        Job(names[MEMORIZING], f"scores, {MEMORIZING}", partial(measure, args, True), (tune.piece,)),
    ]
    missing = [job for job in jobs if job.piece not in pieces]
    exit_if_missing(pieces.work([tune, *missing] if any(job.needs for job in missing) else missing))
    content = {"settings": fine_tuned | {"command": COMMAND}}
    content |= {name: pieces.read(piece) for name, piece in names.items()}
    write_results(results, content, render(content))


if __name__ == "__main__":
    main()
