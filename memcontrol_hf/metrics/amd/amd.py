"""Average minimum distance, as an evaluate module."""

import datasets
import evaluate
import torch

import memcontrol_hf.metrics

_DESCRIPTION = """Mean cosine distance of generated images to the nearest training image."""
_INPUTS = """
Args:
    predictions: features of the generated images, M lists of D floats.
    train: features of the training images, `[N, D]`.
    held_out: features of held-out images of the same domain, `[N', D]`; optional.
Returns:
    amd: in [0, 2], higher is safer; amd_held_out: the same to the held-out images, when given.
"""


class AMD(evaluate.Metric):
    """The evaluate module; the formula is `memcontrol_hf.metrics.amd`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="https://huggingface.co/papers/2405.19458",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float32"))}),
        )

    def _compute(self, predictions, train, held_out=None) -> dict[str, float]:
        generated = torch.as_tensor(predictions)
        result = {"amd": memcontrol_hf.metrics.amd(generated, torch.as_tensor(train))}
        if held_out is not None:
            result["amd_held_out"] = memcontrol_hf.metrics.amd(generated, torch.as_tensor(held_out))
        return result
