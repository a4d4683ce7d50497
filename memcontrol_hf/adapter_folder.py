"""The folder that a fine-tune leaves: names of its files, its adapters, its mask, and what may be published."""

import hashlib
import json
from pathlib import Path

REPORT, CARD, PLOT, MASK = "memorization_report.json", "README.md", "pareto_front.png", "mask.json"

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""Weights and configuration of an adapter, by the names that PEFT gives them."""

LORA = "pytorch_lora_weights.safetensors"
"""An export for `load_lora_weights`, by the name that diffusers gives such a file."""

PARTS = ("", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Where the folder holds adapters: the denoiser's in itself, a text encoder's in a folder of the encoder's name."""


def _within(part: str, name: str) -> str:
    return f"{part}/{name}".lstrip("/")


PUBLIC_FILES = (*(_within(part, name) for part in PARTS for name in (ADAPTER, CONFIG)), LORA, REPORT, PLOT, CARD)
"""What a push uploads, where the folder has it, the card last; nothing else of the folder."""


def adapter_parts(folder: Path) -> tuple[str, ...]:
    """The elements of `PARTS` where the folder holds an adapter."""
    return tuple(p for p in PARTS if all((folder / p / name).is_file() for name in (ADAPTER, CONFIG)))


def adapter_digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of weights in the folder: a report says with them what it was measured on."""
    names = [*(_within(part, ADAPTER) for part in adapter_parts(folder)), LORA]
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names if (folder / name).is_file()
    }


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
        content = json.loads(_mask_file(str(source)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # no such file, no JSON, or no name of a repository
        raise ValueError(f"{str(source)!r} cannot be read: {str(error).splitlines()[0]}") from None
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
