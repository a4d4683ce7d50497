"""What was computed of images is kept on disk beside a checksum, and computed anew when it does not fit."""

import logging
from pathlib import Path

from datasets import Dataset
from datasets import config as datasets_config
from pyarrow import ArrowInvalid

from ..adapter_folder import file_digest
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


def is_whole(file: Path) -> bool:
    """Whether a cached file is there and is what was written; it is read once in each process.

    Of a file without a checksum, as earlier versions left it, only this can be told: whether Arrow reads it.
    """
    if not file.exists():
        _verified.discard(file)
        return False
    if file in _verified:
        return True
    if (checksum := _checksum_file(file)).exists():
        whole = checksum.read_text(encoding="utf-8") == file_digest(file)
    else:
        whole = _can_be_read(file)
    if whole:
        _verified.add(file)
    return whole


def delete_damaged(file: Path) -> None:
    """Delete a cached file, if it is there, with its checksum, and say so."""
    if file.exists():
        logger.warning(f"{file} is damaged: it is deleted, and what it held is computed again")
        file.unlink()
    _checksum_file(file).unlink(missing_ok=True)


def seal(file: Path) -> None:
    """Write the checksum of a file that is whole, unless it has one."""
    if not _checksum_file(file).exists():
        write_whole(_checksum_file(file), file_digest(file))
    _verified.add(file)


def _checksum_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _can_be_read(file: Path) -> bool:
    try:
        Dataset.from_file(str(file))
    except (OSError, ArrowInvalid):
        return False
    return True
