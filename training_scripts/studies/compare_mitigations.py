"""Compare the mitigations on the demo: each added to SV-DIFF in all blocks, beside none, full fine-tune and a mask.

Equal steps, held-out figures, several seeds. Each finished run is kept, so the same command goes on where it stopped:

    python training_scripts/compare_mitigations.py

It writes `docs/mitigations_comparison.json` (every run) and `.md` (mean and 95 % t interval over seeds).
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from scipy.stats import t as student
from transformers import logging as transformers_logging

from memcontrol_hf import MemControlConfig, MemControlTrainer, SearchSpace, demo_dataset, demo_pipeline
from memcontrol_hf.audit import AuditSettings, audit_memorization
from memcontrol_hf.encoders import load_encoder
from memcontrol_hf.flags import DEMO, ScriptArguments
from memcontrol_hf.from_flags import training_arguments
from memcontrol_hf.sampling import denoiser_in_place

COLUMNS = {
    "fid": "fid ↓",
    "amd": "amd ↑",
    "membership_auc": "membership AUC ↓",
    "canaries_caught": "canaries caught, % ↓",
    "seconds_per_step": "CPU seconds a step",
}
COMPARED = ("fid", "amd", "membership_auc", "canaries_caught")
NOTES = (
    "Membership AUC and canaries are of attacks on the weights, as whoever downloads them can run them; `fid` and "
    "`amd` are of images sampled with the mitigation on. Canaries: the repeated training images, and of all attacks "
    "of `memcontrol audit` the one that catches most of them. `multiple_captions` draws from four wordings that the "
    "command makes of each caption. What each mitigation does and does not protect against: "
    "[mitigations.md](mitigations.md)."
)
COMMAND = "python training_scripts/compare_mitigations.py"
DP_SGD = "dp_sgd:epsilon=8,delta=0.001,max_grad_norm=0.05"
# Each with its defaults, except where these would change nothing or do not fit 128 rows.
MITIGATIONS = (
    "multiple_captions",
    "rwa",
    "gaussian_noise",
    "caption_dropout:0.5",
    "threshold",
    "early_stop",
    DP_SGD,
    "prompt_embedding",
    "anti_memorization_guidance",
)
CANARIES = AuditSettings(
    resolution=DEMO["resolution"],
    num_prompts=12,  # the repeated images come first: these are all of them
    num_quality_images=8,
    images_per_prompt=10,
    inference_steps=DEMO["eval_inference_steps"],
    guidance_scale=DEMO["eval_guidance_scale"],
)


def rows(args: argparse.Namespace) -> dict[str, dict]:
    """What each row tunes, and at which learning rate."""
    if args.mask_from.is_dir():
        report = json.loads((args.mask_from / "memorization_report.json").read_text(encoding="utf-8"))
        found = {"mask": report["mask"], "learning_rate": report["training"]["learning_rate"]}
    else:
        found = json.loads(args.mask_from.read_text(encoding="utf-8"))
    rate = found["learning_rate"]
    full = {"method": "weights", "granularity": [".*"], "mask": True, "rate": args.weights_rate}
    all_blocks = {"method": "svdiff", "granularity": "block", "mask": True, "rate": rate}
    return {
        "SV-DIFF, all blocks": all_blocks,
        "full fine-tune": full,
        "SV-DIFF, selected mask": {**all_blocks, "mask": found["mask"]},
        **{f"all blocks, {name}": {**all_blocks, "mitigation": [name]} for name in MITIGATIONS},
    }


def measure(row: dict, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Train one row with one seed and measure it against the held-out images."""
    pipeline, data, encoder = demo_pipeline(), demo_dataset(), load_encoder("demo")
    space = SearchSpace.from_model(pipeline.unet, row["granularity"])
    mask = row["mask"] if isinstance(row["mask"], dict) else space.mask(row["mask"])
    trainer = MemControlTrainer(
        pipeline=pipeline,
        peft_config=MemControlConfig(method=row["method"]),
        args=training_arguments(
            ScriptArguments(
                output_dir="outputs/comparison",
                max_train_steps=args.max_train_steps,
                learning_rate=row["rate"],
                eval_num_images=args.eval_num_images,
                mitigation=row.get("mitigation", []),
                seed=seed,
            )
        ),
        train_dataset=data["train"].map(lambda image: {"captions": captions(image["text"])}),
        eval_dataset=data["validation"],
        search_space=space,
        mask=mask,
        encoder=encoder,
    )
    started = time.process_time()  # so that other work on the machine does not count
    trainer.train()
    figures = {"seconds_per_step": (time.process_time() - started) / trainer.state.global_step}
    measured = trainer.evaluate(data["held_out"], metrics=["fid", "amd", "membership_auc"])
    figures |= {name.removeprefix("eval_"): value for name, value in measured.items()}
    figures["canaries_caught"] = canaries_caught(trainer, data, encoder)
    if trainer.privacy:
        figures["epsilon"] = trainer.privacy["epsilon"]
    return {"trainable_percent": trainer.trainable_percent, **figures}


def captions(text: str) -> list[str]:
    """What `multiple_captions` draws from, of which the demo has one."""
    return [text, f"{text} emoji", f"an emoji of {text}", f"a picture of {text}"]


def canaries_caught(trainer: MemControlTrainer, data: dict, encoder: torch.nn.Module) -> float:
    """Percent of the repeated training images that the best of the audit's attacks on the weights catches."""
    with denoiser_in_place(trainer.pipeline, trainer.model):
        report = audit_memorization(
            data["train"], data["held_out"], trainer.pipeline, encoder=encoder, settings=CANARIES, control=False
        )
    return best_attack(report.audit)


def best_attack(audit: dict) -> float:
    """Percent of the canaries that it looked at which the best attack of an audit caught; NaN without canaries."""
    shares = [100 * n["caught"] / n["of"] for n in audit["canaries"]["caught"].values() if n["of"]]
    return max(shares, default=float("nan"))


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % t interval; values from at least two seeds."""
    spread = statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), student.ppf(0.975, len(values) - 1) * spread


def render(content: dict) -> str:
    """The table, and paired differences to all blocks."""
    runs, settings = content["runs"], content["settings"]
    lines = [
        "# The mitigations beside none, full fine-tune and the selected mask: the demo",
        "",
        f"{settings['max_train_steps']} steps of batch size 32 on the demo's train split, measured against its "
        f"held-out split; mean ± half width of the 95 % t interval over the seeds {settings['seeds']}. "
        f"Learning rates: {settings['weights_rate']:g} for weights, {settings['rate']:.3g} for SV-DIFF (the selected "
        "run's own). The [mask](demo_mask.json) was found with seed 0 on the validation split, by eight trials of "
        "the quickstart's search as it was before its sampler was seeded by the trial.",
        "",
        NOTES,
        "",
        "| | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, of_seed in runs.items():
        cells = []
        for column in COLUMNS:
            mean, half = interval([figures[column] for figures in of_seed.values()])
            cells.append(f"{mean:.4g} ± {half:.2g}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    everything = runs["SV-DIFF, all blocks"]
    lines += [
        "",
        "Minus SV-DIFF in all blocks, paired by seed, with the 95 % t interval:",
        "",
        "| | " + " | ".join(COLUMNS[column] for column in COMPARED) + " |",
        "|---" * (len(COMPARED) + 1) + "|",
    ]
    for name in list(runs)[1:]:
        cells = []
        for column in COMPARED:
            mean, half = interval([runs[name][seed][column] - everything[seed][column] for seed in everything])
            cells.append(f"{mean:+.3g} ({mean - half:+.3g} to {mean + half:+.3g})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "```bash", COMMAND, "```", ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mask_from",
        type=Path,
        default=Path("docs/demo_mask.json"),
        help="the found mask and its learning rate: a JSON file, or the folder of an adapter",
    )
    parser.add_argument("--max_train_steps", type=int, default=200, help="steps of each row")
    parser.add_argument("--weights_rate", type=float, default=1e-3, help="learning rate of the rows that tune weights")
    parser.add_argument(
        "--eval_num_images", type=int, default=DEMO["eval_num_images"], help="images generated for fid and for amd"
    )
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2], help="one run of each row for each")
    parser.add_argument("--results", type=Path, default=Path("docs/mitigations_comparison.json"), help="every run")
    args = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    table = rows(args)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "max_train_steps": args.max_train_steps,
        "weights_rate": args.weights_rate,
        "rate": table["SV-DIFF, selected mask"]["rate"],
        "mask": table["SV-DIFF, selected mask"]["mask"],
        "eval_num_images": args.eval_num_images,
        "seeds": args.seed,
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
