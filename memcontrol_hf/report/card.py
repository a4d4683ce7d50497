"""The card of a folder, whichever kind of folder it is."""

from pathlib import Path

from ..adapter_folder import CARD, MASK, REPORT
from ..whole_files import write_whole
from .adapter_card import AdapterCard
from .audit_card import AuditCard
from .base_card import TRAINING_LOG, render_base_card
from .mask_card import MaskCard
from .report import MemorizationReport


def write_card(folder: str | Path) -> Path:
    """Render the card of a folder, and put the card there, whole or not at all.

    Args:
        folder (`str`): As for [`render_card`].

    Returns:
        `Path`: The card.

    Raises:
        ValueError: As [`render_card`].
    """
    folder = Path(folder)
    text = render_card(folder)
    write_whole(folder / CARD, text)
    return folder / CARD


def render_card(folder: str | Path) -> str:
    """The text of the card of a folder, from the files in the folder.

    Args:
        folder (`str`): Folder of an adapter, an export or an audit (with a `memorization_report.json`), of a mask
            (with a `mask.json`), or of the demo's pipeline.

    Returns:
        `str`: The card.

    Raises:
        ValueError: When the folder is of no such kind, or its report is of another version.
    """
    folder = Path(folder)
    if (folder / REPORT).is_file():
        report = MemorizationReport.from_json(folder / REPORT)
        of_audit = report.audit is not None and not report.mask
        return (AuditCard if of_audit else AdapterCard).from_folder(folder).render()
    if (folder / MASK).is_file():
        return MaskCard.from_folder(folder).render()
    if (folder / "model_index.json").is_file() and (folder.parent / TRAINING_LOG).is_file():
        return render_base_card(folder)
    raise ValueError(f"{str(folder)!r} holds no {REPORT} and no {MASK}: a card is rendered from one of these")
