"""Images between PIL and tensors, their digest, and near-duplicates."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageColor, ImageOps
from torch.nn import functional as F

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Framing:
    """How an image becomes a square with three channels.

    Args:
        fit (`str`):
            `"crop"`: the shorter side fills the square, and the ends of the longer side are cut away, as the usual
            base models were trained. `"pad"`: the whole image is kept, between two bars.
        background (`str`):
            Colour of the bars, and under what is transparent: a name or `#rrggbb`, as `PIL.ImageColor` reads it.

    Raises:
        ValueError: for another `fit`, and for a colour that Pillow does not know.
    """

    fit: str = "crop"
    background: str = "white"

    def __post_init__(self) -> None:
        if self.fit not in ("crop", "pad"):
            raise ValueError(f"fit must be crop or pad, but is {self.fit!r}")
        try:
            ImageColor.getrgb(self.background)
        except (AttributeError, ValueError):
            raise ValueError(
                f"background must be a colour such as white, black or #808080, but is {self.background!r}"
            ) from None

    def square(self, image: PILImage.Image, side: int) -> PILImage.Image:
        """The image as a square of RGB."""
        rgb, size = to_rgb(image, self.background), (side, side)
        if self.fit == "crop":
            return ImageOps.fit(rgb, size, PILImage.Resampling.LANCZOS)
        return ImageOps.pad(rgb, size, PILImage.Resampling.LANCZOS, color=ImageColor.getrgb(self.background)[:3])


DEFAULT_FRAMING = Framing()


def thumbnails(images: "Dataset", rows: Sequence[int], framing: Framing = DEFAULT_FRAMING) -> torch.Tensor:
    """Some rows of the column `image` at 32 x 32 pixels: `[len(rows), 3, 32, 32]` in [0, 1]."""
    return to_pixels((images[row]["image"] for row in rows), 32, framing)


DIGEST_VERSION = 2
"""Version of [`pixel_digest`], which cached columns and the settings of a study name. Version 1 ignored the size."""


def pixel_digest(image: PILImage.Image) -> str:
    """A digest of an image's size and RGB values, equal for exact copies: 32 hexadecimal digits.

    A digest stays in memory and in the local cache, and is never published.
    """
    return hashlib.blake2b(repr(image.size).encode() + to_rgb(image).tobytes(), digest_size=16).hexdigest()


def to_rgb(image: PILImage.Image, background: str = "white") -> PILImage.Image:
    """An image with three channels of 8 bits. Of 16 bits the upper 8 are taken, where Pillow would clip.

    What is transparent lies over the background, where Pillow would show the colour beneath, which is often black.
    """
    if image.mode.startswith("I;16"):
        image = PILImage.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        beneath = PILImage.new("RGBA", image.size, ImageColor.getrgb(background)[:3])
        return PILImage.alpha_composite(beneath, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def to_pixels(images: Iterable[PILImage.Image], resolution: int, framing: Framing = DEFAULT_FRAMING) -> torch.Tensor:
    """PIL images -> `[N, 3, resolution, resolution]` in [0, 1]: RGB squares, by default cropped."""
    arrays = [np.asarray(framing.square(image, resolution)) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


TILES = 4
"""Tiles along each side of an image in the extraction attack."""


def tile_distances(a: torch.Tensor, b: torch.Tensor, exact: bool = False) -> torch.Tensor:
    """Pairwise distance of images: the largest Euclidean distance over 4 x 4 tiles at the same place.

    The distance is that of Carlini et al. (https://huggingface.co/papers/2301.13188), without their division by the
    number of values.

    Args:
        a (`torch.Tensor`): images `[M, C, H, W]`; H and W multiples of 4.
        b (`torch.Tensor`): images `[N, C, H, W]`.
        exact (`bool`): compute without matrix multiplication, which is ten times as fast but puts equal images up to
            .001 of the brightness apart.

    Returns:
        `torch.Tensor`: `[M, N]`.
    """
    mode = "donot_use_mm_for_euclid_dist" if exact else "use_mm_for_euclid_dist_if_necessary"
    return torch.cdist(cut_into_tiles(a), cut_into_tiles(b), compute_mode=mode).amax(0)


def near_duplicates(
    a: torch.Tensor, b: torch.Tensor | None = None, threshold: float = 0.05, altered: bool = False
) -> list[tuple[int, int]]:
    """Pairs of images that are the same picture saved twice: compressed, scaled or slightly brightened.

    Two thumbnails of 32 x 32 pixels are near-duplicates when the root mean square difference of their most different
    tile of 4 x 4 (see [`tile_distances`]) is at most the threshold. Crops and turned copies are not found.

    Args:
        a (`torch.Tensor`): images in [0, 1], `[M, C, H, W]`.
        b (`torch.Tensor`, *optional*): `[N, C, H, W]`; without it the images of `a` are compared with each other.
        threshold (`float`): largest difference, in [0, 1] of the brightness; 0 finds equal thumbnails only.
        altered (`bool`): whether to find copies that are mirrored, darker or of another contrast, too: once all
            thumbnails have the same mean and contrast, a difference of .6 of the threshold is allowed, as they are or
            with one of them mirrored.

    Returns:
        list of `tuple[int, int]`: rows of `a` and `b`; without `b`, each pair once.
    """
    ones, others = (F.interpolate(x.float(), (32, 32), mode="area") for x in (a, a if b is None else b))
    limit, exact = threshold * math.sqrt(ones[0].numel() / TILES**2), threshold < 0.01
    pairs = []
    for start in range(0, len(ones), _AT_ONCE):
        one = ones[start : start + _AT_ONCE]
        near = torch.zeros(len(one), len(others), dtype=torch.bool)
        for begin in range(start if b is None else 0, len(others), _AT_ONCE):
            other = others[begin : begin + _AT_ONCE]
            found = tile_distances(one, other, exact) <= limit
            if altered and threshold > 0:
                plain, of_other = _same_contrast(one), _same_contrast(other)
                for mirrored in (of_other, of_other.flip(3), of_other.flip(2)):
                    found |= tile_distances(plain, mirrored, exact) <= _ALTERED * limit
            near[:, begin : begin + _AT_ONCE] = found.cpu()
        if b is None:
            near = near.triu(start + 1)
        pairs += [(row + start, other) for row, other in near.nonzero().tolist()]
    return pairs


_AT_ONCE = 1024  # images of each side that are compared at once, so that memory holds the thumbnails and little more
_ALTERED = 0.6  # of the threshold: docs/results/duplicate_scan.md has what it finds, and its false alarms
_CONTRAST, _LEAST_CONTRAST = 0.2, 0.05  # of a usual picture; noise in a flat one is not to look like a picture


def _same_contrast(images: torch.Tensor) -> torch.Tensor:
    """Images of the same mean and standard deviation."""
    deviation, mean = torch.std_mean(images, (1, 2, 3), keepdim=True)
    return (images - mean) / deviation.clamp(min=_LEAST_CONTRAST) * _CONTRAST


def cut_into_tiles(images: torch.Tensor) -> torch.Tensor:
    """Images `[N, C, H, W]` -> tiles `[16, N, C * H / 4 * W / 4]`."""
    n, c, h, w = images.shape
    tiles = images.float().reshape(n, c, TILES, h // TILES, TILES, w // TILES)
    return tiles.permute(2, 4, 0, 1, 3, 5).reshape(TILES * TILES, n, -1)
