"""Norm of the text's pull on the noise prediction, as an evaluate module."""

import datasets
import evaluate
import torch

import memcontrol_hf.metrics

_DESCRIPTION = """Mean Euclidean norm of the conditional minus the unconditional noise prediction."""
_INPUTS = """
Args:
    predictions: conditional noise predictions, each flattened to a list of D floats.
    references: unconditional noise predictions of the same noised images, likewise.
Returns:
    noise_norm: mean of the norms, ≥ 0.
    noise_norms: norm of each image.
"""


class NoiseNorm(evaluate.Metric):
    """The evaluate module; the formula is `memcontrol_hf.metrics.steering_norms`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="https://huggingface.co/papers/2407.21720",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Sequence(datasets.Value("float32")),
                }
            ),
        )

    def _compute(self, predictions, references) -> dict[str, float | list[float]]:
        norms = memcontrol_hf.metrics.steering_norms(torch.as_tensor(predictions), torch.as_tensor(references))
        return {"noise_norm": norms.mean().item(), "noise_norms": norms.tolist()}
