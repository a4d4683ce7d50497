"""Where studies are kept: in a journal file, in a database, or behind a gRPC proxy."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import optuna
from optuna.storages import BaseStorage, JournalStorage
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from ..error_lines import first_line
from .claims import FINAL, SCREENING
from .journal import Journal
from .servers import open_database, open_proxy


def storage_address(storage: str | None, output_dir: str | Path) -> str:
    """The storage that was given; without one, the journal file in the output folder."""
    return storage or str(Path(output_dir) / "study.journal")


def public_address(storage: str) -> str:
    """The address of a storage as it may be shown: without the password of a database."""
    try:
        return make_url(storage).set(query={}).render_as_string() if "://" in storage else storage
    except ArgumentError:
        return storage.partition("://")[0] + "://..."


def open_storage(storage: str) -> BaseStorage:
    """Open a journal file by its path, a gRPC proxy by `grpc://host:port`, or a database by its address.

    Raises:
        ValueError: when a server does not answer, and for a file that is no journal.
    """
    if storage.startswith("grpc://"):
        address = urlsplit(storage)
        try:
            return open_proxy(address.hostname, address.port or 13000)
        except ConnectionError as error:
            raise ValueError(f"cannot open the storage {storage}: no proxy answers there ({error})") from None
    if "://" not in storage:
        Path(storage).parent.mkdir(parents=True, exist_ok=True)
        journal = Journal(storage)
        try:
            return JournalStorage(journal)
        except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"the journal {storage} was changed, so that its records do not fit together ({type(error).__name__}: "
                f"{error}): put a copy of it in its place, or move it away to search anew"
            ) from None
    try:
        return open_database(storage)
    except (SQLAlchemyError, ImportError) as error:
        reason = first_line(error)
        raise ValueError(f"cannot open the storage {public_address(storage)}: {reason}") from None


def check_study(
    storage: str,
    study_name: str,
    settings: Mapping[str, Any],
    only_study: bool = False,
    ignore: Sequence[str] = (),
) -> None:
    """Check that a study was made with these settings, where there is such a study already.

    Args:
        storage (`str`):
            Address of the storage; see [`~memcontrol_hf.search.open_storage`].
        study_name (`str`):
            Name of the study.
        settings (`dict`):
            Settings that the study shall be made with.
        only_study (`bool`):
            Whether the storage may hold no other study, as is the case for the storage of an output folder.
        ignore (list of `str`):
            Names of settings that are not compared, as their values are not known yet.

    Raises:
        ValueError: names the settings that differ, or the studies that the storage holds instead.
    """
    if "://" not in storage and not Path(storage).exists():
        return
    opened = open_storage(storage)
    names = [name for name in optuna.get_all_study_names(opened) if not name.endswith((FINAL, SCREENING))]
    if study_name not in names:
        if names and only_study:
            raise ValueError(
                f"{public_address(storage)} holds another study ({', '.join(names)}), not {study_name!r}: "
                "give another --output_dir, or that --study_name"
            )
        return
    stored = optuna.load_study(study_name=study_name, storage=opened).user_attrs.get("settings")
    if not stored or not settings:
        return
    settings = json.loads(json.dumps(settings))  # as the study keeps them: a tuple is a list there
    names = [name for name in {**stored, **settings} if name not in ignore]
    differing = [name for name in names if stored.get(name) != settings.get(name)]
    if differing:
        changes = ", ".join(f"{name} was {stored.get(name)!r} and is {settings.get(name)!r}" for name in differing)
        raise ValueError(
            f"the study {study_name!r} in {public_address(storage)} was made with other settings: {changes}. "
            "Use the same settings to go on with it, or another --output_dir or --study_name"
        )
