"""The card of an adapter: the verdict, how to load the adapter, its figures, and the attacks on it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from markupsafe import Markup

from ..adapter_folder import ADAPTER, LORA, PLOT, REPORT, adapter_parts
from ..masks import block_map, selected_blocks
from .card_metadata import as_yaml, base_metadata, eval_results, last_part, pipeline_task, readable_base
from .escaping import render_template
from .loading_snippet import loading_snippet
from .report import SELECTED, MemorizationReport

_ATTACKS = {
    "membership_auc_loss": "Tell training images from others by how well they are denoised. 0.5 is guessing, 1 (or 0, "
    "turned around) is always right",
    "membership_auc_secmi": "The same by the attack SecMI",
    "membership_auc_pia": "The same by the attack PIA",
    "membership_auc_clid": "The same by the attack CLiD",
    "extraction_rate": "Get training images back by asking with their captions",
    "extraction_rate_calibrated": "The same, closeness judged by how close other real images are",
    "nearest_share": "Generated images that are nearer to a training image than to other real images",
    "copy_share": "Generated images that could pass for a copy of a training image",
}
"""What the table of attacks says about a measure. A measure that is not here goes by its own name."""

_LIMITS = {
    "max": "at most {}",
    "min": "at least {}",
    "max_above_frozen_base": "at most {} above the base",
    "max_above_held_out_as_train": "at most {} above the false alarms",
}


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
    def attacks(self) -> list[dict[str, str]]:
        """Rows of the audit's table: the measures that the gate limits, or without a gate those with an interval."""
        gate = self.report.gate or {"limits": {}, "failures": []}
        failed = {reason.split(":")[0] for reason in gate["failures"]}
        rows = []
        for name, figures in self.report.audit["measures"].items():
            limits = gate["limits"].get(name)
            shown_without_gate = figures["model"]["low"] is not None and not name.startswith("membership_tpr")
            if limits is None if self.report.gate else not shown_without_gate:
                continue
            percent = name.endswith(("_share", "_rate", "_rate_calibrated")) or "_tpr_" in name
            texts = [_limit(kind, bound, percent) for kind, bound in (limits or {}).items()]
            rows.append(
                {
                    "name": name,
                    "what": _ATTACKS.get(name, name),
                    "model": _figure(figures["model"], percent, with_interval=True),
                    "frozen_base": _figure(figures["frozen_base"], percent),
                    "false_alarms": _figure(figures["held_out_as_train"], percent),
                    "limit": " and ".join(texts) + (" ✗" if name in failed else " ✓") if texts else "none",
                }
            )
        return rows

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
            stopped_at=stopped if isinstance(stopped, dict) else {SELECTED: stopped},
            dp=report.guarantee(),
        )


def _limit(kind: str, bound: float, percent: bool) -> str:
    """A limit of the gate in words. A difference of percentages is in points."""
    text = f"{100 * bound:.3g} points" if percent and "_above_" in kind else _number(bound, percent)
    return _LIMITS[kind].format(text)


def _figure(figure: Mapping[str, Any] | None, percent: bool, with_interval: bool = False) -> str:
    """A figure of the audit (`value`, `low`, `high`, `note`) as a cell of the table."""
    if figure is None:
        return "not measured"
    if figure["value"] is None:
        return figure["note"] or "not estimable"
    text = _number(figure["value"], percent)
    if not with_interval or figure["low"] is None:
        return text
    return f"{text} ({_number(figure['low'], percent)} to {_number(figure['high'], percent)})"


def _number(value: float, percent: bool) -> str:
    return f"{100 * value:.3g} %" if percent else f"{value:.3g}"
