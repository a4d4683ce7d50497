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
    amd: in [0, 2], higher is safer.
    The following need held-out images; the larger set is subsampled where the size of a set matters.
    amd_held_out: the same distance to the held-out images.
    nearest_share with its 95 % interval (nearest_share_low, nearest_share_high): share of the generated images that
    are nearer to the training images than to the held-out ones; .5 where nothing was memorized.
    c_t: z score of the data-copying test, well below 0 for copies.
    auth_pct: share of authentic images in percent.
    quantiles, quantiles_held_out: minimum, 1, 5, 25, 50, 75, 95 % and maximum of the distances.
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
        generated, train = torch.as_tensor(predictions), torch.as_tensor(train)
        if held_out is None:
            return {"amd": memcontrol_hf.metrics.amd(generated, train)}
        held_out = torch.as_tensor(held_out)
        nearest = memcontrol_hf.metrics.nearest_share(generated, train, held_out)
        quantiles = torch.tensor([0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 1], dtype=torch.double)
        return {
            "amd": nearest.to_train.mean().item(),
            "amd_held_out": nearest.to_held_out.mean().item(),
            "nearest_share": nearest.share,
            "nearest_share_low": nearest.interval[0],
            "nearest_share_high": nearest.interval[1],
            "c_t": memcontrol_hf.metrics.c_t(generated, train, held_out),
            "auth_pct": memcontrol_hf.metrics.auth_pct(generated, train),
            "quantiles": nearest.to_train.quantile(quantiles).tolist(),
            "quantiles_held_out": nearest.to_held_out.quantile(quantiles).tolist(),
        }
