"""How near generated images are to training images, by the features of an encoder.

No result depends on the batch size or on the global random state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import bootstrap
from torch.nn import functional as F

from ..randomness import seeded_generator
from .intervals import clopper_pearson
from .persons import mean_of_persons, share_of_draws


def check_features(**sets: torch.Tensor) -> None:
    """Raise `ValueError` for sets of features that are empty, not finite, or of different widths."""
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
        chunk (`int`): number of queries and of references compared at once; bounds the memory.

    Returns:
        `torch.Tensor`: `[M]`, in [0, 2]; 0 for a copy.

    Raises:
        ValueError: for empty, non-finite or mismatched features, and for rows of zeros, which have no direction.
    """
    check_features(queries=queries, references=references)
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

    The measure is MemControl's (https://huggingface.co/papers/2405.19458). Higher is safer. The figure means little
    without the same distance to as many held-out images of the same domain beside it.

    Args:
        generated (`torch.Tensor`): features `[M, D]`.
        train (`torch.Tensor`): features `[N, D]`.

    Returns:
        `float`: in [0, 2].
    """
    return nearest_distances(generated, train).mean().item()


def auth_pct(generated: torch.Tensor, train: torch.Tensor) -> float:
    """Share of generated images that are authentic, in percent (Alaa et al., https://huggingface.co/papers/2102.08921).

    A generated image is authentic when it is farther from its nearest training image than that image is from its own
    nearest neighbour among the training images, by Euclidean distance. Exact repeats in `train` count once.

    Args:
        generated (`torch.Tensor`): features `[M, D]`.
        train (`torch.Tensor`): features `[N, D]`, at least two of them different.

    Returns:
        `float`: in [0, 100]; higher is safer. The figure of fresh images depends on the encoder and the data (57 for
        the demo's held-out images, 81 for normal draws in 128 dimensions): compare with the figure of held-out images.
    """
    check_features(generated=generated, train=train)
    train = torch.unique(train.double(), dim=0)
    if len(train) < 2:
        raise ValueError("train: the authentic share needs at least 2 different training images")
    distance, nearest = nearest_euclidean(generated.double(), train)
    among, _ = nearest_euclidean(train, train, owners=range(len(train)))
    return 100 * (distance > among[nearest]).double().mean().item()


def c_t(generated: torch.Tensor, train: torch.Tensor, held_out: torch.Tensor) -> float:
    """Data-copying test C_T of Meehan et al. (https://huggingface.co/papers/2004.05675), all of space as one cell.

    The z score of the Mann-Whitney U statistic that compares generated with held-out images by their Euclidean
    distance to the nearest training image; ties count half.

    Args:
        generated (`torch.Tensor`): features `[M, D]`.
        train (`torch.Tensor`): features `[N, D]`.
        held_out (`torch.Tensor`): features `[L, D]`, of the same distribution as `train`.

    Returns:
        `float`: well below 0 where generated images are nearer to the training images than held-out ones are
        (copying), well above 0 where they are farther (underfitting). The score is standard normal for independent
        images of one distribution; but several images of a prompt are not independent, and a generator's style alone
        moves the score.
    """
    check_features(generated=generated, train=train, held_out=held_out)
    generated_distances, _ = nearest_euclidean(generated.double(), train.double())
    held_out_distances, _ = nearest_euclidean(held_out.double(), train.double())
    m, n = len(generated), len(held_out)
    ordered = held_out_distances.sort().values
    below = torch.searchsorted(ordered, generated_distances, right=False)
    up_to = torch.searchsorted(ordered, generated_distances, right=True)
    u = (below + up_to).double().sum().item() / 2
    return (u - m * n / 2) / math.sqrt(m * n * (m + n + 1) / 12)


def nearest_euclidean(
    queries: torch.Tensor, references: torch.Tensor, owners: Sequence[int] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Euclidean distance to the nearest reference, and its index: `[M]` each. About 2^24 distances fit in memory.

    Args:
        queries (`torch.Tensor`): features `[M, D]`.
        references (`torch.Tensor`): features `[N, D]`.
        owners (list of `int`): where the queries are the references, the number of each row's owner, `[N]`. Rows of
            one owner are not compared; with `range(N)` no row is compared with itself.
    """
    chunk = max(1, 2**24 // len(references))
    numbers = torch.tensor(owners, device=queries.device)
    distances, indices = [], []
    for start in range(0, len(queries), chunk):
        block = torch.cdist(queries[start : start + chunk], references)
        if len(owners):
            block.masked_fill_(numbers[start : start + chunk, None] == numbers, math.inf)
        nearest = block.min(1)
        distances.append(nearest.values)
        indices.append(nearest.indices)
    return torch.cat(distances), torch.cat(indices)


@dataclass(frozen=True)
class NearestShareResult:
    """How near generated images are to training images, beside held-out ones.

    Args:
        share (`float`):
            Share of the generated images that are nearer to the training images; .5 where nothing was memorized.
        interval (`tuple[float, float]`):
            Interval of the share at 95 %.
        references (`int`):
            Number of images of each set that the generated images were compared with.
        to_train, to_held_out (`torch.Tensor`):
            Cosine distance of each generated image to the nearest image of the set, `[M]`.
    """

    share: float
    interval: tuple[float, float]
    references: int
    to_train: torch.Tensor
    to_held_out: torch.Tensor


def distances_to_both(
    generated: torch.Tensor,
    train: torch.Tensor,
    held_out: torch.Tensor,
    seed: int | tuple[int, ...] = 0,
    own: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine distances of generated images to the nearest of equally many training and held-out images.

    The larger set is subsampled, because the nearest of more images is nearer by chance alone. A larger training set
    gives the images of the prompts first, as many as fit, and the others at random. Each generated image is also
    compared with its own prompt's image, which the subsample may lack: else a copy of that image would go unseen.

    Args:
        generated (`torch.Tensor`): features `[M, D]`.
        train (`torch.Tensor`): features `[N, D]`.
        held_out (`torch.Tensor`): features `[L, D]`.
        seed (`int` or tuple of `int`): random seed of the subsample.
        own (list of `int`): row in `train` of each of the `P` prompts' images; the generated images are `M / P` of
            the first prompt, then as many of the second, and so on. Empty where the prompts are not known.

    Returns:
        pair of `torch.Tensor`, `[M]` each: distances to the training and to the held-out images.

    Raises:
        ValueError: for empty, non-finite, zero or mismatched features.
    """
    check_features(generated=generated, train=train, held_out=held_out)
    count, key = min(len(train), len(held_out)), (seed,) if isinstance(seed, int) else seed
    order, order_held_out = (
        torch.randperm(len(references), generator=seeded_generator(*key, i))
        for i, references in enumerate((train, held_out))
    )
    fewer = len(own) > 0 and len(train) > count
    if fewer:
        order = torch.tensor(list(dict.fromkeys([*own, *order.tolist()])))
    to_train, to_held_out = (
        nearest_distances(generated, references[rows[:count].to(references.device)])
        for rows, references in ((order, train), (order_held_out, held_out))
    )
    if fewer:
        originals = train[torch.tensor(own)].repeat_interleave(len(generated) // len(own), 0).to(generated.device)
        to_own = 1 - F.cosine_similarity(generated.float(), originals.float())
        to_train = torch.minimum(to_train, to_own.clamp(0, 2))
    return to_train, to_held_out


def nearest_share(
    generated: torch.Tensor,
    train: torch.Tensor,
    held_out: torch.Tensor,
    seed: int = 0,
    resamples: int = 2000,
    per_prompt: int = 1,
    own: Sequence[int] = (),
    persons: Sequence[int] = (),
) -> NearestShareResult:
    """The share of generated images that are nearer to the training images than to held-out ones.

    Nearer is meant by the cosine distance to the nearest image, against equally many images of both sets
    ([`distances_to_both`]). A tie counts half.

    The interval is the percentile bootstrap over the prompts (Efron & Tibshirani 1993, section 13.3): images of one
    prompt are alike and stay together. Where all prompts agree there is nothing to resample, and the interval is
    Clopper and Pearson's. The references are taken as given: which images happen to be in `train` and `held_out` moves
    the share by more than the interval says. Compare the share only with that of a model that saw none of the images.

    Args:
        generated (`torch.Tensor`): features `[M, D]`.
        train (`torch.Tensor`): features `[N, D]`.
        held_out (`torch.Tensor`): features `[L, D]`, of the same domain as `train`.
        seed (`int`): random seed of the subsample and of the bootstrap.
        resamples (`int`): number of resamples of the bootstrap.
        per_prompt (`int`): number of generated images in a row that belong to one prompt.
        own (list of `int`): row in `train` of each prompt's image, where the prompts are those of training images.
            Without these rows, copies of images that the subsample of a larger `train` leaves out are not seen.
        persons (list of `int`): number of the person of each prompt, where persons and not prompts are the draws: the
            share is then the mean over persons, who are resampled.

    Returns:
        [`NearestShareResult`]: a share well above that of a model that saw none of the images means memorization.

    Raises:
        ValueError: for empty, non-finite, zero or mismatched features.
    """
    both = distances_to_both(generated, train, held_out, seed, own)
    to_train, to_held_out = (distances.double().cpu() for distances in both)
    nearer = (to_train < to_held_out).double() + (to_train == to_held_out).double() / 2
    nearer = nearer.view(-1, per_prompt).mean(1)
    nearer = (mean_of_persons(nearer, persons) if persons else nearer).numpy()
    share = float(nearer.mean())
    if (nearer == nearer[0]).all():
        interval = clopper_pearson(share * len(nearer), len(nearer))
    else:
        result = bootstrap(
            (nearer,), np.mean, n_resamples=resamples, batch=100, method="percentile", rng=np.random.default_rng(seed)
        )
        interval = tuple(map(float, result.confidence_interval))
    return NearestShareResult(share, interval, min(len(train), len(held_out)), to_train, to_held_out)


@dataclass(frozen=True)
class CopySimilarityResult:
    """How alike generated images are to training images, in the features of a copy detector.

    Args:
        percentile_95 (`float`): 95th percentile of the similarity to the nearest training image, in [-1, 1].
        threshold (`float`): similarity above which an image counts as a copy.
        share (`float`): share of the generated images that count as copies, or its mean over persons.
        interval (`tuple[float, float]`): interval of the share, Clopper-Pearson at 95 % over the prompts or persons.
        similarities (`torch.Tensor`): similarity of each generated image to its nearest training image, `[M]`, on the
            CPU.
    """

    percentile_95: float
    threshold: float
    share: float
    interval: tuple[float, float]
    similarities: torch.Tensor


def copy_similarity(
    generated: torch.Tensor,
    train: torch.Tensor,
    held_out: torch.Tensor,
    false_alarms: float = 0.01,
    per_prompt: int = 1,
    persons: Sequence[int] = (),
) -> CopySimilarityResult:
    """How alike generated images are to the nearest training image, in the features of a copy detector.

    The 95th percentile of the cosine similarity is what Somepalli et al. report
    (https://huggingface.co/papers/2212.03860). No threshold carries from one detector or domain to another. The
    threshold here is the similarity to the nearest training image that all but `false_alarms` of the held-out images,
    which cannot be copies, stay below.

    Args:
        generated (`torch.Tensor`): features `[M, D]`.
        train (`torch.Tensor`): features `[N, D]`.
        held_out (`torch.Tensor`): features `[L, D]`, of the same domain as `train`. With fewer than `1 / false_alarms`
            images the threshold lies near their largest similarity, and more than the nominal share is called a copy.
        false_alarms (`float`): nominal share of the images that are called copies and are none; .01 takes the 99th
            percentile.
        per_prompt (`int`): number of generated images in a row that belong to one prompt, which counts as one draw.
        persons (list of `int`): number of the person of each prompt, where persons and not prompts are the draws: the
            share is then the mean over persons.

    Returns:
        [`CopySimilarityResult`]: compare the share with `false_alarms`.

    Raises:
        ValueError: for empty, non-finite, zero or mismatched features, for `false_alarms` outside (0, 1), and when no
            image could pass the threshold: held-out images are among the training images, or the detector cannot tell
            images apart.
    """
    if not 0 < false_alarms < 1:
        raise ValueError(f"false_alarms must lie between 0 and 1, but got {false_alarms}")
    check_features(generated=generated, train=train, held_out=held_out)
    similarities = 1 - nearest_distances(generated, train).double().cpu()
    innocent = 1 - nearest_distances(held_out, train).double().cpu()
    threshold = float(np.quantile(innocent.numpy(), 1 - false_alarms))
    if threshold > 1 - 1e-6:
        raise ValueError(
            f"{int((innocent > 1 - 1e-6).sum())} of {len(innocent)} held-out images are as near to a training image "
            "as a copy is: the sets overlap, or this detector cannot tell images apart, so that no copy can be told"
        )
    share, interval = share_of_draws(similarities > threshold, per_prompt, persons)
    percentile = float(np.quantile(similarities.numpy(), 0.95))
    return CopySimilarityResult(percentile, threshold, share, interval, similarities)
