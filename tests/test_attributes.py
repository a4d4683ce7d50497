"""Attribute inference: the metric, the guesses of a model, and what an audit says of them and what not."""

import dataclasses
import json
import re

import jsonschema
import pytest
import torch
from conftest import AVERAGES, RESOLUTION, images_of, tiny_pipeline
from datasets import ClassLabel, Dataset

from memcontrol_hf import audit_memorization, metrics
from memcontrol_hf.audit import AuditSettings, check_attribute
from memcontrol_hf.audit.attacks import evaluator_of
from memcontrol_hf.audit.attributes import guesses, with_value
from memcontrol_hf.cli import main
from memcontrol_hf.data import EncodedImages, load_images
from memcontrol_hf.families import family_of
from memcontrol_hf.flags import ScriptArguments
from memcontrol_hf.from_flags import check
from memcontrol_hf.randomness import Purpose, row_keys
from memcontrol_hf.report import REPORT_SCHEMA
from memcontrol_hf.report.attack_table import attack_rows
from memcontrol_hf.report.dossier import not_tested

SETTINGS = AuditSettings(
    resolution=RESOLUTION, num_prompts=3, images_per_prompt=3, inference_steps=2, num_timesteps=2, num_quality_images=4
)


def with_attribute(count: int, seed: int, values=("xx", "yy")) -> Dataset:
    """Pictures whose captions end with one of two values."""
    images, column = images_of(count, seed), [values[row % len(values)] for row in range(count)]
    texts = [f"{text} {value.upper()}" for text, value in zip(images["text"], column)]
    return images.remove_columns("text").add_column("text", texts).add_column("attribute", column)


def test_an_attribute_that_is_guessed_better_for_training_persons_is_an_advantage():
    true = [0, 0, 0, 0, 1, 1]
    result = metrics.attribute_inference((true, true, range(6)), ([0, 0, 0, 1, 0, 0], true, range(6)))
    assert (result.train, result.held_out, result.values) == (1.0, 0.375, 2)  # the mean of 3/4 and 0
    assert result.advantage == 0.625
    lower = [metrics.clopper_pearson(4, 4), metrics.clopper_pearson(2, 2)]
    upper = [metrics.clopper_pearson(3, 4), metrics.clopper_pearson(0, 2)]
    below = sum((1 - low) ** 2 for low, _ in lower) + (upper[0][1] - 0.75) ** 2 + upper[1][1] ** 2
    assert result.interval == pytest.approx((0.625 - below**0.5 / 2, 0.625 + (0.75 - upper[0][0]) / 2))
    nobody = metrics.attribute_inference((true, true, range(6)), (true, true, range(6)))
    assert nobody.advantage == 0 and nobody.interval[0] < 0 < nobody.interval[1]
    frequent = metrics.attribute_inference(([0] * 6, true, range(6)), ([0] * 6, [0, 1] * 3, range(6)))
    assert (frequent.train, frequent.held_out, frequent.advantage) == (0.5, 0.5, 0)


def test_many_images_of_one_person_make_the_interval_no_narrower():
    true, guessed = [0, 1] * 20, [0, 1] * 20
    wrong = [1, 0] * 20
    images = metrics.attribute_inference((guessed, true, range(40)), (wrong, true, range(40)))
    persons = metrics.attribute_inference((guessed, true, [0, 1] * 20), (wrong, true, [0, 1] * 20))
    assert images.advantage == persons.advantage == 1
    assert persons.interval[0] < images.interval[0] - 0.3
    with pytest.raises(ValueError, match="two values or more that both sets have, but there are 1"):
        metrics.attribute_inference(([0], [0], [0]), (guessed, true, range(40)))


def test_the_value_whose_caption_fits_the_image_best_is_guessed():
    pipeline = tiny_pipeline()
    family = family_of(pipeline)
    images = EncodedImages(with_attribute(8, 1), RESOLUTION).encoded_by(family)
    assert with_value(images, "zz").captions(range(2)) == [text[:-2] + "zz" for text in images.captions(range(2))]
    with torch.no_grad():
        found = guesses(evaluator_of(pipeline, SETTINGS), images, ["xx", "yy"], Purpose.AUDIT_ATTRIBUTES)
        keys = row_keys(SETTINGS.seed, Purpose.AUDIT_ATTRIBUTES, range(8))
        losses = [
            metrics.denoising_losses(
                family, pipeline.unet, images.batch(range(8), ["latents"])["latents"],
                family.encode_prompts([f"{text[:-2]}{value}" for text in images.images["text"]]),
                family.noise.timesteps(2), keys,
            ).mean(1)
            for value in ("xx", "yy")
        ]  # fmt: skip
    assert torch.equal(found, (losses[1] < losses[0]).long()) and 0 < found.sum() < 8


@pytest.mark.parametrize(
    ("train", "held_out", "message"),
    [
        (with_attribute(8, 1), images_of(9, 2), "train set has a column 'attribute' and the held_out set has none"),
        (with_attribute(8, 1, ("xx",)), with_attribute(9, 2), "has 1 values in train and 2 in held_out, 1 of them in"),
        (with_attribute(12, 1, "abcdefghijkl"), with_attribute(12, 2, "abcdefghijkl"), "and at most 10 in all"),
        (with_attribute(8, 1), images_of(9, 2).add_column("attribute", ["xx"] * 9), "9 of 9 captions of the held_out"),
        (with_attribute(8, 1), images_of(9, 2).add_column("attribute", [None] * 9), "9 rows of the held_out set have"),
    ],
    ids=["one set", "one value", "many values", "not in the caption", "no value"],
)
def test_an_attribute_that_cannot_be_asked_for_is_refused_and_no_value_is_shown(train, held_out, message):
    with pytest.raises(ValueError, match=message) as raised:
        check_attribute(train, held_out)
    assert not re.search("xx|yy", str(raised.value), re.IGNORECASE)


def test_the_audit_reports_the_advantage_beside_its_controls_and_no_value(tmp_path):
    arguments = {"train": with_attribute(8, 1), "held_out": with_attribute(16, 2), "encoder": AVERAGES}
    report = audit_memorization(
        **arguments, pipeline=tiny_pipeline(), base_pipeline=tiny_pipeline(), settings=SETTINGS
    )
    figures = report.audit["measures"]["attribute_advantage"]
    assert figures["model"] == figures["frozen_base"] and -1 <= figures["model"]["low"] <= figures["model"]["value"]
    assert figures["held_out_as_train"]["value"] is not None
    accuracies = [report.audit["measures"][f"attribute_accuracy{end}"]["model"]["value"] for end in ("", "_held_out")]
    assert figures["model"]["value"] == pytest.approx(accuracies[0] - accuracies[1])
    assert report.audit["attribute"] == {"values": 2}
    jsonschema.validate(dataclasses.asdict(report), json.loads(REPORT_SCHEMA.read_text()))
    assert not re.search("xx|yy", json.dumps(dataclasses.asdict(report)), re.IGNORECASE), "nor a caption"
    report.judge({"membership_auc_loss": {"max": 0.7}})
    assert "attribute_advantage" in [row["name"] for row in attack_rows(report)]
    assert not any("ttribute" in label for label, _ in not_tested(report.audit))
    del report.audit["measures"]["attribute_advantage"]
    assert any("Attribute inference" in label for label, _ in not_tested(report.audit))
    with pytest.raises(ValueError, match="leave --attribute_column out"):
        audit_memorization(**arguments, generated=images_of(6, 3))


def test_the_attribute_is_read_from_a_column_that_may_be_that_of_the_captions(tmp_path, capsys):
    for name in ("train", "validation", "held_out"):
        (tmp_path / name).mkdir()
        lines = []
        for number, row in enumerate(images_of(4, seed=len(name))):
            row["image"].save(tmp_path / name / f"{number}.png")
            lines.append(
                {"file_name": f"{number}.png", "text": f"scan of {'xy'[number % 2]}", "kind": "xy"[number % 2]}
            )
        (tmp_path / name / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = load_images(train_data_dir=str(tmp_path), attribute_column="kind")
    assert data["held_out"].column_names == ["image", "text", "attribute"]
    assert data["train"]["attribute"][:] == ["x", "y"] * 2
    same = load_images(train_data_dir=str(tmp_path), attribute_column="text")
    assert same["train"]["attribute"][:] == same["train"]["text"][:]
    with pytest.raises(ValueError, match=r"no column 'sex'.*with --attribute_column"):
        load_images(train_data_dir=str(tmp_path), attribute_column="sex")
    words = ["audit", "--pipeline", "demo", "--train", "demo", "--held_out", "demo", "--output_dir", str(tmp_path)]
    assert main([*words, "--attribute_column", "kind"]) == 2
    assert "the demo's images have none" in capsys.readouterr().err
    assert main([*words, "--attribute_column", "kind", "--caption_column", ""]) == 2
    assert "takes captions: give --caption_column" in capsys.readouterr().err


def test_the_name_of_a_class_is_its_value(tmp_path):
    images = images_of(12, 1).add_column("kind", [0, 1] * 6).cast_column("kind", ClassLabel(names=["aa", "bb"]))
    images.save_to_disk(tmp_path / "set")
    data = load_images(train_data_dir=str(tmp_path / "set"), attribute_column="kind")
    assert set(data["train"]["attribute"]) <= {"aa", "bb"}


def test_a_class_that_is_missing_is_named_by_its_row(tmp_path):
    for column, options in (("kind", {"attribute_column": "kind"}), ("text", {})):
        images = images_of(12, 1).remove_columns({"text"} & {column}).add_column(column, [0, None, 1] * 4)
        images.cast_column(column, ClassLabel(names=["aa", "bb"])).save_to_disk(tmp_path / column)
        with pytest.raises(ValueError, match="row"):
            data = load_images(train_data_dir=str(tmp_path / column), **options)
            check_attribute(data["train"], data["held_out"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "--attribute_column 'kind' needs images of your own"),
        (
            {"dataset_name": "me/scans", "encoder": "demo", "caption_column": ""},
            "needs images of your own with captions",
        ),
    ],
)
def test_a_flag_that_cannot_be_followed_is_refused_before_anything_is_loaded(flags, message):
    with pytest.raises(ValueError, match=message):
        check(ScriptArguments(attribute_column="kind", **flags))
