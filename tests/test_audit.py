import dataclasses
import datetime
import json
import math
import shlex
import socket

import jsonschema
import peft
import pytest
import torch
import yaml
from conftest import RESOLUTION, adapter_folder, images_of, tiny_pipeline
from datasets import Dataset, DatasetDict, concatenate_datasets
from tiny_families import ddpm, dit

from memcontrol_hf import (
    MemControlConfig,
    MemControlTrainer,
    MemControlTrainingArguments,
    MemorizationReport,
    SearchSpace,
    audit_memorization,
    demo_dataset,
    demo_pipeline,
)
from memcontrol_hf.adapters import adapter_in_place, load_adapter
from memcontrol_hf.audit import (
    AuditSettings,
    cannot_pass,
    caption_identifiers,
    caption_markers,
    least_images,
    write_split,
)
from memcontrol_hf.audit.attacks import Attacked, _compare_trajectories, _extraction, compare_with_training_images
from memcontrol_hf.audit.membership import highest_innocent
from memcontrol_hf.cli import _parser, main
from memcontrol_hf.data import EncodedImages, load_image_folder, weights_digest
from memcontrol_hf.flags import ScriptArguments, settings
from memcontrol_hf.from_flags import check
from memcontrol_hf.images import to_pixels
from memcontrol_hf.public_facts import public_flags
from memcontrol_hf.report import DEFAULT_GATE, MEASURES, REPORT_SCHEMA, load_gate, verdict
from memcontrol_hf.report.attack_table import attack_rows
from memcontrol_hf.report.dossier import NOT_TESTED, Dossier
from memcontrol_hf.report.dossier_facts import Facts

ENCODER = torch.nn.Flatten()
SETTINGS = AuditSettings(
    resolution=RESOLUTION, num_prompts=6, images_per_prompt=3, inference_steps=2, guidance_scale=2.0, num_timesteps=2
)


DARKER = {"image": images_of(10, seed=1)[4]["image"].point(lambda value: round(0.97 * value)), "text": "a"}


def audit(**arguments) -> MemorizationReport:
    defaults = {
        "train": images_of(10, seed=1),
        "held_out": images_of(12, seed=2),
        "encoder": ENCODER,
        "settings": SETTINGS,
    }
    return audit_memorization(**{**defaults, **arguments})


def value(report: MemorizationReport, measure: str, who: str = "model") -> float:
    return report.audit["measures"][measure][who]["value"]


def test_copies_are_found_among_images_and_fresh_ones_are_not():
    train = images_of(30, seed=1)
    copies = audit(train=train, held_out=images_of(40, seed=2), generated=train.select_columns(["image"]))
    fresh = audit(train=train, held_out=images_of(40, seed=2), generated=images_of(60, seed=3))
    assert value(copies, "copy_share") == 1 and value(copies, "nearest_share") == 1
    assert value(copies, "partial_copy_share") == 1 and value(fresh, "partial_copy_share") < 0.1
    assert value(copies, "amd") == pytest.approx(0, abs=1e-5) and value(copies, "auth_pct") == 0
    assert value(copies, "c_t") < -5
    assert value(fresh, "copy_share") < 0.1 and 0.25 < value(fresh, "nearest_share") < 0.75
    assert abs(value(fresh, "c_t")) < 3
    # the control never looks at the training images
    assert value(copies, "copy_share", "held_out_as_train") < 0.2
    gate = {"copy_share": {"max": 0.2}}
    assert fresh.judge(gate) and not copies.judge(gate)
    assert "copy_share: may be as high as 1.000, above the limit 0.2" in copies.summary()


def test_a_generated_image_counts_as_often_as_it_was_generated():
    train, fresh = images_of(60, seed=1), images_of(10, seed=3).select_columns(["image"])
    copies = Dataset.from_dict({"image": [train[0]["image"]] * 90}, features=fresh.features)
    report = audit(train=train, held_out=images_of(40, seed=2), generated=concatenate_datasets([copies, fresh]))
    assert value(report, "copy_share") == 0.9 and report.audit["images"]["generated"] == 100


def test_what_needs_a_model_is_not_claimed_of_images():
    report = audit(generated=images_of(6, seed=3))
    assert "extraction_rate" not in report.audit["measures"] and report.audit["canaries"]["caught"] == {}
    assert not report.judge({"membership_auc_loss": {"max": 1.0}})
    assert "was not measured" in report.gate["failures"][0]


def test_a_memorizing_fine_tune_is_caught_and_its_base_is_not(tmp_path):
    data = demo_dataset()
    once = data["train"].filter(lambda text, seen=set(): not (text in seen or seen.add(text)), input_columns="text")
    train = concatenate_datasets([once.select(range(16)), once.select([0, 1] * 3)])
    held_out = data["held_out"].select(range(28))
    pipeline = demo_pipeline()
    trainer = MemControlTrainer(
        pipeline=pipeline,
        peft_config=MemControlConfig(method="weights"),
        args=MemControlTrainingArguments(
            output_dir=str(tmp_path / "adapter"),
            resolution=64,
            max_steps=80,
            per_device_train_batch_size=22,
            learning_rate=1e-3,
        ),
        train_dataset=train,
        eval_dataset=held_out,
        search_space=SearchSpace.from_model(pipeline.unet, [".*"]),
    )
    trainer.train()
    trainer.save_model()
    settings = AuditSettings(
        resolution=64,
        num_prompts=3,
        images_per_prompt=3,
        num_quality_images=8,
        inference_steps=4,
        guidance_scale=3.0,
        num_timesteps=3,
    )
    report = audit_memorization(
        train, held_out, pipeline=demo_pipeline(), adapter=tmp_path / "adapter", settings=settings
    )
    auc = report.audit["measures"]["membership_auc_loss"]
    assert auc["model"]["value"] > 0.9 and auc["model"]["low"] > 0.75
    assert auc["frozen_base"]["value"] < 0.7 and 0.25 < auc["held_out_as_train"]["value"] < 0.75
    by_noise = report.audit["measures"]["membership_auc_semantic_noise"]
    assert by_noise["model"]["value"] > 0.8 and by_noise["frozen_base"]["low"] < 0.5
    calibrated = report.audit["measures"]["membership_auc_calibrated"]
    assert calibrated["model"]["value"] > 0.9 and 0.2 < calibrated["held_out_as_train"]["value"] < 0.8
    canaries = report.audit["canaries"]
    assert canaries["planted"] == 2 and canaries["caught"]["membership_loss"] == {"caught": 2, "of": 2}
    assert canaries["caught"]["extraction"]["of"] == 2, "canaries come first among the prompts"
    distances = report.audit["distances"]
    assert sum(distances["train"]) == sum(distances["held_out"]) == 9 and len(distances["edges"]) == 41
    for measure in ("trajectory_norm_auc", "trajectory_norm_auc_canaries"):
        assert 0 <= report.audit["measures"][measure]["model"]["low"] <= 1
    assert report.audit["images"]["train_near_duplicates"] == 0
    assert not report.judge(load_gate())
    assert any("membership_auc_loss" in failure for failure in report.gate["failures"])


def test_captions_that_steer_less_than_others_are_caught_as_well_as_those_that_steer_harder():
    result, others = Attacked({}, {}, [], {}), torch.linspace(1, 2, 100)
    norms, units = torch.tensor([0.5, 1.5, 2.5]), {"units": [0, 1, 2], "other_units": list(range(100))}
    _compare_trajectories(result, norms, others, rows=[4, 7, 9], repeated={4}, **units)
    assert result.caught == {
        "trajectory_norm": ({9}, {4, 7, 9}),
        "trajectory_norm_low": ({4}, {4, 7, 9}),
    }
    assert result.figures["trajectory_norm_auc_canaries"].value == 0, "the AUC keeps its side"


def test_captions_of_persons_with_several_images_are_not_caught_by_chance():
    generator = torch.Generator().manual_seed(0)
    result, norms, others = Attacked({}, {}, [], {}), *(torch.randn(1000, generator=generator) for _ in range(2))
    units = {"units": list(range(1000)), "other_units": [number // 10 for number in range(1000)]}
    _compare_trajectories(result, norms, others, rows=list(range(1000)), repeated=set(), **units)
    for name in ("trajectory_norm", "trajectory_norm_low"):
        assert len(result.caught[name][0]) < 25, "1 % of single images, whose norms scatter more than persons' means"


def test_a_resolution_that_cannot_be_cut_into_tiles_is_refused_before_the_attacks(monkeypatch):
    monkeypatch.setattr("memcontrol_hf.audit.audit.attack_pipeline", lambda *_, **__: pytest.fail("attacked"))
    settings = dataclasses.replace(SETTINGS, resolution=30)
    with pytest.raises(ValueError, match="resolution 30 is no multiple of 4"):
        pipeline = ddpm()
        pipeline.unet.register_to_config(sample_size=30)
        audit(pipeline=pipeline, settings=settings)
    with pytest.raises(ValueError, match="an adapter and a base_pipeline belong to a pipeline"):
        audit(generated=images_of(6, seed=3), adapter="somewhere")


def test_no_held_out_score_is_caught_where_they_are_fewer_than_a_hundred():
    assert highest_innocent(torch.arange(12.0)) == 11 and highest_innocent(torch.arange(101.0)) == 99


@pytest.mark.parametrize("captions", [[""] * 9, ["a", "b", "c"] * 3])
def test_a_training_image_that_another_caption_of_its_words_gives_back_is_extracted(captions):
    """As unconditional models, classes and findings that many images share do."""

    def of(seed: int, count: int, repeated: int = 0) -> EncodedImages:
        images = images_of(count, seed=seed).remove_columns("text").add_column("text", captions * (count // 9))
        return EncodedImages(concatenate_datasets([images, *[images.select(range(repeated))] * 2]), RESOLUTION)

    members, others = of(1, 9, repeated=2), of(2, 18)
    settings = dataclasses.replace(SETTINGS, num_prompts=9, images_per_prompt=3)
    rows = list(range(9))
    moved = members.pixels([(row + 3) % 9 for row in rows for _ in range(3)])  # another image with the same caption
    figures, caught = _extraction(moved, rows, members, others, settings)
    assert figures["extraction_rate_calibrated"].value == figures["extraction_rate"].value == 1
    assert caught["extraction_calibrated"] == caught["extraction"] == ({*rows}, {*rows})
    attacked = compare_with_training_images(
        moved, moved.flatten(1), 3, members, others, settings, torch.nn.Flatten(), own=rows
    )
    assert attacked.caught["copy"] == attacked.caught["partial_copy"] == ({*rows}, {*rows})
    strangers = others.pixels([row for row in rows for _ in range(3)])
    figures, caught = _extraction(strangers, rows, members, others, settings)
    assert figures["extraction_rate_calibrated"].value == 0 and caught["extraction_calibrated"][0] == set()


def test_a_caption_of_its_own_is_compared_with_its_own_image_alone():
    members, others = EncodedImages(images_of(9, seed=1), RESOLUTION), EncodedImages(images_of(9, seed=2), RESOLUTION)
    settings, rows = dataclasses.replace(SETTINGS, num_prompts=9, images_per_prompt=3), list(range(9))
    moved = members.pixels([(row + 3) % 9 for row in rows for _ in range(3)])
    figures, caught = _extraction(moved, rows, members, others, settings)
    assert figures["extraction_rate"].value == 0 and caught["extraction_calibrated"][0] == set()


def test_figures_do_not_depend_on_the_batch_size():
    reports = [
        audit(pipeline=tiny_pipeline(), settings=AuditSettings(**{**vars(SETTINGS), "batch_size": size}))
        for size in (1, 7)
    ]
    for measure, of in reports[0].audit["measures"].items():
        for who in ("model", "held_out_as_train"):
            if of[who] is not None and of[who]["value"] is not None:
                assert of[who]["value"] == pytest.approx(value(reports[1], measure, who), rel=1e-3, abs=1e-5), measure
    assert all(of["frozen_base"] is None for of in reports[0].audit["measures"].values())


def test_a_schedule_of_100_timesteps_is_attacked_at_the_same_shares_of_it():
    pipeline = tiny_pipeline()
    pipeline.scheduler = type(pipeline.scheduler)(num_train_timesteps=100)
    settings = dataclasses.replace(SETTINGS, num_prompts=2, num_quality_images=2)
    report = audit(pipeline=pipeline, settings=settings, control=False)
    assert 0 <= value(report, "membership_auc_secmi") <= 1 and 0 <= value(report, "membership_auc_pia") <= 1


def test_a_rate_that_the_sample_is_too_small_for_is_not_estimable():
    report = audit(pipeline=tiny_pipeline())
    assert report.audit["measures"]["membership_tpr_loss"]["model"] == {
        "value": None,
        "low": None,
        "high": None,
        "note": "not estimable from 12 held-out images: it needs 100",
    }
    assert not report.judge({"membership_tpr_loss": {"max": 1.0}})
    assert "not estimable" in report.summary()


def test_adapters_of_others_and_whole_pipelines(tmp_path):
    pipeline = tiny_pipeline()
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    adapted = peft.get_peft_model(pipeline.unet, config)
    adapted.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    state = peft.get_peft_model_state_dict(adapted)
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    pipeline.save_lora_weights(tmp_path / "diffusers", unet_lora_layers=state)
    pipeline.unet = adapted.merge_and_unload()
    pipeline.save_pretrained(tmp_path / "merged")
    x, c = torch.randn(1, 4, 8, 8), torch.randn(1, 8, 8)

    def output(pipe):
        with torch.no_grad():
            return pipe.unet(x, 5, c).sample

    expected = output(pipeline)
    assert not torch.allclose(expected, output(tiny_pipeline()), atol=1e-3)
    file = tmp_path / "diffusers" / "pytorch_lora_weights.safetensors"
    for adapter in (tmp_path / "peft", tmp_path / "diffusers", file):
        other = tiny_pipeline()
        load_adapter(other, adapter)
        torch.testing.assert_close(output(other), expected, atol=1e-5, rtol=1e-4)
    base = tiny_pipeline()
    of_adapter = audit(pipeline=base, adapter=tmp_path / "peft")
    assert torch.equal(output(base), output(tiny_pipeline())), "the audit leaves the pipeline as it was"
    merged = type(pipeline).from_pretrained(tmp_path / "merged")
    of_pipeline = audit(pipeline=merged, base_pipeline=tiny_pipeline())
    for who in ("model", "frozen_base"):
        auc = value(of_adapter, "membership_auc_loss", who)
        assert auc == pytest.approx(value(of_pipeline, "membership_auc_loss", who), abs=0.02)


@pytest.mark.parametrize("kind", ["ours", "peft", "diffusers"])
def test_an_adapter_leaves_the_pipeline_as_it_was(tmp_path, kind):
    adapter_folder(tmp_path / "ours")
    other = tiny_pipeline()
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    adapted = peft.get_peft_model(other.unet, config)
    adapted.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    state = {
        name.removeprefix("base_model.model."): tensor
        for name, tensor in peft.get_peft_model_state_dict(adapted).items()
    }
    other.save_lora_weights(tmp_path / "diffusers", unet_lora_layers=state)
    pipeline, x, c, outputs = tiny_pipeline(), torch.randn(1, 4, 8, 8), torch.randn(1, 8, 8), []
    before = tiny_pipeline().unet.state_dict()
    for _ in range(2):
        with torch.no_grad(), pytest.raises(KeyError), adapter_in_place(pipeline, tmp_path / kind):
            outputs.append(pipeline.unet(x, 5, c).sample)
            raise KeyError
        after = pipeline.unet.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(*outputs) and not torch.allclose(outputs[0], pipeline.unet(x, 5, c).sample, atol=1e-3)


def test_copies_are_found_in_a_training_set_that_is_larger_than_the_held_out_one(monkeypatch):
    train, others = images_of(60, seed=1), images_of(12, seed=2)
    pixels = to_pixels(train["image"], RESOLUTION)
    monkeypatch.setattr(
        "memcontrol_hf.evaluation.generate", lambda pipe, prompts, keys, *_: pixels[[k[2] for k in keys]]
    )
    report = audit(train=train, held_out=others, pipeline=tiny_pipeline(), control=False)
    assert value(report, "nearest_share") == 1 and value(report, "amd") == pytest.approx(0, abs=1e-6)


def test_weights_are_digested_once_for_each_model_that_is_attacked(monkeypatch):
    digested = []
    monkeypatch.setattr("memcontrol_hf.audit.audit.weights_digest", lambda m: digested.append(m) or weights_digest(m))
    monkeypatch.setattr("memcontrol_hf.data.encoded.weights_digest", lambda m: pytest.fail("digested again"))
    pipeline = tiny_pipeline()
    audit(pipeline=pipeline, settings=dataclasses.replace(SETTINGS, num_prompts=2, num_quality_images=2))
    assert digested == [pipeline.vae, pipeline.text_encoder]


@pytest.mark.parametrize("content", [None, "{}", "no json"])
def test_what_is_no_adapter_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"cannot load the adapter .*Give a PEFT folder or Hub id, or a LoRA file"):
        load_adapter(tiny_pipeline(), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either a pipeline or generated images"),
        ({"generated": images_of(4), "train": images_of(0)}, "the train set is empty"),
        ({"generated": images_of(4), "held_out": images_of(0)}, "the held_out set is empty"),
        ({"generated": images_of(0)}, "the generated set is empty"),
        ({"generated": images_of(4), "held_out": images_of(5)}, "has 5 different images, but an audit needs 8"),
        ({"generated": images_of(4), "train": images_of(1).select([0] * 9)}, "has 1 different images"),
        ({"generated": images_of(4), "held_out": images_of(9, seed=1)}, "9 images are in train and in held_out too"),
        (
            {"generated": images_of(4), "held_out": Dataset.from_list([*images_of(12, seed=2), DARKER])},
            "^1 held-out images are near-duplicates of training images, .*: rows 4 and 12",
        ),
        ({"generated": images_of(4), "train": images_of(4).select_columns(["text"])}, "no column 'image'.*has: text"),
        ({"pipeline": tiny_pipeline(), "held_out": images_of(9).select_columns(["image"])}, "no column 'text'"),
        (
            {
                "generated": images_of(4),
                "train": Dataset.from_dict({"image": images_of(2)["image"], "text": ["", None]}),
            },
            "the caption of row 1 of the train split is no text but NoneType",
        ),
        (
            {"pipeline": tiny_pipeline(), "canaries": images_of(9).select_columns(["image"])},
            "the canaries set has no column 'text'",
        ),
        ({"pipeline": tiny_pipeline(), "delta": 5.0}, r"delta must lie in \[0, 1\), but is 5.0"),
    ],
)
def test_bad_sets_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        audit(**arguments)


def test_too_few_images_for_a_clique_are_named():
    with pytest.raises(ValueError, match="images_per_prompt must be at least 3, but is 2"):
        AuditSettings(images_per_prompt=2)
    with pytest.raises(ValueError, match="num_quality_images must be at least 2, but is 1"):
        AuditSettings(num_quality_images=1)


def test_an_encoder_that_sees_no_difference_is_no_clean_result():
    class Blind(torch.nn.Module):
        def forward(self, images):
            return torch.zeros(len(images), 4)

    with pytest.raises(ValueError, match="the encoder gives all 10 images of the train set the same features"):
        audit(generated=images_of(6, seed=3), encoder=Blind())


def test_a_bad_adapter_or_resolution_costs_nothing(tmp_path, monkeypatch):
    def sample(*args, **kwargs):
        raise AssertionError("the long work began")

    monkeypatch.setattr("memcontrol_hf.evaluation.generate", sample)
    with pytest.raises(ValueError, match="cannot load the adapter"):
        audit(pipeline=tiny_pipeline(), adapter=tmp_path)
    with pytest.raises(ValueError, match="resolution 17 is not"):
        audit(pipeline=tiny_pipeline(), settings=AuditSettings(resolution=17))
    with pytest.raises(ValueError, match="cannot load the CLIP model"):
        audit(pipeline=tiny_pipeline(), clip_model=str(tmp_path))
    (tmp_path / "private").touch()
    for folder in (tmp_path, tmp_path / "private"):
        with pytest.raises(ValueError, match=r"cannot write to the folder '.*private'"):
            audit(pipeline=tiny_pipeline(), output_dir=folder)


def test_what_a_model_cannot_sample_costs_nothing(monkeypatch):
    def attack(*args, **kwargs):
        raise AssertionError("the long work began")

    monkeypatch.setattr("memcontrol_hf.audit.audit.attack_pipeline", attack)
    few = dit()
    few.transformer.register_to_config(num_embeds_ada_norm=10)
    sets = {}
    for seed, name in enumerate(("train", "held_out"), 1):
        sets[name] = images_of(12, seed=seed).remove_columns("text").add_column("text", ["3"] * 12)
    with pytest.raises(ValueError, match="guides only models of 1000 classes, not 10"):
        audit(pipeline=few, **sets, settings=AuditSettings(resolution=16))
    with pytest.raises(ValueError, match="resolution 24 is not"):
        audit(pipeline=tiny_pipeline(), base_pipeline=dit(), settings=AuditSettings(resolution=24))


def test_features_that_are_not_finite_are_no_clean_result():
    class Broken(torch.nn.Module):
        def forward(self, images):
            return images.flatten(1) * math.nan

    with pytest.raises(ValueError, match="not finite"):
        audit(generated=images_of(6, seed=3), encoder=Broken())


def test_the_report_names_nobody_and_the_page_stays_private(tmp_path):
    train = images_of(10, seed=1)
    train = train.map(lambda row: {"text": f"{row['text']} <b>zebra</b> ___"})
    report = audit(train=train, generated=train, output_dir=tmp_path)
    report.to_json(tmp_path / "memorization_report.json")
    text = (tmp_path / "memorization_report.json").read_text()
    assert "zebra" not in text and not any(caption in text for caption in train["text"])
    assert report.audit["caption_markers"] == {"blank (___)": 10}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["memorization_report.json", "private"]
    page = (tmp_path / "private" / "review.html").read_text()
    assert page.count("data:image/png;base64,") == 20 and "http" not in page and "zebra" not in page
    assert MemorizationReport.from_json(tmp_path / "memorization_report.json") == report


def test_a_score_is_calibrated_by_the_frozen_base_where_there_is_one(tmp_path):
    adapter = adapter_folder(tmp_path / "adapter")
    with_base = audit(pipeline=tiny_pipeline(), adapter=adapter).audit["measures"]
    calibrated = with_base["membership_auc_calibrated"]
    assert 0 <= calibrated["model"]["value"] <= 1 and 0 <= calibrated["held_out_as_train"]["value"] <= 1
    assert calibrated["frozen_base"] is None, "the base cannot be its own reference"
    p_value = with_base["dataset_inference_p"]
    assert 0 < p_value["model"]["value"] <= 1 and p_value["held_out_as_train"]["note"].startswith("not estimable")


def test_reports_follow_the_published_schema():
    schema = json.loads(REPORT_SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    report = audit(pipeline=tiny_pipeline())
    assert "membership_auc_calibrated" not in report.audit["measures"], "there is no base to calibrate by"
    report.judge(load_gate())
    content = json.loads(json.dumps(dataclasses.asdict(report)))
    jsonschema.validate(content, schema)
    for wrong in ({"schema_version": 1}, {"caption": "zebra"}, {"gate": {"passed": True}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(content | wrong, schema)


def test_the_fingerprint_is_keyed(tmp_path):
    first = audit(generated=images_of(6, seed=3), output_dir=tmp_path / "a").audit["data_fingerprint"]
    again = audit(generated=images_of(6, seed=3), output_dir=tmp_path / "a").audit["data_fingerprint"]
    other_key = audit(generated=images_of(6, seed=3), output_dir=tmp_path / "b").audit["data_fingerprint"]
    assert first == again != other_key
    private = tmp_path / "a" / "private"
    assert {f"{path.name} {path.stat().st_mode & 0o777:o}" for path in [private, *private.iterdir()]} == {
        *("private 700", "fingerprint.key 600", "review.html 600")
    }


@pytest.mark.parametrize("content", ["", "ab", "no key", "é" * 64])
def test_a_key_that_was_cut_short_is_an_error_before_the_attacks(tmp_path, monkeypatch, content):
    monkeypatch.setattr("memcontrol_hf.audit.audit.attack_images", lambda *_: pytest.fail("attacked"))
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "fingerprint.key").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"fingerprint.key' holds no key of 64 hexadecimal digits: put back"):
        audit(generated=images_of(6, seed=3), output_dir=tmp_path)


def test_a_split_is_written_for_another_audit_of_exactly_it(tmp_path):
    data = DatasetDict(train=images_of(9, seed=1), held_out=images_of(8, seed=2))
    for _ in range(2):  # a second run replaces it
        write_split(data, tmp_path)
    for name, images in data.items():
        again = load_image_folder(str(tmp_path / "private" / "split" / name), name, "text")
        assert [row["image"].tobytes() for row in again] == [row["image"].tobytes() for row in images]
        assert again["text"][:] == images["text"][:]
    split = tmp_path / "private" / "split"
    assert {path.stat().st_mode & 0o777 for path in split.rglob("*")} == {0o700, 0o600}


def test_the_least_number_of_images_is_where_a_harmless_model_begins_to_pass():
    """Clopper-Pearson: 0 of n is at most 1 - .025 ** (1 / n), which is .05 from n = 72 on."""
    limits = load_gate()
    assert least_images(limits) == (72, 72)
    assert cannot_pass(limits, 71, 72, 100) == ["extraction_rate_calibrated"] and not cannot_pass(limits, 72, 72, 72)
    assert cannot_pass(limits, 100, 100, 24) == ["extraction_rate_calibrated", "copy_share", "nearest_share"]
    assert "membership_auc_pia" in cannot_pass(limits, 200, 8, 200)
    assert least_images({"membership_auc_pia": {"max": 0.4}}) is None


def test_the_precision_that_accelerate_sets_is_the_runs(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    args = ScriptArguments()
    assert args.mixed_precision == settings(args)["mixed_precision"] == "bf16"
    assert "--mixed_precision bf16" in public_flags(args)
    with pytest.raises(ValueError, match="combined with mixed precision"):
        MemControlTrainingArguments(output_dir="o", max_steps=1, mitigations=["dp_sgd:epsilon=8,delta=0.001"])


def test_images_of_ones_own_need_a_named_encoder(tmp_path, capsys):
    sets = [folder_of(images_of(9, seed=s), tmp_path / str(s)) for s in (1, 2)]
    arguments = [
        "--generated",
        sets[1],
        "--train",
        sets[0],
        "--held_out",
        sets[1],
        "--output_dir",
        str(tmp_path / "o"),
    ]
    assert main(["audit", *arguments]) == 2
    assert "need an --encoder" in capsys.readouterr().err and not (tmp_path / "o").exists()
    with pytest.raises(ValueError, match=r"need an --encoder.*microsoft/rad-dino"):
        check(ScriptArguments(train_data_dir=sets[0]))
    assert ScriptArguments().encoder == "demo"


def test_caption_markers_are_counted():
    captions = ["seen by Dr. Smith on 2/3/2019", "[**Name**] ___", "clear lungs", "XXXX effusion", "id 12345678"]
    found = {"blank (___)", "placeholder ([** **])", "redaction (XXXX)", "date", "long number", "titled name"}
    assert caption_markers(captions) == dict.fromkeys(found, 1)
    assert caption_markers(["no finding", "x-ray of 2 lungs"]) == {}


def test_identifiers_in_captions_are_counted_by_kind_without_the_network(monkeypatch, caplog):
    pytest.importorskip("presidio_analyzer", reason="the extra identifiers is not installed")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))
    captions = ["call 212-555-5555 or 212-555-5556", "seen on 2021-03-04, write to a@example.org", "12345678", "lungs"]
    captions.append("card 4111 1111 1111 1111, not 4111 1111 1111 1112")
    with caplog.at_level("WARNING"):
        found = caption_identifiers(captions)
    assert not caplog.records
    assert found.pop("URL", 1) == 1  # the domain of the address, too
    assert found == {"CREDIT_CARD": 1, "DATE_TIME": 1, "EMAIL_ADDRESS": 1, "PHONE_NUMBER": 1}
    assert caption_identifiers(["no finding", "x-ray of 2 lungs", "PA and lateral, 3 cm nodule"]) == {}


@pytest.mark.parametrize(("found", "reported"), [(None, "none"), ({}, {}), ({"PHONE_NUMBER": 2}, {"PHONE_NUMBER": 2})])
def test_a_report_says_of_identifiers_only_what_was_looked_for(found, reported, monkeypatch):
    monkeypatch.setattr("memcontrol_hf.audit.audit.caption_identifiers", lambda _: found)
    report = audit(train=images_of(10, seed=1), generated=images_of(10, seed=2))
    assert report.audit.get("caption_identifiers", "none") == reported


def test_captions_that_nobody_looked_at_are_not_said_to_be_clean():
    train = images_of(10, seed=1)
    for captions in (train.remove_columns("text"), train.remove_columns("text").add_column("text", [""] * 10)):
        report = audit(train=captions, generated=images_of(10, seed=2))
        assert not {"caption_markers", "caption_identifiers"} & report.audit.keys()
        dossier = Dossier("folder", report, Facts(), None, datetime.date(2026, 11, 28))
        lines = {line.label: line.text for section in dossier.sections for line in section.lines}
        assert lines["Captions with traces of de-identification"] == NOT_TESTED


def report_with(**measures) -> MemorizationReport:
    return MemorizationReport(audit={"measures": measures})


def figure(value, low=None, high=None):
    return {"value": value, "low": low, "high": high, "note": None}


@pytest.mark.parametrize(
    ("limit", "figures", "passed"),
    [
        ({"max": 0.5}, {"model": figure(0.4, 0.3, 0.5)}, True),
        ({"max": 0.5}, {"model": figure(0.4, 0.3, 0.51)}, False),
        ({"max": 0.5}, {"model": figure(0.4)}, True),
        ({"min": 0.3}, {"model": figure(0.4, 0.3, 0.5)}, True),
        ({"min": 0.3}, {"model": figure(0.4, 0.29, 0.5)}, False),
        ({"max_above_frozen_base": 0.1}, {"model": figure(0.4, 0.3, 0.5), "frozen_base": figure(0.41)}, True),
        ({"max_above_frozen_base": 0.1}, {"model": figure(0.4, 0.3, 0.5), "frozen_base": figure(0.39)}, False),
        ({"max_above_frozen_base": 0.1}, {"model": figure(0.4, 0.3, 0.5), "frozen_base": None}, False),
        # the upper end of a difference of .35: .35 + sqrt(.03 ** 2 + .04 ** 2) = .4
        (
            {"max_above_frozen_base": 0.41},
            {"model": figure(0.4, 0.3, 0.43), "frozen_base": figure(0.05, 0.01, 1)},
            True,
        ),
        (
            {"max_above_frozen_base": 0.39},
            {"model": figure(0.4, 0.3, 0.43), "frozen_base": figure(0.05, 0.01, 1)},
            False,
        ),
        ({"max_above_frozen_base": 0.3}, {"model": figure(0.4, 0.3, 0.4), "frozen_base": figure(0.1, 0.9, 1)}, True),
        ({"max_above_held_out_as_train": 1.0}, {"model": figure(None), "held_out_as_train": figure(0.1)}, False),
        ({"max": 1.0, "min": 0.5}, {"model": figure(0.4)}, False),
        ({"max": 0.5}, {"model": figure(0.6) | {"note": "not applicable: edited"}}, False),
        ({"max": 0.5}, {"model": figure(0.6, 0.1, 0.2)}, False),  # edited: beyond its own interval
    ],
)
def test_the_gate_takes_the_bad_end_of_the_interval(limit, figures, passed):
    report = report_with(rate=figures)
    assert report.judge({"rate": limit}) is passed and report.gate["passed"] is passed
    assert bool(report.gate["failures"]) is not passed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "is no gate"),
        ("", "is no gate"),
        ("fid: 3", "is no gate"),
        ("extraction_rat: {max: 0.05}", "unknown measure 'extraction_rat' in .*use some of membership_auc_loss"),
        ("fid: {most: 3}", "unknown limit 'most' of fid.*use max, min"),
        ("fid: {max: high}", "must be a number, but is 'high'"),
        ("fid: {max: .nan}", "must be a number, but is nan"),
        ("fid: {max: true}", "must be a number, but is True"),
        ("fid: {max: 1" + "0" * 400 + "}", r"must be a number, but is \[\.\.\.\]"),
        ("fid: {max: [", r"cannot read the gate '.*gate.yaml': while parsing .* in line 1, column 13"),
        ("fid: {max: .inf}", "must be a number, but is inf"),
        ("fid: {}", "fid has no limit"),
        ("fid: {max: 1}\nfid: {max: 2}", "fid stands there twice"),
        ("fid: {max: 1, max: 2}", "max stands there twice"),
        ("fid: &a {max: 1}\nkid: *a", r"a gate has no aliases, but \*a is one"),
        ("[" * 3000, "cannot read the gate .*nested too deeply"),
        ("#" * 200_000, "has 200000 bytes, more than"),
        ("a" * 900 + ": {max: 1}", r"unknown measure \[...\] in "),
        ("\ud800", "cannot read the gate"),
    ],
)
def test_a_bad_gate_is_named(tmp_path, content, message):
    (tmp_path / "gate.yaml").write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match=message):
        load_gate(tmp_path / "gate.yaml")


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"membership_auc_pia": figure(0.7, 0.6, 0.8)}, "It leaks, by membership_auc_pia (attack by PIA)."),
        ({"copy_share": figure(0.3, 0.2, 0.4), "fid": figure(9)}, "It leaks, by copy_share. Its images are poorer"),
        # by the square of .1 / .05: four times as many
        ({"membership_auc_pia": figure(0.6, 0.5, 0.7)}, "There are too few images to tell by membership_auc_pia "
         "(attack by PIA): 50 training and 90 held-out images were attacked, and about 200 and 360 would do"),
        ({"copy_share": figure(0.0, 0.0, 0.1)}, "and about 100 and 180 would do"),
        ({"membership_auc_pia": figure(None)}, "No figure could be had of membership_auc_pia"),
        ({"membership_auc_pia": figure(0.5, 0.4, 0.6)}, "In every attack that the gate limits"),
        # no number of images would do
        ({"extraction_rate": figure(0.0, 0.0, 0.1)}, "There are too few images to tell by extraction_rate."),
    ],
)  # fmt: skip
def test_the_verdict_says_whether_it_leaks_or_there_are_too_few_images(figures, said):
    report = report_with(**{name: {"model": of} for name, of in figures.items()})
    report.audit |= {"subject": "adapter", "images": {"train": 50, "held_out": 90}}
    limits = {"membership_auc_pia": {"max": 0.65}, "copy_share": {"max": 0.05}, "fid": {"max": 5}}
    limits["extraction_rate"] = {"max": 0.0}
    report.judge({name: limits[name] for name in figures})
    json.dumps(report.gate, allow_nan=False)
    assert said in verdict(report.gate, report.audit)
    assert ("too few images" in verdict(report.gate, report.audit)) == ("would do" in said or "too few" in said)


@pytest.mark.parametrize(
    ("audit", "said"),
    [
        # .1 / .05: twice as many
        ({"subject": "adapter", "images": {"train": 5000, "held_out": 900}, "settings": {"num_prompts": 100}},
         "There are too few sampled captions (--num_prompts, or --audit_num_prompts of a training) to tell by "
         "copy_share: there were 100, and about 200 would do"),
        ({"subject": "generated images", "images": {"train": 5000, "held_out": 900, "generated": 40}},
         "There are too few generated images to tell by copy_share: there were 40, and about 80 would do"),
        ({"subject": "adapter", "images": {"train": 90, "held_out": 90}, "settings": {"num_prompts": 100}},
         "There are too few images to tell by copy_share: 90 training and 90 held-out images were attacked"),
    ],
)  # fmt: skip
def test_the_verdict_asks_for_more_of_what_the_interval_depends_on(audit, said):
    report = report_with(copy_share={"model": figure(0.0, 0.0, 0.1)})
    report.audit |= audit
    report.judge({"copy_share": {"max": 0.05}})
    assert said in verdict(report.gate, report.audit)
    unit = said.removeprefix("There are too few ").partition(" (")[0].partition(" to tell")[0]
    assert report.gate["failures"][0].endswith(f"about 2 times as many {unit} would tell")


def test_a_limit_on_what_is_not_applicable_is_not_said_to_be_kept():
    report = report_with(membership_auc_clid={who: figure(None) for who in ("model", "frozen_base")})
    report.audit["measures"]["membership_auc_clid"] |= {"held_out_as_train": None}
    report.audit["measures"]["membership_auc_clid"]["model"]["note"] = "not applicable: no captions"
    report.audit["measures"]["copy_share"] = {"model": figure(0.0, 0.0, 0.01), "frozen_base": None}
    report.audit["measures"]["copy_share"] |= {"held_out_as_train": None}
    assert report.judge({"membership_auc_clid": {"max": 0.65}, "copy_share": {"max": 0.05}})
    assert [row["limit"] for row in attack_rows(report)] == ["not asked", "at most 5 % ✓"]
    said = verdict(report.gate, report.audit)
    assert said.endswith("Passed over, since not applicable to this model: membership_auc_clid (attack by CLiD).")


def test_a_gate_of_which_nothing_applies_to_the_model_fails():
    report = report_with(membership_auc_clid={"model": figure(None) | {"note": "not applicable: no captions"}})
    assert not report.judge({"membership_auc_clid": {"max": 0.65}}) and not report.judge_again()
    assert "Nothing that the gate asks for applies to this model" in report.gate["failures"][0]
    assert "No figure could be had of membership_auc_clid" in verdict(report.gate, report.audit)


def test_a_limit_on_an_attribute_is_not_asked_of_generated_images():
    report = report_with(copy_share={"model": figure(0.0, 0.0, 0.01)})
    report.audit["subject"] = "generated images"
    assert report.judge({"copy_share": {"max": 0.05}, "attribute_advantage": {"max": 0.1}})


def test_generated_images_pass_a_gate_of_their_own_scope():
    train, held_out = images_of(60, seed=1), images_of(80, seed=2)
    fresh = audit(train=train, held_out=held_out, generated=images_of(300, seed=3))
    copies = audit(train=train, held_out=held_out, generated=train.select_columns(["image"]))
    assert fresh.judge(load_gate()) and "the weights were not attacked" in fresh.summary()
    assert not copies.judge(load_gate())
    assert "It leaks, by copy_share and nearest_share." in copies.summary()
    assert not fresh.judge({"membership_auc_pia": {"max": 0.9}}), "a gate that asks for weights alone"


def test_the_absolute_extraction_is_reported_beside_its_false_alarms_and_not_judged():
    gray = [image.point(lambda v: 120 + v // 64) for image in images_of(9, seed=3)["image"]]
    train = Dataset.from_dict({"image": gray, "text": ["a"] * 9})
    held_out = Dataset.from_dict({"image": [image.point(lambda v: v + 9) for image in gray], "text": ["a"] * 9})
    settings = dataclasses.replace(SETTINGS, near_duplicates=0, num_prompts=2, num_quality_images=2)
    report = audit(pipeline=tiny_pipeline(), train=train, held_out=held_out, settings=settings, control=False)
    assert value(report, "extraction_false_alarms") == 1, "all pairs of real images lie within the threshold"
    assert {"extraction_rate", "extraction_rate_calibrated"} & load_gate().keys() == {"extraction_rate_calibrated"}


def test_the_card_of_an_audit_says_nothing_of_a_training(tmp_path):
    report = audit(generated=images_of(6, seed=3))
    report.judge(load_gate())
    report.to_json(tmp_path / "memorization_report.json")
    assert main(["card", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "# " + tmp_path.name + ": audit of generated images" in text.replace("\\", "")
    assert "the weights were not attacked" in text and "copy_share" in text
    for claim in ("of 0 blocks", "from_pretrained", "was trained", "None", "nan"):
        assert claim not in text, claim


def test_an_attack_that_can_be_turned_around_does_not_pass():
    limits = {"membership_auc_secmi": load_gate()["membership_auc_secmi"]}
    assert report_with(membership_auc_secmi={"model": figure(0.5, 0.43, 0.57)}).judge(limits)
    assert not report_with(membership_auc_secmi={"model": figure(0.1, 0.05, 0.2)}).judge(limits)


def test_a_gate_can_name_what_an_audit_measures():
    measured = audit(pipeline=tiny_pipeline()).audit["measures"].keys()
    assert load_gate(DEFAULT_GATE).keys() <= measured <= set(MEASURES)


# ---- the command ----


def folder_of(images, path) -> str:
    path.mkdir()
    for i, row in enumerate(images):
        row["image"].save(path / f"{i}.png")
    return str(path)


def test_exit_codes(tmp_path, capsys):
    train, held_out, fresh = (images_of(n, seed=s) for n, s in ((30, 1), (40, 2), (60, 3)))
    sets = ["--train", folder_of(train, tmp_path / "train"), "--held_out", folder_of(held_out, tmp_path / "held_out")]
    gate = tmp_path / "gate.yaml"
    gate.write_text(yaml.safe_dump({"amd": {"min": 0.01}}))
    common = [*sets, "--gate", str(gate), "--encoder", "demo", "--output_dir", str(tmp_path / "out")]
    assert main(["audit", "--generated", folder_of(fresh, tmp_path / "fresh"), *common]) == 0
    assert "gate: passed" in capsys.readouterr().out
    assert main(["audit", "--generated", folder_of(train, tmp_path / "copies"), *common]) == 3
    assert "gate: FAILED\namd: may be as low as" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "memorization_report.json").read_text())
    assert report["gate"]["passed"] is False and str(tmp_path) not in report["command"]
    words = shlex.split(report["command"].removeprefix("memcontrol "))
    again = _parser().parse_args(words)
    assert (again.generated, again.encoder, again.resolution) == ("YOUR_GENERATED", "demo", RESOLUTION)
    for wrong in (str(tmp_path / "nowhere"), "demo"):
        assert main(["audit", "--generated", wrong, *common]) == 2
        assert "error: --generated" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["audit", "--generated", str(tmp_path / "fresh"), *common[:-1], str(tmp_path / "file")]) == 2
    assert "error: cannot write to the folder" in capsys.readouterr().err
    (tmp_path / "in_the_way" / "memorization_report.json").mkdir(parents=True)
    assert main(["audit", "--generated", str(tmp_path / "fresh"), *common[:-1], str(tmp_path / "in_the_way")]) == 1
    assert "DirectoryError: " in capsys.readouterr().err
    trained = adapter_folder(tmp_path / "trained")
    before = (trained / "memorization_report.json").read_bytes()
    assert main(["audit", "--generated", str(tmp_path / "fresh"), *common[:-1], str(trained)]) == 2
    assert "is the report of a training, which would be lost" in capsys.readouterr().err
    assert (trained / "memorization_report.json").read_bytes() == before
    with pytest.raises(SystemExit) as stop:
        main(["audit", *common])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--generated", "x", "--adapter", "a", "--clip_model", "c"], "or leave out --adapter, --clip_model"),
        (["--generated", "x", "--num_prompts", "100", "--inference_steps", "9"], "leave out --inference_steps"),
        (["--pipeline", "demo", "--adapter", "a", "--base_pipeline", "b"], "--base_pipeline is for a whole"),
        (["--generated", "x", "--gate", "nowhere.yaml"], "cannot read the gate 'nowhere.yaml'"),
        (["--pipeline", "demo"], "has no column 'text'"),
        (["--pipeline", "nowhere", "--num_prompts", "0"], "num_prompts must be at least"),
        (["--generated", "x", "--device", "nosuch"], "--device 'nosuch' cannot be used: "),
        (
            ["--pipeline", "demo", "--train", "demo", "--held_out", "demo", "--inference_steps", "5000"],
            "5000 sampling steps are too many: the schedule of this model has 1000 timesteps",
        ),
    ],
)
def test_wrong_use_is_said_in_one_line(tmp_path, capsys, arguments, message):
    sets = [folder_of(images_of(9, seed=s), tmp_path / str(s)) for s in (1, 2)]
    sets = ["--train", sets[0], "--held_out", sets[1], "--encoder", "demo", "--output_dir", str(tmp_path / "o")]
    code = main(["audit", *sets, *arguments])
    error = capsys.readouterr().err
    assert code == 2 and message in error.strip().splitlines()[-1] and error.count("error: ") == 1
    assert "Traceback" not in error


def test_an_unreadable_image_is_named(tmp_path, capsys):
    train, held_out = (folder_of(images_of(9, seed=s), tmp_path / str(s)) for s in (1, 2))
    (tmp_path / "1" / "4.png").write_bytes(b"no picture")
    sets = ["--generated", held_out, "--train", train, "--held_out", held_out, "--encoder", "demo"]
    code = main(["audit", *sets, "--output_dir", str(tmp_path)])
    assert code == 2 and "cannot read the image 4.png" in capsys.readouterr().err
