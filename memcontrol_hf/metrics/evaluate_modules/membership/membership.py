"""Success of a membership inference attack, as an evaluate module."""

import datasets
import evaluate
import torch

import memcontrol_hf.metrics

_DESCRIPTION = """ROC AUC, with its interval, and true-positive rates of a membership inference attack."""
_INPUTS = """
Args:
    predictions: score of each image, higher = more member-like (say, the negative denoising loss).
    references: 1 for an image that was trained on, 0 for a held-out one.
Returns:
    membership_auc with its 95 % interval (membership_auc_low, membership_auc_high): .5 is chance.
    tpr_at_1_percent_fpr: None with fewer than 100 held-out images.
    tpr_at_0.1_percent_fpr: None with fewer than 1,000 held-out images.
"""


class Membership(evaluate.Metric):
    """The evaluate module; the formula is `memcontrol_hf.metrics.membership`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="https://huggingface.co/papers/2301.09956",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int32")}
            ),
        )

    def _compute(self, predictions, references) -> dict[str, float | None]:
        scores, members = torch.as_tensor(predictions, dtype=torch.double), torch.as_tensor(references).bool()
        result = memcontrol_hf.metrics.membership(scores[members], scores[~members])
        rates = {f"tpr_at_{100 * fpr:g}_percent_fpr": result.tpr_at_fpr(fpr) for fpr in (0.01, 0.001)}
        return {
            "membership_auc": result.auc,
            "membership_auc_low": result.interval[0],
            "membership_auc_high": result.interval[1],
            **{name: None if rate != rate else rate for name, rate in rates.items()},
        }
