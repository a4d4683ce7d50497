"""Kernel distance in the features of any encoder, as an evaluate module."""

import datasets
import evaluate
import torch

import memcontrol_hf.metrics

_DESCRIPTION = """Unbiased kernel distance between the features of generated and of real images."""
_INPUTS = """
Args:
    predictions: features of the generated images, M lists of D floats.
    real: features of the real images, `[N, D]`.
Returns:
    kid: 0 on average for sets of one distribution, lower is better.
"""


class KID(evaluate.Metric):
    """The evaluate module; the formula is `memcontrol_hf.metrics.kid`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="https://huggingface.co/papers/1801.01401",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float32"))}),
        )

    def _compute(self, predictions, real) -> dict[str, float]:
        return {"kid": memcontrol_hf.metrics.kid(torch.as_tensor(predictions), torch.as_tensor(real))}
