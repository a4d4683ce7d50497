"""The dossier for a data protection officer: what was tested and what was not, in the order of ISO/IEC 27559.

Every line names the field that it comes from, or says that nothing was tested or stated. The dossier repeats figures
of the report and words of people; it makes no legal claim.
"""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..adapter_folder import PLOT, REPORT, bound_files, changed_files
from .attack_table import attack_rows
from .cross_references import cross_references
from .dossier_facts import NOT_STATED, Facts
from .report import MemorizationReport
from .verdict import GENERATED, unit_of, verdict

NOT_TESTED = "not tested"


@dataclass(frozen=True)
class Line:
    """A line of the dossier.

    Args:
        label (`str`): what the line is about.
        text (`str`): what is known.
        source (`str`): field of the report or of the facts that the text comes from.
    """

    label: str
    text: str
    source: str


@dataclass(frozen=True)
class Section:
    """A section: a title, what it is about, lines, and tables of text whose first row is the head."""

    title: str
    about: str
    lines: tuple[Line, ...] = ()
    tables: tuple[tuple[str, list[list[str]]], ...] = ()


@dataclass(frozen=True)
class Dossier:
    """What the dossier says, apart from how it looks.

    Args:
        name (`str`): name of the folder.
        report ([`MemorizationReport`]): report of the folder.
        facts ([`Facts`]): what people filled in.
        weights_agree (`bool`, *optional*):
            Whether the files in the folder have the report's digests; `None` where there are none to compare.
        today (`datetime.date`): day of the rendering.
    """

    name: str
    report: MemorizationReport
    facts: Facts
    weights_agree: bool | None
    today: datetime.date

    @classmethod
    def from_folder(cls, folder: Path, facts: Facts, today: datetime.date | None = None) -> "Dossier":
        """Read the folder that `memcontrol train` or `memcontrol audit` left.

        Raises:
            ValueError: when the folder has no report, or a report without an audit.
        """
        if not (folder / REPORT).is_file():
            raise ValueError(
                f"{str(folder)!r} holds no {REPORT}: give a folder that memcontrol train or memcontrol audit left"
            )
        report = MemorizationReport.from_json(folder / REPORT)
        if report.audit is None:
            raise ValueError(
                f"the report in {str(folder)!r} has no audit, so there is nothing to say: audit the model"
            )
        files = {*bound_files(folder)} - {PLOT}
        agree = not changed_files(folder, report.weights) if files and report.weights else None
        return cls(folder.resolve().name, report, facts, agree, today or datetime.date.today())

    @property
    def sections(self) -> list[Section]:
        """All sections, in order."""
        return [
            self._summary(),
            self._context(),
            self._data(),
            self._tests(),
            self._not_tested(),
            self._governance(),
            *(
                Section(title, about, tables=((("", rows)),))
                for title, about, rows in cross_references(self.report.audit)
            ),
        ]

    def html(self) -> str:
        """The dossier as a self-contained page."""
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent / "templates"), undefined=StrictUndefined, autoescape=True
        )
        return environment.get_template("dossier.html").render(dossier=self)

    # ---- the sections ----

    def _summary(self) -> Section:
        report, facts = self.report, self.facts
        gate, said = report.gate, "no gate was applied"
        if gate:
            said = f"The gate {'passed' if gate['passed'] else 'FAILED'}. {verdict(gate, report.audit)}"
        overdue = ": THIS DATE HAS PASSED" if facts.overdue(self.today) else ""
        lines = [
            Line("What was audited", self._subject(), "audit.subject, base_model"),
            Line("Weights are those that were measured", self._are_measured(), "weights, card.export"),
            Line("Verdict", said, "gate"),
            Line(
                "Formal guarantee", report.privacy() or "none: no differentially private training", "training.dp_sgd"
            ),
            self._fact("Decision", "decision"),
            self._fact("Signed by", "signed_by"),
            Line("Next review", (facts.review_date or NOT_STATED) + overdue, "facts: review_date"),
        ]
        return Section("Summary", "The result in one view; the sections below say how it was obtained.", tuple(lines))

    def _are_measured(self) -> str:
        """Whether the weights in the folder are those that were measured; the digests of an export are its own."""
        if self.weights_agree is None:
            return "not known: digests or weights are missing"
        if not self.weights_agree:
            return "NO: the files were changed after the audit"
        export = self.report.card.get("export")
        if not export:
            return "yes"
        if export["format"] == "peft":
            return "yes, copied: the files are copies of the adapter that was measured, with the same tensors"
        if export["format"] == "merged":
            return "NO, merged: the adapter that was measured was added to the weights of its base"
        if "relative_error" not in export:
            return "NO, converted: the tensors are those of the adapter that was measured, in a file for diffusers"
        return (
            "NO: converted from the adapter that was measured, with a relative error of the change of the weights of "
            f"{export['relative_error']:.2g} (0 is exact, 1 is as far as the base)"
        )

    def _subject(self) -> str:
        subject, base = self.report.audit["subject"], self.report.base_model
        if subject == GENERATED:
            return "a folder of generated images; the model that made them was not attacked"
        of_base = f"of the base model {base}" if base else "of a base model that the report does not name"
        return f"an adapter {of_base}" if subject == "adapter" else f"a whole pipeline ({base})"

    def _context(self) -> Section:
        without_weights = self.report.audit["subject"] == GENERATED
        threat = (
            "a recipient of the images, who has candidate images and compares them with what was generated"
            if without_weights
            else "a recipient who has the weights, their base, and a candidate image with its caption, and asks "
            "whether the image was trained on; a recipient who asks the model with training captions to get the "
            "images back"
        )
        return Section(
            "1. Context (ISO/IEC 27559, clause 6)",
            "Who gets the model, what for, and what they could do with it.",
            (
                self._fact("Purpose", "purpose"),
                self._fact("Recipients", "recipients"),
                self._fact("What recipients know besides", "knowledge"),
                self._fact("Safeguards around the model", "safeguards"),
                Line("Threats that were modelled", threat, "audit.subject"),
                self._fact("Harm to a person if a threat comes true", "harm"),
            ),
        )

    def _data(self) -> Section:
        audit = self.report.audit
        images, persons = audit["images"], audit.get("persons")
        lines = [
            self._fact("Where the images come from, and whom they show", "source"),
            self._fact("Preparation", "preparation"),
            Line("Images", f"{images['train']} trained on, {images['held_out']} held out", "audit.images"),
        ]
        if persons:
            counts = ", ".join(
                f"{persons[name]} {said} ({of['least']} to {of['most']} images each, median {of['median']:g})"
                for name, said in (("train", "trained on"), ("held_out", "held out"))
                if (of := persons["images_per_person"][name])
            )
            lines.append(Line("Persons", counts, "audit.persons"))
        else:
            said = f"{NOT_TESTED}: no column of persons was given, so every image counts as a person of its own"
            lines.append(Line("Persons", said, "audit.persons"))
        near = images.get("train_near_duplicates")
        lines.append(
            Line(
                "Training images that are near-duplicates of another",
                NOT_TESTED if near is None else str(near),
                "audit.images.train_near_duplicates",
            )
        )
        for label, field in (
            ("Captions with traces of de-identification", "caption_markers"),
            ("Captions with identifiers that Presidio recognizes", "caption_identifiers"),
        ):
            found = audit.get(field)
            said = (
                NOT_TESTED if found is None else ", ".join(f"{kind}: {n}" for kind, n in found.items()) or "none found"
            )
            lines.append(Line(label, said, f"audit.{field}"))
        lines.append(Line("Identifiers in the pixels: faces, burned-in text", NOT_TESTED, "no field"))
        return Section("2. Data (ISO/IEC 27559, clause 7)", "What the model was trained on.", tuple(lines))

    def _tests(self) -> Section:
        report, audit = self.report, self.report.audit
        head = ["what was tried", "this model (95 % interval)", "untouched base", "false alarms", "limit"]
        rows = [
            [
                f"{row['what']} ({row['name']})",
                row["model"],
                row["frozen_base"],
                row["false_alarms"],
                _limit(row["limit"]),
            ]
            for row in attack_rows(report)
        ]
        tables = [(f"Attacks; rates and intervals are of {unit_of(audit)}", [head, *rows])]
        if audit.get("persons"):
            tables.append(("Exposure of persons; compare with held-out persons", report.persons_table()))
        canaries = audit["canaries"]
        caught = ", ".join(f"{name} {n['caught']} of {n['of']}" for name, n in canaries["caught"].items())
        planted = f"{canaries['planted']} training images occur several times. Found: {caught or 'none was attacked'}"
        used = [*report.training.get("mitigations", []), *report.training.get("sampling_mitigations", [])]
        mitigations = ", ".join(used) or ("none" if report.training else "not known: the training was not seen")
        failures = report.gate["failures"] if report.gate else []
        lines = [
            Line(
                "Control: could the attacks find anything?",
                planted
                if canaries["planted"]
                else f"{NOT_TESTED}: no image was repeated, so no attack was seen to fire",
                "audit.canaries",
            ),
            Line(
                "Control: what did the base know before?",
                _control(audit, "frozen_base", "see the column untouched base"),
                "audit.measures.*.frozen_base",
            ),
            Line(
                "Control: what is found where nothing is to be found?",
                _control(audit, "held_out_as_train", "see the column false alarms"),
                "audit.measures.*.held_out_as_train",
            ),
            Line("Measured lower bound of epsilon", report.measured_epsilon() or NOT_TESTED, "audit.epsilon"),
            Line("Mitigations", mitigations, "training.mitigations"),
            *(Line("Limit that was not kept", failure, "gate.failures") for failure in failures),
            self._fact("Residual risk", "residual_risk"),
        ]
        about = (
            "Attacks by a tester who has everything that a recipient has. The limits are conventions of a gate file."
        )
        return Section("3. Identifiability (ISO/IEC 27559, clause 8)", about, tuple(lines), tuple(tables))

    def _not_tested(self) -> Section:
        lines = tuple(Line(label, NOT_TESTED, source) for label, source in not_tested(self.report.audit))
        about = "A test that is not named here and in section 3 was not made, either."
        return Section("4. What was not tested", about, lines)

    def _governance(self) -> Section:
        report = self.report
        versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
        digests = "; ".join(f"{name} {digest}" for name, digest in report.weights.items())
        return Section(
            "5. Governance (ISO/IEC 27559, clause 9)",
            "Who answers for the model, and when it is tested again.",
            (
                self._fact("Signed by", "signed_by"),
                self._fact("Signed on", "signed_on"),
                self._fact("Next review", "review_date"),
                self._fact("Test again before that date when", "review_when"),
                self._fact("Incidents", "incidents"),
                Line("Command that repeats the measurement", report.command or "not known", "command"),
                Line("Fingerprint of the training images", report.audit.get("data_fingerprint", "none"), "audit"),
                Line("SHA-256 of the files", digests or "none", "weights"),
                Line("Versions", versions, "versions"),
                Line("Rendered on", self.today.isoformat(), "day of this rendering"),
            ),
        )

    def _fact(self, label: str, name: str) -> Line:
        assert name in {fact.name for fact in fields(Facts)}
        return Line(label, getattr(self.facts, name) or NOT_STATED, f"facts: {name}")


def not_tested(audit: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The tests that an audit lacks, each with the field where it would stand: first those that could be made."""
    possible = [
        ("membership_auc_loss", "Membership inference on the weights"),
        ("extraction_rate_calibrated", "Extraction of training images by their captions"),
        ("embedding_attack_auc", "Extraction by text embeddings that are optimized to give an image back"),
        ("copy_share", "Copies among generated images"),
        ("partial_copy_share", "Parts of training images in generated images"),
        ("attribute_advantage", "Attribute inference: an attribute of a training person, by the captions that fit"),
        ("reidentified_share", "Re-identification of persons in generated images by a verifier"),
    ]
    for measure, label in possible:
        figure = (audit["measures"].get(measure) or {}).get("model")
        if figure is None or figure["value"] is None:
            note = f" ({figure['note']})" if figure and figure["note"] else ""
            yield label + note, f"audit.measures.{measure}"
    if not audit.get("persons"):
        yield "Persons as the unit, and the worst person beside the mean", "audit.persons"
    if not audit.get("epsilon"):
        yield "A lower bound of epsilon by coins of canaries", "audit.epsilon"
    yield "Attacks that are trained for the purpose, such as shadow models", "no field"
    yield "Captions that are optimized to make the model give an image back", "no field"
    yield "Reconstruction of images from the weights by optimization (model inversion)", "no field"
    yield "Other training runs: the intervals are of images or persons, not of trainings", "no field"
    yield "Recognition of a person by people, or together with other sources", "no field"


def _limit(text: str) -> str:
    return text.replace(" ✓", ": kept").replace(" ✗", ": NOT kept")


def _control(audit: dict[str, Any], control: str, where: str) -> str:
    measured = any(figures.get(control) for figures in audit["measures"].values())
    return where if measured else NOT_TESTED
