"""The folder that a fine-tune leaves: names of its files, its adapters, its mask, and what may be published."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .error_lines import first_line
from .whole_files import read_json

REPORT, CARD, PLOT, MASK = "memorization_report.json", "README.md", "pareto_front.png", "mask.json"

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""Weights and configuration of an adapter, by the names that PEFT gives them."""

LORA = "pytorch_lora_weights.safetensors"
"""An export for `load_lora_weights`, by the name that diffusers gives such a file."""

PARTS = ("", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Where the folder holds adapters: the denoiser's in itself, a text encoder's in a folder of the encoder's name."""


def _within(part: str, name: str) -> str:
    return f"{part}/{name}".lstrip("/")


MODEL_INDEX = "model_index.json"
"""In the folder of a merged export: the components of a whole pipeline, each in a folder of its name."""

_COMPONENT_FILE = re.compile(
    r"(config|scheduler_config|preprocessor_config|generation_config|tokenizer|tokenizer_config|special_tokens_map"
    r"|added_tokens|vocab)\.json|merges\.txt|spiece\.model"
    r"|(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
)
"""What a component's folder of a pipeline holds, as diffusers and transformers name it."""

PUBLIC_FILES = (*(_within(part, name) for part in PARTS for name in (ADAPTER, CONFIG)), LORA, REPORT, PLOT, CARD)
"""What a push uploads, where the folder has it, the card last; nothing else of the folder but [`pipeline_files`]."""


def pipeline_files(folder: Path) -> tuple[str, ...]:
    """The files of a whole pipeline in a folder without an adapter, as a merged export is one.

    These are its index, and what the folders of its components are known to hold.

    Raises:
        ValueError: for an index that is no object of components.
    """
    index = folder / MODEL_INDEX
    if adapter_parts(folder) or not index.is_file():
        return ()
    try:
        components = [name for name in json.loads(index.read_text(encoding="utf-8")) if not name.startswith("_")]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(index)!r} is no index of a pipeline: {error}") from None
    if wrong := [name for name in components if not re.fullmatch(r"\w+", name)]:
        raise ValueError(f"{str(index)!r} names {wrong[0]!r}, which is no name of a component")
    found = (place for name in sorted(components) for place in sorted((folder / name).glob("*")))
    known = (f"{place.parent.name}/{place.name}" for place in found if _COMPONENT_FILE.fullmatch(place.name))
    return (MODEL_INDEX, *known)


def public_files(folder: Path) -> tuple[str, ...]:
    """What a push of a folder uploads, where the folder has it, the card last."""
    return (*pipeline_files(folder), *PUBLIC_FILES)


def adapter_parts(folder: Path) -> tuple[str, ...]:
    """The elements of `PARTS` where the folder holds an adapter."""
    return tuple(p for p in PARTS if all((folder / p / name).is_file() for name in (ADAPTER, CONFIG)))


def bound_files(folder: Path) -> list[str]:
    """The files of an adapter or a pipeline, and the plot: what a report is bound to."""
    names = [_within(part, name) for part in PARTS for name in (ADAPTER, CONFIG)]
    names += [*pipeline_files(folder), LORA, PLOT]
    return [name for name in names if (folder / name).is_file()]


def adapter_digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each of the [`bound_files`]."""
    return {name: file_digest(folder / name) for name in bound_files(folder)}


def file_digest(file: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while part := content.read(2**24):  # a pipeline has gigabytes
            digest.update(part)
    return digest.hexdigest()


def changed_files(folder: Path, digests: Mapping[str, str]) -> list[str]:
    """The files that are not what a report was measured on. A plot may be missing, since it changes no figure.

    Args:
        folder (`Path`): Folder of the adapter.
        digests (`dict[str, str]`): The report's SHA-256 of each file.
    """
    found = adapter_digests(folder)
    known = {name: digest for name, digest in digests.items() if name != PLOT or name in found}
    return sorted(name for name in found.keys() | known.keys() if found.get(name) != known.get(name))


def check_plain_files(folder: Path) -> None:
    """Raise `ValueError` for a public file that is a link, or lies behind one: it may be any file of this machine."""
    for name in public_files(folder):
        place = folder / name
        for inside in {place.parent, place} - {folder}:
            check_no_link(inside)
        if place.exists() and not place.is_file():
            raise ValueError(f"{str(place)!r} is no file: take it away")
        if place.exists() and place.stat().st_nlink > 1:
            raise ValueError(f"{str(place)!r} is a hard link, a second name of some file: put a copy there")


def check_no_link(place: Path) -> None:
    """Raise `ValueError` for a symbolic link: what it leads to is not uploaded."""
    if place.is_symlink():
        raise ValueError(f"{str(place)!r} is a symbolic link, which a push does not follow: put a copy there")


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of the adapter in a folder.

    Raises:
        ValueError: When the file is missing, or holds no object.
    """
    try:
        content = read_json(folder / CONFIG)
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(folder / CONFIG)!r} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{str(folder / CONFIG)!r} holds no configuration of an adapter, but {str(content)[:40]}")
    return content


def read_mask(source: str | Path) -> dict[str, bool]:
    """The mask in an adapter's folder, in a JSON file, or in a repository on the Hub.

    Args:
        source (`str`): Folder with a mask, a report or an adapter; JSON file of a mask, or of an object with the field
            `mask`; or Hub id `owner/name` of a mask.

    Returns:
        `dict[str, bool]`: For each block of the search space whether it is trained.

    Raises:
        ValueError: When the source cannot be read, holds no mask, or holds a mask that selects no block.
    """
    try:
        content = read_json(_mask_file(str(source)))
    except (OSError, ValueError) as error:  # no such file, no JSON, or no name of a repository
        raise ValueError(f"{str(source)!r} cannot be read: {first_line(error)}") from None
    mask = content.get("mask", content) if isinstance(content, dict) else content
    if not isinstance(mask, dict) or not all(isinstance(value, bool) for value in mask.values()):
        raise ValueError(f"{str(source)!r} holds no mask, which is an object of block names and booleans")
    if not any(mask.values()):
        raise ValueError(f"{str(source)!r} selects no block: the frozen base has nothing to train")
    return mask


def _mask_file(source: str) -> Path:
    """The JSON file with the mask, downloaded if the source is a repository on the Hub."""
    path = Path(source)
    if path.is_dir():
        return next((path / name for name in (MASK, REPORT, CONFIG) if (path / name).exists()), path)
    if not path.exists() and source.count("/") == 1 and not path.is_absolute():
        from huggingface_hub import HfApi  # its HTTP client is slow to import, and a card needs none

        return Path(HfApi().hf_hub_download(source, MASK))
    return path
