"""The extraction attack: whether training images come out of a model again."""

import itertools
import math
from dataclasses import dataclass

import networkx
import torch

from ..images import TILES, cut_into_tiles
from .intervals import clopper_pearson


@dataclass(frozen=True)
class ExtractionResult:
    """The findings of the extraction attack, prompt by prompt.

    Args:
        memorized (`torch.Tensor`): whether the images of each prompt hold a large enough clique, bool `[P]`.
        extracted (`torch.Tensor`): whether a member of such a clique is as close to the training image, bool `[P]`.
        rate (`float`): share of the prompts that are extracted.
        interval (`tuple[float, float]`): interval of the rate, Clopper-Pearson at 95 %.
        nearest (`torch.Tensor`): smallest tile distance of each prompt's images to the training image, `[P]`.
        calibrated (`torch.Tensor`, *optional*): whether each prompt is extracted by the calibrated distance, bool
            `[P]`. This and the following are `None` without held-out images.
        calibrated_distance (`torch.Tensor`, *optional*): smallest calibrated distance of each prompt's images, `[P]`.
        calibrated_rate (`float`, *optional*): share of the prompts that are extracted by the calibrated distance.
        calibrated_interval (`tuple[float, float]`, *optional*): interval of `calibrated_rate`, Clopper-Pearson at
            95 %.
    """

    memorized: torch.Tensor
    extracted: torch.Tensor
    rate: float
    interval: tuple[float, float]
    nearest: torch.Tensor
    calibrated: torch.Tensor | None = None
    calibrated_distance: torch.Tensor | None = None
    calibrated_rate: float | None = None
    calibrated_interval: tuple[float, float] | None = None


def extraction(
    generated: torch.Tensor,
    train: torch.Tensor,
    threshold: float = 20.0,
    clique_size: int = 3,
    held_out: torch.Tensor | None = None,
    neighbors: int = 50,
    scale: float = 0.5,
) -> ExtractionResult:
    """The extraction attack of Carlini et al. 2023 (https://huggingface.co/papers/2301.13188).

    Two images of one prompt are joined when their tile distance is at most the threshold. The prompt counts as
    memorized when `clique_size` images are all joined with each other, and as extracted when a member of such a clique
    is also within the threshold of the training image.

    An absolute threshold fits one size and kind of image. With held-out images, the calibrated distance of section 5
    of the paper is also taken, on the tile distance d:

        d(x, t) / (scale * mean of d(x, h) over the `neighbors` held-out images h that are nearest to x)

    for a generated image x and its prompt's training image t. The prompt counts as extracted when the calibrated
    distance of one of its images is at most 1. No clique is needed, because an audit has the training image. The paper
    takes the neighbours from the training set; distances to held-out images do not depend on how many near-duplicates
    a training image has.

    Args:
        generated (`torch.Tensor`): images in [0, 1], `[P, K, C, H, W]`: K for each of P prompts.
        train (`torch.Tensor`): the prompts' training images in [0, 1], `[P, C, H, W]`.
        threshold (`float`): largest tile distance of two images that count as alike; 20 is MemControl's for RGB at
            224 px, and the threshold scales with the side.
        clique_size (`int`): number of images in a clique, at least 2.
        held_out (`torch.Tensor`, *optional*): images of the same domain that were not trained on, `[L, C, H, W]`.
            Fewer images than `neighbors` are all taken, which calls more prompts extracted, not fewer.
        neighbors (`int`): number of neighbours of each generated image; the paper's is 50.
        scale (`float`): share of the mean distance to the neighbours within which an image counts as extracted; the
            paper's is .5.

    Returns:
        [`ExtractionResult`]: findings, on the CPU. Memory is needed for one copy of `held_out` and of one prompt's
        images, beside the arguments.

    Raises:
        ValueError: for shapes that do not fit, fewer images than a clique needs, values outside [0, 1], a side that 4
            does not divide, and thresholds that are not positive.
    """
    _check_images(generated, train, held_out, clique_size)
    if not (threshold > 0 and scale > 0 and neighbors >= 1):
        raise ValueError(
            f"threshold {threshold} and scale {scale} must be positive, and neighbors {neighbors} at least 1"
        )
    reference = None if held_out is None else cut_into_tiles(held_out.to(generated.device))
    memorized, extracted, nearest, ratios = [], [], [], []
    for images, original in zip(generated, train):
        joined, to_original = _compare(images, original.to(images), threshold)
        near = (to_original <= threshold).tolist()
        members = _in_cliques(joined, clique_size)
        memorized.append(bool(members))
        extracted.append(any(near[node] for node in members))
        nearest.append(to_original.min().item())
        if reference is not None:
            to_others = torch.cdist(cut_into_tiles(images), reference).amax(0)
            usual = to_others.topk(min(neighbors, to_others.shape[1]), largest=False).values.mean(1)
            # 0 / 0 where held-out images are copies, too; the training image was extracted all the same
            ratios.append((to_original / (scale * usual)).nan_to_num(nan=0.0, posinf=math.inf).min().item())
    result = (torch.tensor(memorized), torch.tensor(extracted), *_rate(extracted), torch.tensor(nearest))
    if reference is None:
        return ExtractionResult(*result)
    calibrated = torch.tensor(ratios) <= 1
    return ExtractionResult(*result, calibrated, torch.tensor(ratios), *_rate(calibrated.tolist()))


def _check_images(
    generated: torch.Tensor, train: torch.Tensor, held_out: torch.Tensor | None, clique_size: int
) -> None:
    if generated.ndim != 5 or train.ndim != 4 or generated.shape[2:] != train.shape[1:]:
        raise ValueError(
            f"generated must be [P, K, C, H, W] and train [P, C, H, W], but got {list(generated.shape)} and "
            f"{list(train.shape)}"
        )
    if len(generated) != len(train) or len(train) == 0:
        raise ValueError(f"{len(generated)} prompts but {len(train)} training images: give one for each, at least one")
    if clique_size < 2 or generated.shape[1] < clique_size:
        raise ValueError(
            f"cliques of {clique_size} need {max(2, clique_size)} images or more of each prompt, but there are "
            f"{generated.shape[1]}; the smallest clique is 2"
        )
    if generated.shape[-1] % TILES or generated.shape[-2] % TILES or 0 in generated.shape[-3:]:
        raise ValueError(f"images of {list(generated.shape[-2:])} pixels cannot be cut into {TILES} x {TILES} tiles")
    if held_out is not None and (held_out.shape[1:] != train.shape[1:] or len(held_out) == 0):
        raise ValueError(
            f"held_out must be [L, {', '.join(map(str, train.shape[1:]))}], L > 0, but got {list(held_out.shape)}"
        )
    for name, images in (("generated", generated), ("train", train), ("held_out", held_out)):
        if images is None:
            continue
        low, high = (bound.item() for bound in torch.aminmax(images))
        if not (low >= 0 and high <= 1):  # true for NaN, too
            raise ValueError(f"{name}: images must lie in [0, 1], but reach {low:.4g} to {high:.4g}")


def _compare(images: torch.Tensor, original: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Which images `[K, C, H, W]` are within the threshold of each other, and how far each is from the original.

    Returns:
        pair of `torch.Tensor`: bool `[K, K]`, above the diagonal only, and the tile distances `[K]`.
    """
    height, width = (side // TILES for side in images.shape[-2:])
    original = original.float()

    def tile_norms(few: torch.Tensor) -> torch.Tensor:
        squares = (few.float() - original).square_()
        return squares.unflatten(3, (TILES, width)).unflatten(2, (TILES, height)).sum(-1).sum((1, 3)).sqrt()

    # A few images at a time, so that intermediate results stay in the processor's cache.
    to_original = torch.cat([tile_norms(few).amax((1, 2)) for few in images.split(8)])
    # By the triangle inequality, two images are no farther apart than the sum of their distances to the original.
    joined = (to_original[:, None] + to_original <= threshold).triu(1)
    open_pairs = (~joined).triu(1)
    for y, x in itertools.product(range(0, height * TILES, height), range(0, width * TILES, width)):
        if not open_pairs.any():  # one tile above the threshold is enough to part two images
            break
        place = (..., slice(y, y + height), slice(x, x + width))
        # Differences to the original: a copy of it gives a short vector, for which float32 is precise enough.
        tile = (images[place].float() - original[place]).flatten(1)
        squares = tile.square().sum(1)
        open_pairs &= squares[:, None] + squares - 2 * (tile @ tile.T) <= threshold**2
    return joined | open_pairs, to_original


def _rate(found: list[bool]) -> tuple[float, tuple[float, float]]:
    """The share of `found` that is true, with its Clopper-Pearson interval at 95 %."""
    return sum(found) / len(found), clopper_pearson(sum(found), len(found))


def _in_cliques(joined: torch.Tensor, size: int) -> set[int]:
    """The images that belong to a clique of at least `size`, where `joined` `[K, K]` says which pairs are joined."""
    graph = networkx.Graph(joined.nonzero().tolist())
    members = set()
    for node in graph:
        if node not in members:
            large = (clique for clique in networkx.find_cliques(graph, [node]) if len(clique) >= size)
            members.update(next(large, ()))
    return members
