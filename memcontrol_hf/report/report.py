"""The memorization report: figures of the tuned model beside those of the frozen base and of all blocks.

A report holds aggregates only: no image, caption, file name or id of the data.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__
from ..adapter_folder import REPORT, changed_files
from ..whole_files import read_json, write_whole
from .gate import check_limits
from .verdict import (
    NOT_APPLICABLE,
    Violation,
    asked_of,
    not_applicable,
    unit_of,
    unit_of_measure,
    verdict,
    violation,
)

SCHEMA_VERSION = 4
_READABLE = (2, 3)
REPORT_SCHEMA = Path(__file__).with_name("report_schema.json")
"""The JSON Schema of a report."""

FROZEN_BASE, ALL_ON, SELECTED = "frozen base", "all blocks", "selected mask"
_CONTROLS = ("frozen_base", "held_out_as_train")
_SUBJECTS = {
    "model": "training persons",
    "frozen_base": "training persons, frozen base",
    "held_out_as_train": "held-out persons as training persons",
    "model_as_many": "training persons, as many as below",
    "floor": "held-out persons, as many as above",
}
_WORST = ("mean", "worst_decile", "worst_person")
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "optuna")


def _versions() -> dict[str, str]:
    """Versions of the packages that a run depends on; this one need not be installed to be imported."""
    return {"memcontrol_hf": __version__, **{name: version(name) for name in _PACKAGES}}


@dataclass
class MemorizationReport:
    """What was tuned, how it was found, what was measured, and what the attacks found.

    A fine-tune fills every field; an audit of somebody else's model fills `audit` alone.

    Args:
        base_model (`str`): Name of the pipeline that was tuned.
        method (`str`): The PEFT method.
        mask (`dict[str, bool]`): The selected mask: for each block whether it was trained.
        figures (`dict[str, dict[str, float]]`):
            For `"frozen base"`, `"all blocks"` and `"selected mask"`, each trained equally long: `trainable_percent`,
            `trainable_parameters`, and what [`MemControlTrainer.evaluate`] returns, against held-out images.
        training (`dict`): Learning rate, steps, batch size, resolution, seed and other settings of the training;
            `mitigations`; and where there are any `sampling_mitigations`, `stopped_at_step` (of each run that was
            stopped early), `dp_sgd` (what [`MemControlTrainer.privacy`] says about the selected mask's run) and
            `singular_values` (number of those that were chosen one by one, over all blocks).
        images (`dict[str, int]`): Number of rows and of different images of each split.
        encoder (`str`): Image encoder whose features `fid` and `amd` use.
        search (`dict`, *optional*): Summary of the search; `None` when the mask was given.
        screening (`dict`, *optional*):
            What each block learns and memorizes, as [`~memcontrol_hf.screening.Screening.to_dict`] gives it; `None`
            when the search made no screening.
        audit (`dict`, *optional*): What [`audit_memorization`] found.
        gate (`dict`, *optional*): What [`MemorizationReport.judge`] decided.
        command (`str`, *optional*): Command that made the report, without what names a place or a person's data.
        weights (`dict[str, str]`): SHA-256 of each file of the adapter that was measured, and of the plot.
        card (`dict`):
            What the card says beside the figures, each where it is known: `base_revision` and `base_variant` of the
            base model, `base_class` and `base_config` of one in a single file (the class of the pipeline, and
            `YOUR_SINGLE_FILE_CONFIG` where a config was given), `hub_model_id` and `revision` of a push, else the
            `location` of the folder in the loading snippet, `denoiser` (the pipeline's attribute), `without_lora`
            (where the pipeline has no `load_lora_weights`), `example_inputs` of the pipeline (`prompt`, `class_labels`
            or `batch_size`), `license`, `datasets` (public ones), `run_url` (address in the tracker), and `export`
            (what [`~memcontrol_hf.publish.export.export`] made of the adapter).
        versions (`dict[str, str]`): Versions of the packages that measured.
        schema_version (`int`): Version of the report's format; see `REPORT_SCHEMA`.
    """

    base_model: str = ""
    method: str = ""
    mask: dict[str, bool] = field(default_factory=dict)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)
    encoder: str = ""
    search: dict[str, Any] | None = None
    screening: dict[str, Any] | None = None
    audit: dict[str, Any] | None = None
    gate: dict[str, Any] | None = None
    command: str | None = None
    weights: dict[str, str] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=_versions)
    schema_version: int = SCHEMA_VERSION

    def to_json(self, path: str | Path) -> None:
        """Write the report as JSON.

        Raises:
            ValueError: When a figure is not finite.
        """
        content = json.dumps(asdict(self), indent=2, allow_nan=False)
        write_whole(path, content + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> "MemorizationReport":
        """Read a report. Earlier ones are read, too: version 2 has no screening, and version 3 no persons and epsilon.

        Raises:
            ValueError: When the file holds no report, or a report of another version.
        """
        try:
            content = read_json(path, parse_constant=_no_number)
        except ValueError as error:
            raise ValueError(f"{path} is no memorization report: {error}") from None
        found = content.get("schema_version") if isinstance(content, dict) else None
        if found in _READABLE:
            found = content["schema_version"] = SCHEMA_VERSION
        if found != SCHEMA_VERSION:
            raise ValueError(f"{path} has report version {found!r}, but this package reads {SCHEMA_VERSION}")
        if unknown := content.keys() - {f.name for f in fields(cls)}:
            raise ValueError(f"{path} is no memorization report: {min(unknown)!r} is no part of a report")
        return cls(**content)

    def judge(self, limits: Mapping[str, Mapping[str, float]]) -> bool:
        """Apply a release gate to the audit, and keep the verdict in `gate`.

        Args:
            limits (`dict`): Limits for each measure, as [`load_gate`] reads them.

        Returns:
            `bool`: Whether every limit is kept that is asked of what was audited ([`asked_of`]). A limit for what
            could not be measured is not kept. A limit for what is not applicable is passed over, but a gate of which
            no limit is applicable fails.

        Raises:
            ValueError: When the report holds no audit.
        """
        if self.audit is None:
            raise ValueError("there is no audit to judge: run audit_memorization first")
        measured, found = self.audit["measures"], []
        self.gate = {"limits": {k: dict(v) for k, v in limits.items()}}
        asked = [name for name in limits if asked_of(name, self.audit.get("subject"))]
        asked = asked or list(limits)  # a gate that asks for attacks on weights alone is not kept by images alone
        for name in asked:
            violations = [
                violation(name, kind, bound, measured.get(name) or {}, unit_of_measure(name, self.audit))
                for kind, bound in limits[name].items()
            ]
            found += [of_limit for of_limit in violations if of_limit]
        if all(not_applicable(measured.get(name) or {}) for name in asked):
            reason = f"{', '.join(asked)}: not applicable. Nothing that the gate asks for applies to this model, so "
            reason += "nothing was judged: name a gate with a limit of a measure that the audit has"
            found = [Violation(name, "unmeasured", reason) for name in asked]
        self.gate["failures"] = list(dict.fromkeys(of_limit.reason for of_limit in found))
        self.gate["passed"] = not found
        if found:
            self.gate["kinds"] = {of_limit.name: of_limit.kind for of_limit in found}
            self.gate["factors"] = {of_limit.name: of_limit.factor for of_limit in found if of_limit.factor}
        return self.gate["passed"]

    def judge_again(self) -> bool | None:
        """Whether the release gate passes, by the figures and limits alone; the stored verdict can only make it fail.

        `gate` holds the new verdict afterwards.

        Returns:
            `bool`: `None` for a report without audit and gate. An audit that no gate has judged does not pass.

        Raises:
            ValueError: When audit or gate are not what an audit writes.
        """
        if self.gate is None:
            return None if self.audit is None else False
        try:
            stored, passed = [str(reason) for reason in self.gate["failures"]], self.gate["passed"]
            limits = check_limits(self.gate["limits"], "the report")
            if self.audit is None:
                self.gate = {"limits": limits, "failures": stored or ["there is no audit"], "passed": False}
                return False
            self.judge(limits)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the report's gate cannot be judged again: {type(error).__name__}: {error}") from None
        self.gate["failures"] += [reason for reason in stored if reason not in self.gate["failures"]]
        if not self.gate["failures"] and passed is not True:
            self.gate["failures"].append(f"the report's verdict is {passed!r}, not true")
        self.gate["passed"] = not self.gate["failures"]
        return self.gate["passed"]

    @property
    def half_precision(self) -> str | None:
        """The precision of the base's weights in the training, if it was `float16` or `bfloat16`, not float32."""
        dtype = self.training.get("base_weights", "").partition(":")[0]
        return dtype if dtype in ("float16", "bfloat16") else None

    def files_not_measured(self, folder: Path) -> list[str]:
        """The files of a folder that are not what was measured: all of them, if an audit names no digests.

        A report without an audit and without digests claims nothing of any file.
        """
        return changed_files(folder, self.weights) if self.audit or self.weights else []

    def guarantee(self) -> dict[str, Any] | None:
        """The spent `epsilon` and `delta` of a differentially private training, if they guarantee anything."""
        spent = self.training.get("dp_sgd")
        return spent if spent and spent["says_something"] else None

    def privacy(self) -> str | None:
        """What the differentially private training guarantees, in words; `None` after any other training."""
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

    def measured_epsilon(self) -> str | None:
        """The lower bound of epsilon that was measured, in words, beside DP-SGD's upper bound; `None` without one."""
        measured = (self.audit or {}).get("epsilon")
        if not measured:
            return None
        repeats = self.training.get("canary_repeats")
        said = (
            f"Measured epsilon: at least {measured['lower']:.2f} (delta {measured['delta']:g}, confidence "
            f"{measured['confidence']:.0%}). Of {measured['canaries']} canaries coins chose {measured['included']} to "
            f"be trained on{f', each in {repeats} rows' if (repeats or 1) > 1 else ''}; of {measured['guesses']} "
            f"guesses at the coins {measured['correct']} were right."
        )
        if mu := measured.get("mu"):
            said += f" By the same guesses, µ of Gaussian differential privacy is at least {mu['lower']:.2f}"
            if mu["epsilon"] is not None:
                said += f", which is an epsilon of {mu['epsilon']:.2f} if the training is as private as its µ says"
            said += f"; the scores look like a µ of {mu['estimate']:.2f}, an estimate without confidence."
        said += " A lower bound near 0 is no proof of privacy: a stronger attack can raise it."
        spent = self.training.get("dp_sgd")
        if spent:
            said += f" The upper bound by DP-SGD is {spent['epsilon']:.2f}."
            if measured["lower"] > spent["epsilon"]:
                said += " THE LOWER BOUND IS ABOVE IT: the training was not what its account says."
        if self.search:
            said += " The search's own choice of blocks and learning rate, by the same images, is covered by neither."
        return said

    def table(self) -> list[list[str]]:
        """The figures against held-out images as rows of text, the head first."""
        head = ["", "trainable %", "fid ↓", "amd ↑ (held-out)", "membership AUC ↓ (95 %)", "noise norm (held-out)"]
        rows = [
            [
                name,
                f"{figures['trainable_percent']:.3g}",
                f"{figures['fid']:.2f}",
                f"{figures['amd']:.4f} ({figures['amd_held_out']:.4f})",
                _with_interval(*(figures["membership_auc" + end] for end in ("", "_low", "_high"))),
                f"{figures['noise_norm']:.3f} ({figures['noise_norm_held_out']:.3f})"
                if "noise_norm" in figures
                else NOT_APPLICABLE,
            ]
            for name, figures in self.figures.items()
        ]
        return [head, *rows]

    def audit_table(self) -> list[list[str]]:
        """The measures of the audit as rows of text, the head first."""
        head = ["", "model (95 %)", "frozen base", "held-out as train"]
        rows = [
            [name, _cell(figures.get("model")), *(_cell(figures.get(control), False) for control in _CONTROLS)]
            for name, figures in self.audit["measures"].items()
        ]
        return [head, *rows]

    def persons_table(self) -> list[list[str]]:
        """How exposed persons are, as rows of text, the head first; the head alone where persons are not known."""
        head = ["exposure of persons", "", "mean", "worst tenth", "worst person"]
        persons = self.audit.get("persons") or {"exposure": {}}
        return [
            head,
            *(
                [name, _SUBJECTS[who], *(f"{of[figure]:.3g}" for figure in _WORST)]
                for name, subjects in persons["exposure"].items()
                for who, of in subjects.items()
                if of is not None
            ),
        ]

    def summary(self) -> str:
        """What was measured, to print: aligned tables, the guarantee, the canaries and the verdict."""
        parts = []
        if self.figures:
            parts.append(aligned(self.table()))
        if privacy := self.privacy():
            parts.append(privacy)
        if self.audit is not None:
            parts.append(aligned(self.audit_table()))
            if persons := self.audit.get("persons"):
                counts = f"{persons['train']} training and {persons['held_out']} held-out persons"
                parts.append(f"{counts}: rates and intervals are of {unit_of(self.audit)}")
                parts.append(aligned(self.persons_table()))
            if measured := self.measured_epsilon():
                parts.append(measured)
            canaries = self.audit["canaries"]
            found = ", ".join(f"{name} {n['caught']} of {n['of']}" for name, n in canaries["caught"].items())
            parts.append(
                f"canaries (training images that are repeated): {found or 'none attacked'}"
                if canaries["planted"]
                else "no canaries: no training image is repeated, so the attacks were not seen to fire"
            )
        if self.gate is not None:
            passed = "passed" if self.gate["passed"] else "FAILED"
            parts.append("\n".join([f"gate: {passed}", *self.gate["failures"], verdict(self.gate, self.audit)]))
        return "\n\n".join(parts)


def check_no_training(folder: Path) -> None:
    """Raise `ValueError` for a folder that holds the report of a training, which another report would replace."""
    file = folder / REPORT
    if file.is_file() and MemorizationReport.from_json(file).mask:
        raise ValueError(
            f"{file} is the report of a training, which would be lost with what it says of the mask and the weights: "
            "give another --output_dir"
        )


def _no_number(name: str) -> None:
    """JSON has no NaN and no Infinity, but Python's reader takes them."""
    raise ValueError(f"{name} is no number")


def aligned(rows: list[list[str]]) -> str:
    """Rows of text in aligned columns, with a line below the head, which is the first row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _cell(figure: Mapping[str, Any] | None, interval: bool = True) -> str:
    """A figure of the audit (`value`, `low`, `high`, `note`) as a cell of a table."""
    if figure is None:
        return "not measured"
    if figure["value"] is None:
        return NOT_APPLICABLE if (figure.get("note") or "").startswith(NOT_APPLICABLE) else "not estimable"
    if not interval or figure["low"] is None:
        return f"{figure['value']:.3f}"
    return _with_interval(figure["value"], figure["low"], figure["high"])


def _with_interval(value: float, low: float, high: float) -> str:
    return f"{value:.3f} ({low:.3f} to {high:.3f})"
