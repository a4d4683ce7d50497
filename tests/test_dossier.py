"""The dossier: every line has a source, what is missing is said, and both files can be read."""

import datetime
import json

import pytest
import yaml
from conftest import adapter_folder, small_report, tiny_pipeline
from peft import LoraConfig

from memcontrol_hf import MemControlConfig, MemorizationReport
from memcontrol_hf.cli import main
from memcontrol_hf.publish.export import export
from memcontrol_hf.report.cross_references import cross_references
from memcontrol_hf.report.dossier import NOT_TESTED, Dossier, not_tested
from memcontrol_hf.report.dossier_facts import NOT_STATED, Facts, empty_facts
from memcontrol_hf.report.dossier_pdf import write_pdf

MASK = {"mid_block.attentions.0": True}
TODAY = datetime.date(2026, 11, 27)


def lines_of(dossier: Dossier) -> dict[str, str]:
    return {line.label: line.text for section in dossier.sections for line in section.lines}


def test_the_first_call_leaves_a_file_to_fill_in_and_the_next_takes_it_up(tmp_path, capsys):
    folder = adapter_folder(tmp_path / "adapter")
    assert main(["dossier", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"to fill in, then run the same command again: {folder / 'dossier.yaml'}" in said
    assert (folder / "dossier.pdf").read_bytes().startswith(b"%PDF")
    page = (folder / "dossier.html").read_text()
    assert page.count(NOT_STATED) > 10 and "http" not in page, "the page loads nothing"
    facts = {name: f"words on <{name}>" for name in ("purpose", "recipients", "signed_by")}
    (folder / "dossier.yaml").write_text(yaml.safe_dump(facts | {"review_date": datetime.date(2020, 1, 2)}))
    assert main(["dossier", str(folder), "--output_dir", str(tmp_path / "out"), "--no_pdf"]) == 0
    page = (tmp_path / "out" / "dossier.html").read_text()
    assert "words on &lt;purpose&gt;" in page and "2020-01-02: THIS DATE HAS PASSED" in page
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["dossier.html"]
    assert "not for others" not in page


def test_every_line_names_its_source(tmp_path):
    dossier = Dossier.from_folder(adapter_folder(tmp_path), Facts(), TODAY)
    lines = [line for section in dossier.sections for line in section.lines]
    assert len(lines) > 30 and all(line.text and line.source for line in lines)
    assert all(line.text.startswith(NOT_TESTED) for line in lines if line.source == "no field")
    titles = [section.title for section in dossier.sections]
    clauses = [title.partition("clause ")[2].rstrip(")") for title in titles if "clause" in title]
    assert clauses == ["6", "7", "8", "9"], "the order of ISO/IEC 27559"


def test_what_was_not_tested_is_said_and_what_was_is_not():
    audit = small_report().audit
    missing = dict(not_tested(audit))
    assert missing["Persons as the unit, and the worst person beside the mean"] == "audit.persons"
    assert "Membership inference on the weights" not in missing
    assert "audit.measures.embedding_attack_auc" in missing.values(), "a search that was not asked for"
    figure = {"model": {"value": None, "low": None, "high": None, "note": "too few images"}}
    audit["measures"]["membership_auc_loss"] = figure
    audit["epsilon"], audit["persons"] = {"lower": 0.1}, {"train": 3}
    missing = dict(not_tested(audit))
    assert missing["Membership inference on the weights (too few images)"] == "audit.measures.membership_auc_loss"
    assert not {"audit.persons", "audit.epsilon"} & {*missing.values()}


def test_weights_that_were_changed_after_the_audit_are_said(tmp_path):
    folder = adapter_folder(tmp_path)
    label = "Weights are those that were measured"
    assert lines_of(Dossier.from_folder(folder, Facts(), TODAY))[label] == "yes"
    with (folder / "adapter_config.json").open("a") as file:
        file.write(" ")
    assert lines_of(Dossier.from_folder(folder, Facts(), TODAY))[label].startswith("NO")
    (folder / "adapter_config.json").unlink()
    assert lines_of(Dossier.from_folder(folder, Facts(), TODAY))[label].startswith("NO")
    (folder / "adapter_model.safetensors").unlink()
    assert lines_of(Dossier.from_folder(folder, Facts(), TODAY))[label].startswith("not known")


@pytest.mark.parametrize(
    ("config", "to", "said"),
    [
        (
            MemControlConfig(method="svdiff"),
            "lora",
            "NO: converted from the adapter that was measured, with a relative",
        ),
        (MemControlConfig(method="svdiff"), "merged", "NO, merged"),
        (LoraConfig(r=2, target_modules=["to_q"]), "lora", "NO, converted: the tensors are those of the adapter"),
        (LoraConfig(r=2, target_modules=["to_q"]), "peft", "yes, copied: the files are copies of the adapter"),
    ],
    ids=["a converted LoRA", "a merged pipeline", "a LoRA for diffusers", "a copy"],
)
def test_the_weights_of_an_export_are_not_passed_off_as_those_that_were_measured(tmp_path, config, to, said):
    method = getattr(config, "method", "lora")
    report = small_report(base_model="tiny-sd", method=method, mask=MASK, card={"denoiser": "unet"})
    folder = adapter_folder(tmp_path / "adapter", config=config, mask=MASK, report=report)
    tiny_pipeline().save_pretrained(tmp_path / "base")
    export(folder, tmp_path / "out", to, pipeline=str(tmp_path / "base"), rank=1)
    lines = lines_of(Dossier.from_folder(tmp_path / "out", Facts(), TODAY))
    text = lines["Weights are those that were measured"]
    assert text.startswith(said)
    facts = MemorizationReport.from_json(tmp_path / "out" / "memorization_report.json").card["export"]
    assert (f"of {facts['relative_error']:.2g} (" in text) if "relative_error" in facts else ("error" not in text)


def test_the_file_to_fill_in_names_every_fact_and_can_be_read(tmp_path):
    (tmp_path / "facts.yaml").write_text(empty_facts())
    assert Facts.from_yaml(tmp_path / "facts.yaml") == Facts()
    assert yaml.safe_load(empty_facts()).keys() == vars(Facts()).keys()
    assert empty_facts().count("#") == len(vars(Facts())) + 1, "a comment for each"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("owner: me", "unknown 'owner': give some of purpose, recipients"),
        ("- a list", "holds a list"),
        ("review_date: next year", "must be a date like 2027-01-31, but is 'next year'"),
        ("purpose: 7", "must be a text, but is 7: write it in quotes"),
        ("purpose: [", "cannot read"),
        (f"purpose: {'w' * 2001}", "has 2001 characters, more than 2000"),
    ],
)
def test_facts_that_cannot_be_read_cost_nothing(tmp_path, capsys, content, message):
    folder = adapter_folder(tmp_path / "adapter")
    (tmp_path / "facts.yaml").write_text(content)
    assert main(["dossier", str(folder), "--facts", str(tmp_path / "facts.yaml")]) == 2
    assert message in capsys.readouterr().err and not (folder / "dossier.html").exists()


def test_a_folder_without_an_audit_is_refused(tmp_path, capsys):
    assert main(["dossier", str(tmp_path)]) == 2
    assert "holds no memorization_report.json" in capsys.readouterr().err
    small_report(None).to_json(tmp_path / "memorization_report.json")
    assert main(["dossier", str(tmp_path)]) == 2
    assert "has no audit" in capsys.readouterr().err
    assert not (tmp_path / "dossier.yaml").exists()


def test_a_passed_gate_and_long_words_are_laid_out(tmp_path):
    report = small_report()
    report.audit["persons"] = {
        "train": 5,
        "held_out": 6,
        "images_per_person": {name: {"least": 1, "median": 2, "most": 9} for name in ("train", "held_out")},
        "verifier": "demo",
        "exposure": {
            "similarity": {
                who: {"mean": 0.5, "worst_decile": 0.8, "worst_person": 0.9}
                for who in ("model", "frozen_base", "held_out_as_train", "floor")
            }
        },
    }
    facts = Facts(purpose="ε ≤ 1, " + "w" * 300, residual_risk="sentence " * 222)
    dossier = Dossier.from_folder(adapter_folder(tmp_path, report=report), facts, TODAY)
    write_pdf(dossier, tmp_path / "dossier.pdf")
    assert (tmp_path / "dossier.pdf").stat().st_size > 10_000
    lines = lines_of(dossier)
    assert lines["Verdict"].startswith("The gate passed.") and "5 trained on (1 to 9 images each" in lines["Persons"]
    assert json.loads((tmp_path / "memorization_report.json").read_text())["gate"]["passed"]
    assert "worst person" in dossier.html()


def test_a_dossier_names_only_measures_that_were_made():
    audit = small_report().audit
    rows = {row[0]: row[1] for _, _, table in cross_references(audit) for row in table}
    assert rows["Extraction of personal data from the model"] == "3, membership_*, extraction_*"
    assert rows["Resistance to membership and attribute inference"] == "3, membership_*"
    assert "has the weights" in rows["has no special equipment or skill"]
    audit |= {"subject": "generated images", "measures": {"copy_share": audit["measures"]["extraction_rate"]}}
    rows = {row[0]: row[1] for _, _, table in cross_references(audit) for row in table}
    assert rows["Extraction of personal data from the model"] == "nothing: not tested"
    assert rows["Personal data obtained by queries"] == "3, copy_share"
    assert "weights" not in rows["has no special equipment or skill"]


def test_an_attack_that_no_gate_limits_has_its_row_in_the_dossier_and_its_figure_on_the_card(tmp_path):
    report = small_report()
    figure = {"value": 0.25, "low": 0.1, "high": 0.4, "note": None}
    report.audit["measures"]["reidentified_share"] = {"model": figure, "frozen_base": None, "held_out_as_train": None}
    folder = adapter_folder(tmp_path, report=report)
    assert (
        "(reidentified_share)</td><td>25 % (10 % to 40 %)</td>" in Dossier.from_folder(folder, Facts(), TODAY).html()
    )
    card = (folder / "README.md").read_text()
    assert "again in images that are generated" not in card
    assert "`reidentified_share` 25 % (10 % to 40 %)" in card
    assert all(f"\n\n{paragraph}" in card for paragraph in ("**Not judged**", "**Canaries**"))
