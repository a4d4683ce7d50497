"""Measures of image quality. No result depends on the batch size or on the global random state."""

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import CLIPModel, CLIPProcessor

from ..error_lines import first_line
from .distances import check_features


def fid(generated: torch.Tensor, real: torch.Tensor) -> float:
    """Fréchet distance between two sets of features (https://huggingface.co/papers/1706.08500).

    The estimate is biased upwards for small sets: compare figures only at equal numbers of images, and have more
    images than features.

    Args:
        generated (`torch.Tensor`): features `[M, D]`, M > 1.
        real (`torch.Tensor`): features `[N, D]`, N > 1.

    Returns:
        `float`: 0 for equal sets, unbounded above; lower is better.

    Raises:
        ValueError: for fewer than 2 images, and for non-finite or mismatched features.
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
    # Each process holds all features; a sum over the processes would count each image several times.
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
        chunk (`int`): number of images compared at once; bounds the memory.

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
    """The share of generated images that look real, and the share of real images that are covered, each in [0, 1]."""

    precision: float
    recall: float


def precision_recall(
    generated: torch.Tensor, real: torch.Tensor, neighbors: int = 3, chunk: int = 1024
) -> PrecisionRecall:
    """Precision and recall of Kynkäänniemi et al. 2019 (https://huggingface.co/papers/1904.06991).

    Around each image of a set lies a ball that reaches to the k-th nearest image of the same set, by Euclidean
    distance; the set covers what lies in its balls. Precision is the share of generated images that the real set
    covers, recall the share of real images that the generated set covers. Copies of real images have perfect
    precision: read the figures beside a measure of memorization.

    Args:
        generated (`torch.Tensor`): features `[M, D]`, M > `neighbors`.
        real (`torch.Tensor`): features `[N, D]`, N > `neighbors`; the figures change with M and N.
        neighbors (`int`): rank k of the image that a ball reaches to; the paper's is 3.
        chunk (`int`): number of images compared at once; bounds the memory.

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

    def radii(features: torch.Tensor) -> torch.Tensor:  # k + 1, because each image is its own nearest
        return each(features, features, lambda distances: distances.kthvalue(neighbors + 1, dim=1).values)

    def covered(queries: torch.Tensor, references: torch.Tensor) -> float:
        reach = radii(references)
        return each(queries, references, lambda distances: (distances <= reach).any(1)).double().mean().item()

    x, y = generated.double(), real.double()
    return PrecisionRecall(covered(x, y), covered(y, x))


def load_clip(model: str) -> tuple[CLIPModel, CLIPProcessor]:
    """A CLIP model of a Hub id or folder, with its processor.

    Raises:
        ValueError: when the model or its processor cannot be loaded.
    """
    try:
        return CLIPModel.from_pretrained(model).eval(), CLIPProcessor.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the CLIP model {model!r}: {first_line(error)}") from None


def clip_score(
    images: torch.Tensor,
    captions: Sequence[str],
    model: str | tuple[CLIPModel, CLIPProcessor],
    batch_size: int = 32,
) -> float:
    """How well images fit their captions (CLIPScore, Hessel et al., https://huggingface.co/papers/2104.08718).

    The score of an image is 100 times the cosine similarity of the CLIP embeddings of image and caption, at least 0;
    the figure is the mean over the images. (The function of torchmetrics 1.9 needs an older transformers.)

    Args:
        images (`torch.Tensor`): images in [0, 1], `[N, 3, H, W]`.
        captions (list of `str`): caption of each image.
        model (`str` or tuple): Hub id or folder of a `transformers` CLIP model with its processor, or the result of
            [`load_clip`].
        batch_size (`int`): number of images embedded at once; bounds the memory.

    Returns:
        `float`: in [0, 100]; higher is better. Only figures of the same CLIP model can be compared.

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
