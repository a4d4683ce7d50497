"""Partial copies: a part of a training image in a generated image whose other parts are different."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .distances import nearest_euclidean
from .persons import share_of_draws

SIDE, WINDOW, STRIDE = 32, 16, 4
"""Side in pixels at which images are compared, side of a window (a quarter of the image), and step between windows."""

_FLOOR = 0.02  # of the brightness: a difference, or a contrast, as small as five grey levels of 255 says nothing


@dataclass(frozen=True)
class PartialCopiesResult:
    """The generated images that hold a part of a training image.

    Args:
        share (`float`): share of the generated images that hold a copied part, or its mean over persons.
        interval (`tuple[float, float]`): interval of the share, Clopper-Pearson at 95 % over the prompts or persons.
        threshold (`float`): distance below which an image counts as a partial copy.
        distances (`torch.Tensor`): the smallest relative distance of a window of each generated image, `[M]`, on the
            CPU; infinite for an image without any contrast.
        nearest (`torch.Tensor`): row of the training image to which that window is nearest, `[M]`, on the CPU.
    """

    share: float
    interval: tuple[float, float]
    threshold: float
    distances: torch.Tensor
    nearest: torch.Tensor


def comparable(images: torch.Tensor) -> torch.Tensor:
    """Images `[N, C, H, W]` at the size at which [`partial_copies`] compares them: `[N, C, 32, 32]`."""
    return F.interpolate(images.float(), (SIDE, SIDE), mode="area")


def partial_copies(
    generated: torch.Tensor,
    train: torch.Tensor,
    held_out: torch.Tensor,
    false_alarms: float = 0.01,
    per_prompt: int = 1,
    persons: Sequence[int] = (),
    held_out_persons: Sequence[int] = (),
) -> PartialCopiesResult:
    """Generated images that hold a part of a training image, at its place, while their other parts are different.

    The tile distance of Carlini et al. (https://huggingface.co/papers/2301.13188) is that of the *most different*
    tile. It hides such copies, which are known as local memorization (https://huggingface.co/papers/2410.21665). Here
    an image is looked at through 25 windows, each a quarter of the image. The relative distance of a window is

        d(window, nearest training image) / (d(window, nearest held-out image) + floor)

    where d is the Euclidean distance of the pixels at the window's place. What all images of the domain have in
    common, such as a black corner, is as near in both sets and gives about 1; a copied part is near in one set alone.
    Windows whose contrast is below the floor (.02 of the brightness) are not looked at. The distance of an image is
    that of its smallest window. The image counts as a partial copy when its distance lies below the threshold that all
    but `false_alarms` of the held-out images stay above; each of these is compared with the held-out images of other
    persons.

    The measure is this package's own. A copied part that was moved, turned or mirrored is not found, and neither is a
    part much smaller than a quarter of the image.

    Args:
        generated (`torch.Tensor`): images in [0, 1], `[M, C, H, W]`, of any size; see [`comparable`].
        train (`torch.Tensor`): images in [0, 1], `[N, C, H, W]`.
        held_out (`torch.Tensor`): images in [0, 1] of the same domain as `train`, `[L, C, H, W]`, L > 1, no image of
            which is also in `train`. With fewer than `1 / false_alarms` images the threshold is their smallest
            distance, and more than the nominal share is called a copy.
        false_alarms (`float`): nominal share of the images that are called copies and are none.
        per_prompt (`int`): number of generated images in a row that belong to one prompt, which counts as one draw.
        persons (list of `int`): number of the person of each prompt, where persons and not prompts are the draws: the
            share is then the mean over persons.
        held_out_persons (list of `int`): number of the person of each held-out image; by default each is of another.

    Returns:
        [`PartialCopiesResult`]: compare the share with `false_alarms`. About 2^24 distances and one window of each
        image are in memory at a time.

    Raises:
        ValueError: for images that do not fit or lie outside [0, 1], for `false_alarms` outside (0, 1), for fewer than
            two held-out images or persons, and when no threshold can be set: held-out images hold parts of training
            images, or have no contrast.
    """
    if not 0 < false_alarms < 1:
        raise ValueError(f"false_alarms must lie between 0 and 1, but got {false_alarms}")
    for name, images in (("generated", generated), ("train", train), ("held_out", held_out)):
        if images.ndim != 4 or len(images) < (2 if name == "held_out" else 1) or images.shape[1] != train.shape[1]:
            raise ValueError(
                f"{name}: images must be [N, {train.shape[1]}, H, W], N > {int(name == 'held_out')}, but are "
                f"{list(images.shape)}"
            )
        low, high = (bound.item() for bound in torch.aminmax(images))
        if not (low >= 0 and high <= 1):  # true for NaN, too
            raise ValueError(f"{name}: images must lie in [0, 1], but reach {low:.4g} to {high:.4g}")
    owners = held_out_persons or range(len(held_out))
    if len(owners) != len(held_out) or len(set(owners)) < 2:
        raise ValueError(
            f"held_out_persons must name at least 2 persons, one for each of {len(held_out)} held-out images, but has "
            f"{len(owners)} entries of {len(set(owners))} persons"
        )
    generated, train, held_out = (comparable(images).to(generated.device) for images in (generated, train, held_out))
    innocent, _ = _relative_distances(held_out, train, held_out, owners)
    threshold = torch.quantile(innocent, false_alarms, interpolation="lower").item()
    if not 1e-3 < threshold < math.inf:
        raise ValueError(
            f"{int((innocent <= 1e-3).sum())} of {len(innocent)} held-out images hold a copy of a part of a training "
            f"image, and {int(innocent.isinf().sum())} have no contrast, so that no partial copy can be told"
        )
    distances, nearest = _relative_distances(generated, train, held_out)
    share, interval = share_of_draws(distances < threshold, per_prompt, persons)
    return PartialCopiesResult(share, interval, threshold, distances, nearest)


def _relative_distances(
    images: torch.Tensor, train: torch.Tensor, held_out: torch.Tensor, owners: Sequence[int] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest relative distance of a window of each image, and the row of `train` nearest to it: `[M]` each."""
    smallest = torch.full((len(images),), math.inf)
    nearest = torch.zeros(len(images), dtype=torch.long)
    for windows, of_train, of_held_out in _windows(images, train, held_out):
        to_train, rows = nearest_euclidean(windows, of_train)
        to_held_out, _ = nearest_euclidean(windows, of_held_out, owners)
        relative = to_train / (to_held_out + _FLOOR * math.sqrt(windows.shape[1]))
        flat = windows.unflatten(1, (images.shape[1], -1)).var(2).mean(1).sqrt() < _FLOOR
        relative = relative.masked_fill(flat, math.inf).cpu()
        nearest = torch.where(relative < smallest, rows.cpu(), nearest)
        smallest = torch.minimum(relative, smallest)
    return smallest, nearest


def _windows(*sets: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The windows of sets of images `[N, C, 32, 32]`, place by place: `[N, C * 16 * 16]` of each set."""
    starts = range(0, SIDE - WINDOW + 1, STRIDE)
    for y in starts:
        for x in starts:
            yield tuple(images[..., y : y + WINDOW, x : x + WINDOW].flatten(1) for images in sets)
