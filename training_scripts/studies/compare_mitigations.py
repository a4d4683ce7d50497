"""Compare the mitigations on the demo: each added to SV-DIFF in all blocks, beside none, a full fine-tune and a mask.

    python training_scripts/studies/compare_mitigations.py

All rows have equal steps and several seeds, and are measured on held-out images. Each finished run is a file in
`--output_dir`, so the same command goes on where it stopped, and processes with one output folder share the work.

Writes `docs/mitigations_comparison.json` (every run) and `docs/mitigations_comparison.md` (mean and 95 % t interval
over seeds). On a new machine the command takes up the finished runs from there.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from transformers import logging as transformers_logging

from common.audits import audit_trainer, best_attack
from common.intervals import paired_difference, t_interval
from common.pages import read_results, table, write_results
from common.pieces import Job, Pieces, exit_if_missing, open_pieces
from common.trainers import DP_SGD, demo_trainer
from memcontrol_hf import demo_dataset
from memcontrol_hf.audit import AuditSettings
from memcontrol_hf.flags import DEMO, ScriptArguments
from memcontrol_hf.from_flags import training_arguments

COLUMNS = {
    "fid": "fid ↓",
    "amd": "amd ↑",
    "membership_auc": "membership AUC ↓",
    "canaries_caught": "canaries caught, % ↓",
    "seconds_per_step": "CPU seconds a step",
}
COMPARED = ("fid", "amd", "membership_auc", "canaries_caught")
COMMAND = "python training_scripts/studies/compare_mitigations.py"
# Each mitigation has its defaults, except where the defaults would change nothing or do not fit 128 rows.
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
ALL_BLOCKS, SELECTED = "SV-DIFF, all blocks", "SV-DIFF, selected mask"

NOTES = """\
The membership AUC and the canaries come from attacks on the weights, which everybody who downloads the weights can \
run. `fid` and `amd` are measured on images that are sampled with the mitigation on. Canaries are the repeated \
training images; the column shows the share that the best of eight attacks of `memcontrol audit` catches. \
`multiple_captions` draws from four wordings that the command makes of each caption. What each mitigation protects \
against, and what not: [mitigations.md](mitigations.md)."""


class Row(NamedTuple):
    """A row of the table.

    Args:
        method: Name of the method, as in `--method` of train_memcontrol.py.
        rate: Learning rate.
        blocks: Granularity of the mask.
        mask: Blocks that are tuned; all blocks when `None`.
        mitigation: Mitigations that are added.
    """

    method: str
    rate: float
    blocks: str | list[str] = "block"
    mask: dict[str, bool] | None = None
    mitigation: tuple[str, ...] = ()


def rows(mask_from: Path, weights_rate: float) -> dict[str, Row]:
    """The rows of the table.

    Args:
        mask_from: JSON file with a found mask and its learning rate, or the folder of an adapter.
        weights_rate: Learning rate of the full fine-tune.
    """
    if mask_from.is_dir():
        report = json.loads((mask_from / "memorization_report.json").read_text(encoding="utf-8"))
        mask, rate = report["mask"], report["training"]["learning_rate"]
    else:
        found = json.loads(mask_from.read_text(encoding="utf-8"))
        mask, rate = found["mask"], found["learning_rate"]
    return {
        ALL_BLOCKS: Row("svdiff", rate),
        "full fine-tune": Row("weights", weights_rate, [".*"]),
        SELECTED: Row("svdiff", rate, mask=mask),
        **{f"all blocks, {name}": Row("svdiff", rate, mitigation=(name,)) for name in MITIGATIONS},
    }


def measure(row: Row, seed: int, steps: int, num_images: int, folder: Path) -> dict[str, float]:
    """Fine-tune one row with one seed, and measure it against the held-out images.

    Args:
        steps: Steps of the fine-tune.
        num_images: Images generated for fid, and as many for amd.
        folder: Output folder of the trainer.
    """
    data = demo_dataset()
    captioned = data["train"].map(lambda image: {"captions": captions(image["text"])})
    script = ScriptArguments(
        output_dir=str(folder),
        max_train_steps=steps,
        learning_rate=row.rate,
        eval_num_images=num_images,
        mitigation=list(row.mitigation),
        seed=seed,
    )
    trainer = demo_trainer({**data, "train": captioned}, row.method, training_arguments(script), row.blocks, row.mask)
    started = time.process_time()  # so that other work on the machine does not count
    trainer.train()
    figures = {"seconds_per_step": (time.process_time() - started) / trainer.state.global_step}
    measured = trainer.evaluate(data["held_out"], metrics=["fid", "amd", "membership_auc"])
    figures |= {name.removeprefix("eval_"): value for name, value in measured.items()}
    figures["canaries_caught"] = best_attack(audit_trainer(trainer, data["train"], data["held_out"], CANARIES))
    if trainer.privacy:
        figures["epsilon"] = trainer.privacy["epsilon"]
    return {"trainable_percent": trainer.trainable_percent, **figures}


def captions(text: str) -> list[str]:
    """Four wordings of a caption for `multiple_captions`; the demo has one."""
    return [text, f"{text} emoji", f"an emoji of {text}", f"a picture of {text}"]


def cell(values: list[float]) -> str:
    """The mean ± half width over seeds; one seed has no interval."""
    interval = t_interval(values)
    return f"{values[0]:.4g}" if interval is None else f"{interval.mean:.4g} ± {interval.half:.2g}"


def render(results: dict[str, Any]) -> str:
    """The page: the table, and the differences to all blocks, paired by seed."""
    runs, settings = results["runs"], results["settings"]
    figures, differences = [], []
    for name, by_seed in runs.items():
        figures.append([name, *(cell([run[column] for run in by_seed.values()]) for column in COLUMNS)])
        if name != ALL_BLOCKS:
            values = [
                [{seed: run[column] for seed, run in runs[row].items()} for row in (name, ALL_BLOCKS)]
                for column in COMPARED
            ]
            differences.append([name, *(str(paired_difference(*pair) or "–") for pair in values)])
    lines = [
        "# The mitigations beside none, full fine-tune and the selected mask: the demo",
        "",
        f"Each row is fine-tuned for {settings['max_train_steps']} steps of batch size 32 on the demo's train split, "
        "and measured against its held-out split. A figure is the mean ± half width of the 95 % t interval over the "
        f"seeds {', '.join(map(str, settings['seeds']))}. The learning rate is {settings['weights_rate']:g} for "
        f"weights, and {settings['rate']:.3g}, the selected run's own, for SV-DIFF. The [mask](demo_mask.json) was "
        "found with seed 0 on the validation split by eight trials of the quickstart's search, before the sampler was "
        "seeded by the trial.",
        "",
        NOTES,
        "",
        *table(["", *COLUMNS.values()], figures),
        "Each row minus SV-DIFF in all blocks, paired by seed, with the 95 % t interval:",
        "",
        *table(["", *(COLUMNS[column] for column in COMPARED)], differences),
        "```bash",
        COMMAND,
        "```",
        "",
    ]
    return "\n".join(lines)


def run_missing(pieces: Pieces, planned: dict[str, Row], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run the rows that are missing with each seed. Returns the figures: row -> seed -> figures."""
    work = partial(measure, steps=args.max_train_steps, num_images=args.eval_num_images, folder=args.output_dir)
    jobs = [
        Job(f"{name}-{seed}", f"{name}, seed {seed}", partial(work, row, seed))
        for seed in args.seed
        for name, row in planned.items()
    ]
    exit_if_missing(pieces.work(jobs))
    return {name: {str(seed): pieces.read(f"{name}-{seed}") for seed in args.seed} for name in planned}


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mask_from",
        type=Path,
        default=Path("docs/demo_mask.json"),
        help="found mask and its learning rate: a JSON file, or the folder of an adapter",
    )
    parser.add_argument("--max_train_steps", type=int, default=200, help="steps of each row (default: 200)")
    parser.add_argument(
        "--weights_rate", type=float, default=1e-3, help="learning rate of the full fine-tune (default: 0.001)"
    )
    parser.add_argument(
        "--eval_num_images",
        type=int,
        default=DEMO["eval_num_images"],
        help=f"images generated for fid, and as many for amd (default: {DEMO['eval_num_images']})",
    )
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2], help="seeds of each row (default: 0 1 2)")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs/compare_mitigations"), help="folder of the finished runs"
    )
    parser.add_argument(
        "--results", type=Path, default=Path("docs/mitigations_comparison.json"), help="file of all runs"
    )
    args = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    planned = rows(args.mask_from, args.weights_rate)
    settings = {
        "max_train_steps": args.max_train_steps,
        "weights_rate": args.weights_rate,
        "rate": planned[SELECTED].rate,
        "mask": planned[SELECTED].mask,
        "eval_num_images": args.eval_num_images,
        "seeds": args.seed,
    }
    committed = read_results(args.results)
    if committed and committed["settings"] != settings:
        parser.error(f"{args.results} was made with other settings; give another --results")
    pieces = open_pieces(parser, args.output_dir, settings)
    for name, by_seed in committed.get("runs", {}).items():
        pieces.restore({f"{name}-{seed}": figures for seed, figures in by_seed.items()})
    results = {"settings": settings, "runs": run_missing(pieces, planned, args)}
    write_results(args.results, results, render(results))


if __name__ == "__main__":
    main()
