"""Pushes to the Hub: one commit of an allowlist of files, to a private repository by default."""

import json
import logging
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from jinja2 import UndefinedError

from ..adapter_folder import (
    ADAPTER,
    CARD,
    CONFIG,
    LORA,
    MASK,
    MODEL_INDEX,
    REPORT,
    adapter_parts,
    check_no_link,
    check_plain_files,
    public_files,
    read_mask,
)
from ..report import MemorizationReport
from ..report.card import render_card, write_card
from ..report.mask_card import MaskCard
from ..whole_files import read_json

CARD_BY_HAND = "README.by_hand.md"
"""Where a push keeps the first card that somebody has written."""

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further try, when the Hub is busy, fails or closes the connection."""

# Uploads of large files end in an OSError or a RuntimeError of their own, from hf_xet and huggingface_hub.
_UPLOAD_ERRORS = (httpx2.HTTPError, json.JSONDecodeError, OSError, RuntimeError)

logger = logging.getLogger(__name__)


class GateFailed(ValueError):
    """The release gate failed, so the adapter is not pushed."""


class PushError(RuntimeError):
    """The Hub did not take the push. The message holds the command that tries again."""


def push(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    revision: str | None = None,
    public: bool = False,
    allow_failed_gate: bool = False,
    commit_message: str = "Upload adapter, memorization report and card",
) -> str:
    """Upload the public files of an adapter's folder, or of an export, in one commit, the card rendered last.

    The token is that of `hf auth login`. The folder keeps all of its files whatever happens; its card and its report
    then name the repository. An adapter that was never audited can be pushed; its card says so.

    Args:
        folder (`str`): Folder with `memorization_report.json` and the adapter.
        repo_id (`str`, *optional*): Repository, `name` or `owner/name`; by default the repository of the last push,
            or else the folder's name.
        revision (`str`, *optional*): Branch, which is made when it does not exist.
        public (`bool`): Whether a new repository is made public, and an existing one may be public.
        allow_failed_gate (`bool`): Whether to push although the release gate failed; the card says so first.
        commit_message (`str`): Message of the commit.

    Returns:
        `str`: The address of the commit.

    Raises:
        ValueError: For a folder without an adapter, for other files than those that the report was measured on, for a
            public file that is a link, and for a public repository that was not allowed.
        GateFailed: When the gate failed and a failed gate was not allowed.
        PushError: When the Hub refuses the token or the commit, or does not answer in several tries.
    """
    folder = Path(folder)
    report = _checked(folder, allow_failed_gate)
    repo_id = repo_id or report.card.get("hub_model_id") or folder.resolve().name
    again = push_command(folder, repo_id, revision, public, allow_failed_gate)
    _keep_card_by_hand(folder)

    def prepare(full_id: str) -> None:
        report.card = {name: value for name, value in report.card.items() if name not in ("revision", "location")}
        report.card |= {"hub_model_id": full_id} | ({"revision": revision} if revision else {})
        report.to_json(folder / REPORT)
        write_card(folder)

    return _upload(folder, public_files(folder), repo_id, revision, public, prepare, commit_message, again)


def push_mask(folder: str | Path, repo_id: str, *, revision: str | None = None, public: bool = False) -> str:
    """Share the mask of an adapter's folder alone: `mask.json` and a card, without weights.

    Args:
        folder (`str`): Folder of an adapter, or with a `mask.json`.
        repo_id (`str`): Repository, `name` or `owner/name`.
        revision (`str`, *optional*): Branch, which is made when it does not exist.
        public (`bool`): Whether a new repository is made public, and an existing one may be public.

    Returns:
        `str`: The address of the commit.

    Raises:
        ValueError: For a folder without a mask, a `mask.json` whose `search` or `figures` lack what the card says of
            them, and a public repository that was not allowed.
        PushError: When the Hub refuses the token or the commit, or does not answer in several tries.
    """
    content = mask_content(folder)
    try:
        MaskCard(content, repo_id).render()  # before there is a repository
    except (UndefinedError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"no card can be written from {MASK} in {str(folder)!r}: its search or its figures lack a part ({error}). "
            "Leave search and figures out, or give the file as memcontrol wrote it"
        ) from None
    again = shlex.join(["memcontrol", "push-mask", str(folder), repo_id, *_options(revision, public)])
    with tempfile.TemporaryDirectory() as temporary:

        def prepare(full_id: str) -> None:
            text = json.dumps(content | {"hub_model_id": full_id}, indent=2)
            (Path(temporary) / MASK).write_text(text + "\n", encoding="utf-8")
            write_card(temporary)

        files, message = (MASK, CARD), "Upload mask and card"
        return _upload(Path(temporary), files, repo_id, revision, public, prepare, message, again)


def mask_content(folder: str | Path) -> dict[str, Any]:
    """The content of a `mask.json`: the mask, and from the report how the mask was found and which figures it gave.

    Raises:
        ValueError: For a folder without a mask.
    """
    folder = Path(folder)
    for name in (MASK, REPORT):
        check_no_link(folder / name)
    if (folder / MASK).is_file():
        content = read_json(folder / MASK)
        read_mask(folder)
        known = ("mask", "base_model", "method", "search", "figures", "license")
        return {name: content[name] for name in known if name in content}
    if not (folder / REPORT).is_file():
        raise ValueError(f"{str(folder)!r} holds no {REPORT} and no {MASK}: give the folder of an adapter")
    report = MemorizationReport.from_json(folder / REPORT)
    if not report.mask:
        raise ValueError(f"{REPORT} in {str(folder)!r} holds no mask")
    content = {name: getattr(report, name) for name in ("mask", "base_model", "method", "search", "figures")}
    return {name: value for name, value in content.items() if value} | (
        {"license": report.card["license"]} if report.card.get("license") else {}
    )


def check_login(repo_id: str, public: bool = False) -> None:
    """Check before long work that a push can succeed: a user is logged in, and the repository is not public.

    A Hub that does not answer now is only warned of; the push itself tries again.

    Args:
        repo_id (`str`): Repository, `name` or `owner/name`.
        public (`bool`): Whether the repository may be public.

    Raises:
        ValueError: When the push would fail; the message says what to do.
    """
    try:
        _private_or_allowed(HfApi(), repo_id, public)
    except (httpx2.TransportError, json.JSONDecodeError) as error:
        logger.warning(f"the Hub does not answer now ({type(error).__name__}): the push will be tried at the end")
    except HfHubHTTPError as error:
        if not _transient(error):
            raise ValueError(f"a push would fail: {_reason(error)}") from None
    except (LocalTokenNotFoundError, OfflineModeIsEnabled, HFValidationError) as error:
        raise ValueError(f"a push would fail: {_reason(error)}") from None


def push_command(
    folder: str | Path,
    repo_id: str | None,
    revision: str | None = None,
    public: bool = False,
    allow_failed_gate: bool = False,
) -> str:
    """The command line that pushes a folder."""
    words = ["memcontrol", "push", str(folder)] + (["--hub_model_id", repo_id] if repo_id else [])
    return shlex.join([*words, *_options(revision, public), *(["--allow_failed_gate"] if allow_failed_gate else [])])


def _options(revision: str | None, public: bool) -> list[str]:
    return (["--hub_revision", revision] if revision else []) + (["--hub_public"] if public else [])


def _checked(folder: Path, allow_failed_gate: bool) -> MemorizationReport:
    """The report of a folder, once the folder is known to hold what a push needs and the gate allows the push."""
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder")
    if not (folder / REPORT).is_file():
        raise ValueError(f"{str(folder)!r} holds no {REPORT}: give the folder that a fine-tune left")
    if not adapter_parts(folder) and not any((folder / name).is_file() for name in (LORA, MODEL_INDEX)):
        raise ValueError(f"{str(folder)!r} holds no adapter: {ADAPTER} with {CONFIG}, {LORA} or {MODEL_INDEX}")
    check_plain_files(folder)
    report = MemorizationReport.from_json(folder / REPORT)
    if changed := report.files_not_measured(folder):
        raise ValueError(
            f"{', '.join(changed)} in {str(folder)!r}: not what {REPORT} was measured on. Run the training again, "
            "which measures what it saves"
        )
    if report.judge_again() is False and not allow_failed_gate:
        reason = f"failed ({len(report.gate['failures'])} limits" if report.gate else "has not judged the audit ("
        raise GateFailed(
            f"the release gate {reason}, see {folder / REPORT}), so nothing is pushed. To push the adapter all the "
            "same, with a card that begins with the failure, add --allow_failed_gate"
        )
    return report


def _keep_card_by_hand(folder: Path) -> None:
    """Keep a card that is not the one that the folder's report gives, since a push writes the card anew.

    Earlier cards that were kept stay: the next one gets a number, `README.by_hand.2.md`.
    """
    card, text = folder / CARD, render_card(folder)
    if card.is_file() and card.read_bytes() != text.encode():
        stem, _, ending = CARD_BY_HAND.rpartition(".")
        names = chain([CARD_BY_HAND], (f"{stem}.{number}.{ending}" for number in count(2)))
        kept = next(folder / name for name in names if not os.path.lexists(folder / name))
        shutil.copy2(card, kept)
        logger.warning(
            f"{card} was changed by hand, or by another version of memcontrol_hf: it is kept as {kept.name}, and "
            "the card of the report is pushed"
        )


def _upload(
    folder: Path,
    names: Sequence[str],
    repo_id: str,
    revision: str | None,
    public: bool,
    prepare: Callable[[str], None],
    message: str,
    again: str,
) -> str:
    """Commit the files, and try again after each of `WAITS` while the Hub is busy, fails or closes the connection.

    A repository that was made for this push is deleted when the push fails and nothing is in it.

    Args:
        prepare (`Callable`): Called with the full name of the repository before the files are read.
        again (`str`): Command that tries again, for the error message.
    """
    api, made_here = HfApi(), None
    for wait in (*WAITS, None):
        try:
            full_id, exists = _private_or_allowed(api, repo_id, public)
            if not exists:
                made_here = full_id
            api.create_repo(full_id, private=not public, exist_ok=True)
            if revision:
                api.create_branch(full_id, branch=revision, exist_ok=True)
            prepare(full_id)
            check_plain_files(folder)
            return api.create_commit(
                full_id,
                [CommitOperationAdd(name, folder / name) for name in names if (folder / name).is_file()],
                commit_message=message,
                revision=revision,
            ).commit_url
        except _UPLOAD_ERRORS as error:
            if wait is None or not _transient(error):
                if made_here:
                    _delete_if_empty(api, made_here)
                raise PushError(
                    f"the push failed: {_reason(error)} Nothing is lost: try again with\n    {again}"
                ) from error
            logger.warning(f"the Hub did not take the push ({_reason(error)}): trying again in {wait:g} s")
            time.sleep(wait)
        except HFValidationError as error:
            raise ValueError(f"{repo_id!r} is no name of a repository: {_reason(error)}") from None


def _delete_if_empty(api: HfApi, repo_id: str) -> None:
    """Delete a repository that holds nothing, if the Hub answers."""
    with suppress(*_UPLOAD_ERRORS):
        if not set(api.list_repo_files(repo_id)) - {".gitattributes"}:
            api.delete_repo(repo_id, missing_ok=True)


def _private_or_allowed(api: HfApi, repo_id: str, public: bool) -> tuple[str, bool]:
    """The full name of a repository that does not exist yet, is private, or may be public; and whether it exists.

    Raises:
        ValueError: When the repository is public and may not be.
    """
    owner = api.whoami()["name"]
    full_id = repo_id if "/" in repo_id else f"{owner}/{repo_id}"
    try:
        if not api.model_info(full_id).private and not public:
            raise ValueError(
                f"the repository {full_id!r} is public: push to another repository, or add --hub_public if everybody "
                "may have the adapter"
            )
    except RepositoryNotFoundError:
        return full_id, False
    return full_id, True


def _transient(error: Exception) -> bool:
    """Whether another try can succeed."""
    if isinstance(error, (LocalTokenNotFoundError, OfflineModeIsEnabled, FileNotFoundError, PermissionError)):
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return isinstance(error, (httpx2.TransportError, json.JSONDecodeError, OSError, RuntimeError))


def _reason(error: Exception) -> str:
    """The reason of a failure in one line, with what to do about it where that is known."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        return "the Hub does not know your token: log in with `hf auth login`."
    if status == 403:
        return "your token may not write there: log in with a write token, `hf auth login`."
    if status == 429:
        return "the Hub is asked too often (429)."
    if status is not None and status >= 500:
        return f"the Hub has an error of its own ({status})."
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set."
    if isinstance(error, (httpx2.TransportError, json.JSONDecodeError, ConnectionError, TimeoutError)):
        return f"the Hub hung up or cannot be reached ({type(error).__name__})."
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
