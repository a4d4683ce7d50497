"""Similarity to the nearest training image in a copy detector's features, as an evaluate module."""

import datasets
import evaluate
import torch

import memcontrol_hf.metrics

_DESCRIPTION = """Cosine similarity of generated images to the nearest training image, and the share of copies."""
_INPUTS = """
Args:
    predictions: features of the generated images by a copy detector, M lists of D floats.
    train: features of the training images, `[N, D]`.
    held_out: features of held-out images of the same domain, `[L, D]`.
    false_alarms: nominal share of innocent images that are called copies, .01 when not given.
Returns:
    copy_similarity: 95th percentile of the similarity to the nearest training image, in [-1, 1], lower is safer.
    copy_threshold: the similarity that all but false_alarms of the held-out images stay below.
    copy_share with its 95 % interval (copy_share_low, copy_share_high): share of the generated images above it.
"""


class CopySimilarity(evaluate.Metric):
    """The evaluate module; the formula is `memcontrol_hf.metrics.copy_similarity`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="https://huggingface.co/papers/2212.03860",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float32"))}),
        )

    def _compute(self, predictions, train, held_out, false_alarms=0.01) -> dict[str, float]:
        result = memcontrol_hf.metrics.copy_similarity(
            torch.as_tensor(predictions), torch.as_tensor(train), torch.as_tensor(held_out), false_alarms
        )
        return {
            "copy_similarity": result.percentile_95,
            "copy_threshold": result.threshold,
            "copy_share": result.share,
            "copy_share_low": result.interval[0],
            "copy_share_high": result.interval[1],
        }
