"""How time and memory grow with images, blocks and trials, each run in a process of its own.

    python training_scripts/studies/growth.py              # fifteen minutes on one core
    python training_scripts/studies/growth.py --collect    # run nothing: judge what is finished

The demo's pipeline throughout, images of noise, one thread. Seconds are those that the process computed, peaks are
memory beyond what the process held before. An exponent is the slope of a straight line through the logarithms. How
workers share a search is in docs/workers.md. Each finished run is a file in `--output_dir`. Writes
docs/results/growth.json, .md and .png.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from scipy.stats import linregress
from transformers import logging as transformers_logging

from common.memory import peak_memory
from common.pages import publish_results, read_results, runs_of, table
from common.pieces import Job, add_piece_flags, exit_if_missing, open_pieces
from common.plots import legend_above, plot_panels
from common.trainers import demo_trainer
from memcontrol_hf import MemControlTrainer, demo_dataset, demo_pipeline
from memcontrol_hf.data import EncodedImages, check_near_duplicates, load_images
from memcontrol_hf.families import family_of
from memcontrol_hf.flags import ScriptArguments
from memcontrol_hf.from_flags import training_arguments

COMMAND = "python training_scripts/studies/growth.py"
SIDE = 64
GRANULARITIES = {16: "block", 48: "site", 192: "module"}
"""Granularities by the number of blocks that they give the demo."""

Work = Callable[[], Any]


# ---- what is measured: each prepares, and returns the work ----


def listed(count: int, folder: Path) -> Work:
    """A folder of images with captions, found and split into three sets."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number in range(count):
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text(f"image {number}", "utf-8")
    return partial(load_images, train_data_dir=str(folder / "images"))


def _noise(count: int, folder: Path) -> Dataset:
    """A data set of `count` images of noise, each with a caption, whose pixels lie on the disk."""

    def rows():
        random = np.random.default_rng(0)
        for number in range(count):
            pixels = random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            yield {"image": Image.fromarray(pixels), "text": f"image {number}"}

    return Dataset.from_generator(rows, cache_dir=str(folder))


def encoded(count: int, folder: Path) -> Work:
    """Latents and conditions of images, put on the disk."""
    data, family = _noise(count, folder), family_of(demo_pipeline())
    return lambda: EncodedImages(data, SIDE).encoded_by(family)


def compared(count: int, folder: Path) -> Work:
    """Images compared with each other to find near-duplicates."""
    data = _noise(count, folder).train_test_split(0.5, seed=0)
    sets = {"train": data["train"], "held_out": data["test"]}
    return lambda: check_near_duplicates(sets, 0.05)


def _trainer(folder: Path, blocks: str) -> MemControlTrainer:
    flags = ScriptArguments(output_dir=str(folder), method="attention", max_train_steps=4)
    arguments = training_arguments(flags)
    arguments.objectives = ["loss", "membership_auc"]
    return demo_trainer(
        {name: rows.select(range(32)) for name, rows in demo_dataset().items()}, "attention", arguments, blocks
    )


def masked(count: int, folder: Path) -> Work:
    """A mask of all blocks put on the model and taken off."""
    trainer = _trainer(folder, GRANULARITIES[count])
    space = trainer.search_space

    def work() -> None:
        for on in (False, True, False):
            trainer.set_mask(space.mask(on))

    return work


def screened(count: int, folder: Path) -> Work:
    """A screening of four steps with two probes."""
    trainer = _trainer(folder, GRANULARITIES[count])
    trainer.encode(trainer.eval_dataset)
    return partial(trainer.screen, 4, every=2)


def searched(count: int, folder: Path) -> Work:
    """A search whose trials cost nothing: what is left is asking the sampler, and the study on the disk."""
    trainer = _trainer(folder, "block")
    random = np.random.default_rng(0)
    trainer.train_and_evaluate = lambda: {"eval_loss": random.random(), "eval_membership_auc": random.random()}
    return partial(
        trainer.hyperparameter_search,
        n_trials=count,
        direction=["minimize", "minimize"],
        learning_rate_range=(1e-4, 1e-3),
        screen=False,
    )


MEASURED: dict[str, tuple[Callable[[int, Path], Work], tuple[int, ...], str]] = {
    "images listed and split": (listed, (1_000, 10_000, 100_000), "images"),
    "images encoded": (encoded, (300, 1_000, 3_000, 10_000), "images"),
    "images compared": (compared, (1_000, 3_000, 10_000), "images"),
    "a mask put on": (masked, tuple(GRANULARITIES), "blocks"),
    "a screening": (screened, tuple(GRANULARITIES), "blocks"),
    "a search without its trials": (searched, (50, 150, 450), "trials"),
}
"""What is measured: how it is prepared, at which sizes, and what the sizes count."""


def measure(name: str, count: int) -> dict[str, float]:
    """Seconds and peak of one run, in this process."""
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = MEASURED[name][0](count, Path(folder))
        started = time.process_time()
        before, peak = peak_memory(work)
        seconds = time.process_time() - started
    return {"seconds": seconds, "peak_mib": peak - before}


def in_its_own_process(name: str, count: int) -> dict[str, float]:
    """[`measure`] in a fresh process that finds nothing in the cache of an earlier one."""
    with (
        tempfile.TemporaryDirectory() as cache,
        patch.dict(os.environ, HF_DATASETS_CACHE=cache),
        multiprocessing.get_context("spawn").Pool(1) as pool,
    ):
        return pool.apply(measure, (name, count))


def exponent(counts: list[int], values: list[float]) -> str:
    """The slope of a line through the logarithms, with its standard error."""
    fit = linregress(np.log(counts), np.log(values))
    return f"{fit.slope:.2f} ± {fit.stderr:.2f}"


def render(content: dict[str, Any]) -> str:
    """The page."""
    rows = []
    for name, (_, _, what) in MEASURED.items():
        if not (runs := runs_of(content["pieces"], name).items()):
            continue
        counts = [count for count, _ in runs]
        seconds, peaks = ([run[key] for _, run in runs] for key in ("seconds", "peak_mib"))
        rows.append(
            [
                name,
                f"{what}: " + ", ".join(f"{count:,}" for count in counts),
                ", ".join(f"{value:.3g}" for value in seconds),
                exponent(counts, seconds) if len(counts) > 1 else "",
                ", ".join(f"{value:.0f}" for value in peaks),
            ]
        )
    head = ["what", "sizes", "seconds", "exponent of the seconds", "peak, MiB"]
    return "\n".join(
        [
            "# How time and memory grow",
            "",
            f"`{content['command']}`",
            "",
            "The demo's pipeline on one core, images of noise. Seconds are those that the process computed; a peak is "
            "memory beyond what the process held when the work began. The exponent is the slope of a straight line "
            "through the logarithms, with its standard error: 1 is proportional. How workers share a search is in "
            "[workers.md](../workers.md).",
            "",
            *table(head, rows),
            "![Seconds and peak memory against images, blocks and trials, on logarithmic axes](growth.png)",
            "",
        ]
    )


def draw(content: dict[str, Any], file: Path) -> None:
    """Seconds and peaks against sizes, on logarithmic axes."""
    figure, panels = plot_panels((10, 4.5), 2)
    for axes, key, title in zip(panels, ("seconds", "peak_mib"), ("seconds", "peak memory, MiB")):
        for name in MEASURED:
            if runs := runs_of(content["pieces"], name).items():
                axes.loglog([count for count, _ in runs], [run[key] for _, run in runs], marker="o", label=name)
        axes.set_xlabel("images, blocks or trials")
        axes.set_ylabel(title)
    legend_above(figure, panels[0])
    figure.savefig(file)


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_piece_flags(parser, "growth")
    args = parser.parse_args(argv)
    file, failed = args.docs_dir / "growth.json", []
    pieces = open_pieces(parser, args.output_dir, {"side": SIDE})
    pieces.restore(read_results(file).get("pieces", {}))
    if not args.collect:
        failed = pieces.work(
            [
                Job(piece, piece, partial(in_its_own_process, name, count))
                for name, (_, counts, _) in MEASURED.items()
                for count in counts
                for piece in (f"{name}/{count}",)
            ]
        )
    content = {
        "command": COMMAND,
        "pieces": {name: pieces.read(name) for kind in MEASURED for name in pieces.names(kind)},
    }
    publish_results(file, content, render)
    draw(content, file.with_suffix(".png"))
    exit_if_missing(failed)


if __name__ == "__main__":
    main()
