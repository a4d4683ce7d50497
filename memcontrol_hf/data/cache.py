"""What was computed of images is kept on disk beside a checksum, and computed anew when it does not fit."""

import hashlib
import logging
import shutil
from pathlib import Path

from datasets import config as datasets_config

from ..whole_files import write_whole

logger = logging.getLogger(__name__)

_verified: set[Path] = set()  # files that this process has read and found whole


def cache_folder() -> Path:
    """The folder of cached encodings, within that of `datasets`, readable for the owner only.

    Raises:
        ValueError: when it cannot be made.
    """
    folder = Path(datasets_config.HF_DATASETS_CACHE) / "memcontrol_hf"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)  # it holds what images and captions say
    except OSError as error:
        raise ValueError(f"the cache {folder} cannot be written ({error.strerror}): set HF_DATASETS_CACHE") from None
    return folder


def check_room(folder: str | Path, needed: int, what: str) -> None:
    """Raise `ValueError` when the disk of a folder has less room than what is to be written there.

    Args:
        folder (`str`): an existing folder.
        needed (`int`): bytes.
        what (`str`): what needs them, for the message.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{what} needs {needed / 1e6:.0f} MB in {folder}, but the disk has {free / 1e6:.0f} MB: make room, or "
            "choose another folder"
        )


def is_whole(file: Path) -> bool:
    """Whether a cached file is there and is what was written; it is read once in each process.

    Of a file without a checksum, as earlier versions left it, nothing can be told.
    """
    if not file.exists():
        _verified.discard(file)
        return False
    if file in _verified or not (checksum := _checksum_file(file)).exists():
        return True
    if checksum.read_text(encoding="utf-8") != _digest(file):
        return False
    _verified.add(file)
    return True


def delete_damaged(file: Path) -> None:
    """Delete a cached file, if it is there, with its checksum, and say so."""
    if file.exists():
        logger.warning(f"{file} is damaged: it is deleted, and what it held is computed again")
        file.unlink()
    _checksum_file(file).unlink(missing_ok=True)


def seal(file: Path) -> None:
    """Write the checksum of a file that is whole."""
    if file not in _verified:
        write_whole(_checksum_file(file), _digest(file))
        _verified.add(file)


def _checksum_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while part := content.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
