"""Training with `torch_compile`: what a step gains, and what the first step costs."""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback

from .training_step import demo_trainer, measure


class _FirstStep(TrainerCallback):
    """Takes the seconds of the first step on the wall, in which the denoiser is compiled."""

    def __init__(self) -> None:
        self.started: float | None = None
        self.seconds: float | None = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.started is None:
            self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.seconds is None:
            self.seconds = time.perf_counter() - self.started


def compiled_step(pairs: int) -> dict[str, Any]:
    """The row of the page, for a process of its own: the environment says that everything is compiled, and where to.

    Args:
        pairs: Number of steps of each side.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/compiler"
        trainer, first = demo_trainer("lora", folder, trainer_args='{"torch_compile": true}'), _FirstStep()
        trainer.add_callback(first)
        row = measure("training step with torch_compile, the demo, lora", trainer, pairs, goal=None)
    return row | {"start": first.seconds}


def rows(pairs: int) -> Iterator[dict[str, Any]]:
    """The row of the page: steps of the trainer with a compiled denoiser, beside a bare loop without.

    Args:
        pairs: Number of steps of each side.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool.apply(compiled_step, (pairs,))
