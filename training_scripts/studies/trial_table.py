"""Real trials on the demo, to measure searches and rewards by: every mask of a coarsened space at a few rates.

    python training_scripts/trial_table.py
    python training_scripts/trial_table.py --part 1/2   # and in another shell --part 2/2

Each run fine-tunes the attention weights of some of six groups of blocks, and is measured twice: by what a search may
look at (cheap rewards against the validation images, at two stages of the training), and by the attacks of the audit
against held-out images. `docs/trial_table.parquet` holds all that are finished, one row each, and each is first
a file in `--output_dir`: the same command goes on where it stopped, on another machine from the table alone. The runs
come in a seeded random order: what is there before the end is a random sample.
"""

import argparse
import dataclasses
import itertools
import json
import random
import time
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from transformers import TrainerCallback
from transformers import logging as transformers_logging

from memcontrol_hf import MemControlTrainer, SearchSpace, audit_memorization, demo_dataset, demo_pipeline, metrics
from memcontrol_hf.encoders import load_encoder
from memcontrol_hf.flags import METHODS, ScriptArguments
from memcontrol_hf.from_flags import audit_settings, training_arguments
from memcontrol_hf.sampling import denoiser_in_place

GROUPS = {
    "down.0": r"^down_blocks\.0\.attentions",
    "down.1": r"^down_blocks\.1\.attentions",
    "down.2, mid": r"^(down_blocks\.2|mid_block)\.attentions",
    "up.1": r"^up_blocks\.1\.attentions",
    "up.2": r"^up_blocks\.2\.attentions",
    "up.3": r"^up_blocks\.3\.attentions",
}
RATES = (3e-4, 1e-3)
STAGES = (0.25, 0.5)
NOISE_TIMESTEPS = (100, 300, 500, 700, 900)


class Stages(TrainerCallback):
    """Takes the cheap rewards at some steps of a training."""

    def __init__(self, trainer: MemControlTrainer, steps: list[int]):
        self.trainer, self.steps = trainer, steps
        self.figures: dict[str, float] = {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            figures = self.trainer.look(["fid", "membership_auc"])
            stage = self.steps.index(state.global_step)
            self.figures |= {f"stage{stage}_{name.removeprefix('eval_')}": value for name, value in figures.items()}


def runs(args: argparse.Namespace) -> list[dict]:
    """All of the table's runs, in their order."""
    masks = [dict(zip(GROUPS, bits)) for bits in itertools.product((False, True), repeat=len(GROUPS))]
    of = [
        {"mask": mask, "learning_rate": rate, "seed": seed}
        for seed in args.seed
        for mask in masks
        for rate in RATES
        if any(mask.values()) or rate == RATES[0]  # the frozen base has no learning rate
    ]
    random.Random(0).shuffle(of)
    return sorted(of, key=lambda run: run["seed"])


def file_of(run: dict, args: argparse.Namespace) -> Path:
    bits = "".join("01"[on] for on in run["mask"].values())
    return args.output_dir / f"{bits}-{run['learning_rate']:g}-{args.max_train_steps}-{run['seed']}.json"


def measure(run: dict, trainer: MemControlTrainer, data: dict) -> dict[str, float | bool | int]:
    """Train and measure one run: one row of the table."""
    row = {f"mask.{name}": on for name, on in run["mask"].items()}
    row |= {"learning_rate": run["learning_rate"], "steps": trainer.args.max_steps, "seed": run["seed"]}

    @contextmanager
    def timed(name: str):
        started = time.process_time()
        yield
        row[f"seconds_{name}"] = time.process_time() - started

    trainer.args.seed = run["seed"]
    mask = dict(zip(GROUPS.values(), run["mask"].values()))
    trainer.apply_hyperparameters({"mask": mask, "learning_rate": run["learning_rate"]})
    row["trainable_parameters"] = trainer.trainable_parameters
    stages = Stages(trainer, [round(share * trainer.args.max_steps) for share in STAGES])
    if any(run["mask"].values()):
        trainer.add_callback(stages)
        with timed("train_with_stages"):
            trainer.train()
        trainer.remove_callback(stages)
    row |= stages.figures
    for name in ("membership_auc", "fid"):
        with timed(name):
            row |= {k.removeprefix("eval_"): v for k, v in trainer.evaluate(metrics=[name]).items()}
    with timed("noise_norm"):
        norms = {
            name: metrics.noise_norm(
                trainer.model,
                images.encoded[images.unique]["latents"],
                images.encoded[images.unique]["prompt_embeds"],
                trainer.family.null_condition(),
                trainer.family,
                NOISE_TIMESTEPS,
                [(run["seed"], purpose, i) for i in images.unique],
            )
            for purpose, (name, images) in enumerate(
                {"train": trainer.train_dataset, "validation": trainer.encode(data["validation"])}.items()
            )
        }
    for k, timestep in enumerate(NOISE_TIMESTEPS):
        row |= {f"noise_norm_{timestep}_{name}": of[:, k].mean().item() for name, of in norms.items()}
        row[f"noise_norm_{timestep}_auc"] = metrics.membership(norms["train"][:, k], norms["validation"][:, k]).auc
    settings = dataclasses.replace(
        audit_settings(ScriptArguments(seed=run["seed"])),
        num_prompts=24,  # the twelve repeated images, and as many others
        images_per_prompt=8,
        num_quality_images=72,
    )
    held_out = data["held_out"].select(range(128))
    with timed("audit"), denoiser_in_place(trainer.pipeline, trainer.model):
        report = audit_memorization(
            data["train"],
            held_out,
            trainer.pipeline,
            encoder=trainer.encoder,
            settings=settings,
            control=False,
        )
    row |= {f"audit_{name}": of["model"]["value"] for name, of in report.audit["measures"].items()}
    row |= {f"canaries_{name}": of["caught"] for name, of in report.audit["canaries"]["caught"].items()}
    return row


def finished(args: argparse.Namespace) -> dict[str, dict]:
    """The rows of all finished runs, in the order of the runs, by the names of their files."""
    table = pd.read_parquet(args.results).to_dict("records") if args.results.exists() else []
    by_settings = {(*(row[f"mask.{name}"] for name in GROUPS), row["learning_rate"], row["steps"], row["seed"]): row
                   for row in table}  # fmt: skip
    rows = {}
    for run in runs(args):
        file, settings = file_of(run, args), (run["learning_rate"], args.max_train_steps, run["seed"])
        if file.exists():
            rows[file.stem] = json.loads(file.read_text(encoding="utf-8"))
        elif (row := by_settings.get((*run["mask"].values(), *settings))) is not None:
            rows[file.stem] = row
    return rows


def collect(args: argparse.Namespace) -> None:
    """All finished runs into one Parquet file."""
    rows = finished(args)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows.values()).to_parquet(args.results, index=False)
    print(f"{len(rows)} of {len(runs(args))} runs: {args.results}")


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_train_steps", type=int, default=80, help="steps of each run")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="all runs with each")
    parser.add_argument("--part", default="1/1", help="which of how many processes this is, say 1/2")
    parser.add_argument("--collect", action="store_true", help="run nothing: collect what is finished")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/trial_table"), help="for the single runs")
    parser.add_argument("--results", type=Path, default=Path("docs/trial_table.parquet"), help="for the table")
    args = parser.parse_args(argv)
    if not args.collect:
        transformers_logging.set_verbosity_error()
        part, parts = (int(number) for number in args.part.split("/"))
        data, pipeline = demo_dataset(), demo_pipeline()
        script_args = ScriptArguments(
            output_dir=str(args.output_dir), max_train_steps=args.max_train_steps, method="attention"
        )
        trainer = MemControlTrainer(
            pipeline=pipeline,
            peft_config=METHODS["attention"][0],
            args=training_arguments(script_args),
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            search_space=SearchSpace.from_model(pipeline.unet, list(GROUPS.values())),
            encoder=load_encoder("demo"),
        )
        args.output_dir.mkdir(parents=True, exist_ok=True)
        done = finished(args)
        for number, run in enumerate(runs(args)):
            file = file_of(run, args)
            if number % parts == part - 1 and file.stem not in done:
                row = measure(run, trainer, data)
                file.with_suffix(".part").write_text(json.dumps(row), encoding="utf-8")
                file.with_suffix(".part").rename(file)
                print(f"run {number + 1} of {len(runs(args))}: {file.stem}", flush=True)
    collect(args)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
