# Copyright 2026 The memcontrol_hf authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The demo that ships in the package: a tiny text-to-image pipeline, a data set and an image encoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import DatasetDict
    from diffusers import StableDiffusionPipeline


DEMO_PIPELINE: Path = Path(__file__).parent / "pipeline"
"""Folder of the pipeline, in diffusers' format."""

DEMO_ENCODER: Path = Path(__file__).parent / "encoder"
"""Folder of the image encoder, for `transformers.AutoModel`."""

DEMO_DATASET: Path = Path(__file__).parent / "dataset"
"""Folder of the data set's Parquet files."""


def demo_pipeline(**kwargs: Any) -> StableDiffusionPipeline:
    """Load the demo pipeline: Stable Diffusion 1.x's layout at 64x64 pixels, trained on Noto emoji.

    Args:
        **kwargs: Passed on to `StableDiffusionPipeline.from_pretrained`, such as `dtype`.

    Returns:
        The pipeline, as float32 unless `dtype` says otherwise.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would report that torchvision, which is not needed, is not there
    try:
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline.from_pretrained(DEMO_PIPELINE, **kwargs)
    finally:
        logging.set_verbosity(verbosity)


def demo_dataset() -> DatasetDict:
    """Load the demo data set: 64x64 Fluent emoji in the column `image`, their names in `text`.

    Returns:
        The splits `train` (128 rows: 80 images once and 12 images four times), `validation` (192 images) and
        `held_out` (256 images). No image is in two splits.
    """
    from datasets import load_dataset

    files = {name: str(DEMO_DATASET / f"{name}.parquet") for name in ("train", "validation", "held_out")}
    return load_dataset("parquet", data_files=files)
