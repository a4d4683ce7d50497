"""Measures of two or three sets of features. No result depends on the batch size or on the global random state."""

import math
import warnings

import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance


def _check_features(**sets: torch.Tensor) -> None:
    widths = set()
    for name, features in sets.items():
        if features.ndim != 2 or len(features) == 0:
            raise ValueError(f"{name}: features must be [N, D] with N > 0, but got {list(features.shape)}")
        if not torch.isfinite(features).all():
            bad = int((~torch.isfinite(features).all(1)).sum())
            raise ValueError(f"{name}: {bad} of {len(features)} rows of features are not finite")
        widths.add(features.shape[1])
    if len(widths) > 1:
        raise ValueError(f"features of different widths: {sorted(widths)}; use one encoder for all sets")


def nearest_distances(queries: torch.Tensor, references: torch.Tensor, chunk: int = 8192) -> torch.Tensor:
    """Cosine distance of each query to its nearest reference.

    Args:
        queries (`torch.Tensor`): features `[M, D]`.
        references (`torch.Tensor`): features `[N, D]`.
        chunk (`int`): references compared at once; bounds the memory.

    Returns:
        `torch.Tensor`: `[M]`, in [0, 2]; 0 for a copy.

    Raises:
        ValueError: for empty, non-finite or mismatched features.
    """
    _check_features(queries=queries, references=references)
    queries = F.normalize(queries.float(), dim=1)
    best = queries.new_full((len(queries),), -1.0)
    for part in references.split(chunk):
        best = torch.maximum(best, (queries @ F.normalize(part.float(), dim=1).T).amax(1))
    return (1 - best).clamp(0, 2)


def amd(generated: torch.Tensor, train: torch.Tensor) -> float:
    """Average minimum distance: the mean cosine distance of generated images to the nearest training image.

    As in MemControl (https://huggingface.co/papers/2405.19458). Higher is safer; it means little without the same
    distance to as many held-out images of the same domain beside it.

    Args:
        generated (`torch.Tensor`): features `[M, D]`.
        train (`torch.Tensor`): features `[N, D]`.

    Returns:
        `float`: in [0, 2].
    """
    return nearest_distances(generated, train).mean().item()


def fid(generated: torch.Tensor, real: torch.Tensor) -> float:
    """Fréchet distance between two sets of features (https://huggingface.co/papers/1706.08500).

    Biased upwards for small sets: compare figures only at equal numbers of images, and have more images than features.

    Args:
        generated (`torch.Tensor`): features `[M, D]`, M > 1.
        real (`torch.Tensor`): features `[N, D]`, N > 1.

    Returns:
        `float`: 0 for equal sets, unbounded above.
    """
    _check_features(generated=generated, real=real)
    for name, features in (("generated", generated), ("real", real)):
        if len(features) < 2:
            raise ValueError(f"{name}: a Fréchet distance needs at least 2 images, but got {len(features)}")
        if len(features) <= features.shape[1]:
            warnings.warn(
                f"fid of {len(features)} {name} images in {features.shape[1]} features is unstable: use more images",
                stacklevel=2,
            )
    identity = nn.Identity()
    identity.num_features = real.shape[1]
    # Each process holds all of the features: summing them over the processes would count them several times.
    metric = FrechetInceptionDistance(feature=identity, sync_on_compute=False)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return max(0.0, metric.compute().item())


def auth_pct(generated: torch.Tensor, train: torch.Tensor) -> float:
    """Share of generated images that are authentic, in percent (Alaa et al., https://huggingface.co/papers/2102.08921).

    A generated image is authentic when it is farther from its nearest training image than that image is from its own
    nearest neighbour among the training images, by Euclidean distance. Exact repeats in `train` count once.

    Args:
        generated (`torch.Tensor`): features `[M, D]`.
        train (`torch.Tensor`): features `[N, D]`, at least two of them different.

    Returns:
        `float`: in [0, 100]; higher is safer, and 50 is about what fresh images of the same distribution have.
    """
    _check_features(generated=generated, train=train)
    train = torch.unique(train.double(), dim=0)
    if len(train) < 2:
        raise ValueError("train: the authentic share needs at least 2 different training images")
    distance, nearest = _nearest_euclidean(generated.double(), train)
    among, _ = _nearest_euclidean(train, train, exclude_self=True)
    return 100 * (distance > among[nearest]).double().mean().item()


def c_t(generated: torch.Tensor, train: torch.Tensor, held_out: torch.Tensor) -> float:
    """Data-copying test C_T of Meehan et al. (https://huggingface.co/papers/2004.05675), with space as one cell.

    The z score of the Mann-Whitney U statistic that compares the Euclidean distance to the nearest training image of
    generated images with that of held-out ones; ties count half.

    Args:
        generated (`torch.Tensor`): features `[M, D]`.
        train (`torch.Tensor`): features `[N, D]`.
        held_out (`torch.Tensor`): features `[L, D]`, of the same distribution as `train`.

    Returns:
        `float`: well below 0, generated images are nearer to the training images than held-out ones are (copying);
        well above 0, farther (underfitting). Standard normal where the two are alike.
    """
    _check_features(generated=generated, train=train, held_out=held_out)
    of_generated, _ = _nearest_euclidean(generated.double(), train.double())
    of_held_out, _ = _nearest_euclidean(held_out.double(), train.double())
    m, n = len(generated), len(held_out)
    ordered = of_held_out.sort().values
    below = torch.searchsorted(ordered, of_generated, right=False)
    up_to = torch.searchsorted(ordered, of_generated, right=True)
    u = (below + up_to).double().sum().item() / 2
    return (u - m * n / 2) / math.sqrt(m * n * (m + n + 1) / 12)


def _nearest_euclidean(
    queries: torch.Tensor, references: torch.Tensor, exclude_self: bool = False, chunk: int = 1024
) -> tuple[torch.Tensor, torch.Tensor]:
    """Euclidean distance to the nearest reference and its index, `[M]` each, in bounded memory."""
    distances, indices = [], []
    for start in range(0, len(queries), chunk):
        block = torch.cdist(queries[start : start + chunk], references)
        if exclude_self:
            rows = torch.arange(len(block))
            block[rows, rows + start] = math.inf
        nearest = block.min(1)
        distances.append(nearest.values)
        indices.append(nearest.indices)
    return torch.cat(distances), torch.cat(indices)
