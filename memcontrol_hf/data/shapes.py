"""What becomes of images that are not square."""

import io
import logging
import math

from datasets import Dataset, Image
from PIL import Image as PILImage

from ..images import Framing

logger = logging.getLogger(__name__)

LOOKED_AT = 1000
"""Largest number of images whose shapes are looked at."""


def cropped_shares(dataset: Dataset) -> list[float]:
    """The share of each image, in [0, 1), that a crop to a square cuts away. Pixels are decoded of DICOM files alone.

    Args:
        dataset (`Dataset`): column `image`.
    """
    shares = []
    for row in dataset.select_columns("image").cast_column("image", Image(decode=False)):
        stored = row["image"]
        with PILImage.open(io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]) as image:
            shares.append(1 - min(image.size) / max(image.size))
    return shares


def warn_of_crops(dataset: Dataset, framing: Framing, what: str) -> None:
    """Say how much a crop cuts away of images that are not square.

    Args:
        dataset (`Dataset`): column `image`.
        framing ([`~memcontrol_hf.images.Framing`]): how an image becomes a square.
        what (`str`): what the images are, for the message.
    """
    if framing.fit != "crop":
        return
    some = dataset.select(range(0, len(dataset), math.ceil(len(dataset) / LOOKED_AT) or 1))
    if cut := [share for share in cropped_shares(some) if share > 0.01]:
        logger.warning(
            f"{len(cut)} of {len(some)} {what} images are not square: what lies beyond a square in their middle is "
            f"cut away, up to {max(cut):.0%} of an image. If their edges matter, as those of scans do, keep them with "
            "--fit pad (fit='pad'), between bars in the colour of --background"
        )
