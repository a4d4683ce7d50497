"""Generated images that hold a part of a training image, as an evaluate module."""

import datasets
import evaluate
import torch

import memcontrol_hf.metrics

_DESCRIPTION = """Share of generated images that hold a quarter or more of a training image at its place."""
_INPUTS = """
Args:
    predictions: generated images in [0, 1]: M nested lists [C][H][W].
    train: training images in [0, 1], `[N, C, H, W]`.
    held_out: held-out images of the same domain in [0, 1], `[L, C, H, W]`.
    false_alarms: nominal share of innocent images that are called copies, .01 when not given.
Returns:
    partial_copy_share with its 95 % interval (partial_copy_share_low, partial_copy_share_high), in [0, 1], lower is
        safer.
    partial_copy_threshold: the relative distance that all but false_alarms of the held-out images stay above.
"""


class PartialCopies(evaluate.Metric):
    """The evaluate module; the formula is `memcontrol_hf.metrics.partial_copies`."""

    def _info(self) -> evaluate.MetricInfo:
        image = datasets.Sequence(datasets.Sequence(datasets.Sequence(datasets.Value("float32"))))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="https://huggingface.co/papers/2410.21665",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": image}),
        )

    def _compute(self, predictions, train, held_out, false_alarms=0.01) -> dict[str, float]:
        sets = (torch.as_tensor(images) for images in (predictions, train, held_out))
        result = memcontrol_hf.metrics.partial_copies(*sets, false_alarms)
        return {
            "partial_copy_share": result.share,
            "partial_copy_share_low": result.interval[0],
            "partial_copy_share_high": result.interval[1],
            "partial_copy_threshold": result.threshold,
        }
