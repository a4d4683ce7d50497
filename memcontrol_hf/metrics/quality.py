"""Measures of quality. No result depends on the batch size or on the global random state."""

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance

from .distances import check_features

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPProcessor


def fid(generated: torch.Tensor, real: torch.Tensor) -> float:
    """Fréchet distance between two sets of features (https://huggingface.co/papers/1706.08500).

    Biased upwards for small sets: compare figures only at equal numbers of images, and have more images than features.

    Args:
        generated (`torch.Tensor`): features `[M, D]`, M > 1.
        real (`torch.Tensor`): features `[N, D]`, N > 1.

    Returns:
        `float`: 0 for equal sets, unbounded above.
    """
    check_features(generated=generated, real=real)
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
    check_features(generated=generated, real=real)
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
    check_features(generated=generated, real=real)
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


def load_clip(model: str) -> "tuple[CLIPModel, CLIPProcessor]":
    """A CLIP model of a Hub id or folder, with its processor.

    Raises:
        ValueError: when it cannot be loaded.
    """
    from transformers import CLIPModel, CLIPProcessor

    try:
        return CLIPModel.from_pretrained(model).eval(), CLIPProcessor.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the CLIP model {model!r}: {str(error).splitlines()[0]}") from None


def clip_score(
    images: torch.Tensor,
    captions: Sequence[str],
    model: "str | tuple[CLIPModel, CLIPProcessor]",
    batch_size: int = 32,
) -> float:
    """How well images fit their captions (CLIPScore, Hessel et al., https://huggingface.co/papers/2104.08718).

    100 times the cosine similarity of the two CLIP embeddings, at least 0; the mean over the images. (torchmetrics 1.9
    has it too, but for an older transformers.)

    Args:
        images (`torch.Tensor`): `[N, 3, H, W]` in [0, 1].
        captions (list of `str`): one for each image.
        model (`str`): Hub id or folder of a `transformers` CLIP model with its processor, or what [`load_clip`] gives.
        batch_size (`int`): only a matter of memory.

    Returns:
        `float`: in [0, 100]; higher is better. Compare figures of one model only.

    Raises:
        ValueError: when there are not as many captions as images, and for a model that cannot be loaded.
    """
    if len(images) != len(captions) or len(captions) == 0:
        raise ValueError(f"{len(images)} images but {len(captions)} captions: give one for each, at least one")
    clip, processor = model if isinstance(model, tuple) else load_clip(model)
    scores = []
    for start in range(0, len(images), batch_size):
        inputs = processor(
            text=list(captions[start : start + batch_size]),
            images=list((images[start : start + batch_size] * 255).round().byte()),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=clip.config.text_config.max_position_embeddings,
        )
        with torch.no_grad():
            output = clip(**inputs)
        scores.append(F.cosine_similarity(output.image_embeds, output.text_embeds).clamp(min=0))
    return 100 * torch.cat(scores).mean().item()
