"""Audits by persons: rates and intervals are of persons, and the worst case stands beside the mean."""

import dataclasses
import json

import jsonschema
import numpy as np
import pytest
import torch
from conftest import RESOLUTION, images_of, tiny_pipeline
from datasets import Dataset

import person_intervals
from memcontrol_hf import audit_memorization, demo_dataset, metrics
from memcontrol_hf.audit import AuditSettings
from memcontrol_hf.audit.persons import exposure_by_membership, reidentified, verifier_of
from memcontrol_hf.cli import main
from memcontrol_hf.data import EncodedImages
from memcontrol_hf.encoders import load_encoder
from memcontrol_hf.report import REPORT_SCHEMA
from memcontrol_hf.report.audit_card import AuditCard

SETTINGS = AuditSettings(
    resolution=RESOLUTION, num_prompts=6, images_per_prompt=3, inference_steps=2, guidance_scale=2.0, num_timesteps=2
)


def persons_of(count: int, each: int, seed: int) -> Dataset:
    """Images of persons, `each` of them."""
    names = [f"set {seed}, person {person}" for person in range(count) for _ in range(each)]
    return images_of(count * each, seed=seed).add_column("group", names)


def audit(**arguments):
    defaults = {"train": persons_of(5, 2, 1), "held_out": persons_of(6, 2, 2), "settings": SETTINGS}
    return audit_memorization(**{**defaults, "encoder": torch.nn.Flatten(), **arguments})


def test_a_person_counts_once_however_many_images_there_are():
    values = torch.tensor([1.0, 2.0, 3.0, 10.0])
    assert metrics.mean_of_persons(values, [7, 7, 7, 2]).tolist() == [2, 10]
    with pytest.raises(ValueError, match="4 values but 1 persons"):
        metrics.mean_of_persons(values, [7])


def test_the_worst_tenth_and_the_worst_person_stand_beside_the_mean():
    worst = metrics.worst_case(torch.arange(20))
    assert dataclasses.astuple(worst) == (9.5, 18.5, 19)
    assert dataclasses.astuple(metrics.worst_case(torch.tensor([3.0]))) == (3, 3, 3)
    few = metrics.worst_case(torch.tensor([1.0, 2.0, 3.0]), persons=2)
    assert dataclasses.astuple(few) == pytest.approx((2, (3 + 3 + 2) / 3, (3 + 3 + 2) / 3)), "of all three pairs"
    values = torch.randn(40, generator=torch.Generator().manual_seed(0)).double()
    drawn = torch.stack([values[torch.randperm(40)[:30]].sort(descending=True).values for _ in range(4000)])
    expected = metrics.worst_case(values, persons=30)
    assert expected.worst_decile == pytest.approx(drawn[:, :3].mean().item(), abs=0.02)
    assert expected.worst_person == pytest.approx(drawn[:, 0].mean().item(), abs=0.02)
    with pytest.raises(ValueError, match="4 of 3 persons cannot be drawn: give 1 to 3"):
        metrics.worst_case(torch.arange(3), persons=4)
    with pytest.raises(ValueError, match="finite"):
        metrics.worst_case(torch.tensor([1.0, torch.nan]))


@pytest.mark.parametrize(("train", "held_out"), [(72, 24), (30, 4), (10, 100)])
def test_persons_of_whom_nothing_was_learned_lie_above_the_floor_half_of_the_time(train, held_out):
    generator = torch.Generator().manual_seed(0)

    def is_above() -> bool:
        sets = (torch.randn(count, generator=generator).double() for count in (train, held_out))
        exposure = exposure_by_membership(*sets)
        return exposure.as_many.worst_person > exposure.floor.worst_person

    assert 0.42 < sum(is_above() for _ in range(400)) / 400 < 0.6


def test_intervals_of_images_hold_the_truth_less_often_than_intervals_of_persons():
    for coverage in (person_intervals.coverage_of_auc, person_intervals.coverage_of_rate):
        of = coverage(0.75, 150, np.random.default_rng(0))
        assert of["images"] < 0.85 < 0.9 < of["persons"]


def test_rates_and_intervals_are_of_persons():
    report = audit(pipeline=tiny_pipeline())
    measures = report.audit["measures"]
    sampled = 4  # 6 captions of 5 persons with 2 images each, drawn by the seed
    assert measures["extraction_rate"]["model"]["high"] == pytest.approx(metrics.clopper_pearson(0, sampled)[1])
    auc = measures["membership_auc_loss"]["model"]
    assert auc["value"] * 5 * 6 == pytest.approx(round(auc["value"] * 5 * 6)), "pairs of persons, not of images"
    assert measures["membership_tpr_loss"]["model"]["note"].startswith("not estimable from 6 held-out persons")
    persons = report.audit["persons"]
    assert (persons["train"], persons["held_out"]) == (5, 6)
    assert persons["images_per_person"]["train"] == {"least": 2, "median": 2, "most": 2}
    attacks = {name.removeprefix("membership_auc_") for name in measures if name.startswith("membership_auc_")}
    assert {"loss", "clid", "sima"} < attacks
    assert set(persons["exposure"]) == {*(f"membership_{attack}" for attack in attacks), "similarity"}
    exposure = persons["exposure"]["membership_loss"]
    floor = exposure["floor"]
    assert floor["mean"] == pytest.approx(0, abs=1e-6), "held-out persons lie around their own mean"
    assert floor["worst_decile"] == floor["worst_person"] > 0
    assert exposure["model_as_many"] == exposure["model"], "5 training persons are fewer than 6"
    jsonschema.validate(dataclasses.asdict(report), json.loads(REPORT_SCHEMA.read_text()))
    assert not report.judge({"membership_auc_loss": {"max": auc["value"] + 0.1}})
    assert "times as many persons would tell" in report.gate["failures"][0]
    assert "There are too few persons to tell" in (said := report.summary())
    assert "5 training and 6 held-out persons were attacked" in said
    assert "| worst tenth | worst person |" in AuditCard(report, "name", False).render()


def test_halves_of_the_held_out_images_keep_persons_together():
    images = EncodedImages(persons_of(7, 3, 1), RESOLUTION)
    halves = images.halves(seed=3)
    names = [set(half.images["group"]) for half in halves]
    assert not names[0] & names[1] and len(names[0]) == 3 and sum(map(len, halves)) == 21


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": images_of(12, seed=2)}, "train set has a column 'group' and the held_out set has none"),
        (
            {"held_out": images_of(12, seed=2).add_column("group", ["set 1, person 0", *"abcdefghijk"])},
            "1 persons .groups. have images in train and in held_out",
        ),
        ({"held_out": persons_of(3, 4, 2)}, "the held_out set has 3 persons, but an audit by persons needs 4"),
        ({"train": images_of(4, seed=1).add_column("group", ["a", "b", "c", None])}, "1 rows have no group"),
    ],
)
def test_persons_that_no_audit_can_judge_are_refused_before_the_work(changes, message):
    with pytest.raises(ValueError, match=message):
        audit(generated=images_of(6, seed=3), **changes)


def turned(images: Dataset) -> Dataset:
    """Each image and the image turned by 10 degrees, as two images of one person."""
    both = [version for image in images["image"] for version in (image, image.rotate(10, fillcolor="white"))]
    return Dataset.from_dict({"image": both, "group": [str(number // 2) for number in range(len(both))]})


def test_a_verifier_finds_persons_again_only_where_they_are_shown():
    emoji = demo_dataset()
    verifier = verifier_of(load_encoder("demo"))
    train, held_out = (turned(emoji[name].select(range(count))) for name, count in (("train", 8), ("held_out", 120)))
    members, others = EncodedImages(train, 64), EncodedImages(held_out, 64)
    rows = [row for row in members.distinct if row % 2 == 0]
    shown = members.pixels([row + 1 for row in rows])
    found = reidentified(shown, rows, 1, members, others, verifier)
    assert found["reidentified_share"].value > 0.8 and found["reidentified_share_real"].value > 0.8
    strangers = reidentified(shown.roll(1, 0), rows, 1, members, others, verifier)
    assert strangers["reidentified_share"].value < 0.3

    def broken(one, other):
        return torch.full((len(one), len(other)), torch.nan)

    figures = reidentified(shown, rows, 1, members, others, broken)
    assert all(figure.value is None and "no number (NaN)" in figure.note for figure in figures.values())


def test_an_audit_takes_any_function_that_compares_two_sets_of_images():
    def mean_difference(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        return (images.mean((1, 2, 3))[:, None] - others.mean((1, 2, 3))).abs()

    report = audit(pipeline=tiny_pipeline(), verifier=mean_difference, control=False)
    assert report.audit["persons"]["verifier"] == "mean_difference"
    assert 0 <= report.audit["measures"]["reidentified_share"]["model"]["value"] <= 1


def test_the_command_reads_persons_from_a_column(tmp_path, capsys):
    for name, data in (("train", persons_of(5, 2, 1)), ("held_out", persons_of(6, 2, 2)), ("fake", images_of(6, 3))):
        (tmp_path / name).mkdir()
        lines = []
        for number, row in enumerate(data):
            row["image"].save(tmp_path / name / f"{number}.png")
            lines.append(json.dumps({"file_name": f"{number}.png", "text": "", "patient": row.get("group", "")}))
        (tmp_path / name / "metadata.jsonl").write_text("\n".join(lines))
    words = ["audit", "--generated", tmp_path / "fake", "--train", tmp_path / "train", "--held_out"]
    words += [tmp_path / "held_out", "--encoder", "demo", "--output_dir", tmp_path / "out"]
    words = list(map(str, words))
    assert main([*words, "--group_column", "patient"]) == 3, "too few persons to pass"
    report = json.loads((tmp_path / "out" / "memorization_report.json").read_text())
    assert report["audit"]["persons"]["train"] == 5 and report["command"].endswith("--group_column YOUR_GROUP_COLUMN")
    assert "person 0" not in (tmp_path / "out" / "memorization_report.json").read_text()
    assert "5 training and 6 held-out persons: rates and intervals are of images" in capsys.readouterr().out
    assert main([*words, "--group_column", "subject"]) == 2
    assert (
        "no column 'subject'" in (said := capsys.readouterr().err)
        and "choose their column with --group_column" in said
    )
    assert main([*words, "--verifier", "demo"]) == 2
    assert "give their column with --group_column" in capsys.readouterr().err
