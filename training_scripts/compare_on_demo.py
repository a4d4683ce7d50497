"""Compare what is tuned, on the demo: frozen base, full fine-tune, attention weights, all-on SV-DIFF, a found mask.

Equal steps, held-out figures, several seeds. Each finished run is kept, so the same command goes on where it stopped:

    python training_scripts/compare_on_demo.py --mask_from outputs/quickstart

It writes `docs/demo_comparison.json` (every run) and `docs/demo_comparison.md` (mean and 95 % t interval over seeds).
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from scipy.stats import t as student
from transformers import logging as transformers_logging

from memcontrol_hf import (
    MemControlConfig,
    MemControlTrainer,
    MemControlTrainingArguments,
    SearchSpace,
    demo_dataset,
    demo_pipeline,
)
from memcontrol_hf.features import load_encoder

COLUMNS = {
    "trainable_percent": "trainable %",
    "fid": "fid ↓",
    "amd": "amd ↑",
    "amd_held_out": "amd, held-out",
    "membership_auc": "membership AUC ↓",
    "loss": "loss, held-out ↓",
    "loss_train": "loss, train",
}


def rows(args: argparse.Namespace) -> dict[str, dict]:
    """What each row tunes, and at which learning rate."""
    config = json.loads((Path(args.mask_from) / "adapter_config.json").read_text(encoding="utf-8"))
    report = json.loads((Path(args.mask_from) / "memorization_report.json").read_text(encoding="utf-8"))
    rate = report["training"]["learning_rate"]
    return {
        "frozen base": {"method": "svdiff", "granularity": "block", "mask": False, "rate": rate},
        "full fine-tune": {"method": "weights", "granularity": [".*"], "mask": True, "rate": args.weights_rate},
        "attention weights": {"method": "weights", "granularity": "block", "mask": True, "rate": args.weights_rate},
        "SV-DIFF, all blocks": {"method": "svdiff", "granularity": "block", "mask": True, "rate": rate},
        "SV-DIFF, selected mask": {"method": "svdiff", "granularity": "block", "mask": config["mask"], "rate": rate},
    }


def measure(row: dict, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Train one row with one seed and measure it against the held-out images."""
    pipeline, data = demo_pipeline(), demo_dataset()
    space = SearchSpace.from_model(pipeline.unet, row["granularity"])
    mask = row["mask"] if isinstance(row["mask"], dict) else space.mask(row["mask"])
    trainer = MemControlTrainer(
        pipeline=pipeline,
        peft_config=MemControlConfig(method=row["method"]),
        args=MemControlTrainingArguments(
            output_dir="outputs/comparison",
            resolution=64,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=32,
            max_steps=args.max_train_steps,
            learning_rate=row["rate"],
            lr_scheduler_type="constant",
            caption_dropout=0.1,
            eval_num_images=args.eval_num_images,
            eval_inference_steps=10,
            eval_guidance_scale=3.0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=False,
            seed=seed,
        ),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        search_space=space,
        mask=mask,
        encoder=load_encoder("demo"),
    )
    if any(mask.values()):
        trainer.train()
    figures = trainer.evaluate(data["held_out"], metrics=["fid", "amd", "membership_auc"])
    return {
        "trainable_percent": trainer.trainable_percent,
        **{name.removeprefix("eval_"): value for name, value in figures.items()},
    }


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % t interval; values from at least two seeds."""
    spread = statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), student.ppf(0.975, len(values) - 1) * spread


def render(content: dict) -> str:
    """The table, and the paired difference of the last two rows."""
    runs, settings = content["runs"], content["settings"]
    lines = [
        "# What is tuned decides what is memorized: the demo",
        "",
        f"{settings['max_train_steps']} steps of batch size 32 on the demo's train split, measured against its "
        f"held-out split; mean ± half width of the 95 % t interval over the seeds {settings['seeds']}. "
        f"Learning rates: {settings['weights_rate']:g} for weights, {settings['rate']:.3g} for SV-DIFF (the selected "
        "run's own). The mask was found with seed 0 on the validation split.",
        "",
        "| | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, of_seed in runs.items():
        cells = []
        for column in COLUMNS:
            mean, half = interval([figures[column] for figures in of_seed.values()])
            cells.append(f"{mean:.3g}" if column == "trainable_percent" else f"{mean:.4g} ± {half:.2g}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    selected, everything = runs["SV-DIFF, selected mask"], runs["SV-DIFF, all blocks"]
    lines += [
        "",
        "Selected mask minus all blocks, paired by seed:",
        "",
        "| | difference | 95 % t interval |",
        "|---" * 3 + "|",
    ]
    for column in ("fid", "amd", "membership_auc", "loss"):
        mean, half = interval([selected[seed][column] - everything[seed][column] for seed in selected])
        lines.append(f"| {COLUMNS[column]} | {mean:+.4g} | {mean - half:+.4g} to {mean + half:+.4g} |")
    lines += ["", "```bash", settings["command"], "```", ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mask_from", default="outputs/quickstart", help="folder of the adapter with the found mask")
    parser.add_argument("--max_train_steps", type=int, default=200, help="steps of each row")
    parser.add_argument("--weights_rate", type=float, default=1e-3, help="learning rate of the rows that tune weights")
    parser.add_argument("--eval_num_images", type=int, default=144, help="images generated for fid and for amd")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2], help="one run of each row for each")
    parser.add_argument("--results", type=Path, default=Path("docs/demo_comparison.json"), help="every run")
    args = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    table = rows(args)
    settings = {
        "max_train_steps": args.max_train_steps,
        "weights_rate": args.weights_rate,
        "rate": table["SV-DIFF, selected mask"]["rate"],
        "mask": table["SV-DIFF, selected mask"]["mask"],
        "eval_num_images": args.eval_num_images,
        "seeds": args.seed,
        "command": "python training_scripts/compare_on_demo.py --mask_from outputs/quickstart",
    }
    content = {"settings": settings, "runs": {name: {} for name in table}}
    if args.results.exists():
        content = json.loads(args.results.read_text(encoding="utf-8"))
        if content["settings"] != settings:
            print(f"error: {args.results} was made with other settings; give another --results", file=sys.stderr)
            raise SystemExit(2)
    for seed in args.seed:
        for name, row in table.items():
            if str(seed) in content["runs"][name]:
                continue
            print(f"{name}, seed {seed}")
            content["runs"][name][str(seed)] = measure(row, seed, args)
            args.results.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    args.results.with_suffix(".md").write_text(render(content), encoding="utf-8")


if __name__ == "__main__":
    main()
