"""Whether a set was trained on as a whole, as an evaluate module."""

import datasets
import evaluate
import torch

import memcontrol_hf.metrics

_DESCRIPTION = """p-value that a training set cannot be told from a held-out set by the scores of several attacks."""
_INPUTS = """
Args:
    predictions: scores of each image by F attacks, each a list of F floats, higher = more member-like.
    references: 1 for an image that was trained on, 0 for a held-out one; 8 or more of each.
    splits: number of random splits, 100 when not given.
    seed: random seed of the splits, 0 when not given.
Returns:
    dataset_inference_p: in [0, 1], small where the training set can be told from the held-out set.
"""


class DatasetInference(evaluate.Metric):
    """The evaluate module; the formula is `memcontrol_hf.metrics.dataset_inference`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="https://huggingface.co/papers/2411.12858",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int32")}
            ),
        )

    def _compute(self, predictions, references, splits=100, seed=0) -> dict[str, float]:
        scores, members = torch.as_tensor(predictions, dtype=torch.double), torch.as_tensor(references).bool()
        p = memcontrol_hf.metrics.dataset_inference(scores[members], scores[~members], splits, seed)
        return {"dataset_inference_p": p}
