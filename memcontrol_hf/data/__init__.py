"""From images and captions to three disjoint splits, and to latents and conditions that are computed once."""

from .canaries import INCLUDED, flip_canaries, load_canaries, plant_canaries
from .encoded import EncodedImages, encode, first_rows, images_digest, weights_digest
from .folders import read_folder
from .shapes import cropped_shares, warn_of_crops
from .split_names import SPLITS
from .splits import (
    ATTRIBUTE,
    check_captions,
    check_groups,
    check_images,
    check_near_duplicates,
    check_readable,
    group_name,
    load_image_folder,
    load_images,
    split,
    without_captions,
)

__all__ = [
    "ATTRIBUTE",
    "INCLUDED",
    "SPLITS",
    "EncodedImages",
    "check_captions",
    "check_groups",
    "check_images",
    "check_near_duplicates",
    "check_readable",
    "cropped_shares",
    "encode",
    "first_rows",
    "flip_canaries",
    "group_name",
    "images_digest",
    "load_canaries",
    "load_image_folder",
    "load_images",
    "plant_canaries",
    "read_folder",
    "split",
    "warn_of_crops",
    "weights_digest",
    "without_captions",
]
