"""Measures of two or three sets of features. No result depends on the batch size or on the global random state."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import bootstrap
from torch import nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance

from ..diffusion import seeded_generator
from .intervals import clopper_pearson


def _check_features(**sets: torch.Tensor) -> None:
    widths = set()
    for name, features in sets.items():
        if features.ndim != 2 or len(features) == 0:
            raise ValueError(f"{name}: features must be [N, D] with N > 0, but got {list(features.shape)}")
        bad = sum(int((~part.isfinite().all(1)).sum()) for part in features.split(8192))
        if bad:
            raise ValueError(f"{name}: {bad} of {len(features)} rows of features are not finite")
        widths.add(features.shape[1])
    if len(widths) > 1:
        raise ValueError(f"features of different widths: {sorted(widths)}; use one encoder for all sets")


def nearest_distances(queries: torch.Tensor, references: torch.Tensor, chunk: int = 2048) -> torch.Tensor:
    """Cosine distance of each query to its nearest reference.

    Args:
        queries (`torch.Tensor`): features `[M, D]`.
        references (`torch.Tensor`): features `[N, D]`.
        chunk (`int`): queries and references compared at once; bounds the memory.

    Returns:
        `torch.Tensor`: `[M]`, in [0, 2]; 0 for a copy.

    Raises:
        ValueError: for empty, non-finite or mismatched features, and for rows of zeros, which have no direction.
    """
    _check_features(queries=queries, references=references)
    for name, features in (("queries", queries), ("references", references)):
        zeros = sum(int((part == 0).all(1).sum()) for part in features.split(8192))
        if zeros:
            raise ValueError(f"{name}: {zeros} of {len(features)} rows of features are zero and have no direction")
    queries = F.normalize(queries.float(), dim=1)
    best = queries.new_full((len(queries),), -1.0)
    for part in references.to(queries.device).split(chunk):
        part = F.normalize(part.float(), dim=1)
        for own, so_far in zip(queries.split(chunk), best.split(chunk)):
            torch.maximum(so_far, (own @ part.T).amax(1), out=so_far)
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


QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Of the distances in a [`NearestShareResult`]."""


@dataclass(frozen=True)
class NearestShareResult:
    """How near generated images are to training images, beside held-out ones.

    Args:
        share (`float`):
            Of the generated images that are nearer to the training images; .5 where nothing was memorized.
        interval (`tuple[float, float]`):
            Of the share, at 95 %.
        references (`int`):
            How many images of each set they were compared with.
        to_train, to_held_out (`dict[float, float]`):
            Quantile (`QUANTILES`) -> cosine distance to the nearest image of the set.
    """

    share: float
    interval: tuple[float, float]
    references: int
    to_train: dict[float, float]
    to_held_out: dict[float, float]


def nearest_share(
    generated: torch.Tensor, train: torch.Tensor, held_out: torch.Tensor, seed: int = 0, resamples: int = 2000
) -> NearestShareResult:
    """The share of generated images that are nearer to the training images than to held-out ones.

    By cosine distance to the nearest image, against equally many images of both sets: the larger one is subsampled,
    since more images are nearer by chance alone. A tie counts half.

    The interval is the percentile bootstrap over the generated images (Efron & Tibshirani 1993, section 13.3). Where
    all of them agree there is nothing to resample, and it is that of Clopper and Pearson. It takes the references and
    the independence of the generated images as given: give one image for each prompt.

    Args:
        generated (`torch.Tensor`): features `[M, D]`.
        train (`torch.Tensor`): features `[N, D]`.
        held_out (`torch.Tensor`): features `[L, D]`, of the same domain as `train`.
        seed (`int`): of the subsample and of the bootstrap.
        resamples (`int`): of the bootstrap.

    Returns:
        [`NearestShareResult`]: a share well above .5 means that the training images were memorized.

    Raises:
        ValueError: for empty, non-finite, zero or mismatched features.
    """
    _check_features(generated=generated, train=train, held_out=held_out)
    count = min(len(train), len(held_out))
    distances = []
    for i, references in enumerate((train, held_out)):
        rows = torch.randperm(len(references), generator=seeded_generator(seed, i))[:count]
        distances.append(nearest_distances(generated, references[rows.to(references.device)]).double().cpu())
    to_train, to_held_out = distances
    nearer = ((to_train < to_held_out).double() + (to_train == to_held_out).double() / 2).numpy()
    share = float(nearer.mean())
    if (nearer == nearer[0]).all():
        interval = clopper_pearson(round(share * len(nearer)), len(nearer))
    else:
        result = bootstrap(
            (nearer,), np.mean, n_resamples=resamples, batch=100, method="percentile", rng=np.random.default_rng(seed)
        )
        interval = tuple(map(float, result.confidence_interval))
    return NearestShareResult(share, interval, count, _quantiles(to_train), _quantiles(to_held_out))


def _quantiles(distances: torch.Tensor) -> dict[float, float]:
    return dict(zip(QUANTILES, np.quantile(distances.numpy(), QUANTILES).tolist()))


@dataclass(frozen=True)
class CopySimilarityResult:
    """What a copy detector says of generated images.

    Args:
        percentile_95 (`float`): of the generated images' similarity to the nearest training image, in [-1, 1].
        threshold (`float`): above it an image counts as a copy.
        share (`float`): of the generated images that count as copies.
        interval (`tuple[float, float]`): of the share, Clopper-Pearson at 95 %.
        similarities (`torch.Tensor`): `[M]`, of each generated image, on the CPU.
    """

    percentile_95: float
    threshold: float
    share: float
    interval: tuple[float, float]
    similarities: torch.Tensor


def copy_similarity(
    generated: torch.Tensor, train: torch.Tensor, held_out: torch.Tensor, false_alarms: float = 0.01
) -> CopySimilarityResult:
    """How alike generated images are to the nearest training image, in the features of a copy detector.

    The 95th percentile of the cosine similarity is what Somepalli et al. report
    (https://huggingface.co/papers/2212.03860). No threshold of it carries from one detector or domain to another, so
    it is the similarity to the nearest training image that all but `false_alarms` of the held-out images stay below:
    they cannot be copies.

    Args:
        generated (`torch.Tensor`): features `[M, D]`.
        train (`torch.Tensor`): features `[N, D]`.
        held_out (`torch.Tensor`): features `[L, D]`, of the same domain as `train`. With fewer than `1 / false_alarms`
            images the threshold lies near the largest of them, and more than the nominal share is called a copy.
        false_alarms (`float`): nominal share of images that are no copies and are called so; .01 takes the 99th
            percentile.

    Returns:
        [`CopySimilarityResult`]: compare the share with `false_alarms`.

    Raises:
        ValueError: for empty, non-finite, zero or mismatched features, and when no image could pass the threshold:
            held-out images are among the training images, or the detector cannot tell images apart.
    """
    if not 0 < false_alarms < 1:
        raise ValueError(f"false_alarms must lie between 0 and 1, but got {false_alarms}")
    _check_features(generated=generated, train=train, held_out=held_out)
    similarities = 1 - nearest_distances(generated, train).double().cpu()
    innocent = 1 - nearest_distances(held_out, train).double().cpu()
    threshold = float(np.quantile(innocent.numpy(), 1 - false_alarms))
    if threshold > 1 - 1e-6:
        raise ValueError(
            f"{int((innocent > 1 - 1e-6).sum())} of {len(innocent)} held-out images are as near to a training image "
            "as a copy is: the sets overlap, or this detector cannot tell images apart, so that no copy can be told"
        )
    copies = int((similarities > threshold).sum())
    interval = clopper_pearson(copies, len(similarities))
    percentile = float(np.quantile(similarities.numpy(), 0.95))
    return CopySimilarityResult(percentile, threshold, copies / len(similarities), interval, similarities)


def kid(generated: torch.Tensor, real: torch.Tensor, chunk: int = 2048) -> float:
    """Kernel distance between two sets of features (Bińkowski et al., https://huggingface.co/papers/1801.01401).

    The unbiased squared MMD with the kernel `(x·y / D + 1)³`, over all images: no random subsets. Unlike the Fréchet
    distance it has no bias for small sets.

    Args:
        generated (`torch.Tensor`): features `[M, D]`, M > 1.
        real (`torch.Tensor`): features `[N, D]`, N > 1.
        chunk (`int`): images compared at once; bounds the memory.

    Returns:
        `float`: 0 on average for sets of one distribution (it can be below), unbounded above; lower is better.

    Raises:
        ValueError: for fewer than 2 images, and for non-finite or mismatched features.
    """
    _check_features(generated=generated, real=real)
    for name, features in (("generated", generated), ("real", real)):
        if len(features) < 2:
            raise ValueError(f"{name}: a kernel distance needs at least 2 images, but got {len(features)}")

    def kernel(dots: torch.Tensor) -> torch.Tensor:
        return (dots / real.shape[1] + 1).pow(3)

    def total(a: torch.Tensor, b: torch.Tensor) -> float:
        return sum(kernel(x @ y.T).sum().item() for x in a.split(chunk) for y in b.split(chunk))

    def within(a: torch.Tensor) -> float:
        return (total(a, a) - kernel(a.square().sum(1)).sum().item()) / (len(a) * (len(a) - 1))

    x, y = generated.double(), real.double()
    return within(x) + within(y) - 2 * total(x, y) / (len(x) * len(y))


class PrecisionRecall(NamedTuple):
    """How many generated images look real, and how much of the real images is covered: each in [0, 1]."""

    precision: float
    recall: float


def precision_recall(
    generated: torch.Tensor, real: torch.Tensor, neighbors: int = 3, chunk: int = 1024
) -> PrecisionRecall:
    """Precision and recall of Kynkäänniemi et al. 2019 (https://huggingface.co/papers/1904.06991).

    A set covers the balls around its images that reach to each one's k-th nearest image of the same set, by Euclidean
    distance. Precision is the share of generated images that the real ones cover, recall the share of real images that
    the generated ones cover. Copies of real images have perfect precision: read it beside a measure of memorization.

    Args:
        generated (`torch.Tensor`): features `[M, D]`, M > `neighbors`.
        real (`torch.Tensor`): features `[N, D]`, N > `neighbors`; the figures change with M and N.
        neighbors (`int`): k; the paper's is 3.
        chunk (`int`): images compared at once; bounds the memory.

    Returns:
        [`PrecisionRecall`]: `precision` and `recall`, each in [0, 1], higher is better.

    Raises:
        ValueError: for no more images than neighbours, and for non-finite or mismatched features.
    """
    _check_features(generated=generated, real=real)
    for name, features in (("generated", generated), ("real", real)):
        if not 1 <= neighbors < len(features):
            raise ValueError(
                f"{name}: {neighbors} neighbors of {len(features)} images; it must be 1 or more, and fewer"
            )

    def each(queries: torch.Tensor, references: torch.Tensor, judge: Callable) -> torch.Tensor:
        return torch.cat([judge(torch.cdist(part, references)) for part in queries.split(chunk)])

    def radii(features: torch.Tensor) -> torch.Tensor:  # an image is its own nearest, at 0
        return each(features, features, lambda distances: distances.kthvalue(neighbors + 1, dim=1).values)

    def covered(queries: torch.Tensor, references: torch.Tensor) -> float:
        reach = radii(references)
        return each(queries, references, lambda distances: (distances <= reach).any(1)).double().mean().item()

    x, y = generated.double(), real.double()
    return PrecisionRecall(covered(x, y), covered(y, x))
