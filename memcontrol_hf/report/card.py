"""The cards of an adapter, of a mask and of the demo's base pipeline, each rendered from the files of its folder."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from markupsafe import Markup

from ..adapter_folder import ADAPTER, CARD, LORA, MASK, PLOT, REPORT, adapter_parts
from ..masks import block_map, selected_blocks
from .escaping import render_template
from .report import SELECTED, MemorizationReport

# What the table of attacks says of a measure; one that is not here goes by its own name.
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
_LIMITS = {
    "max": "at most {}",
    "min": "at least {}",
    "max_above_frozen_base": "at most {} above the base",
    "max_above_held_out_as_train": "at most {} above the false alarms",
}
_INTERVAL_ENDS = ("_low", "_high")


def write_card(folder: str | Path) -> Path:
    """Render the card of a folder from the files in it, and put it there in one move.

    Args:
        folder (`str`): of an adapter or an export of it (`memorization_report.json`), of a mask (`mask.json`), or of
            the demo's pipeline.

    Returns:
        `Path`: of the card.

    Raises:
        ValueError: when the folder holds none of these.
    """
    folder = Path(folder)
    if (folder / REPORT).is_file():
        text = AdapterCard.from_folder(folder).render()
    elif (folder / MASK).is_file():
        text = MaskCard.from_folder(folder).render()
    elif (folder / "model_index.json").is_file() and (folder.parent / "training_log.json").is_file():
        text = render_base_card(folder)
    else:
        raise ValueError(f"{str(folder)!r} holds no {REPORT} and no {MASK}: there is nothing to make a card of")
    new = folder / f".{CARD}.new"
    new.write_text(text, encoding="utf-8")
    os.replace(new, folder / CARD)
    return folder / CARD


@dataclass(frozen=True)
class AdapterCard:
    """What `model_card_template.md` says, apart from its own words.

    Args:
        report ([`MemorizationReport`]): of the adapter.
        location (`str`): folder or Hub id of the adapter, in the loading snippet.
        adapter_bytes (`int`, *optional*): size of the adapter's files.
        has_plot (`bool`): whether `pareto_front.png` lies beside the card.
        parts (tuple of `str`): of [`adapter_parts`].
    """

    report: MemorizationReport
    location: str
    adapter_bytes: int | None
    has_plot: bool
    parts: tuple[str, ...] = ("",)

    @classmethod
    def from_folder(cls, folder: Path) -> "AdapterCard":
        """Read the folder of an adapter."""
        parts = adapter_parts(folder)
        files = [folder / part / ADAPTER for part in parts] or [f for f in (folder / LORA,) if f.is_file()]
        report = MemorizationReport.from_json(folder / REPORT)
        location = report.card.get("hub_model_id") or report.card.get("location") or folder.resolve().name
        size = sum(file.stat().st_size for file in files) if files else None
        return cls(report, location, size, (folder / PLOT).is_file(), parts or ("",))

    @property
    def metadata(self) -> str:
        """The YAML head, with every figure of the report as a model index."""
        report, card = self.report, self.report.card
        data = ModelCardData(
            model_name=_name(self.location),
            eval_results=eval_results(report) or None,
            datasets=card.get("datasets") or None,
            license=card.get("license"),
            pipeline_tag=_task(report),
            **_base(report.base_model, "merge" if self.export.get("format") == "merged" else "adapter"),
            library_name="diffusers" if self.export.get("format") in ("merged", "lora") else "peft",
            tags=["memcontrol", report.method, "diffusers", "memorization", *(["lora"] if self._is_lora else [])],
        )
        return Markup(data.to_yaml().strip())

    @property
    def _is_lora(self) -> bool:
        return self.export.get("format") == "lora" and self.report.method != "lora"

    @property
    def export(self) -> dict[str, Any]:
        return self.report.card.get("export") or {}

    @property
    def snippet(self) -> str:
        """Python that loads the pipeline with the adapter and generates an image."""
        report, card, kind = self.report, self.report.card, self.export.get("format")
        location = _python(self.location)
        revision = f", revision={_python(card['revision'])}" if card.get("revision") else ""
        denoiser = card.get("denoiser", "unet")
        ours = report.method in _OUR_METHODS and kind in (None, "peft")
        demo = report.base_model == "demo" and kind != "merged"
        lines = []
        if ours or demo:
            lines += ["import memcontrol_hf  # registers the PEFT method" if ours else "import memcontrol_hf"]
        if not demo:
            lines += ["from diffusers import DiffusionPipeline"]
        if kind in (None, "peft"):
            lines += ["from peft import PeftModel"]
        base = "memcontrol_hf.demo_pipeline()" if demo else "DiffusionPipeline.from_pretrained({}{})"
        if kind == "merged":
            lines += ["", f"pipe = {base.format(location, revision)}"]
        else:
            of_base = f", revision={_python(card['base_revision'])}" if card.get("base_revision") else ""
            lines += ["", f"pipe = {base if demo else base.format(_python(report.base_model), of_base)}"]
            lines += (
                [f"pipe.load_lora_weights({location}{revision})"]
                if kind == "lora"
                else [
                    f"pipe.{part or denoiser} = PeftModel.from_pretrained(pipe.{part or denoiser}, {location}"
                    + (f", subfolder={_python(part)}" if part else "")
                    + f"{revision})"
                    for part in self.parts
                ]
            )
        inputs = card.get("example_inputs") or {"prompt": [""]}
        if "prompt" in inputs:
            call = _python(inputs["prompt"][0])
        else:
            call = ", ".join(f"{name}={_python(value)}" for name, value in inputs.items())
        return "\n".join([*lines, f"image = pipe({call}).images[0]"])

    @property
    def attacks(self) -> list[dict[str, str]]:
        """The table of the audit: what the gate looked at, or without a gate what has an interval."""
        gate = self.report.gate or {"limits": {}, "failures": []}
        failed = {reason.split(":")[0] for reason in gate["failures"]}
        rows = []
        for name, of in self.report.audit["measures"].items():
            limits = gate["limits"].get(name)
            if limits is None if self.report.gate else name.startswith("membership_tpr") or of["model"]["low"] is None:
                continue
            percent = name.endswith(("_share", "_rate", "_rate_calibrated")) or "_tpr_" in name
            texts = [
                _LIMITS[kind].format(
                    f"{100 * bound:.3g} points" if percent and "_above_" in kind else _figure(bound, percent)
                )
                for kind, bound in (limits or {}).items()
            ]
            rows.append(
                {
                    "name": name,
                    "what": _ATTACKS.get(name, name),
                    "model": _with_interval(of["model"], percent),
                    "frozen_base": _with_interval(of["frozen_base"], percent, False),
                    "false_alarms": _with_interval(of["held_out_as_train"], percent, False),
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
            name=_name(self.location),
            base="the demo pipeline of memcontrol_hf" if report.base_model == "demo" else report.base_model,
            figures=report.figures.get(SELECTED),
            table=report.table() if report.figures else [],
            block_map=block_map(report.mask),
            blocks_on=len(selected_blocks(report.mask)),
            stopped_at=stopped if isinstance(stopped, dict) else {SELECTED: stopped},
            dp=guarantee(report),
        )


@dataclass(frozen=True)
class MaskCard:
    """What `mask_card_template.md` says: a mask is worth sharing without the adapter.

    Args:
        content (`dict`): of `mask.json`: `mask`, and where they are known `base_model`, `method`, `search` and
            `figures` (of the frozen base, all blocks and the mask), `hub_model_id`, `license`.
        location (`str`): folder or Hub id of the mask.
    """

    content: dict[str, Any]
    location: str

    @classmethod
    def from_folder(cls, folder: Path) -> "MaskCard":
        """Read the folder of a mask."""
        content = json.loads((folder / MASK).read_text(encoding="utf-8"))
        return cls(content, content.get("hub_model_id") or folder.resolve().name)

    def render(self) -> str:
        """The text of the card."""
        content, location = self.content, self.location
        base, method = content.get("base_model", ""), content.get("method")
        report = MemorizationReport(figures=content.get("figures", {}))
        data = ModelCardData(
            **_base(base, "adapter"),
            license=content.get("license"),
            tags=["memcontrol", "memcontrol-mask", *([method] if method else []), "diffusers", "memorization"],
        )
        return render_template(
            "mask_card_template.md",
            metadata=Markup(data.to_yaml().strip()),
            name=_name(location),
            location=location,
            base="the demo pipeline of memcontrol_hf" if base == "demo" else base,
            base_argument=base,
            method=method,
            block_map=block_map(content["mask"]),
            blocks_on=len(selected_blocks(content["mask"])),
            block_count=len(content["mask"]),
            tunes_text=any(name.startswith("text_encoder") for name in content["mask"]),
            search=content.get("search"),
            table=report.table() if report.figures else [],
        )


def render_base_card(folder: Path) -> str:
    """The card of the demo's pipeline, with the figures of the `training_log.json` beside its folder."""
    log = json.loads((folder.parent / "training_log.json").read_text(encoding="utf-8"))
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    data = ModelCardData(
        library_name="diffusers",
        license="apache-2.0",
        pipeline_tag="text-to-image",
        tags=["memcontrol", "diffusers", "stable-diffusion", "demo"],
    )
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    return render_template(
        "base_card_template.md",
        metadata=Markup(data.to_yaml().strip()),
        log=log,
        pipeline_class=index["_class_name"],
        size=size,
    )


# ---- what the cards are made of ----

_OUR_METHODS = ("svdiff", "difffit", "attention", "weights", "norm", "bias")


def eval_results(report: MemorizationReport) -> list[EvalResult]:
    """Every figure of the selected model for the model index: quality and memorization, with their intervals."""

    def result(config: str, name: str, value: float, low: float | None = None, high: float | None = None):
        return EvalResult(
            task_type=_task(report),
            dataset_type="held-out-images",
            dataset_name="held-out images of the tuned domain",
            dataset_config=config,
            dataset_split="held_out",
            metric_type=name,
            metric_name=name,
            metric_value=value,
            metric_args=None if low is None else {"low": low, "high": high},
        )

    figures = report.figures.get(SELECTED, {})
    results = [
        result("fine-tune", name, value, *(figures.get(name + end) for end in _INTERVAL_ENDS))
        for name, value in figures.items()
        if not name.startswith("trainable_") and not name.endswith(_INTERVAL_ENDS)
    ]
    for name, of in (report.audit or {"measures": {}})["measures"].items():
        if of["model"]["value"] is not None:
            results.append(result("audit", name, of["model"]["value"], of["model"]["low"], of["model"]["high"]))
    if dp := guarantee(report):
        results.append(result("training", "dp_epsilon", dp["epsilon"]))
        results.append(result("training", "dp_delta", dp["delta"]))
    return results


def guarantee(report: MemorizationReport) -> dict[str, Any] | None:
    """The spent `epsilon` and `delta` of a differentially private training, if they guarantee anything."""
    spent = report.training.get("dp_sgd")
    return spent if spent and spent["says_something"] else None


def _base(base_model: str, relation: str) -> dict[str, str]:
    """Metadata for a base model that the Hub has."""
    on_hub = base_model != "demo" and re.fullmatch(r"[\w.-]+/[\w.-]+", base_model)
    return {"base_model": base_model, "base_model_relation": relation} if on_hub else {}


def _name(location: str) -> str:
    return location.rstrip("/").split("/")[-1]


def _task(report: MemorizationReport) -> str:
    """The Hub's name for what the pipeline does."""
    inputs = report.card.get("example_inputs") or {"prompt": []}
    return "text-to-image" if "prompt" in inputs else "unconditional-image-generation"


def _python(value: str | int | list[int]) -> str:
    """A string, number or list as Python reads it, strings in double quotes."""
    return json.dumps(value, ensure_ascii=False)


def _figure(value: float, percent: bool) -> str:
    return f"{100 * value:.3g} %" if percent else f"{value:.3g}"


def _with_interval(figure: Mapping[str, Any] | None, percent: bool, interval: bool = True) -> str:
    if figure is None:
        return "not measured"
    if figure["value"] is None:
        return figure["note"] or "not estimable"
    text = _figure(figure["value"], percent)
    if not interval or figure["low"] is None:
        return text
    return f"{text} ({_figure(figure['low'], percent)} to {_figure(figure['high'], percent)})"


# ---- escaping: whatever a template prints is text, unless one of these filters makes it code ----
