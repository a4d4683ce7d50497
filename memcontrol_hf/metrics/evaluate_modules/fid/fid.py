"""Fréchet distance in the features of any encoder, as an evaluate module."""

import datasets
import evaluate
import torch

import memcontrol_hf.metrics

_DESCRIPTION = """Fréchet distance between the features of generated and of real images."""
_INPUTS = """
Args:
    predictions: features of the generated images, M lists of D floats.
    real: features of the real images, `[N, D]`.
Returns:
    fid: 0 for equal sets, lower is better.
"""


class FID(evaluate.Metric):
    """The evaluate module; the formula is `memcontrol_hf.metrics.fid`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="https://huggingface.co/papers/1706.08500",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float32"))}),
        )

    def _compute(self, predictions, real) -> dict[str, float]:
        return {"fid": memcontrol_hf.metrics.fid(torch.as_tensor(predictions), torch.as_tensor(real))}
