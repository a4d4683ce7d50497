"""From images and captions to three disjoint splits.

`train` is trained on; `validation` is what the search's rewards may use; `held_out` is seen by nothing before the
final measurement.
"""

from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from PIL import Image as PILImage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ..images import near_duplicates, pixel_digest, thumbnails
from ..randomness import seeded_generator

SPLITS = ("train", "validation", "held_out")

_ALIASES = {"val": "validation", "valid": "validation", "dev": "validation", "test": "held_out"}


def load_images(
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    image_column: str = "image",
    caption_column: str = "text",
    group_column: str | None = None,
    seed: int = 0,
    captions_column: str | None = None,
) -> DatasetDict:
    """Load images with captions and split them.

    Args:
        dataset_name (`str`, *optional*):
            A Hub id or a folder that `datasets.load_dataset` reads.
        train_data_dir (`str`, *optional*):
            A folder of images with a `metadata.jsonl` (or `.csv`) beside them, as `imagefolder` reads it; where there
            are splits already, a folder for each, named as they are.
        image_column, caption_column (`str`):
            Their columns. With `caption_column=""` every caption is empty, as for a model without captions; of a
            column of classes (`ClassLabel`), the caption is the class's name.
        group_column (`str`, *optional*):
            Rows of one group (a patient, say) go to one split. Exact copies of an image always do.
        seed (`int`):
            Of the split.
        captions_column (`str`, *optional*):
            Of the training images, with a list of further captions in each row.

    Returns:
        `DatasetDict`: [`SPLITS`] with the columns `image`, `text`, and `group` where a group column is given; `train`
        with the column of further captions, under its own name.

    Raises:
        ValueError: for a missing folder, column or image, an image that cannot be read, a caption that is no text,
            an empty split, and groups that are in more than one of the given splits.
    """
    if train_data_dir is not None:
        if not Path(train_data_dir).is_dir():
            raise ValueError(f"--train_data_dir {train_data_dir!r} is no folder")
        # A folder `held_out` would be passed over: `datasets` knows splits by its own names alone.
        named = [name for name in (*SPLITS, *_ALIASES) if (Path(train_data_dir) / name).is_dir()]
        # Where there is no folder of a split, it would find splits in the names of files.
        files = {"train": "**"} if not named else {n: f"{n}/**" for n in named} if "held_out" in named else None
        source = {"path": "imagefolder", "data_dir": train_data_dir, "data_files": files}
    else:
        source = {"path": dataset_name}
    try:
        loaded = load_dataset(**source)
    except (OSError, ValueError, DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot load the images of {train_data_dir or dataset_name!r}: {reason}") from None
    splits = {}
    for name, dataset in loaded.items():
        name = _ALIASES.get(name, name)
        if name not in SPLITS:
            raise ValueError(f"unknown split {name!r}: use train, and where given validation and held_out (or test)")
        further = captions_column if name == "train" else None
        splits[name] = _columns(dataset, name, image_column, caption_column, group_column, further)
    if "train" not in splits:
        raise ValueError(f"the data has no train split, only {', '.join(splits)}")
    return split(DatasetDict(splits), seed)


def load_image_folder(folder: str, split_name: str, caption_column: str | None = None) -> Dataset:
    """Load all images of a folder as one set, whatever the names of its files and subfolders are.

    Args:
        folder (`str`): Folder of images; captions lie in a `metadata.jsonl` (or `.csv`) beside the files.
        split_name (`str`): Name of the set, for messages.
        caption_column (`str`, *optional*): Column of the metadata with the captions.

    Returns:
        `Dataset`: Column `image`, and `text` where a caption column is given.

    Raises:
        ValueError: For a missing folder, a folder without images, an image that cannot be read, and a missing column.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder!r} is no folder")
    try:
        # Without data_files="**", `datasets` would find splits in the names of files.
        data = load_dataset("imagefolder", data_dir=folder, data_files={"train": "**"}, split="train")
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{folder!r} holds no images: {str(error).splitlines()[0]}") from None
    check_readable(data, split_name)
    if caption_column is None:
        return data.select_columns(["image"])
    if caption_column not in data.column_names:
        raise ValueError(
            f"{folder!r} has no column {caption_column!r}; it has: {', '.join(data.column_names)}. "
            "Captions are read from a metadata.jsonl beside the images; choose their column with --caption_column"
        )
    data = data.select_columns(["image", caption_column])
    return data if caption_column == "text" else data.rename_column(caption_column, "text")


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
    if caption_column == "":
        return without_captions(dataset)
    classes = dataset.features["text"]
    if isinstance(classes, ClassLabel):
        return dataset.remove_columns("text").add_column("text", classes.int2str(dataset["text"][:]))
    return dataset


def without_captions(dataset: Dataset) -> Dataset:
    """A dataset whose captions are all empty."""
    return dataset.remove_columns({"text"} & {*dataset.column_names}).add_column("text", [""] * len(dataset))


def check_images(data: DatasetDict) -> None:
    """Read every image and caption once.

    Raises:
        ValueError: names the first image that cannot be read, or row whose caption is no text, and an empty split.
    """
    for name, dataset in data.items():
        if len(dataset) == 0:
            raise ValueError(f"the {name} split is empty")
        for row, text in enumerate(dataset["text"]):
            if not isinstance(text, str):
                raise ValueError(f"the caption of row {row} of the {name} split is no text but {type(text).__name__}")
        check_readable(dataset, name)


def check_readable(dataset: Dataset, split_name: str) -> None:
    """Raise `ValueError`, which names it, for the first image that cannot be read."""
    undecoded = dataset.cast_column("image", Image(decode=False))
    for row in range(len(undecoded)):
        _read_image(undecoded[row]["image"], split_name, row)


def _read_image(stored: dict, split_name: str, row: int) -> PILImage.Image:
    path = stored.get("path")
    try:
        image = Image().decode_example(stored)
        image.load()
        if image.mode in ("I", "F"):
            raise ValueError(f"its mode {image.mode} says no range of values: save it with 8 or 16 bits")
        return image
    except Exception as error:  # PIL raises many kinds, down to SyntaxError
        where = f"{Path(path).name} (row {row} of the {split_name} split)" if path else f"row {row} of {split_name}"
        raise ValueError(f"cannot read the image {where}: {error}") from None


def split(data: DatasetDict, seed: int = 0, fractions: tuple[float, float] = (0.2, 0.2)) -> DatasetDict:
    """Fill up to the three splits: those that are missing are taken out of `train`, whole groups at a time.

    Args:
        data (`DatasetDict`): with `train`, and possibly `validation` and `held_out`; columns `image`, `text` and
            possibly `group`.
        seed (`int`): of the draw.
        fractions: shares of the rows of `train` that become `validation` and `held_out`, where missing.

    Raises:
        ValueError: when a group or an exact copy of an image lies in more than one of the given splits, or there are
            too few groups.
    """
    check_images(data)
    groups = _groups(data)
    owner: dict[int, str] = {}
    for name, of_rows in groups.items():
        for group in of_rows:
            if owner.setdefault(group, name) != name:
                what = "an image or a group" if "group" in data[name].column_names else "an image"
                raise ValueError(f"{what} is in the {owner[group]} and in the {name} split: they must be disjoint")
    missing = [name for name in SPLITS[1:] if name not in data]
    if not missing:
        return DatasetDict({name: data[name] for name in SPLITS})
    train, of_rows = data["train"], groups["train"]
    names = sorted(set(of_rows))
    if len(names) < 2 * (len(missing) + 1):
        raise ValueError(
            f"{len(names)} different images or groups in train are too few to split into train and "
            f"{' and '.join(missing)}: give at least {2 * (len(missing) + 1)}, or the splits themselves"
        )
    order = torch.randperm(len(names), generator=seeded_generator(seed)).tolist()
    sizes = dict.fromkeys(names, 0)
    for group in of_rows:
        sizes[group] += 1
    assigned, position = {}, 0
    for name in missing:
        target, filled = max(2, round(fractions[SPLITS.index(name) - 1] * len(train))), 0
        while filled < target and position < len(order) - 2:
            group = names[order[position]]
            assigned[group], filled, position = name, filled + sizes[group], position + 1
    rows = {name: [i for i, g in enumerate(of_rows) if assigned.get(g, "train") == name] for name in SPLITS}
    taken = ("train", *missing)
    result = DatasetDict({name: train.select(rows[name]) if name in taken else data[name] for name in SPLITS})
    for name, dataset in result.items():
        if len(dataset) == 0:
            raise ValueError(f"the {name} split would be empty: the groups of {len(train)} rows are too large")
    return result


def check_near_duplicates(data: DatasetDict, threshold: float = 0.05) -> None:
    """Raise `ValueError` when two splits hold the same picture, saved once more: compressed, scaled, brightened.

    Args:
        data (`DatasetDict`): [`SPLITS`], column `image`.
        threshold (`float`): of [`~memcontrol_hf.metrics.near_duplicates`].
    """
    small = {name: thumbnails(images, range(len(images))) for name, images in data.items()}
    for one, other in combinations(data, 2):
        pairs = near_duplicates(small[one], small[other], threshold)
        if pairs:
            rows = ", ".join(f"{i} and {j}" for i, j in pairs[:5]) + (" ..." if len(pairs) > 5 else "")
            raise ValueError(
                f"{len({j for _, j in pairs})} images of {other} are near-duplicates of images of {one}: rows {rows}. "
                "Splits must be disjoint: put what belongs together into one group (--group_column), take these "
                f"images out, or lower the threshold --near_duplicates {threshold:g} if they are different pictures"
            )


def plant_canaries(train: Dataset, count: int, repeats: int, seed: int = 0) -> Dataset:
    """Repeat some training images, so that an audit shows whether its attacks find what was learnt by heart.

    Args:
        train (`Dataset`): column `image`.
        count (`int`): how many different images are repeated, drawn by the seed.
        repeats (`int`): how often each occurs in the end, at least 2.

    Raises:
        ValueError: for more canaries than there are images, or no repeat.
    """
    if count == 0:
        return train
    digests = [pixel_digest(image) for image in train["image"]]
    counts = Counter(digests)
    rows = [row for row, digest in enumerate(digests) if counts[digest] == 1]
    if not 0 < count <= len(rows):
        raise ValueError(
            f"--canaries must lie between 0 and {len(rows)}, the training images that occur once: {count}"
        )
    if repeats < 2:
        raise ValueError(f"--canary_repeats must be at least 2, but is {repeats}")
    order = torch.randperm(len(rows), generator=seeded_generator(seed, count)).tolist()[:count]
    return concatenate_datasets([train, train.select([rows[i] for i in sorted(order)] * (repeats - 1))])


def _groups(data: DatasetDict) -> dict[str, list[int]]:
    """For each row of each split a number, the same for rows that belong together.

    These are exact copies of an image, the rows of one group, and what is joined through several of these.
    """
    pixels = [pixel_digest(row["image"]) for dataset in data.values() for row in dataset]
    named = ["group" in dataset.column_names for dataset in data.values()]
    names = [str(group) for dataset in data.values() for group in dataset["group"]] if all(named) else pixels
    images = np.unique(pixels, return_inverse=True)[1]
    groups = np.unique(names, return_inverse=True)[1] + images.max() + 1
    links = coo_array((np.ones(len(images)), (images, groups)), shape=(groups.max() + 1,) * 2)
    numbers = connected_components(links, directed=False)[1][images].tolist()
    result = {}
    for name, dataset in data.items():
        result[name], numbers = numbers[: len(dataset)], numbers[len(dataset) :]
    return result
