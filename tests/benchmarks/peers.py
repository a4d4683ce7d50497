"""LoRA from a folder of images and captions, beside the example script of diffusers.

The script is no part of diffusers' package. It is at
https://github.com/huggingface/diffusers/blob/main/examples/text_to_image/train_text_to_image_lora.py and has
requirements of its own (torchvision). `DIFFUSERS_SCRIPT=its path make bench ROWS=peers` measures beside it.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memcontrol_hf import demo_dataset, demo_pipeline

from .startup import children
from .timing import compared

SCRIPT = os.environ.get("DIFFUSERS_SCRIPT")
SHORT, LONG = 10, 60
"""Steps of the two trainings whose difference is the price of a step."""

OURS = """
import sys
from peft import LoraConfig
from diffusers import StableDiffusionPipeline
from memcontrol_hf import MemControlTrainer, MemControlTrainingArguments
from memcontrol_hf.data import load_images

base, images, output, steps = sys.argv[1:]
data = load_images(train_data_dir=images)
trainer = MemControlTrainer(
    StableDiffusionPipeline.from_pretrained(base),
    LoraConfig(r=4, lora_alpha=4, target_modules=["to_k", "to_q", "to_v", "to_out.0"]),
    MemControlTrainingArguments(
        output, max_steps=int(steps), per_device_train_batch_size=32, resolution=64,
        objectives=["loss", "membership_auc"], save_strategy="no", report_to="none",
    ),
    data["train"], data["validation"],
)
trainer.train()
trainer.save_model()
"""


def write_folder(folder: Path) -> None:
    """The demo's training images as PNG files, with their captions in `metadata.jsonl`."""
    folder.mkdir(parents=True)
    lines = []
    for row, example in enumerate(demo_dataset()["train"]):
        example["image"].convert("RGB").save(folder / f"{row}.png")
        lines.append(json.dumps({"file_name": f"{row}.png", "text": example["text"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def theirs(base: Path, images: Path, output: Path, steps: int) -> list[str]:
    """The command of diffusers' script for the same training."""
    flags = {
        "pretrained_model_name_or_path": base,
        "train_data_dir": images,
        "output_dir": output,
        "max_train_steps": steps,
        "resolution": 64,
        "train_batch_size": 32,
        "rank": 4,
        "seed": 0,
    }
    return [sys.executable, SCRIPT, *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]


def seconds_of(command: list[str], cache: Path) -> float:
    """Seconds that a command computed, with a cache of its own."""
    before = children()
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[1]} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return children() - before


def rows(pairs: int) -> Iterator[dict[str, Any]]:
    """The rows of the page: nothing without diffusers' script.

    Args:
        pairs: At most so many turns of each side; each takes minutes on a CPU, so three do.
    """
    if SCRIPT is None:
        print(__doc__)
        return
    first: dict[str, list[float]] = {"this package": [], "diffusers' script": []}
    step: dict[str, list[float]] = {"this package": [], "diffusers' script": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        demo_pipeline().save_pretrained(folder / "base")
        write_folder(folder / "images" / "train")
        for turn in range(min(pairs, 3)):
            for side in first:
                cache = folder / f"cache {turn} {side}"
                place = (folder / "base", folder / "images", folder / "output")
                long, short = (
                    [sys.executable, "-c", OURS, *map(str, (*place, steps))]
                    if side == "this package"
                    else theirs(*place, steps)
                    for steps in (LONG, SHORT)
                )
                first[side].append(seconds_of(long, cache))
                again = seconds_of(long, cache)
                step[side].append((again - seconds_of(short, cache)) / (LONG - SHORT))
    yield compared("a step of LoRA from a folder of images, the demo", 1 / 1.5, step)
    yield compared(f"{LONG} steps of LoRA from a new folder of images, imports and all, the demo", 1.0, first)
