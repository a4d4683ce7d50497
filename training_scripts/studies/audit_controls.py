"""Do the attacks fire where they must, and keep still where they must? The audit's own controls, on the demo.

    python training_scripts/audit_controls.py

1. Positive: a full fine-tune of the demo's training images, far too long. The gate must fail, and the canaries (the 12
   images that occur four times) must be caught.
2. Negative: the frozen base, which never saw an image of the data set. The gate must pass.
3. False alarms: the memorizing model again, but half of the held-out images in the place of the training images and
   the other half in that of the held-out ones, in 20 draws. Nothing is there to be found.

Each finished part is kept in `docs/audit_controls.json`: the same command goes on where it stopped. Tables go to
`docs/audit_controls.md`.
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

import torch
from scipy.stats import binom
from transformers import logging as transformers_logging

from memcontrol_hf import (
    MemControlConfig,
    MemControlTrainer,
    MemControlTrainingArguments,
    MemorizationReport,
    SearchSpace,
    audit_memorization,
    demo_dataset,
    demo_pipeline,
)
from memcontrol_hf.audit import FALSE_ALARMS, AuditSettings, load_adapter
from memcontrol_hf.metrics import clopper_pearson
from memcontrol_hf.report import load_gate

MEMORIZING, BASE = "memorizing full fine-tune", "frozen base"
AUC = "membership_auc_"


def fine_tune(args: argparse.Namespace) -> Path:
    """The adapter of a full fine-tune; trained once."""
    folder = args.output_dir / f"full-{args.max_train_steps}-{args.seed}"
    if (folder / "adapter_config.json").is_file():
        return folder
    data, pipeline = demo_dataset(), demo_pipeline()
    trainer = MemControlTrainer(
        pipeline=pipeline,
        peft_config=MemControlConfig(method="weights"),
        args=MemControlTrainingArguments(
            output_dir=str(folder),
            resolution=64,
            per_device_train_batch_size=32,
            max_steps=args.max_train_steps,
            learning_rate=args.learning_rate,
            caption_dropout=0.1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=False,
            seed=args.seed,
        ),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        search_space=SearchSpace.from_model(pipeline.unet, [".*"]),
    )
    trainer.train()
    trainer.save_model()
    return folder


def audited(args: argparse.Namespace, adapter: Path | None) -> dict:
    """The report of an audit against the demo's own splits."""
    data = demo_dataset()
    report = audit_memorization(
        data["train"], data["held_out"], pipeline=demo_pipeline(), adapter=adapter, settings=settings_of(args)
    )
    return dataclasses.asdict(report)


def settings_of(args: argparse.Namespace, **changes: float) -> AuditSettings:
    return AuditSettings(
        **{
            "resolution": 64,
            "num_prompts": 92,
            "images_per_prompt": 4,
            "num_quality_images": 144,
            "inference_steps": 10,
            "guidance_scale": 3.0,
            "seed": args.seed,
            **changes,
        }
    )


def draw(args: argparse.Namespace, adapter: Path, number: int) -> dict:
    """What the attacks find in one half of the held-out images, beside the other half."""
    held_out, pipeline = demo_dataset()["held_out"], demo_pipeline()
    load_adapter(pipeline, adapter)
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(number)).tolist()
    half, other = (held_out.select(rows) for rows in (order[: len(order) // 2], order[len(order) // 2 :]))
    settings = settings_of(
        args, num_prompts=24, images_per_prompt=3, num_quality_images=2, near_duplicates=0, seed=number
    )
    measures = audit_memorization(half, other, pipeline=pipeline, settings=settings).audit["measures"]
    return {name: of["model"] for name, of in measures.items()}


def render(content: dict) -> str:
    """The three tables."""
    settings, reports = content["settings"], {name: MemorizationReport(**content[name]) for name in (MEMORIZING, BASE)}
    lines = [
        "# The audit's controls",
        "",
        f"`{settings['command']}`, on the demo: a full fine-tune of {settings['max_train_steps']} steps of batch size "
        f"32 at learning rate {settings['learning_rate']:g} on 92 images, 12 of them four times, and the frozen base. "
        "92 prompts x 4 images, 10 steps, guidance 3, held-out images: 256.",
        "",
        "## Positive and negative control",
        "",
        f"| measure | {MEMORIZING} (95 %) | {BASE} (95 %) |",
        "|---|---|---|",
    ]
    measures = reports[MEMORIZING].audit["measures"]
    cells = {name: {row[0]: row[1] for row in report.audit_table()[1:]} for name, report in reports.items()}
    lines += [f"| {measure} | {' | '.join(of[measure] for of in cells.values())} |" for measure in measures]
    lines += ["", "| canaries caught by | " + " | ".join(reports) + " |", "|---|---|---|"]
    for attack in reports[MEMORIZING].audit["canaries"]["caught"]:
        found = [report.audit["canaries"]["caught"][attack] for report in reports.values()]
        lines.append(f"| {attack} | " + " | ".join(f"{n['caught']} of {n['of']}" for n in found) + " |")
    for name, report in reports.items():
        report.judge(load_gate())
        lines += ["", f"Gate, {name}: **{'passed' if report.gate['passed'] else 'failed'}**."]
        lines += [f"- {failure}" for failure in report.gate["failures"]]
    draws = content["draws"].values()
    lines += [
        "",
        f"## False alarms: held-out images as training images, {len(draws)} draws",
        "",
        "The memorizing model, 128 held-out images against the other 128, 24 prompts x 3 images. The draws share "
        "images, so they are not independent; the nominal figures take them as if they were.",
        "",
        "| attack | mean AUC | draws whose 95 % interval leaves .5 out | as many in 99 of 100 such studies, at most |",
        "|---|---|---|---|",
    ]
    allowed = int(binom.ppf(0.99, len(draws), 0.05))
    for measure in [name for name in measures if name.startswith(AUC)]:
        figures = [d[measure] for d in draws]
        outside = sum(not f["low"] <= 0.5 <= f["high"] for f in figures)
        mean = statistics.fmean(f["value"] for f in figures)
        lines.append(f"| {measure.removeprefix(AUC)} | {mean:.3f} | {outside} of {len(draws)} | {allowed} |")
    # A rate of at most 1 % of 128 others is one of them: an image that is like them is above all but one so often.
    of_one = (int(128 * FALSE_ALARMS) + 1) / 129
    lines += ["", "| rate | nominal | mean over the draws | 95 % of all prompts |", "|---|---|---|---|"]
    for measure, nominal in (
        *((name, of_one) for name in measures if name.startswith("membership_tpr_") and "strict" not in name),
        ("copy_share", FALSE_ALARMS),
        ("extraction_rate", 0.0),
        ("extraction_rate_calibrated", 0.0),
    ):
        rates = [d[measure]["value"] for d in draws if d[measure]["value"] is not None]
        each = 128 if measure.startswith("membership") else 24
        mean = statistics.fmean(rates)
        low, high = clopper_pearson(mean * each * len(rates), each * len(rates))
        lines.append(f"| {measure} | {nominal:.3g} | {mean:.4f} | {low:.4f} to {high:.4f} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Run what is missing, then render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_train_steps", type=int, default=600, help="of the memorizing fine-tune")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of the memorizing fine-tune")
    parser.add_argument("--draws", type=int, default=20, help="of held-out images as training images")
    parser.add_argument("--seed", type=int, default=0, help="of the fine-tune and of the two audits")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/audit_controls"), help="for the adapter")
    parser.add_argument("--results", type=Path, default=Path("docs/audit_controls.json"), help="every figure")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    settings = {name: getattr(args, name) for name in ("max_train_steps", "learning_rate", "seed")}
    settings["command"] = "python training_scripts/audit_controls.py"
    content = {"settings": settings, "draws": {}}
    if args.results.exists():
        content = json.loads(args.results.read_text(encoding="utf-8"))
        if content["settings"] != settings:
            parser.error(f"{args.results} was made with other settings; give another --results")
    adapter = fine_tune(args)

    def keep() -> None:
        args.results.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    for name, of in ((MEMORIZING, adapter), (BASE, None)):
        if name not in content:
            print(f"audit: {name}")
            content[name] = audited(args, of)
            keep()
    for number in range(args.draws):
        if str(number) not in content["draws"]:
            print(f"draw {number + 1} of {args.draws}")
            content["draws"][str(number)] = draw(args, adapter, number)
            keep()
    args.results.with_suffix(".md").write_text(render(content), encoding="utf-8")


if __name__ == "__main__":
    main()
