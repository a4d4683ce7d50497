"""The card of an adapter: the verdict, how to load the adapter, its figures, and the attacks on it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from markupsafe import Markup

from ..adapter_folder import ADAPTER, LORA, PLOT, REPORT, adapter_parts
from ..masks import block_map, selected_blocks
from .attack_table import attack_rows
from .card_metadata import as_yaml, base_metadata, eval_results, last_part, pipeline_task, readable_base
from .escaping import render_template
from .loading_snippet import loading_snippet
from .report import SELECTED, MemorizationReport
from .screening_table import screening_table
from .verdict import unit_of, verdict

WITHOUT_MATRICES = ("norm", "bias", "ln_tuning")
"""Methods that change no weight matrix."""


@dataclass(frozen=True)
class AdapterCard:
    """What `model_card_template.md` says, apart from its own words.

    Args:
        report ([`MemorizationReport`]): Report of the adapter.
        location (`str`): Folder or Hub id of the adapter, for the loading snippet.
        adapter_bytes (`int`, *optional*): Size of the adapter's weights.
        has_plot (`bool`): Whether `pareto_front.png` lies beside the card.
        parts (tuple of `str`): Folders that hold an adapter; see [`~memcontrol_hf.adapter_folder.adapter_parts`].
    """

    report: MemorizationReport
    location: str
    adapter_bytes: int | None
    has_plot: bool
    parts: tuple[str, ...] = ("",)

    @classmethod
    def from_folder(cls, folder: Path) -> "AdapterCard":
        """Read the folder of an adapter or of an export.

        Raises:
            ValueError: When the report is of another version, or no report.
        """
        parts = adapter_parts(folder)
        files = [folder / part / ADAPTER for part in parts] or [f for f in (folder / LORA,) if f.is_file()]
        report = MemorizationReport.from_json(folder / REPORT)
        location = report.card.get("hub_model_id") or report.card.get("location") or folder.resolve().name
        size = sum(file.stat().st_size for file in files) if files else None
        return cls(report, location, size, (folder / PLOT).is_file(), parts or ("",))

    @property
    def export(self) -> dict[str, Any]:
        """What the export recorded: `format`, `rank` and `relative_error`. Empty for the folder of a fine-tune."""
        return self.report.card.get("export") or {}

    @property
    def metadata(self) -> Markup:
        """The YAML head, with every figure of the report as a model index."""
        report, card, kind = self.report, self.report.card, self.export.get("format")
        converted = kind == "lora" and report.method != "lora"
        return as_yaml(
            ModelCardData(
                model_name=last_part(self.location),
                eval_results=eval_results(report) or None,
                datasets=card.get("datasets") or None,
                license=card.get("license"),
                pipeline_tag=pipeline_task(report),
                **base_metadata(report.base_model, "merge" if kind == "merged" else "adapter"),
                library_name="diffusers" if kind in ("merged", "lora") else "peft",
                tags=["memcontrol", report.method, "diffusers", "memorization", *(["lora"] if converted else [])],
            )
        )

    @property
    def snippet(self) -> str:
        """Python that loads the pipeline with the adapter and generates an image."""
        return loading_snippet(self.report, self.location, self.export.get("format"), self.parts)

    @property
    def fits_lora(self) -> bool:
        """Whether a LoRA file can hold the adapter: it tunes the denoiser alone, and weight matrices of it."""
        return self.parts == ("",) and self.report.method not in WITHOUT_MATRICES

    def render(self) -> str:
        """The text of the card."""
        report, stopped = self.report, self.report.training.get("stopped_at_step", {})
        return render_template(
            "model_card_template.md",
            card=self,
            report=report,
            name=last_part(self.location),
            base=readable_base(report.base_model),
            figures=report.figures.get(SELECTED),
            table=report.table() if report.figures else [],
            block_map=block_map(report.mask),
            blocks_on=len(selected_blocks(report.mask)),
            what_blocks_do=screening_table(report.screening, report.mask) if report.screening else [],
            stopped_at=stopped if isinstance(stopped, dict) else {SELECTED: stopped},
            dp=report.guarantee(),
            attacks=attack_rows(report) if report.audit else [],
            persons=report.persons_table() if report.audit else [],
            unit=report.audit and unit_of(report.audit),
            verdict=report.gate and verdict(report.gate, report.audit),
        )
