"""The card of an audit: what was attacked and what was found, without a word on a training that nobody saw."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCardData

from ..adapter_folder import REPORT
from .attack_table import attack_rows
from .card_metadata import as_yaml, eval_results
from .escaping import render_template
from .report import MemorizationReport
from .verdict import unit_of, verdict

DISTANCES = "distances.png"
"""The plot that `memcontrol audit` leaves beside its report."""


@dataclass(frozen=True)
class AuditCard:
    """What `audit_card_template.md` says, apart from its own words.

    Args:
        report ([`MemorizationReport`]): report of an audit alone.
        name (`str`): name of the folder.
        has_plot (`bool`): whether `distances.png` lies beside the card.
    """

    report: MemorizationReport
    name: str
    has_plot: bool

    @classmethod
    def from_folder(cls, folder: Path) -> "AuditCard":
        """Read the folder that `memcontrol audit` left."""
        report = MemorizationReport.from_json(folder / REPORT)
        return cls(report, folder.resolve().name, (folder / DISTANCES).is_file())

    def render(self) -> str:
        """The text of the card."""
        report = self.report
        data = ModelCardData(
            model_name=self.name,
            eval_results=eval_results(report) or None,
            tags=["memcontrol", "memcontrol-audit", "diffusers", "memorization"],
        )
        return render_template(
            "audit_card_template.md",
            metadata=as_yaml(data),
            name=self.name,
            report=report,
            has_plot=self.has_plot,
            attacks=attack_rows(report),
            persons=report.persons_table(),
            unit=unit_of(report.audit),
            verdict=report.gate and verdict(report.gate, report.audit),
        )
