"""The journal file of a study, which stays readable when a process or the machine ends in the middle of a write."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from optuna.storages.journal import JournalFileBackend

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

_BEGINNING = b'{"op_code":'


class Journal(JournalFileBackend):
    """Optuna's journal file, which holds one record in each line, with whole records only.

    A write that a full disk, a signal or a power cut ends leaves a part of a record at the end of the file. It is
    moved to a file beside the journal, whose name ends in `.torn`, before anything is appended. So is what begins with
    a damaged record, when the journal is opened: the records after it count on it. Trials whose records are lost are
    run again.

    Args:
        path (`str`): path of the file.

    Raises:
        ValueError: for a file that never was a journal; it is left as it is.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._path = Path(path)
        if self._damage() is not None:
            with self._locked():  # what another process is writing at this moment looks torn, too
                self._set_damage_aside()

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """The records from a number on.

        Raises:
            OSError: when another process has set aside a damaged record that this one had read.
        """
        if self._log_number_offset.get(log_number_from, 0) > self._path.stat().st_size:
            raise OSError(
                f"{self._path} has become shorter: another process found a damaged record in it, and moved what "
                f"follows to {self._torn}. Run the same command again to go on with the trials that are left"
            )
        return super().read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append records.

        Raises:
            OSError: when they cannot be written; none of them is in the file then.
        """
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with self._locked() as file:
            end = file.seek(0, os.SEEK_END)
            if end and not _ends_a_line(file):
                self._set_damage_aside()
                end = file.seek(0, os.SEEK_END)
            try:
                file.write(lines.encode())
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                os.ftruncate(file.fileno(), end)
                raise

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        """The file, locked by the operating system, so that the lock ends with its process.

        Where there is no such lock, the link that Optuna makes beside the file is the lock.
        """
        with open(self._path, "rb+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except (AttributeError, OSError):  # Windows, or a file system without locks
                self._lock.acquire()
                try:
                    yield file
                finally:
                    self._lock.release()
            else:
                yield file

    @property
    def _torn(self) -> Path:
        return self._path.with_name(f"{self._path.name}.torn")

    def _damage(self) -> tuple[int, int] | None:
        """Number of whole records before the first that is not, and where that begins; `None` without any."""
        place = 0
        with open(self._path, "rb") as file:
            for number, line in enumerate(file):
                if not _is_record(line):
                    if number == 0 and not line.startswith(_BEGINNING[: len(line)]):
                        raise ValueError(f"{self._path} is no journal of Optuna's: give another path")
                    return number, place
                place += len(line)
        return None

    def _set_damage_aside(self) -> None:
        """Move what begins with the first damaged record to the file beside the journal."""
        if (found := self._damage()) is None:
            return
        records, place = found
        with open(self._path, "rb+") as journal, open(self._torn, "ab") as torn:
            journal.seek(place)
            damaged = journal.read()
            torn.write(damaged)
            torn.flush()
            os.fsync(torn.fileno())
            journal.truncate(place)
            os.fsync(journal.fileno())
        lines = len(damaged.splitlines())
        logger.warning(
            f"{self._path} is damaged after its first {records} records, as a full disk or a power cut leaves it: "
            f"{len(damaged)} bytes ({lines} line{'s' * (lines != 1)}) were moved to {self._torn.name}, and the search "
            "goes on with what is whole"
        )


def _ends_a_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _is_record(line: bytes) -> bool:
    """Whether a line is a whole record of Optuna's."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return False
    return isinstance(record, dict) and isinstance(record.get("op_code"), int)
