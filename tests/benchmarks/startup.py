"""What it costs to import the package and to come to the first training step, beside importing its libraries."""

import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from .timing import alternate, compared

LIBRARIES = """
import torch, datasets, peft
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer, Trainer
"""

PACKAGE = "from memcontrol_hf import MemControlTrainer, MemControlTrainingArguments, audit_memorization"

TO_THE_FIRST_STEP = """
import os, sys
from memcontrol_hf import train, training_loss
training_loss.TrainingLoss.__call__ = lambda *_: os._exit(0)
train.main(["--output_dir", sys.argv[1], "--n_trials", "1", "--screen", "False"])
"""


def children() -> float:
    """Seconds that finished child processes computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def process(code: str, *arguments: str) -> Callable[[], Any]:
    """Run some Python in a process of its own."""
    return lambda: subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


def rows(pairs: int) -> Iterator[dict[str, Any]]:
    """The rows of the page.

    Args:
        pairs: At most so many turns of each side; each takes seconds, so five do.
    """
    pairs, libraries = min(pairs, 5), process(LIBRARIES)
    sides = {"this package": process(PACKAGE), "its libraries": libraries}
    yield compared("import of the trainer and the audit", 1.05, alternate(sides, pairs, children))
    with tempfile.TemporaryDirectory() as folder:
        sides = {"to the first step": process(TO_THE_FIRST_STEP, folder), "its libraries": libraries}
        yield compared("start of memcontrol train, the demo", 1.5, alternate(sides, pairs, children))
