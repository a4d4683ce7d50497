"""CLIP score, as an evaluate module."""

import datasets
import evaluate
import numpy as np
import torch

import memcontrol_hf.metrics

_DESCRIPTION = """How well generated images fit their captions, by a CLIP model."""
_INPUTS = """
Args:
    predictions: the generated images, N PIL images of one size.
    references: caption of each image.
    model: Hub id or folder of a CLIP model of transformers.
Returns:
    clip_score: in [0, 100], higher is better.
"""


class ClipScore(evaluate.Metric):
    """The evaluate module; the formula is `memcontrol_hf.metrics.clip_score`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="https://huggingface.co/papers/2104.08718",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Value("string")}),
        )

    def _compute(self, predictions, references, model) -> dict[str, float]:
        images = torch.stack([torch.from_numpy(np.asarray(image.convert("RGB")).copy()) for image in predictions])
        images = images.permute(0, 3, 1, 2).float() / 255
        return {"clip_score": memcontrol_hf.metrics.clip_score(images, references, model)}
