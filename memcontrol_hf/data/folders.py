"""A folder of images in any of the layouts that people have, read as tables of images; `docs/data.md` lists them.

`datasets` reads Parquet files, its own saved data sets and WebDataset archives. A folder of image files is read here:
`imagefolder` reads no DICOM files and no captions in `.txt` files, drops an image without a line in the metadata in
silence, and knows few names of splits.
"""

import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict, Image, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from datasets.fingerprint import Hasher
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from pyarrow import ArrowException

from ..error_lines import first_line
from .cache import cache_folder
from .dicom import DICOM_SUFFIXES
from .split_names import SPLITS, split_of_name, split_of_path

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(ImageFolder.EXTENSIONS) | frozenset(DICOM_SUFFIXES)
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def read_folder(folder: str | Path, as_one: bool = False) -> DatasetDict:
    """Read a folder as the splits that the names of its folders or files mean; all as `train` if none means a split.

    Args:
        folder (`str`): folder of images, of Parquet files or of WebDataset archives, or a data set that
            `save_to_disk` wrote.
        as_one (`bool`): whether everything is `train`, whatever the names mean.

    Returns:
        `DatasetDict`: some of [`SPLITS`], with a column `image` and the columns of the metadata. Side files `.txt`
        give the column `text`. Without metadata, the column `label` holds the names of the images' folders, if there
        are several.

    Raises:
        ValueError: for a folder without images or with several layouts, a name that may mean a split or not, images
            outside of the folders of the splits, and metadata that cannot be read or name missing files.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder")
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return _saved(root, as_one)
    files = _files(root)
    kinds = {
        "images": [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES],
        "webdataset": [file for file in files if file.name.lower().endswith((".tar", ".tar.gz", ".tgz"))],
        "parquet": [file for file in files if file.suffix.lower() == ".parquet" and file.name not in METADATA],
    }
    found = [kind for kind, of_kind in kinds.items() if of_kind]
    if not found:
        suffixes = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in _suffixes(files).items())
        raise ValueError(
            f"{str(folder)!r} holds no images, only these files: {suffixes or 'none'}. Image files (PNG, JPEG, TIFF, "
            "DICOM as .dcm, ...), Parquet files, WebDataset archives (.tar) and what save_to_disk wrote are read"
        )
    if len(found) > 1:
        counts = ", ".join(f"{len(kinds[kind])} files of {kind}" for kind in found)
        raise ValueError(f"{str(folder)!r} holds {counts}: put each kind into a folder of its own")
    kind = found[0]
    by_split = {"train": kinds[kind]} if as_one else _by_split(root, kinds[kind], kind)
    if kind == "images":
        return _image_files(root, by_split, [file for file in files if file.name in METADATA])
    return _archives(root, kind, by_split)


def _files(root: Path) -> list[Path]:
    """All files below a folder, in order, through links to folders, too; without hidden ones."""
    found, seen = [], set()
    for parent, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        if (real := os.path.realpath(parent)) in seen:  # a link to a folder above
            folders[:] = []
            continue
        seen.add(real)
        found += [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
    return found


def _suffixes(files: list[Path]) -> Counter:
    return Counter(file.suffix.lower() for file in files)


def _by_split(root: Path, files: list[Path], kind: str) -> dict[str, list[Path]]:
    """The files of each split, by the names of their folders; Parquet files and archives by their own names, too."""
    found: dict[str | None, list[Path]] = {}
    known: dict[tuple[str, ...], str | None] = {}
    for file in files:
        parts = file.relative_to(root).parts[:-1]
        if parts not in known:
            known[parts] = split_of_path(parts)
        split = known[parts]
        if split is None and kind != "images":
            split = split_of_name(file.name.split(".")[0], strict=False)
        found.setdefault(split, []).append(file)
    outside = found.pop(None, [])
    if not found:
        return {"train": outside}
    if outside:
        example = outside[0].relative_to(root).parent
        raise ValueError(
            f"{len(outside)} files of {str(root)!r} lie outside of the folders of the splits ({', '.join(found)}), "
            f"for example in {str(example)!r}: put them into a folder train, validation or held_out, or take them out"
        )
    if "train" not in found:
        raise ValueError(f"{str(root)!r} has no folder train, only one for {', '.join(found)}: name the others, too")
    return {name: found[name] for name in SPLITS if name in found}


# ---- image files ----


def _image_files(root: Path, by_split: dict[str, list[Path]], metadata: list[Path]) -> DatasetDict:
    splits = {str(file): name for name, files in by_split.items() for file in files}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in by_split}
    if metadata:
        missing = []
        for table in metadata:
            for row in _metadata_rows(table):
                path = os.path.normpath(table.parent / str(row.pop("file_name")))
                row.pop("image", None)  # the image is the file
                if path in splits:
                    rows[splits[path]].append({"image": path, **row})
                else:
                    missing.append(path)
        if missing:
            name = os.path.relpath(missing[0], root)
            raise ValueError(
                f"the metadata of {str(root)!r} name {len(missing)} files that are no images: {name}, ..."
            )
    else:
        for path, name in splits.items():
            rows[name].append({"image": path})
    in_rows = [row for of_split in rows.values() for row in of_split]
    if not any("text" in row for row in in_rows) and (texts := _side_files(in_rows)):
        for row in in_rows:
            row["text"] = texts.get(row["image"])
        rows = {name: [row for row in of_split if row["text"] is not None] for name, of_split in rows.items()}
    without = len(splits.keys() - {row["image"] for of_split in rows.values() for row in of_split})
    if without:
        logger.warning(
            f"{without} of {len(splits)} images have no line in the metadata and no text: they are left out"
        )
    labels = sorted({Path(row["image"]).parent.name for row in in_rows})
    columns = list(dict.fromkeys(key for row in in_rows for key in row))
    result = DatasetDict()
    for name, of_split in rows.items():
        try:
            table = Dataset.from_dict({column: [row.get(column) for row in of_split] for column in columns})
        except ArrowException:  # its text holds the value: a caption, or a person's id
            mixed = [column for column in columns if not _of_one_kind([row.get(column) for row in of_split])]
            names = ", ".join(map(repr, mixed))
            raise ValueError(
                f"the metadata of {str(root)!r} mix kinds of values in a column ({names}): write all values of a "
                "column as texts, or all as numbers"
            ) from None
        if not metadata and len(labels) > 1 and "label" not in columns:
            numbers = [labels.index(Path(row["image"]).parent.name) for row in of_split]
            table = table.add_column("label", numbers).cast_column("label", ClassLabel(names=labels))
        table = table.cast_column("image", Image())
        table._fingerprint = Hasher.hash([table._fingerprint, [_stamp(row["image"]) for row in of_split]])
        result[name] = table
    return result


def _of_one_kind(values: list[Any]) -> bool:
    try:
        Dataset.from_dict({"values": values})
    except ArrowException:
        return False
    return True


def _stamp(path: str) -> tuple[str, int, int]:
    """What changes with a file's content: the file that a path leads to, its size and its time."""
    stat = os.stat(path)
    return os.path.realpath(path), stat.st_size, stat.st_mtime_ns


def _side_files(rows: list[dict[str, Any]]) -> dict[str, str]:
    """The caption beside each image: the text of the file of the same name that ends in `.txt`."""
    texts = {}
    for row in rows:
        if (file := Path(row["image"]).with_suffix(".txt")).is_file():
            try:
                texts[row["image"]] = file.read_text(encoding="utf-8").strip()
            except UnicodeDecodeError:
                raise ValueError(f"the caption {file.name} is no text in UTF-8: save it so") from None
    return texts


def _metadata_rows(file: Path) -> list[dict[str, Any]]:
    """The lines of a `metadata.csv`, `.jsonl` or `.parquet`. Values of a CSV stay texts, so that 007 is not 7."""
    try:
        match file.suffix:
            case ".csv":
                rows = pd.read_csv(file, dtype=str, keep_default_na=False).to_dict("records")
            case ".jsonl":
                lines = file.read_text(encoding="utf-8").split("\n")  # a caption may hold U+2028
                rows = [json.loads(line) for line in lines if line.strip()]
            case _:
                rows = pq.read_table(file).to_pylist()
    except (OSError, ValueError, ArrowException) as error:
        raise ValueError(f"cannot read {file.name}: {first_line(error)}") from None
    if not all(isinstance(row, dict) and row.get("file_name") for row in rows):
        raise ValueError(
            f"each line of {file.name} needs a file_name, the image's path from the folder of {file.name}"
        )
    return rows


# ---- what `datasets` reads ----


def _saved(root: Path, as_one: bool) -> DatasetDict:
    try:
        loaded = load_from_disk(str(root))
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(f"cannot read the data set that was saved to {str(root)!r}: {error}") from None
    splits = loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)
    return DatasetDict(train=concatenate_datasets(list(splits.values()))) if as_one else renamed_splits(splits)


def renamed_splits(loaded: DatasetDict) -> DatasetDict:
    """The same splits under the names of [`SPLITS`].

    Raises:
        ValueError: for a name that means no split, and for two that mean the same.
    """
    result = DatasetDict()
    for name, dataset in loaded.items():
        split = split_of_name(name)
        if split is None:
            raise ValueError(f"unknown split {name!r}: use train, and where given validation and held_out (or test)")
        if split in result:
            raise ValueError(f"two splits mean {split}: {', '.join(loaded)}. Join them, or take one out")
        result[split] = dataset
    return result


def _archives(root: Path, kind: str, by_split: dict[str, list[Path]]) -> DatasetDict:
    """Parquet files, or WebDataset archives, whose fields are named by suffixes: the image's becomes `image`."""
    result, kept = DatasetDict(), str(cache_folder() / kind)  # a copy of the images, for their owner alone
    for name, files in by_split.items():
        data_files = {"train": [str(file) for file in files]}
        try:
            table = load_dataset(kind, data_files=data_files, split="train", cache_dir=kept)
        except (OSError, ValueError, DatasetsError) as error:
            reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"cannot read the {kind} files of {str(root)!r}: {reason}") from None
        if kind == "webdataset":
            images = [column for column, feature in table.features.items() if isinstance(feature, Image)]
            names = {images[0]: "image"} if len(images) == 1 and "image" not in table.column_names else {}
            names |= {"txt": "text"} if "txt" in table.column_names and "text" not in table.column_names else {}
            table = table.rename_columns(names).flatten()  # fields of a .json file: json.caption, ...
        stamps = [_stamp(str(file)) for file in files]
        table._fingerprint = Hasher.hash([table._fingerprint, stamps])
        result[name] = table
    return result
