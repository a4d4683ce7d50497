"""Images and captions encoded once, beside the encoders alone."""

import copy
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset

from memcontrol_hf import demo_dataset, demo_pipeline
from memcontrol_hf.data import encode
from memcontrol_hf.families import family_of
from memcontrol_hf.images import to_pixels

from .timing import alternate, clock, compared

RESOLUTION, BATCH = 64, 32


def rows(pairs: int) -> Iterator[dict[str, Any]]:
    """The row of the page: the 256 held-out images of the demo, decoded, encoded and written to the cache.

    Args:
        pairs: At most so many turns of each side; each takes seconds on a CPU, so ten do there.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    family, images = family_of(demo_pipeline().to(device)), demo_dataset()["held_out"]
    pixels, captions = to_pixels(images["image"], RESOLUTION), images["text"][:]
    numbers = itertools.count()

    def under_a_new_name() -> tuple[Dataset]:
        renamed = copy.copy(images)
        renamed._fingerprint = f"turn{next(numbers)}"
        return (renamed,)

    def encoders(_: Dataset) -> None:
        for start in range(0, len(images), BATCH):
            family.encode_images(pixels[start : start + BATCH])
            with torch.no_grad():
                family.encode_prompts(captions[start : start + BATCH])

    pairs = pairs if device.type == "cuda" else min(pairs, 10)
    sides = {"cached": lambda dataset: encode(dataset, family, RESOLUTION), "encoders": encoders}
    before = datasets.config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder)
        try:
            seconds = alternate(
                sides, pairs if device.type == "cuda" else min(pairs, 10), clock(device), under_a_new_name
            )
        finally:
            datasets.config.HF_DATASETS_CACHE = before
    yield compared("images and captions encoded, the demo", 1.1, seconds)
