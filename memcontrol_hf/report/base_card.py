"""The card of the demo's base pipeline."""

import json
from pathlib import Path

from huggingface_hub import ModelCardData

from .card_metadata import as_yaml
from .escaping import render_template

TRAINING_LOG = "training_log.json"
"""The file beside the pipeline's folder with the figures of its training."""


def render_base_card(folder: Path) -> str:
    """The text of the card, with the figures of the training log beside the pipeline's folder."""
    log = json.loads((folder.parent / TRAINING_LOG).read_text(encoding="utf-8"))
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    data = ModelCardData(
        library_name="diffusers",
        license="apache-2.0",
        pipeline_tag="text-to-image",
        tags=["memcontrol", "diffusers", "stable-diffusion", "demo"],
    )
    return render_template(
        "base_card_template.md",
        metadata=as_yaml(data),
        log=log,
        pipeline_class=index["_class_name"],
        size=sum(file.stat().st_size for file in folder.rglob("*.safetensors")),
    )
