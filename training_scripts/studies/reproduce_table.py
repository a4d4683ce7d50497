"""The paper's table, small, with error bars: what is tuned and how, on two data sets, over several seeds.

    pip install elpv-dataset==1.0.0.post1
    python training_scripts/reproduce_table.py                     # all of it, in a night on two cores
    python training_scripts/reproduce_table.py --rows transfer     # what is found on one set, on the other
    python training_scripts/reproduce_table.py --collect           # runs nothing: writes what is finished

Each finished piece of work is a file in `--output_dir`, so the same command goes on where it stopped, and any number
of processes with one output folder share the work: start the command once for each core, with `OMP_NUM_THREADS=1`. On
machines that share no folder, `--part 1/2` and `--part 2/2` do half of the rows each; copy their folders into one.

`docs/results.json` and `docs/results.parquet` hold all that is finished. `docs/results.md` and the tables over seeds
on the cards in `model_cards/` are rendered from them. On a new machine the same command takes up what
`docs/results.json` holds.

How a row is made:

- Its learning rate is chosen once for each data set: three rates, evenly spread on a logarithmic scale over the
  method's range, each for half the steps with one seed that no other run has; the lowest denoising loss on the
  validation images wins.
- A searched row has for each seed a search of its own, with that seed, over the mask and the learning rate together,
  as train_memcontrol.py does it: objectives fid and membership AUC on the validation images, the knee of the front. A
  random mask of the same size, and a mitigation added to a found mask, have that search's learning rate.
- In the transfer table all masks have the learning rate of all blocks.
- The fine-tune that is measured has a seed that no search saw, the same for all rows, and the same number of images.
"""

import argparse
import dataclasses
import fcntl
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from analyze_trials import correlations
from analyze_trials import read as read_trials
from compare_mitigations import DP_SGD, best_attack, interval
from datasets import DatasetDict
from elpv import elpv_dataset
from PIL import Image as PILImage
from scipy.stats import spearmanr
from scipy.stats import t as student
from transformers import PrinterCallback
from transformers import logging as transformers_logging

from memcontrol_hf import MemControlTrainer, SearchSpace, audit_memorization, demo_dataset, demo_pipeline, select_run
from memcontrol_hf.adapter_folder import REPORT
from memcontrol_hf.data import first_rows
from memcontrol_hf.encoders import load_encoder
from memcontrol_hf.flags import METHODS, ScriptArguments, settings
from memcontrol_hf.from_flags import audit_settings, training_arguments
from memcontrol_hf.images import to_pixels
from memcontrol_hf.metrics.intervals import clopper_pearson
from memcontrol_hf.report import MemorizationReport
from memcontrol_hf.report.card import write_card
from memcontrol_hf.sampling import denoiser_in_place, generate

DATA: dict[str, tuple[str, Callable[[], DatasetDict]]] = {
    "demo": ("Fluent emoji (the demo's)", demo_dataset),
    "elpv": ("ELPV solar cells", elpv_dataset),
}
FINAL_SEED, RATE_SEED = 100, 1000  # added to the seed of a search; of the choice of a learning rate
PICTURED_SEED = 0  # whose runs draw samples to look at
PUBLIC = ("demo",)  # the others' licences keep their images, and what looks like them, out of the repository


class Row(NamedTuple):
    """What is tuned: the method, where, and what else is done against memorization."""

    title: str
    method: str
    mask: str = "on"  # or off, found, random; in the transfer table own, transferred, random transferred
    mitigation: tuple[str, ...] = ()


NAMES = {"full": "full fine-tune", "svdiff": "SV-DIFF", "difffit": "DiffFit", "attention": "attention weights"}
ADDED = ("rwa", "threshold")
ROWS: dict[str, Row] = {
    "base": Row("frozen base", "svdiff", "off"),
    "full": Row("full fine-tune", "weights"),
    **{method: Row(NAMES[method], method) for method in ("svdiff", "difffit", "attention")},
    **{method: Row(title, method) for method, title in (("lora", "LoRA"), ("norm", "norms"), ("bias", "biases"))},
    **{
        f"{method}+{added}": Row(f"{title} with {added}", method.replace("full", "weights"), "on", (added,))
        for method, title in NAMES.items()
        for added in ADDED
    },
    **{
        f"memcontrol-{method}": Row(f"MemControl, {NAMES.get(method, 'LoRA')}", method, "found")
        for method in ("svdiff", "difffit", "attention", "lora")
    },
    **{
        f"memcontrol-svdiff+{added}": Row(f"MemControl, SV-DIFF, with {added}", "svdiff", "found", (added,))
        for added in ADDED
    },
    "random-svdiff": Row("SV-DIFF, a random mask of MemControl's size", "svdiff", "random"),
    "svdiff+dp_sgd": Row("SV-DIFF with DP-SGD (ε 8)", "svdiff", "on", (DP_SGD,)),
    "transfer-own": Row("mask found on this set", "svdiff", "own"),
    "transfer-mask": Row("mask found on the other set", "svdiff", "transferred"),
    "transfer-random": Row("random mask of the other's size", "svdiff", "random transferred"),
}
TRANSFER = ("svdiff", "transfer-mask", "transfer-own", "transfer-random")
GROUPS = {"main": [row for row in ROWS if not row.startswith("transfer-")], "transfer": list(TRANSFER)}

# ---- the work ----


class Task(NamedTuple):
    """A piece of work with a file of its own: choose a learning rate, search a mask, or run a row."""

    kind: str  # rate, search, run
    data: str
    name: str  # of a row; of the method in a search
    seed: int

    def file(self, args: argparse.Namespace) -> Path:
        return args.output_dir / self.kind / f"{self.data}-{self.name}-{self.seed}.json"

    def read(self, args: argparse.Namespace) -> dict[str, Any]:
        return json.loads(self.file(args).read_text(encoding="utf-8"))

    def rate(self) -> "Task | None":
        """Where the learning rate of a run comes from."""
        mask, method = ROWS[self.name].mask, ROWS[self.name].method
        if mask in ("found", "random"):
            return Task("search", self.data, method, self.seed)
        if self.name in TRANSFER:
            return Task("rate", self.data, "svdiff", RATE_SEED)
        return None if mask == "off" else Task("rate", self.data, self.name, RATE_SEED)

    def search(self) -> "Task | None":
        """Where the mask of a run comes from."""
        row = ROWS[self.name]
        if row.mask in ("on", "off"):
            return None
        other = "transferred" in row.mask
        data = next(name for name in DATA if name != self.data) if other else self.data
        return Task("search", data, row.method, self.seed)

    def needs(self) -> "list[Task]":
        found = (self.rate(), self.search()) if self.kind == "run" else ()
        return list(dict.fromkeys(task for task in found if task is not None))


def plan(data: Sequence[str], rows: Sequence[str], seeds: Sequence[int], part: str) -> list[Task]:
    """The runs of this part, each after what it needs."""
    number, parts = (int(n) for n in part.split("/"))
    runs = [Task("run", name, row, seed) for seed in seeds for row in rows for name in data]
    return list(dict.fromkeys(task for run in runs[number - 1 :: parts] for task in (*run.needs(), run)))


def work(tasks: Sequence[Task], args: argparse.Namespace) -> list[Task]:
    """Do what is not done yet, and leave to other processes what they are at. Returns what failed, and so is missing.

    A task that fails is told of and left out, with what needs it; the same command tries it again.
    """
    failed: set[Task] = set()
    while left := [task for task in tasks if not task.file(args).exists() and task not in failed]:
        busy = False
        for task in left:
            needs = task.needs()
            if failed & set(needs):
                failed.add(task)
            if task in failed or not all(need.file(args).exists() for need in needs):
                continue
            with _locked(task.file(args)) as mine:
                if not mine or task.file(args).exists():
                    continue
                busy, started = True, time.process_time()
                try:
                    result = DO[task.kind](task, args)
                except Exception:
                    traceback.print_exc()
                    failed.add(task)
                    continue
                piece = {"data": task.data, "row": task.name, "seed": task.seed, **result}
                piece["seconds"] = time.process_time() - started
                part = task.file(args).with_suffix(".part")
                part.write_text(json.dumps(piece), encoding="utf-8")
                part.rename(task.file(args))
                done = sum(t.file(args).exists() for t in tasks)
                print(f"{done} of {len(tasks)}: {' '.join(map(str, task))}, {piece['seconds']:.0f} s", flush=True)
        if not busy:
            time.sleep(1)  # what is left is under way in other processes
    return [task for task in tasks if task in failed]


@contextmanager
def _locked(file: Path) -> Iterator[bool]:
    """Whether no other process is at this file; the lock ends with the process, however that ends."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@cache
def images_of(name: str, count: int | None) -> DatasetDict:
    """A data set; for a try the first images of each split."""
    data = DATA[name][1]()
    return data if count is None else DatasetDict({n: s.select(range(min(count, len(s)))) for n, s in data.items()})


def script_arguments(task: Task, args: argparse.Namespace, seed: int, **changes: Any) -> ScriptArguments:
    """The settings of a task, as train_memcontrol.py has them."""
    return ScriptArguments(
        **{
            "output_dir": str(args.output_dir / task.kind / f"{task.data}-{task.name}-{task.seed}"),
            "dataset_name": task.data,
            "max_train_steps": args.max_train_steps,
            "search_max_steps": args.search_max_steps,
            "eval_num_images": args.eval_num_images,
            "audit_num_prompts": args.num_prompts,
            "audit_images_per_prompt": args.images_per_prompt,
            "seed": seed,
            **changes,
        }
    )


def trainer_of(data: DatasetDict, method: str, script: ScriptArguments) -> MemControlTrainer:
    pipeline = demo_pipeline()
    trainer_args = training_arguments(script)
    trainer_args.disable_tqdm = True
    trainer = MemControlTrainer(
        pipeline=pipeline,
        peft_config=METHODS[method][0],
        args=trainer_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        search_space=SearchSpace.from_model(pipeline.unet, [".*"] if method == "weights" else "block"),
        encoder=load_encoder("demo"),
    )
    trainer.remove_callback(PrinterCallback)  # one line for each piece of work is enough
    return trainer


def choose_rate(task: Task, args: argparse.Namespace) -> dict[str, Any]:
    """The learning rate of a row with the lowest validation loss, of three."""
    row = ROWS[task.name]
    steps = max(1, args.max_train_steps // 2)
    script = script_arguments(task, args, task.seed, max_train_steps=steps, mitigation=list(row.mitigation))
    trainer = trainer_of(images_of(task.data, args.max_images), row.method, script)
    losses = {}
    for rate in np.geomspace(*METHODS[row.method][1], 3).tolist():
        trainer.apply_hyperparameters({"mask": trainer.search_space.mask(True), "learning_rate": rate})
        trainer.train()
        losses[rate] = trainer.evaluate(metrics=["loss"])["eval_loss"]
    finite = {rate: loss for rate, loss in losses.items() if np.isfinite(loss)}
    return {"rates": list(losses), "losses": list(losses.values()), "learning_rate": min(finite, key=finite.get)}


def search(task: Task, args: argparse.Namespace) -> dict[str, Any]:
    """A mask and its learning rate, found on the validation images."""
    script = script_arguments(task, args, task.seed, method=task.name)
    trainer = trainer_of(images_of(task.data, args.max_images), task.name, script)
    runs = trainer.hyperparameter_search(
        n_trials=args.n_trials,
        learning_rate_range=METHODS[task.name][1],
        sampler=script.sampler,
        settings=settings(script),
    )
    chosen = select_run(runs)
    return {
        **chosen.hyperparameters,
        "trial": int(chosen.run_id),
        "values": dict(zip(script.objectives, chosen.objective)),
        "front": len(runs),
    }


def random_mask(sizes: dict[str, int], like: dict[str, bool], seed: int) -> dict[str, bool]:
    """A random mask, another one than `like`, with as many trainable parameters up to 5 %, or as near as may be.

    Args:
        sizes: the parameters that are trained in each block.
        like: the mask whose size is wanted.
        seed: of the draw.
    """
    generator, wanted = random.Random(seed), sum(sizes[block] for block, on in like.items() if on)
    nearest, off_by = dict(like), float("inf")
    for _ in range(1000):
        blocks = generator.sample(list(sizes), len(sizes))
        totals = np.cumsum([sizes[block] for block in blocks])
        count = int(np.abs(totals - wanted).argmin()) + 1
        mask = {block: block in blocks[:count] for block in sizes}
        distance = abs(int(totals[count - 1]) - wanted)
        if mask != like and distance < off_by:
            nearest, off_by = mask, distance
        if off_by <= 0.05 * wanted:
            break
    return nearest


def block_sizes(trainer: MemControlTrainer) -> dict[str, int]:
    """How many parameters each block trains."""
    sizes = {}
    for block in trainer.search_space.blocks:
        trainer.set_mask({block: True})
        sizes[block] = trainer.trainable_parameters
    return sizes


def run(task: Task, args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune a row with one seed and attack it."""
    row, data, seed = ROWS[task.name], images_of(task.data, args.max_images), task.seed + FINAL_SEED
    script = script_arguments(task, args, seed, mitigation=list(row.mitigation))
    trainer = trainer_of(data, row.method, script)
    found, rate = task.search(), task.rate()
    mask = found.read(args)["mask"] if found else trainer.search_space.mask(row.mask == "on")
    if row.mask.startswith("random"):
        mask = random_mask(block_sizes(trainer), mask, seed)
    hyperparameters = {"mask": mask} | ({"learning_rate": rate.read(args)["learning_rate"]} if rate else {})
    trainer.apply_hyperparameters(hyperparameters, final_model=True)
    figures: dict[str, Any] = {
        "learning_rate": hyperparameters.get("learning_rate"),
        "blocks": " ".join(block for block, on in mask.items() if on),
        "trainable_parameters": trainer.trainable_parameters,
        "trainable_percent": trainer.trainable_percent,
        "adapter_bytes": 0,
    }
    if any(mask.values()):
        started = time.process_time()
        trainer.train()
        figures["seconds_per_step"] = (time.process_time() - started) / trainer.state.global_step
        with tempfile.TemporaryDirectory() as folder:
            trainer.save_model(folder)
            figures["adapter_bytes"] = sum(f.stat().st_size for f in Path(folder).rglob("*.safetensors"))
    if trainer.privacy:
        figures["epsilon"] = trainer.privacy["epsilon"]
    if task.seed == PICTURED_SEED:
        draw_samples(trainer, script, data, args.output_dir / "samples" / task.data, task.name)
    measured = trainer.evaluate(data["held_out"], metrics=["fid", "amd", "noise_norm"])
    figures |= {name.removeprefix("eval_"): value for name, value in measured.items()}
    with denoiser_in_place(trainer.pipeline, trainer.model):
        audit = audit_memorization(
            data["train"],
            data["held_out"],
            trainer.pipeline,
            encoder=trainer.encoder,
            settings=dataclasses.replace(audit_settings(script), num_quality_images=min(72, args.eval_num_images)),
            control=False,
        ).audit
    for name, of in audit["measures"].items():
        figures[f"audit_{name}"] = of["model"]["value"]
        if of["model"]["low"] is not None:
            figures |= {f"audit_{name}_{end}": of["model"][end] for end in ("low", "high")}
    figures |= {f"canaries_{name}": of["caught"] for name, of in audit["canaries"]["caught"].items()}
    figures["canaries_best"] = best_attack(audit) if audit["canaries"]["planted"] else None
    figures["prompts"] = min(args.num_prompts, audit["images"]["train"])
    return figures


def draw_samples(
    trainer: MemControlTrainer, script: ScriptArguments, data: DatasetDict, folder: Path, name: str
) -> None:
    """`name`.png, and real.png with the images of the same captions: four repeated in training, four held out."""
    seen = [image.tobytes() for image in data["train"]["image"]]
    repeated = [row for row in first_rows(seen) if seen.count(seen[row]) > 1]
    shown = [*data["train"].select(repeated[:4]), *data["held_out"].select(range(4))]
    with denoiser_in_place(trainer.pipeline, trainer.model):
        images = generate(
            trainer.pipeline,
            [row["text"] for row in shown],
            [(script.seed, i) for i in range(len(shown))],
            script.resolution,
            script.eval_inference_steps,
            script.eval_guidance_scale,
        )
    folder.mkdir(parents=True, exist_ok=True)
    for file, pixels in ((name, images), ("real", to_pixels([row["image"] for row in shown], script.resolution))):
        side_by_side = (torch.cat([*pixels], 2) * 255).round().byte().permute(1, 2, 0)
        PILImage.fromarray(side_by_side.numpy()).save(folder / f"{file}.png")


DO: dict[str, Callable[[Task, argparse.Namespace], dict[str, Any]]] = {
    "rate": choose_rate,
    "search": search,
    "run": run,
}

# ---- what it says: pure functions of the collected results ----

CONFIRMED, NOT_CONFIRMED, UNDECIDED = "confirmed", "not confirmed", "undecided at this size"
NOT_RUN = "not run yet"
COST = {
    "trainable_percent": ("trainable %", "{:.3g}"),
    "adapter_bytes": ("adapter, bytes", "{:.0f}"),
    "fid": ("fid ↓", "{:.3f}"),
    "audit_kid": ("kid ↓", "{:.4f}"),
    "amd": ("amd ↑", "{:.4f}"),
    "amd_held_out": ("amd to held-out", "{:.4f}"),
    "audit_copy_similarity": ("copy similarity, p95 ↓", "{:.4f}"),
    "noise_norm": ("noise norm", "{:.2f}"),
}
ATTACKS = {
    **{
        f"audit_membership_{kind}_{name.lower()}": (f"{kind.upper()} {name} ↓", "{:.3f}")
        for kind in ("auc", "tpr")
        for name in ("loss", "CLiD", "PIA", "SecMI")
    },
    "canaries_best": ("canaries caught by the best attack, % ↓", "{:.0f}"),
}
EXTRACTED = {"audit_extraction_rate": "extracted ↓", "audit_extraction_rate_calibrated": "extracted, calibrated ↓"}
# What decides: the attack that a search lowers, one that it does not see, and where it counts that fid is no worse by
# more than a share of the other row's.
MEMORIZATION, UNSEEN, QUALITY, MARGIN = "audit_membership_auc_loss", "audit_membership_auc_clid", "fid", 0.1
# What a claim's comparisons show; lower is better in all but amd.
SHOWN = {
    MEMORIZATION: "membership AUC",
    UNSEEN: "the same by CLiD",
    QUALITY: "fid",
    "canaries_best": "canaries by the best attack, %",
    "audit_copy_similarity": "copy similarity",
    "audit_extraction_rate_calibrated": "extracted, calibrated",
    "amd": "amd",
}
DECIDED = ("seeds to decide it", "")


class Claim(NamedTuple):
    """A claim of the paper: one row of each pair memorizes less than the other, and with `quality` is not worse."""

    text: str
    pairs: tuple[tuple[str, str], ...]
    quality: bool


SEARCHED = ("svdiff", "difffit", "attention", "lora")
CLAIMS = (
    Claim(
        "PEFT memorizes less than full fine-tuning",
        tuple((row, "full") for row in ("svdiff", "difffit", "attention", "lora", "norm", "bias")),
        False,
    ),
    Claim(
        "A searched mask beats the same method in all blocks",
        tuple((f"memcontrol-{method}", method) for method in SEARCHED),
        True,
    ),
    Claim("A searched mask beats a random one of its size", (("memcontrol-svdiff", "random-svdiff"),), True),
    Claim(
        "MemControl beats RWA and threshold mitigation",
        tuple((f"memcontrol-{m}", f"{m}+{added}") for m in ("svdiff", "difffit", "attention") for added in ADDED),
        True,
    ),
    Claim(
        "MemControl with a mitigation beats MemControl alone",
        tuple((f"memcontrol-svdiff+{added}", "memcontrol-svdiff") for added in ADDED),
        True,
    ),
    Claim(
        "A mask carries over to another data set",
        (("transfer-mask", "svdiff"), ("transfer-mask", "transfer-random")),
        True,
    ),
)
CAPACITY = "Less capacity, less memorization"
Runs = dict[str, dict[int, dict[str, Any]]]  # row -> seed -> figures


class Ends(NamedTuple):
    """A mean over seeds and the ends of its 95 % t interval."""

    mean: float
    low: float
    high: float
    seeds: int


Limit = tuple[Ends | None, float]  # of a difference, and what it shall lie below


def mean_and_ends(values: Sequence[float]) -> Ends | None:
    """Mean and the ends of its 95 % t interval; `None` for less than two seeds."""
    if len(values) < 2:
        return None
    mean, half = interval(list(values))
    return Ends(mean, mean - float(half), mean + float(half), len(values))


def paired(runs: Runs, one: str, other: str, column: str) -> Ends | None:
    """The difference of two rows, paired by seed."""
    both = runs.get(one, {}).keys() & runs.get(other, {}).keys()
    of = [(runs[one][seed].get(column), runs[other][seed].get(column)) for seed in sorted(both)]
    return mean_and_ends([a - b for a, b in of if a is not None and b is not None])


def capacity(runs: Runs, column: str) -> Ends | None:
    """Over seeds: the rank correlation, over rows without a mitigation, of trainable % with a measure."""
    rows = [name for name in GROUPS["main"] if not ROWS[name].mitigation and name in runs]
    rhos = []
    for seed in sorted({seed for name in rows for seed in runs[name]}):
        of = [runs[name][seed] for name in rows if runs[name].get(seed, {}).get(column) is not None]
        if len(of) >= 4 and len({figures[column] for figures in of}) > 1:
            rhos.append(spearmanr([f["trainable_percent"] for f in of], [f[column] for f in of]).statistic)
    of = mean_and_ends(rhos)
    return of and Ends(of.mean, max(of.low, -1.0), min(of.high, 1.0), of.seeds)


def verdict(limits: Sequence[Limit]) -> str:
    """Confirmed: all intervals lie below their limits. Not confirmed: one lies above. Undecided otherwise."""
    if any(of is None for of, _ in limits):
        return NOT_RUN
    if any(of.low > limit for of, limit in limits):
        return NOT_CONFIRMED
    return CONFIRMED if all(of.high < limit for of, limit in limits) else UNDECIDED


def outlook(limits: Sequence[Limit]) -> str:
    """Of an undecided comparison: how many seeds would decide it, and how, if means and spreads stay as they are."""
    if verdict(limits) != UNDECIDED:
        return "–"

    def needed(of: Ends, limit: float) -> float:
        spread = (of.high - of.mean) / student.ppf(0.975, of.seeds - 1) * of.seeds**0.5
        halves = ((n, student.ppf(0.975, n - 1) * spread / n**0.5) for n in range(2, 1001))
        return next((n for n, half in halves if half < abs(of.mean - limit)), np.inf)

    against = [needed(of, limit) for of, limit in limits if of.mean > limit]
    count, then = (min(against), NOT_CONFIRMED) if against else (max(needed(*of) for of in limits), CONFIRMED)
    return f"{count}: {then}" if count < np.inf else "more than 1000"


def overall(verdicts: Sequence[str]) -> str:
    """Of a claim: confirmed in all of its comparisons; not confirmed when one speaks against it."""
    for first in (NOT_RUN, NOT_CONFIRMED, UNDECIDED):
        if first in verdicts:
            return first
    return CONFIRMED


def by_row(content: dict[str, Any], data: str) -> Runs:
    runs: Runs = {}
    for figures in content["runs"]:
        if figures["data"] == data:
            runs.setdefault(figures["row"], {})[figures["seed"]] = figures
    return runs


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows), ""]


def _cell(of_seed: dict[int, dict[str, Any]], column: str, form: str) -> str:
    values = [f[column] for f in of_seed.values() if f.get(column) is not None]
    if not values:
        return "–"
    if len(set(values)) == 1 and column in ("trainable_percent", "adapter_bytes"):
        return form.format(values[0])
    ends = mean_and_ends(values)
    return (
        form.format(values[0]) if ends is None else f"{form.format(ends.mean)} ± {form.format(ends.high - ends.mean)}"
    )


def _extracted(of_seed: dict[int, dict[str, Any]], column: str) -> str:
    """Pooled over seeds, with the exact interval."""
    runs = [f for f in of_seed.values() if f.get(column) is not None]
    if not runs:
        return "–"
    of = sum(f["prompts"] for f in runs)
    found = round(sum(f[column] * f["prompts"] for f in runs))
    low, high = clopper_pearson(found, of)
    return f"{found} of {of} ({100 * low:.0f} to {100 * high:.0f} %)"


def _difference(ends: Ends | None) -> str:
    return "–" if ends is None else f"{ends.mean:+.3g} ({ends.low:+.3g} to {ends.high:+.3g})"


def _comparisons(runs: Runs, pairs: Sequence[tuple[str, str]], quality: bool) -> list[list[str]]:
    """A line for each pair: its differences, and the verdict last."""
    lines = []
    for one, other in pairs:
        of = {column: paired(runs, one, other, column) for column in SHOWN}
        limits: list[Limit] = [(of[MEMORIZATION], 0.0), (of[UNSEEN], 0.0)]
        if quality:
            fids = [figures[QUALITY] for figures in runs.get(other, {}).values()]
            limits.append((of[QUALITY], MARGIN * float(np.mean(fids)) if fids else 0.0))
        differences = map(_difference, of.values())
        lines.append([f"{ROWS[one].title} − {ROWS[other].title}", *differences, outlook(limits), verdict(limits)])
    return lines


def claims(content: dict[str, Any]) -> dict[str, dict[str, tuple[str, list[list[str]]]]]:
    """Claim -> data set -> its verdict and the comparisons it follows from."""
    result: dict[str, dict[str, tuple[str, list[list[str]]]]] = {CAPACITY: {}} | {claim.text: {} for claim in CLAIMS}
    for data in DATA:
        runs = by_row(content, data)
        rhos = {column: capacity(runs, column) for column in SHOWN}
        # a high correlation is what is claimed
        negative = [of and Ends(-of.mean, -of.high, -of.low, of.seeds) for of in (rhos[MEMORIZATION], rhos[UNSEEN])]
        limits = [(of, 0.0) for of in negative]
        said = verdict(limits)
        line = ["rank correlation with trainable %", *map(_difference, rhos.values()), outlook(limits), said]
        result[CAPACITY][data] = said, [line]
        for claim in CLAIMS:
            lines = _comparisons(runs, claim.pairs, claim.quality)
            result[claim.text][data] = overall([line[-1] for line in lines]), lines
    return result


def render(content: dict[str, Any]) -> str:
    """The page of what is finished."""
    settings, environment = content["settings"], content["environment"]
    hours = sum(piece["seconds"] for kind in ("rates", "searches", "runs") for piece in content[kind]) / 3600
    said = claims(content)
    lines = [
        "# The paper's table, small, with error bars",
        "",
        "```bash",
        "python training_scripts/reproduce_table.py",
        "```",
        "",
        f"{settings['max_train_steps']} steps of batch size 32 for each row, {settings['n_trials']} trials of "
        f"{settings['search_max_steps']} steps for each search, {settings['num_prompts']} prompts of "
        f"{settings['images_per_prompt']} images for each audit; the demo's base (3.3 M parameters, 64 pixels). "
        f"{len(content['runs'])} runs, {len(content['searches'])} searches and {len(content['rates'])} choices of a "
        f"learning rate are finished, in {hours:.1f} CPU hours ({environment}). Every run: "
        "[results.parquet](results.parquet), [results.json](results.json).",
        "",
        "How a row is made, how its learning rate is chosen and what a searched row is: "
        "[reproduce_table.py](../training_scripts/reproduce_table.py). Figures are against held-out images that "
        "nothing saw before; mean ± half width of the 95 % t interval over seeds. Extracted: of the prompts of all "
        "seeds together, with the exact 95 % interval as if they were independent, which the same prompts under "
        "several seeds are not. TPR: at 1 % false alarms. Canaries: of the repeated training images, what the best "
        "of the audit's eight attacks catches, chosen after they ran; the frozen base shows how much of it is chance. "
        "An adapter's bytes are those of its safetensors.",
        "",
        "## The claims of the paper",
        "",
        *_table(
            ["", *(title for title, _ in DATA.values())],
            [[text, *(of[data][0] for data in DATA)] for text, of in said.items()],
        ),
        "Decided by the differences below, paired by seed, and never by hand: by two membership AUCs, that of the "
        "loss, which the searches lower on the same training images, and that of CLiD, which no search sees; and, "
        "where a row shall beat another, by fid, which may be worse by "
        f"{100 * MARGIN:.0f} % of the other row's. Confirmed: all of these 95 % t intervals lie below 0, "
        "that of fid below the margin. Not confirmed: one lies above. Undecided "
        "otherwise. A claim with several comparisons is confirmed when all are, and not confirmed when one is not; "
        "nothing is corrected for their number. The capacity claim: Spearman's correlations over rows without a "
        "mitigation shall lie above 0. With three seeds only large differences are decided: for the others stands how "
        "many would decide them, and how, if mean and spread stayed as they are; three seeds tell those roughly.",
        "",
    ]
    for data, (title, _) in DATA.items():
        runs = by_row(content, data)
        lines += [f"## {title}", ""]
        for columns, pooled in ((COST, {}), (ATTACKS, EXTRACTED)):
            table = []
            for name in GROUPS["main"]:
                of_seed = runs.get(name, {})
                cells = [_cell(of_seed, column, form) for column, (_, form) in columns.items()]
                cells += [_extracted(of_seed, column) for column in pooled]
                unfinished = [NOT_RUN, *[""] * (len(cells) - 1)]
                table.append([ROWS[name].title, str(len(of_seed)), *(cells if of_seed else unfinished)])
            heads = [head for head, _ in columns.values()]
            lines += _table(["", "seeds", *heads, *pooled.values()], table)
        if runs:
            lines += [f"![](results_{data}.png)", "", *_render_pictures(data, content["pictures"])]
        lines += ["### Masks from the other set", ""]
        shown = {**{c: (head, "{:.4g}") for c, head in SHOWN.items()}, "trainable_percent": COST["trainable_percent"]}
        titles = {**{name: ROWS[name].title for name in TRANSFER}, "svdiff": "all blocks"}
        lines += _table(
            ["SV-DIFF, the learning rate of all blocks", "seeds", *(head for head, _ in shown.values())],
            [
                [titles[name], str(len(runs.get(name, {})))]
                + (
                    [_cell(runs[name], column, form) for column, (_, form) in shown.items()]
                    if name in runs
                    else [NOT_RUN, *[""] * (len(shown) - 1)]
                )
                for name in TRANSFER
            ],
        )
        others = [("transfer-mask", other) for other in TRANSFER if other != "transfer-mask"]
        lines += _table(["difference", *SHOWN.values(), *DECIDED], _comparisons(runs, others, True))
        lines += ["### What the claims rest on", ""]
        for text, of in said.items():
            lines += [
                f"{text}: **{of[data][0]}**",
                "",
                *_table(["difference", *SHOWN.values(), *DECIDED], of[data][1]),
            ]
    lines += _render_sweep(content["sweep"])
    lines += [
        "",
        "What would settle it at full size: the same rows in [the original setting](../training_scripts/README.md).",
    ]
    return "\n".join(lines) + "\n"


CARD_ROWS = ("base", "full", "svdiff", "random-svdiff", "memcontrol-svdiff")
CARD_COLUMNS = ("trainable_percent", "fid", "amd", "amd_held_out", MEMORIZATION, "audit_membership_auc_clid")


def over_seeds(content: dict[str, Any], data: str) -> dict[str, Any] | None:
    """What the card of a data set's SV-DIFF adapter shows of other seeds; `None` before all its rows have run."""
    runs = by_row(content, data)
    seeds = set.intersection(*(set(runs.get(name, {})) for name in CARD_ROWS))
    if len(seeds) < 2:
        return None
    columns = {column: (COST | ATTACKS)[column] for column in CARD_COLUMNS}
    of_row = {name: {seed: runs[name][seed] for seed in sorted(seeds)} for name in CARD_ROWS}
    lines = [
        [ROWS[name].title, *(_cell(of, column, form) for column, (_, form) in columns.items())]
        for name, of in of_row.items()
    ]
    table = [["", *(head for head, _ in columns.values())], *lines]
    return {"seeds": len(seeds), "steps": content["settings"]["max_train_steps"], "table": table}


def _render_pictures(data: str, pictures: Sequence[str]) -> list[str]:
    """What the rows draw, in the order of the table, below the real images."""
    lines = [
        "### Samples",
        "",
        f"Of seed {PICTURED_SEED}, the same captions and noise in all rows: four of images that are repeated in "
        "training, then four of held-out ones. The first line is the images themselves.",
        "",
    ]
    if data not in PUBLIC:
        return [*lines[:2], f"Not shown, for their licence: the command writes them to `samples/{data}`.", ""]
    titles = {"real": "real images", **{name: ROWS[name].title for name in ROWS}}
    names = [name for name in titles if name in pictures]
    return lines + _table(["", ""], [[titles[name], f"![](results_samples/{name}.png)"] for name in names])


def _render_sweep(sweep: dict[str, Any] | None) -> list[str]:
    lines = ["## Size alone: the same method over many masks", ""]
    if sweep is None:
        return [*lines, f"{NOT_RUN}: it is read from the table of `training_scripts/trial_table.py`."]
    cells = [
        "–" if of is None else f"{of['rho']:.2f} ({of['low']:.2f} to {of['high']:.2f})"
        for of in sweep["correlations"].values()
    ]
    return [
        *lines,
        f"Of {sweep['runs']} runs of [the table of real trials](trial_table.parquet), whole attention weights of some "
        "of six groups of blocks on the demo: Spearman's correlation of the trainable parameters with what the audit "
        "finds, ranks within each learning rate (95 % bootstrap interval over runs).",
        "",
        *_table(list(SWEEP.values()), [cells]),
        "![](results_sweep.png)",
    ]


SWEEP = {
    "audit_membership_auc_loss": "membership AUC",
    "canaries": "canaries caught by the best attack",
    "audit_copy_share": "copies",
    "audit_extraction_rate_calibrated": "extracted, calibrated",
    "fid": "fid",
}


def sweep_of(table: Path) -> dict[str, Any] | None:
    """Memorization and quality against size, over the masks of the table of real trials, where it is there."""
    if not table.is_file():
        return None
    runs = read_trials(table)
    of = correlations(runs, True, ["trainable_parameters"], list(SWEEP))["trainable_parameters"]
    return {"runs": int((runs["trainable_parameters"] > 0).sum()), "correlations": of}


COLORS = {
    "base": "black",
    "full": "tab:blue",
    "svdiff": "tab:orange",
    "difffit": "tab:green",
    "attention": "tab:red",
    "lora": "tab:purple",
    "norm": "tab:brown",
    "bias": "tab:olive",
}
MARKERS = {"": "o", "rwa": "s", "threshold": "^", "dp_sgd": "D"}


def look(row: Row) -> dict[str, str | None]:
    """How a row is drawn: what is tuned is the colour, a mitigation the shape, and a searched mask is hollow."""
    tuned = "base" if row.mask == "off" else row.method.replace("weights", "full")
    mitigation = row.mitigation[0].partition(":")[0] if row.mitigation else ""
    return {
        "color": COLORS[tuned],
        "marker": "x" if row.mask == "random" else MARKERS[mitigation],
        "mfc": "white" if row.mask == "found" else None,
    }


def plots(content: dict[str, Any], table: Path, folder: Path) -> None:
    """Memorization and quality of all rows of a data set, and against size over the masks of the trials."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    def figure_of(count: int) -> tuple[Figure, list[Any]]:
        figure = Figure(figsize=(6.4 * count, 4.6), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        return figure, [figure.add_subplot(1, count, i + 1) for i in range(count)]

    for data in DATA:
        runs = by_row(content, data)
        shown = [name for name in GROUPS["main"] if name in runs]
        if not shown:
            continue
        figure, (axes,) = figure_of(1)
        figure.set_size_inches(8.2, 4.8)
        for name in shown:
            x, y = [[f[c] for f in runs[name].values() if f.get(c) is not None] for c in (QUALITY, MEMORIZATION)]
            ends = [mean_and_ends(values) or Ends(*[float(np.mean(values))] * 3, len(values)) for values in (x, y)]
            errors = [[[of.mean - of.low], [of.high - of.mean]] for of in ends]
            at = [of.mean for of in ends]
            axes.errorbar(*at, xerr=errors[0], yerr=errors[1], lw=0.5, ms=6, **look(ROWS[name]))
        legend = {ROWS[name].title: {"marker": "o", "color": color} for name, color in COLORS.items()} | {
            "all blocks": {"marker": "o", "color": "gray"},
            "mask of MemControl": {"marker": "o", "color": "gray", "mfc": "white"},
            "random mask": {"marker": "x", "color": "gray"},
            **{f"with {name}": {"marker": marker, "color": "gray"} for name, marker in MARKERS.items() if name},
        }
        handles = [Line2D([], [], ls="", label=label, **style) for label, style in legend.items()]
        figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
        axes.set(xlabel="fid ↓ (mean, 95 % t interval over seeds)", ylabel="membership AUC, loss ↓")
        axes.grid(alpha=0.3)
        figure.savefig(folder / f"results_{data}.png")
    if content["sweep"] is not None:
        runs = read_trials(table)
        runs = runs[runs["trainable_parameters"] > 0]
        figure, both = figure_of(2)
        for axes, column, label in zip(both, (MEMORIZATION, "fid"), ("membership AUC, loss ↓", "fid ↓")):
            for rate, of in runs.groupby("learning_rate"):
                axes.scatter(of["trainable_parameters"], of[column], s=12, label=f"learning rate {rate:g}")
            axes.set(xlabel="trainable parameters", ylabel=label)
            axes.grid(alpha=0.3)
        both[0].legend()
        figure.savefig(folder / "results_sweep.png")


# ---- the command ----


def restore(args: argparse.Namespace) -> None:
    """What `results.json` holds of the same settings, as the files that it was collected from."""
    file = args.docs_dir / "results.json"
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if content.get("settings") != settings_of(args):
        return
    for kind, pieces in (("rate", content["rates"]), ("search", content["searches"]), ("run", content["runs"])):
        for piece in pieces:
            file = Task(kind, piece["data"], piece["row"], piece["seed"]).file(args)
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(piece), encoding="utf-8")


def collect(args: argparse.Namespace) -> None:
    """All that is finished, whatever was asked for, into the results and what is rendered from them."""
    pieces = {
        kind: [json.loads(f.read_text(encoding="utf-8")) for f in sorted((args.output_dir / kind).glob("*.json"))]
        for kind in ("rate", "search", "run")
    }
    packages = ("torch", "diffusers", "transformers", "peft", "optuna")
    if not pieces["run"]:
        print(f"no run is finished in {args.output_dir}: nothing is written")
        return
    pictures = args.docs_dir / "results_samples"
    pictures.mkdir(parents=True, exist_ok=True)
    for data in PUBLIC:
        for file in (args.output_dir / "samples" / data).glob("*.png"):
            shutil.copy(file, pictures)
    content = {
        "settings": settings_of(args),
        "environment": f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in packages)
        + f", {platform.machine()} with {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "rates": pieces["rate"],
        "searches": pieces["search"],
        "runs": sorted(
            pieces["run"], key=lambda f: (list(DATA).index(f["data"]), list(ROWS).index(f["row"]), f["seed"])
        ),
        "sweep": sweep_of(args.trials),
        "pictures": sorted(file.stem for file in pictures.glob("*.png")),
    }
    (args.docs_dir / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    pd.DataFrame(content["runs"]).to_parquet(args.docs_dir / "results.parquet", index=False)
    (args.docs_dir / "results.md").write_text(render(content), encoding="utf-8")
    plots(content, args.trials, args.docs_dir)
    for data in DATA:
        card, shown = args.docs_dir.parent / "model_cards" / f"{data}-svdiff", over_seeds(content, data)
        if shown and card.is_dir():
            report = MemorizationReport.from_json(card / REPORT)
            report.card["over_seeds"] = shown
            report.to_json(card / REPORT)
            write_card(card)
    print(f"{len(content['runs'])} runs: {args.docs_dir / 'results.md'}")


NUMBERS = {
    "max_train_steps": (200, "steps of a row"),
    "search_max_steps": (50, "steps of a trial of a search"),
    "n_trials": (12, "trials of a search"),
    "eval_num_images": (144, "images generated for fid and for amd"),
    "num_prompts": (24, "training captions that the audit samples: the repeated images, and as many others"),
    "images_per_prompt": (8, "images for each of them"),
}


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What all pieces of one output folder have in common."""
    return {name: getattr(args, name) for name in (*NUMBERS, "max_images")}


def check(args: argparse.Namespace) -> list[str]:
    """The rows that are meant.

    Raises:
        ValueError: for an unknown row, a part that is none, and an output folder of other settings.
    """
    unknown = [name for name in args.rows if name not in ROWS and name not in GROUPS]
    if unknown:
        raise ValueError(f"unknown row(s) {', '.join(unknown)}: use some of {', '.join((*GROUPS, *ROWS))}")
    number, _, parts = args.part.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise ValueError(f"--part must be like 1/2, the first of two, but is {args.part!r}")
    file, wanted = args.output_dir / "settings.json", settings_of(args)
    if file.exists():
        stored = json.loads(file.read_text(encoding="utf-8"))
        differing = [name for name in wanted if stored.get(name) != wanted[name]]
        if differing:
            changes = ", ".join(f"{name} was {stored.get(name)} and is {wanted[name]}" for name in differing)
            raise ValueError(f"{args.output_dir} was made with other settings: {changes}. Give another --output_dir")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(wanted), encoding="utf-8")
    return list(dict.fromkeys(row for name in args.rows for row in GROUPS.get(name, [name])))


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="data sets")
    parser.add_argument("--rows", nargs="+", default=["transfer", "main"], help="rows, or all of main or transfer")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2], help="each row with each")
    parser.add_argument("--part", default="1/1", help="which of how many machines this is, say 1/2")
    parser.add_argument("--collect", action="store_true", help="run nothing: write what is finished")
    for name, (default, text) in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--max_images", type=int, help="of each split, for a try; all by default")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/reproduce_table"), help="for single pieces")
    parser.add_argument("--docs_dir", type=Path, default=Path("docs"), help="for the results")
    parser.add_argument("--trials", type=Path, default=Path("docs/trial_table.parquet"), help="of trial_table.py")
    args = parser.parse_args(argv)
    try:
        rows = check(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    missing = []
    restore(args)
    if not args.collect:
        transformers_logging.set_verbosity_error()
        missing = work(plan(args.data, rows, args.seed, args.part), args)
    collect(args)
    if missing:
        print(f"error: missing, see above: {'; '.join(' '.join(map(str, t)) for t in missing)}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
