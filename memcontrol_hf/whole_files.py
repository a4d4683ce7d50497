"""Files and folders that appear whole or not at all, whenever the process or the machine that writes them ends."""

import json
import os
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import IO, Any

LARGEST_JSON = 50_000_000
"""Bytes of the largest JSON file that is read; the report of a search of a thousand trials has less than a million."""


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file aside, and rename it when it is on the disk. Of several processes that do so, the last one wins.

    Args:
        path (`str`): path of the file.
        content (`str` or `bytes`): a text, written in UTF-8; or bytes, in a file that the owner alone can read.

    Raises:
        OSError: when it cannot be written; what was there before is left then.
    """
    path = Path(path)
    aside, file = _opened_aside(path)
    try:
        with file:
            if isinstance(content, bytes):
                aside.chmod(0o600)
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _opened_aside(path: Path) -> tuple[Path, IO[bytes]]:
    """A new file beside a path, which no other process writes to."""
    aside = path.with_name(f".{path.name}.unfinished")
    try:
        return aside, open(aside, "xb")
    except FileExistsError:  # another process writes it at this moment, or was killed while it did
        aside = aside.with_suffix(f".{uuid.uuid4().hex}.unfinished")
        return aside, open(aside, "xb")


def read_json(path: str | Path, **options: Any) -> Any:
    """The content of a JSON file that may be a stranger's, which is not read when it is large.

    Args:
        path (`str`): path of the file.
        **options: for `json.loads`.

    Raises:
        OSError: when there is no such file.
        ValueError: when it is no JSON, nested too deeply, or larger than [`LARGEST_JSON`].
    """
    if (size := Path(path).stat().st_size) > LARGEST_JSON:
        raise ValueError(f"it has {size} bytes, more than {LARGEST_JSON}")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), **options)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def move_whole(source: str | Path, target: str | Path) -> None:
    """Give a folder its name when its files are on the disk. A folder that has the name already is replaced."""
    for file in Path(source).rglob("*"):
        if file.is_file():
            _sync(file)
    _sync(Path(source))
    shutil.rmtree(target, ignore_errors=True)
    os.rename(source, target)
    _sync(Path(target).parent)


def is_new_or_empty(folder: str | Path) -> bool:
    """Whether a folder does not exist yet, or is empty; a file is neither."""
    folder = Path(folder)
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def check_writable(folder: str | Path) -> None:
    """Raise `ValueError` when a folder cannot be written, or made. Nothing is left there.

    Args:
        folder (`str`): path of the folder, which need not exist.
    """
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)) as file:
            file.write(b"0")
    except OSError as error:
        raise ValueError(f"the folder {folder} cannot be written ({error.strerror}): choose another") from None


def _existing(folder: str | Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    return place


def check_room(folder: str | Path, needed: int, what: str) -> None:
    """Raise `ValueError` when the disk of a folder has less room than what is to be written there.

    Args:
        folder (`str`): path of the folder, which need not exist.
        needed (`int`): bytes.
        what (`str`): what needs them, for the message.
    """
    free = shutil.disk_usage(_existing(folder)).free
    if free < needed:
        raise ValueError(
            f"{what} needs {needed / 1e6:.0f} MB in {folder}, but the disk has {free / 1e6:.0f} MB: make room, or "
            "choose another folder"
        )


def _sync(path: Path) -> None:
    """Wait until the contents of a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
