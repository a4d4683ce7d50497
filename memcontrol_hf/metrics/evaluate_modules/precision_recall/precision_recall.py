"""Precision and recall in the features of any encoder, as an evaluate module."""

import datasets
import evaluate
import torch

import memcontrol_hf.metrics

_DESCRIPTION = """Share of generated images that look real, and of real images that generated ones cover."""
_INPUTS = """
Args:
    predictions: features of the generated images, M lists of D floats.
    real: features of the real images, `[N, D]`.
    neighbors: rank of the nearest image that each image's ball reaches to, 3 when not given.
Returns:
    precision, recall: each in [0, 1], higher is better.
"""


class PrecisionRecall(evaluate.Metric):
    """The evaluate module; the formula is `memcontrol_hf.metrics.precision_recall`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="https://huggingface.co/papers/1904.06991",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float32"))}),
        )

    def _compute(self, predictions, real, neighbors=3) -> dict[str, float]:
        generated, real = torch.as_tensor(predictions), torch.as_tensor(real)
        return memcontrol_hf.metrics.precision_recall(generated, real, neighbors)._asdict()
