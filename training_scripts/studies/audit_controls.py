"""The audit's own controls on the demo: do the attacks fire where something was memorized, and only there?

    python training_scripts/studies/audit_controls.py

1. Positive control: a full fine-tune of the demo's training images, far too long. The gate must fail, and the canaries
   (the 12 images that occur four times) must be caught.
2. Negative control: the frozen base, which never saw an image of the data set. The gate must pass.
3. False alarms: the memorizing model again, but one half of the held-out images stands in the place of the training
   images, and the other half in the place of the held-out images, in 20 draws. There is nothing to find.

Each finished part is a file in `--output_dir`, so the same command goes on where it stopped, and processes with one
output folder share the work. Writes `docs/audit_controls.json` (all figures) and `docs/audit_controls.md` (tables). On
a new machine the command takes up the finished parts from there.
"""

import argparse
import dataclasses
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binom
from transformers import logging as transformers_logging

from common.pages import read_results, table, write_results
from common.pieces import Job, Pieces, exit_if_missing, open_pieces
from common.trainers import demo_trainer
from memcontrol_hf import (
    MemControlTrainingArguments,
    MemorizationReport,
    audit_memorization,
    demo_dataset,
    demo_pipeline,
)
from memcontrol_hf.adapters import load_adapter
from memcontrol_hf.audit import FALSE_ALARMS, AuditSettings
from memcontrol_hf.metrics import clopper_pearson
from memcontrol_hf.report import load_gate

COMMAND = "python training_scripts/studies/audit_controls.py"
MEMORIZING, BASE = "memorizing full fine-tune", "frozen base"
AUC = "membership_auc_"
HALF = 128  # held-out images in each half of a draw
DRAW_PROMPTS = 24

# ---- the work ----


def adapter_folder(args: argparse.Namespace) -> Path:
    """The folder of the memorizing adapter."""
    return args.output_dir / f"full-{args.max_train_steps}-{args.seed}"


def fine_tune(args: argparse.Namespace) -> dict[str, Any]:
    """Make the memorizing adapter."""
    arguments = MemControlTrainingArguments(
        output_dir=str(adapter_folder(args)),
        resolution=64,
        per_device_train_batch_size=32,
        max_steps=args.max_train_steps,
        learning_rate=args.learning_rate,
        caption_dropout=0.1,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
    )
    trainer = demo_trainer(demo_dataset(), "weights", arguments, [".*"])
    trainer.train()
    trainer.save_model()
    return {"trainable_percent": trainer.trainable_percent}


def audit_control(args: argparse.Namespace, adapter: Path | None) -> dict[str, Any]:
    """The report of an audit against the demo's own splits; of the frozen base when there is no adapter."""
    data = demo_dataset()
    report = audit_memorization(
        data["train"], data["held_out"], pipeline=demo_pipeline(), adapter=adapter, settings=audit_settings(args.seed)
    )
    return dataclasses.asdict(report)


def audit_settings(seed: int, **changes: float) -> AuditSettings:
    """The settings of the controls' audits, with some of them changed."""
    settings = AuditSettings(
        resolution=64,
        num_prompts=92,
        images_per_prompt=4,
        num_quality_images=144,
        inference_steps=10,
        guidance_scale=3.0,
        seed=seed,
    )
    return dataclasses.replace(settings, **changes)


def draw(args: argparse.Namespace, number: int) -> dict[str, Any]:
    """What the attacks find in one half of the held-out images beside the other half: measure -> figure."""
    held_out, pipeline = demo_dataset()["held_out"], demo_pipeline()
    load_adapter(pipeline, adapter_folder(args))
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(number)).tolist()
    half, other = held_out.select(order[:HALF]), held_out.select(order[HALF:])
    settings = audit_settings(
        number, num_prompts=DRAW_PROMPTS, images_per_prompt=3, num_quality_images=2, near_duplicates=0
    )
    measures = audit_memorization(half, other, pipeline=pipeline, settings=settings).audit["measures"]
    return {name: measure["model"] for name, measure in measures.items()}


def work(args: argparse.Namespace, pieces: Pieces) -> None:
    """Do the parts that are not finished, and first the fine-tune when one of them needs the adapter."""
    tune = Job("fine_tune", "fine-tune", partial(fine_tune, args))
    parts = [
        Job(MEMORIZING, f"audit, {MEMORIZING}", partial(audit_control, args, adapter_folder(args)), (tune.piece,)),
        Job(BASE, f"audit, {BASE}", partial(audit_control, args, None)),
    ]
    for number in range(args.draws):
        parts.append(Job(f"draws/{number}", f"draw {number}", partial(draw, args, number), (tune.piece,)))
    missing = [job for job in parts if job.piece not in pieces]
    exit_if_missing(pieces.work([tune, *missing] if any(job.needs for job in missing) else missing))


# ---- the page ----


def render(results: dict[str, Any]) -> str:
    """The page, in Markdown."""
    settings = results["settings"]
    reports = {name: MemorizationReport(**results[name]) for name in (MEMORIZING, BASE)}
    lines = [
        "# The audit's controls",
        "",
        f"`{settings['command']}` audits two models of the demo: a full fine-tune of {settings['max_train_steps']} "
        f"steps of batch size 32 at learning rate {settings['learning_rate']:g} on 92 images, 12 of which occur four "
        "times, and the frozen base. Each audit generates 4 images for each of 92 prompts, with 10 steps and guidance "
        "3, and compares with 256 held-out images.",
        "",
        *controls_section(reports),
        *false_alarms_section(list(results["draws"].values())),
    ]
    return "\n".join(lines)


def controls_section(reports: dict[str, MemorizationReport]) -> list[str]:
    """The measures, the canaries and the gate of both models."""
    cells = {name: {row[0]: row[1] for row in report.audit_table()[1:]} for name, report in reports.items()}
    caught = {name: report.audit["canaries"]["caught"] for name, report in reports.items()}
    lines = [
        "## Positive and negative control",
        "",
        *table(
            ["measure", *(f"{name} (95 %)" for name in reports)],
            [
                [measure, *(of_report[measure] for of_report in cells.values())]
                for measure in reports[MEMORIZING].audit["measures"]
            ],
        ),
        *table(
            ["canaries caught by", *reports],
            [
                [attack, *(f"{found[attack]['caught']} of {found[attack]['of']}" for found in caught.values())]
                for attack in caught[MEMORIZING]
            ],
        ),
    ]
    for name, report in reports.items():
        report.judge(load_gate())
        lines.append(f"Gate, {name}: **{'passed' if report.gate['passed'] else 'failed'}**.")
        lines += [*(f"- {failure}" for failure in report.gate["failures"]), ""]
    return lines


def false_alarms_section(draws: list[dict[str, Any]]) -> list[str]:
    """What the attacks find where there is nothing to find."""
    measures = list(draws[0])
    allowed = int(binom.ppf(0.99, len(draws), 0.05))
    aucs = []
    for measure in [name for name in measures if name.startswith(AUC)]:
        figures = [figures[measure] for figures in draws]
        outside = sum(not figure["low"] <= 0.5 <= figure["high"] for figure in figures)
        mean = statistics.fmean(figure["value"] for figure in figures)
        aucs.append([measure.removeprefix(AUC), f"{mean:.3f}", f"{outside} of {len(draws)}", str(allowed)])
    # A rate of at most 1 % of 128 others is one of them: an image that is like them is above all but one so often.
    nominal = {
        name: (int(HALF * FALSE_ALARMS) + 1) / (HALF + 1)
        for name in measures
        if name.startswith("membership_tpr_") and "strict" not in name
    }
    nominal |= {"copy_share": FALSE_ALARMS, "extraction_rate": 0.0, "extraction_rate_calibrated": 0.0}
    return [
        f"## False alarms: held-out images as training images, {len(draws)} draws",
        "",
        f"The memorizing model is audited with {HALF} held-out images against the other {HALF}, with {DRAW_PROMPTS} "
        "prompts of 3 images. The draws share images, so they are not independent; the nominal figures treat them as "
        "independent.",
        "",
        *table(
            [
                "attack",
                "mean AUC",
                "draws whose 95 % interval leaves .5 out",
                "as many in 99 of 100 such studies, at most",
            ],
            aucs,
        ),
        *table(
            ["rate", "nominal", "mean over the draws", "95 % of all prompts"],
            [false_alarm_row(name, rate, draws) for name, rate in nominal.items()],
        ),
    ]


def false_alarm_row(measure: str, nominal: float, draws: list[dict[str, Any]]) -> list[str]:
    """A rate over all draws beside its nominal value, with the exact interval."""
    rates = [figures[measure]["value"] for figures in draws if figures[measure]["value"] is not None]
    tried = (HALF if measure.startswith("membership") else DRAW_PROMPTS) * len(rates)
    mean = statistics.fmean(rates)
    low, high = clopper_pearson(mean * tried, tried)
    return [measure, f"{nominal:.3g}", f"{mean:.4f}", f"{low:.4f} to {high:.4f}"]


# ---- the command ----


def main(argv: list[str] | None = None) -> None:
    """Do what is missing, then render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--max_train_steps", type=int, default=600, help="steps of the memorizing fine-tune (default: 600)"
    )
    parser.add_argument(
        "--learning_rate", type=float, default=1e-3, help="learning rate of the memorizing fine-tune (default: 0.001)"
    )
    parser.add_argument(
        "--draws", type=int, default=20, help="draws of held-out images as training images (default: 20)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of the fine-tune and of the two audits (default: 0)"
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("outputs/audit_controls"),
        help="folder of the adapter and the finished parts",
    )
    parser.add_argument("--results", type=Path, default=Path("docs/audit_controls.json"), help="file of all figures")
    args = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    fine_tuned = {name: getattr(args, name) for name in ("max_train_steps", "learning_rate", "seed")}
    settings = {**fine_tuned, "command": COMMAND}
    committed = read_results(args.results)
    if committed and committed["settings"] != settings:
        parser.error(f"{args.results} was made with other settings; give another --results")
    pieces = open_pieces(parser, args.output_dir, fine_tuned)
    pieces.restore({name: committed[name] for name in (MEMORIZING, BASE) if name in committed})
    pieces.restore({f"draws/{number}": figures for number, figures in committed.get("draws", {}).items()})
    work(args, pieces)
    numbers = sorted(int(Path(piece).name) for piece in pieces.names("draws"))
    results = {
        "settings": settings,
        "draws": {str(number): pieces.read(f"draws/{number}") for number in numbers},
        **{name: pieces.read(name) for name in (MEMORIZING, BASE)},
    }
    write_results(args.results, results, render(results))


if __name__ == "__main__":
    main()
