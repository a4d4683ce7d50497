"""The memorization report: figures of the tuned model beside those of the frozen base and of the all-on mask.

It holds aggregates only: no image, caption, file name or id of the data.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .gate import NOT_APPLICABLE, violation

SCHEMA_VERSION = 2
REPORT_SCHEMA = Path(__file__).with_name("report_schema.json")
"""The JSON Schema of a report."""
FROZEN_BASE, ALL_ON, SELECTED = "frozen base", "all blocks", "selected mask"
_PACKAGES = ("memcontrol_hf", "torch", "diffusers", "transformers", "peft", "optuna")


@dataclass
class MemorizationReport:
    """What was tuned, how it was found, what was measured, and what the attacks found.

    A fine-tune fills all of it; an audit of somebody else's model fills `audit` alone.

    Args:
        base_model (`str`): name of the pipeline that was tuned.
        method (`str`): the PEFT method.
        mask (`dict[str, bool]`): of the selected blocks.
        figures (`dict[str, dict[str, float]]`):
            For `"frozen base"`, `"all blocks"` and `"selected mask"`, each trained equally long: `trainable_percent`,
            `trainable_parameters`, and what [`MemControlTrainer.evaluate`] returns, against held-out images.
        training (`dict`): learning rate, steps, batch size, resolution, seed, ...; `mitigations`, and where there are
            any `sampling_mitigations`, `stopped_at_step` (of each run that was stopped early) and `dp_sgd` (what
            [`MemControlTrainer.privacy`] says of the selected mask's run).
        images (`dict[str, int]`): rows and different images of each split.
        encoder (`str`): whose features `fid` and `amd` use.
        search (`dict`, *optional*): the study; `None` when the mask was given.
        audit (`dict`, *optional*): what [`audit_memorization`] found.
        gate (`dict`, *optional*): what [`MemorizationReport.judge`] decided.
        command (`str`, *optional*): that made it, without what names a place or a person's data.
        card (`dict`):
            What the card says beside that, each where it is known: `base_revision` of the base model, `hub_model_id`
            and `revision` of a push, else the `location` of the folder in the loading snippet, `denoiser` (the
            pipeline's attribute), `example_inputs` of the pipeline (`prompt`, `class_labels` or `batch_size`),
            `license`, `datasets` (public ones), `run_url` (of the tracker), and `export` (what
            [`~memcontrol_hf.publish.export.export`] made of the adapter).
        versions (`dict[str, str]`): of the packages.
    """

    base_model: str = ""
    method: str = ""
    mask: dict[str, bool] = field(default_factory=dict)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)
    encoder: str = ""
    search: dict[str, Any] | None = None
    audit: dict[str, Any] | None = None
    gate: dict[str, Any] | None = None
    command: str | None = None
    weights: dict[str, str] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: {name: version(name) for name in _PACKAGES})
    schema_version: int = SCHEMA_VERSION

    def to_json(self, path: str | Path) -> None:
        """Write the report."""
        content = json.dumps(asdict(self), indent=2, allow_nan=False)
        Path(path).write_text(content + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> "MemorizationReport":
        """Read a report.

        Raises:
            ValueError: when the file holds a report of another version, or none.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no memorization report: {error}") from None
        found = content.get("schema_version") if isinstance(content, dict) else None
        if found != SCHEMA_VERSION:
            raise ValueError(f"{path} has report version {found!r}, but this package reads {SCHEMA_VERSION}")
        return cls(**content)

    def judge(self, limits: Mapping[str, Mapping[str, float]]) -> bool:
        """Apply a release gate to the audit, and keep the verdict in `gate`.

        Args:
            limits (`dict`): as [`load_gate`] reads them.

        Returns:
            `bool`: whether every limit is kept. What could not be measured is not kept.
        """
        if self.audit is None:
            raise ValueError("there is no audit to judge: run audit_memorization first")
        measured = self.audit["measures"]
        self.gate = {"limits": {k: dict(v) for k, v in limits.items()}, "failures": []}
        for name, limit in limits.items():
            figures = measured.get(name) or {}
            for kind, bound in limit.items():
                reason = violation(name, kind, bound, figures)
                if reason and reason not in self.gate["failures"]:
                    self.gate["failures"].append(reason)
        self.gate["passed"] = not self.gate["failures"]
        return self.gate["passed"]

    def privacy(self) -> str | None:
        """What the differentially private training guarantees, in words; `None` without one."""
        spent = self.training.get("dp_sgd")
        if spent is None:
            return None
        terms = (
            f"epsilon {spent['epsilon']:.2f} at delta {spent['delta']:g} for each row of the training data "
            f"({spent['accountant']}: noise multiplier {spent['noise_multiplier']:.3g}, gradients cut to the norm "
            f"{spent['max_grad_norm']:g}, sampling rate {spent['sample_rate']:.3g}, {spent['steps']} steps)"
        )
        if not spent["says_something"]:
            return (
                f"Too little noise: the training was differentially private with {terms}, but an epsilon above "
                f"{spent['epsilon_limit']:g} guarantees next to nothing."
            )
        looked = "by the search, which trained" if self.search else "if it was made by training"
        return (
            f"The training was differentially private: {terms}. An image in several rows, or a person with several "
            "images, is protected less. This covers the adapter's weights, while the key of the noise is kept secret. "
            f"It does not cover the figures of this report, nor the choice of mask and learning rate, {looked} on "
            "the same images."
        )

    def table(self) -> list[list[str]]:
        """The figures as rows of text, the head first."""
        head = ["", "trainable %", "fid ↓", "amd ↑ (held-out)", "membership AUC ↓ (95 %)", "noise norm (held-out)"]
        rows = [
            [
                name,
                f"{f['trainable_percent']:.3g}",
                f"{f['fid']:.2f}",
                f"{f['amd']:.4f} ({f['amd_held_out']:.4f})",
                f"{f['membership_auc']:.3f} ({f['membership_auc_low']:.3f} to {f['membership_auc_high']:.3f})",
                f"{f['noise_norm']:.3f} ({f['noise_norm_held_out']:.3f})" if "noise_norm" in f else NOT_APPLICABLE,
            ]
            for name, f in self.figures.items()
        ]
        return [head, *rows]

    def audit_table(self) -> list[list[str]]:
        """The audit's measures as rows of text, the head first."""
        head = ["", "model (95 %)", "frozen base", "held-out as train"]
        return [
            head,
            *(
                [name, *(_cell(of.get(who), who == "model") for who in ("model", "frozen_base", "held_out_as_train"))]
                for name, of in self.audit["measures"].items()
            ),
        ]

    def summary(self) -> str:
        """What was measured as aligned tables, with the canaries and the verdict."""
        parts = []
        if self.figures:
            parts.append(_aligned(self.table()))
        if privacy := self.privacy():
            parts.append(privacy)
        if self.audit is not None:
            parts.append(_aligned(self.audit_table()))
            canaries = self.audit["canaries"]
            found = ", ".join(f"{name} {n['caught']} of {n['of']}" for name, n in canaries["caught"].items())
            parts.append(
                f"canaries (training images that are repeated): {found or 'none attacked'}"
                if canaries["planted"]
                else "no canaries: no training image is repeated, so the attacks were not seen to fire"
            )
        if self.gate is not None:
            parts.append("\n".join([f"gate: {'passed' if self.gate['passed'] else 'FAILED'}", *self.gate["failures"]]))
        return "\n\n".join(parts)


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _cell(figure: Mapping[str, Any] | None, interval: bool) -> str:
    if figure is None:
        return "not measured"
    if figure["value"] is None:
        return NOT_APPLICABLE if (figure.get("note") or "").startswith(NOT_APPLICABLE) else "not estimable"
    text = f"{figure['value']:.3f}"
    return f"{text} ({figure['low']:.3f} to {figure['high']:.3f})" if interval and figure["low"] is not None else text


# ---- the release gate ----
