"""Images with captions are loaded, checked and split into three disjoint splits.

The model is trained on `train`. The rewards of the search may use `validation`. Nothing sees `held_out` before the
final measurement.
"""

import os
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset
from datasets.exceptions import DatasetsError
from PIL import Image as PILImage
from pyarrow import ArrowException
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ..images import DEFAULT_FRAMING, Framing, near_duplicates, pixel_digest, thumbnails
from ..randomness import seeded_generator
from .folders import read_folder, renamed_splits
from .split_names import SPLITS

ATTRIBUTE = "attribute"
"""Column of the attribute that an audit tries to infer, as text."""


def load_images(
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    image_column: str = "image",
    caption_column: str = "text",
    group_column: str | None = None,
    seed: int = 0,
    captions_column: str | None = None,
    attribute_column: str | None = None,
) -> DatasetDict:
    """Load images with captions and split them.

    Args:
        dataset_name (`str`, *optional*):
            Hub id that `datasets.load_dataset` reads, or a folder as `train_data_dir`.
        train_data_dir (`str`, *optional*):
            Folder of images in any layout of [`~memcontrol_hf.data.folders.read_folder`]. Images that are already
            split lie in subfolders with names that mean splits.
        image_column (`str`):
            Column of the images.
        caption_column (`str`):
            Column of the captions. With `caption_column=""` every caption is empty, as a model without captions
            needs. If the column holds classes (`ClassLabel`), a caption is the name of the class.
        group_column (`str`, *optional*):
            Column of the groups, for example patients. All rows of one group go to one split. Exact copies of an
            image go to one split in any case.
        seed (`int`):
            Random seed of the split.
        captions_column (`str`, *optional*):
            Column of the training images that holds a list of further captions in each row.
        attribute_column (`str`, *optional*):
            Column of an attribute of the persons, which an audit tries to infer. It can be the caption column, too.

    Returns:
        `DatasetDict`: [`SPLITS`] with the columns `image`, `text`, `group` if a group column is given, and `attribute`
        (as text) if an attribute column is given. The column of further captions keeps its name and is in `train`
        only.

    Raises:
        ValueError: for a missing folder, column or image, an image that cannot be read, a caption that is not a text,
            an empty split, and a group that is in more than one of the given splits.
    """
    folder = train_data_dir or (dataset_name if os.path.isdir(dataset_name) else None)
    if train_data_dir is not None and not Path(train_data_dir).is_dir():
        raise ValueError(f"--train_data_dir {train_data_dir!r} is no folder")
    try:
        loaded = read_folder(folder) if folder else renamed_splits(load_dataset(dataset_name))
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # RuntimeError: a data set that is a script
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot load the images of {folder or dataset_name!r}: {reason}") from None
    splits = {}
    for name, dataset in loaded.items():
        further = captions_column if name == "train" else None
        columns = _columns(dataset, name, image_column, caption_column, group_column, further)
        splits[name] = _with_attribute(columns, dataset, name, attribute_column)
    if "train" not in splits:
        raise ValueError(f"the data has no train split, only {', '.join(splits)}")
    return split(DatasetDict(splits), seed)


def load_image_folder(
    folder: str,
    split_name: str,
    caption_column: str | None = None,
    group_column: str | None = None,
    attribute_column: str | None = None,
) -> Dataset:
    """Load all images of a folder and its subfolders as one set, whatever their names are.

    Args:
        folder (`str`): Folder of images; captions lie in a `metadata.jsonl` (or `.csv`) beside the files.
        split_name (`str`): Name of the set, for messages.
        caption_column (`str`, *optional*): Column of the metadata with the captions.
        group_column (`str`, *optional*): Column of the metadata with the groups, for example patients.
        attribute_column (`str`, *optional*): Column of the metadata with an attribute that an audit tries to infer.

    Returns:
        `Dataset`: Column `image`, `text` if a caption column is given, `group` if a group column is given, and
        `attribute` if an attribute column is given.

    Raises:
        ValueError: For a missing folder, a folder without images, an image that cannot be read, a caption that is not
            a text, and a missing column.
    """
    data = _as_images(read_folder(folder, as_one=True)["train"], split_name)
    check_readable(data, split_name)
    wanted = {"text": caption_column, "group": group_column}
    wanted = {name: column for name, column in wanted.items() if column is not None}
    for name, column in wanted.items():
        if column not in data.column_names:
            what, flag = ("Captions", "--caption_column") if name == "text" else ("Groups", "--group_column")
            raise ValueError(
                f"{folder!r} has no column {column!r}; it has: {', '.join(data.column_names)}. "
                f"{what} are read from a metadata.jsonl beside the images; choose their column with {flag}"
            )
    columns = data.select_columns(["image", *wanted.values()])
    columns = columns.rename_columns({column: name for name, column in wanted.items() if column != name})
    columns = _named_classes(columns)
    check_captions(columns, split_name)
    return _with_attribute(columns, data, split_name, attribute_column)


def _with_attribute(columns: Dataset, data: Dataset, split_name: str, attribute_column: str | None) -> Dataset:
    """The columns of some data, and beside them an attribute of the data, as text."""
    if attribute_column is None:
        return columns
    if attribute_column not in data.column_names:
        raise ValueError(
            f"the {split_name} split has no column {attribute_column!r}; it has: {', '.join(data.column_names)}. "
            "Choose the column of the attribute with --attribute_column"
        )
    values = _with_names_of_classes(data[attribute_column][:], data.features[attribute_column])
    return columns.add_column(ATTRIBUTE, [None if value is None else str(value) for value in values])


def _columns(
    dataset: Dataset,
    split_name: str,
    image_column: str,
    caption_column: str,
    group_column: str | None,
    captions_column: str | None,
) -> Dataset:
    if captions_column in (image_column, caption_column, group_column) and captions_column is not None:
        raise ValueError(f"the column {captions_column!r} cannot hold lists of captions and be another column, too")
    wanted = {"image": image_column, "text": caption_column, "group": group_column, captions_column: captions_column}
    if caption_column == "":
        del wanted["text"]
    wanted = {new: old for new, old in wanted.items() if old is not None}
    for old in wanted.values():
        if old not in dataset.column_names:
            raise ValueError(
                f"the {split_name} split has no column {old!r}; it has: {', '.join(dataset.column_names)}. "
                "Choose with --image_column, --caption_column, --group_column, --mitigation multiple_captions:COLUMN"
            )
    dataset = dataset.select_columns(list(wanted.values()))
    dataset = dataset.rename_columns({old: new for new, old in wanted.items() if old != new})
    dataset = _as_images(dataset, split_name)
    if caption_column == "":
        return without_captions(dataset)
    return _named_classes(dataset)


def _as_images(dataset: Dataset, split_name: str) -> Dataset:
    """The dataset with images in its column `image`, where Parquet files may hold the bytes of image files."""
    if "image" not in dataset.column_names:
        raise ValueError(f"the {split_name} split has no column 'image'; it has: {', '.join(dataset.column_names)}")
    if isinstance(dataset.features["image"], Image):
        return dataset
    try:
        return dataset.cast_column("image", Image())
    except (ArrowException, TypeError, ValueError):
        kind = dataset.features["image"]
        raise ValueError(f"the column of the images of the {split_name} split holds no images but {kind}") from None


def _named_classes(dataset: Dataset) -> Dataset:
    """The dataset with the names of classes as captions, where its captions are classes."""
    classes = dataset.features.get("text")
    if isinstance(classes, ClassLabel):
        names = _with_names_of_classes(dataset["text"][:], classes)
        return dataset.remove_columns("text").add_column("text", names)
    return dataset


def _with_names_of_classes(values: list, feature: Any) -> list:
    """The values of a column, with the names of its classes where it has classes; what is missing stays `None`."""
    if not isinstance(feature, ClassLabel):
        return values
    return [None if value is None else feature.int2str(value) for value in values]


def without_captions(dataset: Dataset) -> Dataset:
    """The same dataset with an empty caption in each row."""
    return dataset.remove_columns({"text"} & {*dataset.column_names}).add_column("text", [""] * len(dataset))


def check_images(data: DatasetDict) -> None:
    """Read every image and caption once, so that a bad one is found before the long work.

    Raises:
        ValueError: for an image that cannot be read, a caption that is not a text, and an empty split. The error names
            the first such image or row.
    """
    for name, dataset in data.items():
        if len(dataset) == 0:
            raise ValueError(f"the {name} split is empty")
        check_captions(dataset, name)
        check_readable(dataset, name)


def check_captions(dataset: Dataset, split_name: str) -> None:
    """Raise `ValueError` for a caption that is not a text, where there are captions. The error names the first row."""
    for row, text in enumerate(dataset["text"] if "text" in dataset.column_names else []):
        if not isinstance(text, str):
            raise ValueError(
                f"the caption of row {row} of the {split_name} split is no text but {type(text).__name__}"
            )


def check_readable(dataset: Dataset, split_name: str) -> None:
    """Raise `ValueError` for an image that cannot be read. The error names the first such image."""
    undecoded = dataset.cast_column("image", Image(decode=False))
    for row in range(len(undecoded)):
        _read_image(undecoded[row]["image"], split_name, row)


def group_name(group: Any) -> str:
    """The name of a group. A whole number is the same as `int` and as `float`, which tables make of it."""
    return str(int(group)) if isinstance(group, float) and group.is_integer() else str(group)


def check_groups(data: DatasetDict) -> None:
    """Raise `ValueError` for groups that are missing, or differ in spelling only: one patient, spelt twice."""
    groups = [(name, row, g) for name in data if "group" in data[name].column_names
              for row, g in enumerate(data[name]["group"])]  # fmt: skip
    missing = [f"row {row} of {name}" for name, row, g in groups if g is None or g != g or not str(g).strip()]
    if missing:
        raise ValueError(
            f"{len(missing)} rows have no group: {_first(missing)}. A person without an id could be in two splits: "
            "give each row its group, or take the row out"
        )
    spellings: dict[str, dict[str, str]] = {}  # spelt one way -> each way, with the first row that spells it so
    for split, row, group in groups:
        name = group_name(group)
        spelling = re.sub(r"^(\d+)\.0+$", r"\1", "".join(name.split()).casefold())
        spellings.setdefault(spelling, {}).setdefault(name, f"row {row} of {split}")
    twice = [" and ".join(of_one.values()) for of_one in spellings.values() if len(of_one) > 1]
    if twice:
        raise ValueError(
            f"{len(twice)} groups are spelt in several ways, which differ in case, blanks or a .0 only: "
            f"{_first(twice)}. Give one person one id, so that no image of theirs is in two splits"
        )


def _first(of: list[str], count: int = 5) -> str:
    return ", ".join(of[:count]) + (", ..." if len(of) > count else "")


def _read_image(stored: dict | None, split_name: str, row: int) -> PILImage.Image:
    if stored is None:
        raise ValueError(f"row {row} of the {split_name} split has no image: give it one, or take the row out")
    path = stored.get("path")
    try:
        image = Image().decode_example(stored)
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a photo, with a preview as its second frame
            raise ValueError(f"it holds {image.n_frames} pages or frames: save those that you need as files")
        image.load()
        if image.mode in ("I", "F"):
            raise ValueError(f"its mode {image.mode} says no range of values: save it with 8 or 16 bits")
        return image
    except Exception as error:  # PIL raises many kinds, down to SyntaxError
        where = f"{Path(path).name} (row {row} of the {split_name} split)" if path else f"row {row} of {split_name}"
        raise ValueError(f"cannot read the image {where}: {error}") from None


def split(data: DatasetDict, seed: int = 0, fractions: tuple[float, float] = (0.2, 0.2)) -> DatasetDict:
    """Make the splits that are missing: their rows are taken out of `train`, whole groups at a time.

    Args:
        data (`DatasetDict`): `train`, and possibly `validation` and `held_out`, with the columns `image`, `text` and
            possibly `group`.
        seed (`int`): random seed of the draw.
        fractions (tuple of `float`): shares of the rows of `train` that become `validation` and `held_out`, if these
            splits are missing.

    Returns:
        `DatasetDict`: the three splits.

    Raises:
        ValueError: when a group, or an exact copy of an image, lies in more than one of the given splits, or when
            there are too few groups.
    """
    check_images(data)
    check_groups(data)
    groups = _groups(data)
    owner: dict[int, str] = {}
    for name, row_groups in groups.items():
        for group in row_groups:
            if owner.setdefault(group, name) != name:
                what = "an image or a group" if "group" in data[name].column_names else "an image"
                raise ValueError(f"{what} is in the {owner[group]} and in the {name} split: they must be disjoint")
    missing = [name for name in SPLITS[1:] if name not in data]
    if not missing:
        return DatasetDict({name: data[name] for name in SPLITS})
    train, row_groups = data["train"], groups["train"]
    names = sorted(set(row_groups))
    if len(names) < 2 * (len(missing) + 1):
        raise ValueError(
            f"{len(names)} different images or groups in train are too few to split into train and "
            f"{' and '.join(missing)}: give at least {2 * (len(missing) + 1)}, or the splits themselves"
        )
    order = torch.randperm(len(names), generator=seeded_generator(seed)).tolist()
    sizes = dict.fromkeys(names, 0)
    for group in row_groups:
        sizes[group] += 1
    assigned, position = {}, 0
    for name in missing:
        target, filled = max(2, round(fractions[SPLITS.index(name) - 1] * len(train))), 0
        while filled < target and position < len(order) - 2:
            group = names[order[position]]
            assigned[group], filled, position = name, filled + sizes[group], position + 1
    rows = {name: [i for i, g in enumerate(row_groups) if assigned.get(g, "train") == name] for name in SPLITS}
    taken = ("train", *missing)
    result = DatasetDict({name: train.select(rows[name]) if name in taken else data[name] for name in SPLITS})
    for name, dataset in result.items():
        if len(dataset) == 0:
            raise ValueError(f"the {name} split would be empty: the groups of {len(train)} rows are too large")
    return result


def check_near_duplicates(data: DatasetDict, threshold: float = 0.05, framing: Framing = DEFAULT_FRAMING) -> None:
    """Raise `ValueError` when two splits hold the same picture, compressed, scaled, mirrored or brightened.

    Args:
        data (`DatasetDict`): [`SPLITS`] with the column `image`.
        threshold (`float`): threshold of [`~memcontrol_hf.metrics.near_duplicates`].
        framing ([`~memcontrol_hf.images.Framing`]): how an image becomes a square.
    """
    small = {name: thumbnails(images, range(len(images)), framing) for name, images in data.items()}
    for one, other in combinations(data, 2):
        pairs = near_duplicates(small[one], small[other], threshold, altered=True)
        if pairs:
            rows = ", ".join(f"{i} and {j}" for i, j in pairs[:5]) + (" ..." if len(pairs) > 5 else "")
            raise ValueError(
                f"{len({j for _, j in pairs})} images of {other} are near-duplicates of images of {one}: rows {rows}. "
                "Splits must be disjoint: put what belongs together into one group (--group_column), take these "
                f"images out, or lower the threshold --near_duplicates {threshold:g} if they are different pictures"
            )


def _groups(data: DatasetDict) -> dict[str, list[int]]:
    """A number for each row of each split; rows that belong together have the same number.

    Rows belong together when they hold exact copies of an image, when they have the same group, or when a chain of
    such pairs joins them.
    """
    pixels = [pixel_digest(row["image"]) for dataset in data.values() for row in dataset]
    named = ["group" in dataset.column_names for dataset in data.values()]
    if any(named) and not all(named):
        of, without = ([name for name, has in zip(data, named) if has is is_named] for is_named in (True, False))
        raise ValueError(
            f"the column 'group' is in {' and '.join(of)}, but not in {' and '.join(without)}: give all splits one, "
            "so that no person is in two of them, or none"
        )
    names = [group_name(group) for dataset in data.values() for group in dataset["group"]] if all(named) else pixels
    images = np.unique(pixels, return_inverse=True)[1]
    groups = np.unique(names, return_inverse=True)[1] + images.max() + 1
    links = coo_array((np.ones(len(images)), (images, groups)), shape=(groups.max() + 1,) * 2)
    numbers = connected_components(links, directed=False)[1][images].tolist()
    result = {}
    for name, dataset in data.items():
        result[name], numbers = numbers[: len(dataset)], numbers[len(dataset) :]
    return result
