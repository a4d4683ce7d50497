"""Finished pieces of work on disk: a study goes on where it stopped, and any number of processes share its work."""

import argparse
import fcntl
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from memcontrol_hf.whole_files import write_whole


class Job(NamedTuple):
    """A piece of work.

    Args:
        piece: Name of the file that holds the result, without suffix; a folder may stand before the name.
        title: Name of the job in messages.
        make: Function that does the work and returns the content of the file.
        needs: Names of the pieces that must be finished before.
    """

    piece: str
    title: str
    make: Callable[[], dict[str, Any]]
    needs: tuple[str, ...] = ()


class Pieces:
    """A folder with one JSON file for each finished piece of work.

    Args:
        folder: Folder that the processes of one machine, or of a shared disk, have in common.
        settings: Settings that all pieces have in common. They are kept in `settings.json`.

    Raises:
        ValueError: The folder holds pieces that were made with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if settings is None:
            return
        if "settings" in self:
            stored = self.read("settings")
            changes = [
                f"{name} was {stored.get(name)} and is {value}"
                for name, value in settings.items()
                if stored.get(name) != value
            ]
            if changes:
                raise ValueError(
                    f"{folder} was made with other settings: {', '.join(changes)}. Give another --output_dir"
                )
        self.write("settings", dict(settings))

    def file(self, piece: str) -> Path:
        """The file of a piece, finished or not."""
        return self.folder / f"{piece}.json"

    def __contains__(self, piece: str) -> bool:
        return self.file(piece).exists()

    def read(self, piece: str) -> dict[str, Any]:
        """The content of a finished piece."""
        return json.loads(self.file(piece).read_text(encoding="utf-8"))

    def write(self, piece: str, content: Mapping[str, Any]) -> None:
        """Write a finished piece; neither an interruption nor another process leaves a half file."""
        file = self.file(piece)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(content))

    def restore(self, contents: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the pieces that are missing here, from the committed results of a study."""
        for piece, content in contents.items():
            if piece not in self:
                self.write(piece, content)

    def names(self, folder: str) -> list[str]:
        """The names of all finished pieces in a subfolder, sorted."""
        return sorted(f"{folder}/{file.stem}" for file in (self.folder / folder).glob("*.json"))

    @contextmanager
    def claim(self, piece: str) -> Iterator[bool]:
        """Whether this process, and no other, may work on a piece now. The lock ends with the process, too."""
        file = self.file(piece)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_suffix(".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def work(self, jobs: Sequence[Job]) -> list[Job]:
        """Do the jobs that are not finished, and wait for those that other processes are working on.

        A job that fails is reported and skipped together with the jobs that need its result. The same command tries
        these jobs again.

        Returns:
            The jobs that failed or could not be started.
        """
        failed: set[str] = set()
        while left := [job for job in jobs if job.piece not in self and job.piece not in failed]:
            busy = False
            for job in left:
                if failed & set(job.needs):
                    busy = True
                    failed.add(job.piece)
                elif all(need in self for need in job.needs):
                    with self.claim(job.piece) as mine:
                        if mine and job.piece not in self:
                            busy = True
                            if not self._do(job, jobs):
                                failed.add(job.piece)
            if not busy:
                time.sleep(1)  # other processes are working on what is left
        return [job for job in jobs if job.piece in failed]

    def _do(self, job: Job, jobs: Sequence[Job]) -> bool:
        """Whether a job could be done."""
        started = time.process_time()
        try:
            content = job.make()
        except Exception:
            traceback.print_exc()
            return False
        self.write(job.piece, content)
        done = sum(other.piece in self for other in jobs)
        print(f"{done} of {len(jobs)}: {job.title}, {time.process_time() - started:.0f} s", flush=True)
        return True


def open_pieces(parser: argparse.ArgumentParser, folder: Path, settings: Mapping[str, Any]) -> Pieces:
    """The pieces in a folder; a folder of other settings ends the command with what differs, and exit code 2."""
    try:
        return Pieces(folder, settings)
    except ValueError as error:
        parser.error(str(error))


def exit_if_missing(failed: Sequence[Job]) -> None:
    """End the command with exit code 1 and the names of the jobs that failed, if there are any."""
    if failed:
        print(f"error: missing, see above: {'; '.join(job.title for job in failed)}", file=sys.stderr)
        raise SystemExit(1)


class Part(NamedTuple):
    """The share of one machine in a study that runs on several machines without a shared folder."""

    number: int = 1
    parts: int = 1

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Read `"1/2"`, the first of two.

        Raises:
            argparse.ArgumentTypeError: The text is not of that form.
        """
        number, _, parts = text.partition("/")
        if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
            raise argparse.ArgumentTypeError(f"must be like 1/2, the first of two, but is {text!r}")
        return cls(int(number), int(parts))

    def of(self, items: Sequence[Any]) -> Sequence[Any]:
        """The items of this machine, out of all."""
        return items[self.number - 1 :: self.parts]


def add_part_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag `--part` to a command."""
    parser.add_argument(
        "--part",
        type=Part.parse,
        default=Part(),
        help="number of this machine among machines that share no folder: 1/2 on the first of two (default: 1/1)",
    )


def add_piece_flags(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the flags `--collect`, `--output_dir` and `--docs_dir` to the command of a study, which `name` names."""
    parser.add_argument("--collect", action="store_true", help="run nothing: judge what is finished")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs", name), help="folder of the pieces")
    parser.add_argument("--docs_dir", type=Path, default=Path("docs/results"), help="folder of the results")
