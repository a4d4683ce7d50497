"""The script as people run it."""

import base64
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import numpy as np
import optuna
import pytest
import torch
from conftest import RESOLUTION, images_of, tiny_pipeline, tiny_trainer, tiny_unet
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard, constants
from mini_hub import TOKEN, MiniHub, serve
from peft import PeftModel
from safetensors.torch import load_file
from tiny_families import ddpm
from transformers import ResNetConfig, ResNetModel, ViTImageProcessorPil

from memcontrol_hf import MemControlTrainer, MemorizationReport, audit_memorization, cli, workflow
from memcontrol_hf.adapter_folder import PUBLIC_FILES
from memcontrol_hf.audit import AuditSettings
from memcontrol_hf.data import load_images, plant_canaries
from memcontrol_hf.flag_parser import FlagParser
from memcontrol_hf.flags import ScriptArguments, settings
from memcontrol_hf.from_flags import load, make_trainer, mask_from
from memcontrol_hf.masks import block_map
from memcontrol_hf.public_facts import card_facts, public_flags
from memcontrol_hf.publish.hub import push_mask
from memcontrol_hf.report import REPORT_SCHEMA
from memcontrol_hf.sampling import denoiser_in_place, generate
from memcontrol_hf.search import open_storage

SCRIPT = Path(__file__).parent.parent / "training_scripts" / "train_memcontrol.py"
PUBLIC = sorted(name for name in PUBLIC_FILES if "/" not in name and name != "pytorch_lora_weights.safetensors")
FILES = sorted([*PUBLIC, "private", "study.journal"])


@pytest.fixture(scope="session")
def script():
    spec = importlib.util.spec_from_file_location("train_memcontrol", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_memcontrol"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def assets(tmp_path_factory):
    """A tiny pipeline, a tiny encoder, and forty images of one's own, as folders."""
    folder = tmp_path_factory.mktemp("assets")
    tiny_pipeline().save_pretrained(folder / "tiny-sd")
    config = ResNetConfig(embedding_size=2, hidden_sizes=[2, 3], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder / "encoder")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "encoder")
    (folder / "images").mkdir()
    lines = []
    for i, row in enumerate(images_of(40, seed=3)):
        row["image"].save(folder / "images" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": row["text"]}))
    (folder / "images" / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def flags(assets, output_dir, **changes) -> list[str]:
    values = {
        "pretrained_model_name_or_path": assets / "tiny-sd",
        "train_data_dir": assets / "images",
        "encoder": assets / "encoder",
        "output_dir": output_dir,
        "resolution": RESOLUTION,
        "train_batch_size": 4,
        "max_train_steps": 3,
        "search_max_steps": 3,
        **({} if "mask_from" in changes else {"n_trials": 3}),
        "eval_num_images": 4,
        "eval_inference_steps": 2,
        "audit_num_prompts": 4,
        "audit_images_per_prompt": 3,
        **changes,
    }
    parts = []
    for name, value in values.items():
        parts += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return parts


@pytest.fixture(scope="session")
def finished(script, assets, tmp_path_factory):
    """The folder that a run leaves."""
    folder = tmp_path_factory.mktemp("out") / "my-adapter"
    script.main(flags(assets, folder, validation_prompt='a "quoted" prompt', canaries=1, canary_repeats=3))
    return folder


def test_it_leaves_these_files_and_no_others(finished):
    assert sorted(p.name for p in finished.iterdir()) == FILES


def test_the_report_is_complete_and_compares_three_models(finished):
    report = MemorizationReport.from_json(finished / "memorization_report.json")
    assert list(report.figures) == ["frozen base", "all blocks", "selected mask"]
    assert report.figures["frozen base"]["trainable_parameters"] == 0
    assert 0 < report.figures["selected mask"]["trainable_parameters"] <= 464
    assert report.figures["all blocks"]["trainable_parameters"] == 464
    for figures in report.figures.values():
        assert 0 <= figures["membership_auc_low"] <= figures["membership_auc"] <= figures["membership_auc_high"] <= 1
        assert figures["fid"] > 0 and figures["noise_norm"] > 0
    assert len(report.search["trials"]) == 3
    content = json.loads((finished / "memorization_report.json").read_text())
    jsonschema.validate(content, json.loads(REPORT_SCHEMA.read_text()))
    assert report.images == {
        **{"train": 26, "validation": 8, "held_out": 8},
        **{"train_different": 24, "validation_different": 8, "held_out_different": 8},
    }
    path = finished.parent / "again.json"
    report.to_json(path)
    assert path.read_text() == (finished / "memorization_report.json").read_text()


def test_what_was_saved_is_audited_and_judged(finished, assets):
    report = MemorizationReport.from_json(finished / "memorization_report.json")
    assert report.audit["subject"] == "adapter" and report.audit["canaries"]["planted"] == 1
    assert report.training["canaries"] == 1 and report.training["canary_repeats"] == 3
    assert report.gate["passed"] is False, "four prompts are too few to tell"
    assert report.audit["measures"]["membership_auc_loss"]["frozen_base"]["value"] is not None
    data = load_images(train_data_dir=str(assets / "images"))
    again = audit_memorization(
        plant_canaries(data["train"], 1, 3),
        data["held_out"],
        pipeline=StableDiffusionPipeline.from_pretrained(assets / "tiny-sd"),
        adapter=finished,
        encoder=str(assets / "encoder"),
        settings=AuditSettings(**report.audit["settings"]),
    )
    for name in ("membership_auc_loss", "membership_auc_secmi", "fid"):
        expected = report.audit["measures"][name]["model"]["value"]
        assert again.audit["measures"][name]["model"]["value"] == pytest.approx(expected, rel=1e-3), name


def test_too_few_images_to_audit_are_no_pass_and_lose_nothing(script, assets, finished, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    lines = []
    for i, row in enumerate(images_of(12, seed=4)):
        row["image"].save(few / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": row["text"]}))
    (few / "metadata.jsonl").write_text("\n".join(lines))
    script.main(flags(assets, tmp_path / "out", train_data_dir=few, mask_from=finished))
    report = MemorizationReport.from_json(tmp_path / "out" / "memorization_report.json")
    assert report.audit is None and not report.gate["passed"]
    assert "no audit: the held_out set has 2 different images" in report.gate["failures"][0]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_the_adapter_holds_the_reported_mask_and_size(finished):
    report = MemorizationReport.from_json(finished / "memorization_report.json")
    config = json.loads((finished / "adapter_config.json").read_text())
    assert config["mask"] == report.mask and config["search"]["study_name"] == "memcontrol"
    size = sum(t.numel() for t in load_file(finished / "adapter_model.safetensors").values())
    assert size == report.figures["selected mask"]["trainable_parameters"]


def test_nothing_that_is_left_names_the_machine_or_the_data(finished, assets):
    captions = set(images_of(40, seed=3)["text"])
    for name in FILES:
        if name.endswith((".png", ".safetensors", "private")):
            continue
        text = (finished / name).read_text()
        assert str(assets) not in text and str(finished.parent) not in text, name
        assert not captions & set(re.findall(r"\w+", text)), name


def test_the_card_has_valid_metadata_and_no_placeholder(finished):
    card = ModelCard.load(finished / "README.md")
    assert card.data.library_name == "peft" and "memcontrol" in card.data.tags
    assert card.data.base_model is None, "a local folder is no base model on the Hub"
    assert "No formal guarantee" in card.text and card.data.eval_results
    assert not re.search(r"\{\{|\}\}|None|nan|More Information Needed|undefined", card.text)
    assert """--validation_prompt 'a "quoted" prompt'""" in card.text


def snippet_of(folder, assets) -> str:
    snippet = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    return snippet.replace('"tiny-sd"', repr(str(assets / "tiny-sd")))


def test_the_snippet_of_the_card_runs(finished, assets, tmp_path):
    code = snippet_of(finished, assets) + "\nimage.save('image.png')"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=finished.parent, capture_output=True)
    assert (finished.parent / "image.png").exists()
    (finished.parent / "image.png").unlink()


def test_blocks_of_the_text_encoder_go_all_the_way(script, assets, tmp_path, monkeypatch):
    """From the flag to the audit, the card's snippet and a merged pipeline; what an earlier mask left is gone."""
    layer, out = "text_encoder.encoder.layers.0", tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    given = {"mask_from": tmp_path / "mask.json", "learning_rate": 0.3, "max_train_steps": 2, "eval_num_images": 2,
             "audit_num_prompts": 2}  # fmt: skip
    plain = StableDiffusionPipeline.from_pretrained(assets / "tiny-sd")
    drawn = {}
    for mask in ({"mid_block.attentions.0": True, layer: True}, {layer: True}):
        (tmp_path / "mask.json").write_text(json.dumps(mask))
        script.main([*flags(assets, out, **given), "--text_encoder_blocks"])
        report = MemorizationReport.from_json(out / "memorization_report.json")
        assert report.mask[layer] and ("text_encoder.encoder.layers", "■") in block_map(report.mask)
        attacked = report.audit["measures"]["membership_auc_secmi"]
        assert attacked["model"]["value"] != attacked["frozen_base"]["value"]
        adapters = {str(file.parent.relative_to(out)) for file in out.rglob("adapter_model.safetensors")}
        assert adapters == ({".", "text_encoder"} if len(mask) == 2 else {"text_encoder"})
        snippet = snippet_of(out, assets)
        assert ("pipe.unet" in snippet) == (len(mask) == 2) and 'subfolder="text_encoder")' in snippet
        names = {}
        exec(snippet, names)
        cli.main(["export", str(out), "--to", "merged", "--pipeline", str(assets / "tiny-sd"),
                  "--output_dir", str(tmp_path / f"merged-{len(mask)}")])  # fmt: skip
        merged = StableDiffusionPipeline.from_pretrained(tmp_path / f"merged-{len(mask)}")
        drawn[len(mask)] = [draw(pipeline) for pipeline in (plain, names["pipe"], merged)]
        torch.testing.assert_close(*drawn[len(mask)][1:], atol=1e-5, rtol=0)
        assert not torch.allclose(*drawn[len(mask)][:2], atol=1e-4)
    assert not torch.allclose(drawn[1][1], drawn[2][1], atol=1e-4)
    with pytest.raises(SystemExit):  # the mask alone does not bring text encoders into the space
        script.main(flags(assets, tmp_path / "other", mask_from=out))


def draw(pipeline) -> torch.Tensor:
    return generate(pipeline, ["abc"], [(0,)], RESOLUTION, num_inference_steps=2, guidance_scale=2.0)


def test_the_same_command_again_repeats_no_trial(script, assets, finished, monkeypatch):
    before = (finished / "memorization_report.json").read_text()
    monkeypatch.setattr(MemControlTrainer, "train_and_evaluate", lambda self: pytest.fail("a trial was run"))
    same = {"validation_prompt": 'a "quoted" prompt', "canaries": 1, "canary_repeats": 3}
    script.main(flags(assets, finished, **same))
    assert (finished / "memorization_report.json").read_text() == before


def test_the_mask_of_an_adapter_is_tuned_without_a_search(script, assets, finished, tmp_path):
    script.main(flags(assets, tmp_path / "out", mask_from=finished, learning_rate=0.01))
    report = MemorizationReport.from_json(tmp_path / "out" / "memorization_report.json")
    assert report.search is None
    assert report.mask == json.loads((finished / "adapter_config.json").read_text())["mask"]
    left = {p.name for p in (tmp_path / "out").iterdir()}
    assert left == set(FILES) - {"study.journal", "pareto_front.png"}


@pytest.mark.parametrize("method", ["difffit", "attention", "lora"])  # difffit trains what norm and bias train
def test_other_methods_run_through(script, assets, tmp_path, method):
    (tmp_path / "mask.json").write_text(json.dumps({"mid_block.attentions.0": True}))
    script.main(flags(assets, tmp_path / "out", method=method, mask_from=tmp_path / "mask.json", max_train_steps=2))
    loaded = PeftModel.from_pretrained(tiny_unet(), tmp_path / "out")
    assert sum(p.numel() for p in loaded.parameters()) > sum(p.numel() for p in tiny_unet().parameters())


def test_one_objective_runs_through(script, assets, tmp_path):
    script.main(flags(assets, tmp_path / "out", objectives="loss", n_trials=2, seed=3))
    report = MemorizationReport.from_json(tmp_path / "out" / "memorization_report.json")
    assert report.search["objectives"] == ["loss"] and len(report.search["trials"]) == 2
    assert report.training["seed"] == 4, "a seed that the search never saw"


def test_any_peft_config_can_be_given_as_a_file(script, assets, tmp_path):
    (tmp_path / "loha.json").write_text(json.dumps({"peft_type": "LOHA", "r": 2, "target_modules": ["to_q"]}))
    script.main(
        flags(assets, tmp_path / "out", peft_config=tmp_path / "loha.json", n_trials=2, granularity="site", seed=1)
    )
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "LOHA"


def test_final_fine_tune_resumes_from_a_checkpoint(script, assets, finished, tmp_path, capsys, monkeypatch):
    given = {"mask_from": finished, "learning_rate": 0.01, "max_train_steps": 4}
    script.main(flags(assets, tmp_path / "whole", **given))
    script.main(flags(assets, tmp_path / "parts", checkpointing_steps=2, **given))
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    assert checkpoint.is_dir()
    whole = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    for start in (checkpoint, "latest"):  # the same command again: it makes checkpoints, too
        again = {"checkpointing_steps": 2, "resume_from_checkpoint": start}
        script.main(flags(assets, tmp_path / "parts", **again, **given))
        parts = load_file(tmp_path / "parts" / "adapter_model.safetensors")
        assert all(torch.equal(whole[name], parts[name]) for name in whole), start
    other = {**given, "learning_rate": 0.02, "resume_from_checkpoint": "latest"}
    monkeypatch.setattr(workflow, "fine_tune_and_measure", lambda *_: pytest.fail("a fine-tune was begun"))
    with pytest.raises(SystemExit):
        script.main(flags(assets, tmp_path / "parts", **other))
    assert "checkpoint-4 is of another run: the learning rate was 0.01 and is 0.02" in capsys.readouterr().err


def test_a_control_that_diverges_costs_nothing_else(script, assets, finished, tmp_path, monkeypatch):
    measure, calls = workflow.fine_tune_and_measure, []

    def diverging(trainer, *args):
        calls.append(trainer.mask)
        if len(calls) == 2:
            raise ValueError("member_scores: 10 of 10 are not finite")
        return measure(trainer, *args)

    monkeypatch.setattr(workflow, "fine_tune_and_measure", diverging)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pareto_front.png").write_bytes(b"of an earlier search")
    script.main(flags(assets, tmp_path / "out", mask_from=finished, learning_rate=0.01))
    report = MemorizationReport.from_json(tmp_path / "out" / "memorization_report.json")
    assert list(report.figures) == ["frozen base", "selected mask"] and report.audit is not None
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not in the table: all blocks, which gave no figures (member\\_scores: 10 of 10 are not finite)" in card
    assert not (tmp_path / "out" / "pareto_front.png").exists()


def test_other_images_are_another_study(script, assets, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(workflow, "fine_tune_and_measure", lambda *_: {})
    for call in ("save", "audit", "write_card"):
        gate = {"passed": False, "limits": {}, "failures": []}
        monkeypatch.setattr(workflow, call, lambda *_, gate=gate, **__: MemorizationReport(gate=gate))
    images = tmp_path / "images"
    shutil.copytree(assets / "images", images)
    arguments = flags(assets, tmp_path / "out", train_data_dir=images, n_trials=1)
    script.main(arguments)
    lines = (images / "metadata.jsonl").read_text().splitlines()
    (images / "metadata.jsonl").write_text("\n".join(lines[:-1]))
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    assert stopped.value.code == 2
    assert re.search("made with other settings: images was 'v2:[0-9a-f]{16}' and is", capsys.readouterr().err)


def test_a_study_of_an_earlier_version_is_named_and_not_gone_on_with(script, assets, tmp_path, capsys):
    """Earlier studies named their images by a digest that ignored the size."""
    arguments = flags(assets, tmp_path / "out", n_trials=1)
    args = FlagParser().script_arguments(arguments)
    storage = open_storage(str(tmp_path / "out" / "study.journal"))
    study = optuna.create_study(storage=storage, study_name="memcontrol", directions=["minimize"] * 2)
    study.set_user_attr("settings", settings(args) | {"images": "0123456789abcdef", "world_size": 1})
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    assert stopped.value.code == 2
    assert "made with other settings: images was '0123456789abcdef' and is 'v2:" in capsys.readouterr().err


def test_the_command_to_repeat_has_all_that_is_not_a_default_of_this_pipeline():
    args = ScriptArguments(
        pretrained_model_name_or_path="stable-diffusion-v1-5/stable-diffusion-v1-5",
        train_data_dir="patients",
        train_batch_size=32,
        resolution=64,
        validation_prompt="a finding " * 100,
    )
    words = public_flags(args)
    assert "--train_batch_size 32" in words and "--resolution 64" in words and "a finding" in words
    assert "--train_data_dir YOUR_TRAIN_DATA_DIR" in words and "patients" not in words
    assert public_flags(ScriptArguments()) == ""


def test_the_card_knows_the_variant_of_the_base(tmp_path):
    args = ScriptArguments(pretrained_model_name_or_path="owner/base", variant="fp16")
    assert card_facts(args, tiny_trainer(tmp_path))["base_variant"] == "fp16"


def test_the_card_knows_whether_the_pipeline_reads_a_lora(tmp_path):
    assert "without_lora" not in card_facts(ScriptArguments(), tiny_trainer(tmp_path))
    assert card_facts(ScriptArguments(), tiny_trainer(tmp_path, pipeline=ddpm()))["without_lora"] is True


def test_a_folder_that_is_called_as_a_method_does_not_hide_the_method(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora").mkdir()
    words = public_flags(ScriptArguments(method="lora", output_dir="lora"))
    assert "--method lora" in words


def test_a_mask_file_that_is_no_object_is_said_to_hold_none(tmp_path):
    (tmp_path / "mask.json").write_text("[1, 0, 1]")
    with pytest.raises(ValueError, match="holds no mask, which is an object of block names and booleans"):
        mask_from(str(tmp_path / "mask.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "dreambooth"}, "--method: invalid choice: 'dreambooth' .choose from '?svdiff'?, '?difffit"),
        ({"objectives": ["fid", "psnr"]}, "--objectives: invalid choice: 'psnr' .choose from '?fid"),
        ({"sampler": "cma"}, "--sampler: invalid choice: 'cma'"),
        ({"backend": "sigopt"}, "--backend: invalid choice: 'sigopt' .choose from '?optuna'?, '?ray"),
        ({"backend": "ray", "num_workers": 0}, "num_workers must be at least 1, but is 0"),
        ({"num_workers": 2}, "--num_workers 2 is for --backend ray"),
        ({"granularity": ["layer", "("]}, "granularity 'layer' matches no module"),
        ({"mixed_precision": "fp8"}, "argument --mixed_precision.*: invalid choice: 'fp8'"),
        ({"sede": 1}, r"unrecognized arguments: --sede 1 \(did you mean --seed\?\)$"),
        ({"zzz": 1}, "unrecognized arguments: --zzz 1$"),
        ({"n_trials": 0}, "--n_trials must be at least 1"),
        ({"prune_at": 1.0}, "--prune_at must be a share of the steps between 0 and 1, but is 1"),
        (
            {"memorization_budget": 0.5, "objectives": ["fid"]},
            "--memorization_budget needs a second objective, the memorization",
        ),
        ({"memorization_budget": "nan"}, "--memorization_budget must be a number, but is nan"),
        (
            {"memorization_budget": 0.6, "objectives": ["membership_auc", "loss"]},
            "--memorization_budget limits the second objective, and that is loss, a quality",
        ),
        ({"max_trainable_percent": "nan"}, "--max_trainable_percent must be positive, but is nan"),
        ({"checkpointing_steps": -1}, "--checkpointing_steps must be at least 0, but is -1"),
        ({"granularity": ["blocks"]}, "unknown granularity 'blocks': use block, site, module, or regular"),
        (
            {"lr_scheduler": "cosine_with_min_lr"},
            "schedule cosine_with_min_lr cannot be made: .*lr_scheduler_kwargs",
        ),
        ({"report_to": "wandbb"}, "unknown tracker 'wandbb': use wandb, tensorboard, trackio, all or none"),
        ({"eval_inference_steps": 5000}, "5000 sampling steps are too many: the schedule of this model has 1000"),
        ({"learning_rate": -1.0}, "--learning_rate must be positive"),
        ({"train_data_dir": "/nowhere"}, "'/nowhere' is no folder"),
        ({"caption_column": "caption"}, "has no column 'caption'; it has: image, text"),
        ({"resolution": RESOLUTION + 1}, "resolution 17 is not a positive multiple of 2"),
        ({"pretrained_model_name_or_path": "/nowhere"}, "cannot load the pipeline '/nowhere'"),
        ({"encoder": "/nowhere"}, "cannot load the image encoder '/nowhere'"),
        ({"peft_config": "/nowhere"}, "--peft_config '/nowhere' is no PEFT config"),
        ({"mask_from": "/nowhere"}, "--mask_from '/nowhere' cannot be read"),
        ({"log_images": -1}, "--log_images must be at least 0, but is -1"),
        ({"log_images": 2}, "--log_images shows what the model makes of a --validation_prompt: give one"),
        (
            {"log_images": 2, "validation_prompt": "a b"},
            "--log_images is for --report_to wandb: give that, too, or neither",
        ),
        ({"max_train_steps": 0}, "--max_train_steps must be at least 1, but is 0"),
        ({"eval_num_images": 1}, "--eval_num_images must be at least 2, but is 1"),
        ({"resume_from_checkpoint": "/nowhere"}, "'/nowhere' is no folder: give a checkpoint's, or latest"),
        ({"mitigation": ["early_stop:every=25"]}, "early_stop looks every 25 steps, but there are 3"),
        (
            {"storage": "mysql://me:secret@nowhere/db"},
            r"cannot open the storage mysql://me:\*\*\*@nowhere/db: Failed",
        ),
        ({"storage": "mysql://nowhere/db?password=secret"}, "cannot open the storage mysql://nowhere/db: Failed"),
        ({"study_name": "chest-screening"}, "--study_name must not end in -final or -screening"),
        ({"trainer_args": '{"push_to_hub": true}'}, "--trainer_args has push_to_hub: use --push_to_hub"),
        ({"trainer_args": '{"optim": '}, "--trainer_args is no JSON object"),
        ({"trainer_args": '{"optimizer": "adam"}'}, "--trainer_args has unknown arguments: optimizer"),
        ({"trainer_args": '{"seed": 1, "logging_steps": 1}'}, "--trainer_args has seed: there are flags for"),
    ],
)
def test_wrong_use_is_one_line_before_any_training(script, assets, tmp_path, capsys, monkeypatch, changes, message):
    monkeypatch.setattr(MemControlTrainer, "train", lambda self, **kwargs: pytest.fail("training began"))
    with pytest.raises(SystemExit) as stopped:
        script.main(flags(assets, tmp_path / "out", **changes))
    assert stopped.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and re.search(message, errors[0])
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_said_before_any_training(script, assets, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(MemControlTrainer, "train", lambda self, **kwargs: pytest.fail("training began"))
    monkeypatch.setattr("memcontrol_hf.training_arguments.find_spec", lambda name: None)
    (tmp_path / "empty").mkdir()
    for changes, message in (
        ({"report_to": "trackio"}, "the tracker trackio needs its package, which is missing: pip install trackio"),
        ({"resume_from_checkpoint": tmp_path / "empty"}, "cannot be gone on from: trainer_state.json is missing"),
    ):
        with pytest.raises(SystemExit) as stopped:
            script.main(flags(assets, tmp_path / "out", **changes))
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_picture_that_is_in_two_splits_again_a_little_darker_is_refused(assets, tmp_path):
    shutil.copytree(assets / "images", tmp_path / "images")
    with open(tmp_path / "images" / "metadata.jsonl", "a") as lines:
        for i, row in enumerate(images_of(40, seed=3)):
            row["image"].point(lambda value: round(0.97 * value)).save(tmp_path / "images" / f"darker-{i}.png")
            lines.write("\n" + json.dumps({"file_name": f"darker-{i}.png", "text": row["text"]}))
    arguments = flags(assets, tmp_path / "out", train_data_dir=tmp_path / "images")
    with pytest.raises(ValueError, match="images of validation are near-duplicates of images of train"):
        load(FlagParser().script_arguments(arguments))
    assert len(load(FlagParser().script_arguments([*arguments, "--near_duplicates", "0"]))[1]["train"]) > 40


def test_a_mask_of_another_model_is_refused_with_the_names(script, assets, tmp_path, capsys):
    (tmp_path / "mask.json").write_text(json.dumps({"transformer_blocks.3": True}))
    with pytest.raises(SystemExit) as stopped:
        script.main(flags(assets, tmp_path / "out", mask_from=tmp_path / "mask.json"))
    assert stopped.value.code == 2
    assert "block(s) that the model lacks: transformer_blocks.3; it has: down_blocks.0" in capsys.readouterr().err


def test_an_output_folder_with_another_study_is_refused(script, assets, finished, capsys):
    for changes, message in (
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"study_name": "another"}, "holds another study (memcontrol)"),
    ):
        with pytest.raises(SystemExit) as stopped:
            script.main(flags(assets, finished, **changes))
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_an_unreadable_image_is_named(script, assets, tmp_path, capsys):
    shutil.copytree(assets / "images", tmp_path / "images")
    (tmp_path / "images" / "5.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit):
        script.main(flags(assets, tmp_path / "out", train_data_dir=tmp_path / "images"))
    assert "error: cannot read the image 5.png" in capsys.readouterr().err


def test_a_search_that_finds_nothing_keeps_its_trials(script, assets, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(flags(assets, tmp_path, memorization_budget=-1))
    assert stopped.value.code == 1
    assert "no trial is within the memorization budget of -1" in capsys.readouterr().err
    assert (tmp_path / "study.journal").exists()


# ---- what leaves the machine: one run with --push_to_hub and --report_to wandb ----

MARK = "zebramark"
"""Part of every caption, file name and patient id of the run."""


@dataclass
class Published:
    folder: Path
    hub: MiniHub
    environment: dict[str, str]
    sent: dict[str, bytes]  # by where it was found: requests to the Hub, and what `wandb sync` would upload
    runs: dict[str, dict]  # by name, as W&B's own tool reads the offline runs
    images: Path


@pytest.fixture(scope="module")
def published(assets, tmp_path_factory):
    """A run that publishes everything it may, on images whose texts are marked."""
    place, wandb = tmp_path_factory.mktemp("published"), tmp_path_factory.mktemp("wandb")
    images = place / "images"
    images.mkdir()
    lines = []
    for i, row in enumerate(images_of(40, seed=5)):
        row["image"].save(images / f"{MARK}-{i}.png")
        name = {"file_name": f"{MARK}-{i}.png", "text": f"{row['text']} {MARK}", "patient": f"{MARK}-{i // 2}"}
        lines.append(json.dumps(name))
    (images / "metadata.jsonl").write_text("\n".join(lines))
    (place / "gate.yaml").write_text("membership_auc_loss: {max: 1}")
    with serve() as (hub, address):
        environment = {
            "HF_ENDPOINT": address,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(place / "hf"),
            "HF_DATASETS_CACHE": str(place / "datasets"),
            "WANDB_MODE": "offline",
            "WANDB_LOG_MODEL": "end",
            "WANDB_DATA_DIR": str(wandb / "data"),
            "WANDB_CACHE_DIR": str(wandb / "cache"),
        }
        arguments = flags(
            assets,
            place / "out",
            train_data_dir=images,
            group_column="patient",
            hub_model_id="tester/adapter",
            report_to="wandb",
            study_name="my-study",
            validation_prompt="public prompt",
            log_images=3,
            gate=place / "gate.yaml",
        )
        result = _run([*arguments, "--push_to_hub"], **environment)
        assert result.returncode == 0, result.stderr[-3000:]
        sent = {f"request {i}": body for i, body in enumerate(hub.sent)}
        for run in (place / "out" / "wandb").glob("offline-run-*"):
            sent |= {str(file): file.read_bytes() for file in (run / "files").rglob("*") if file.is_file()}
            (records,) = run.glob("*.wandb")
            sent[str(records)] = records_of(records)
        staged = [file for file in (wandb / "data").rglob("*") if file.is_file()]
        sent |= {str(file): file.read_bytes() for file in staged}
        yield Published(place / "out", hub, environment, sent, runs_of(place / "out"), images)


def records_of(file: Path) -> bytes:
    """What an offline run holds, without the heads of the pieces that it lies in (LevelDB's log format)."""
    data, place, records = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        length = int.from_bytes(data[place + 4 : place + 6], "little")
        records += data[place + 7 : place + 7 + length]
        place += 7 + length
    return records


def _run(arguments: list[str], **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def encodings(mark: bytes) -> list[bytes]:
    """A mark as it is, and as base64 at each alignment."""
    coded = [base64.b64encode(b"\0" * shift + mark) for shift in range(3)]
    whole = [(0, 0), (2, 1), (3, 2)]  # first character of the mark alone at that alignment, bytes before it
    return [mark, *(text[first : (before + len(mark)) * 8 // 6] for text, (first, before) in zip(coded, whole))]


def found(mark: bytes, sent: dict[str, bytes]) -> list[str]:
    return [where for where, data in sent.items() if any(coded in data for coded in encodings(mark))]


def test_no_text_of_the_data_is_sent(published):
    assert found(b"public prompt", published.sent), "what is published is found, so the search works"
    assert found(b"mid_block.attentions.0", published.sent)
    assert any("wandb" in where for where in found(b"my-study", published.sent))
    assert found(MARK.encode(), published.sent) == []


def test_no_image_is_sent_nor_its_latents_or_embeddings(published):
    from memcontrol_hf.families import family_of

    family = family_of(tiny_pipeline())
    weights = load_file(published.folder / "adapter_model.safetensors")
    assert found(next(iter(weights.values())).numpy().tobytes()[:32], published.sent), "the search works for tensors"
    for i, row in enumerate(images_of(40, seed=5)):
        pixels = torch.from_numpy(np.asarray(row["image"])).permute(2, 0, 1)[None].float() / 255
        latents = family.encode_images(pixels)[0]
        condition = family.encode_prompts([f"{row['text']} {MARK}"])
        embeds = condition["prompt_embeds"][0, 1:]  # the first token is the same for all
        file = (published.images / f"{MARK}-{i}.png").read_bytes()
        marks = [file[file.index(b"IDAT") + 8 :][:32], row["image"].tobytes()[:48]]
        for tensor in (latents, embeds.detach()):
            marks += [tensor.to(kind).numpy().tobytes()[:32] for kind in (torch.float32, torch.float16)]
        for mark in marks:
            assert len(set(mark)) > 4 and found(mark, published.sent) == []


def test_no_place_of_this_machine_is_sent(published, assets):
    for place in (str(published.folder.parent), str(assets), str(SCRIPT.parent), str(Path.home()) + "/"):
        assert found(place.encode(), published.sent) == [], place


def runs_of(output_dir: Path) -> dict[str, dict]:
    wandb, runs = Path(sys.executable).with_name("wandb"), {}
    for folder in sorted((output_dir / "wandb").glob("offline-run-*")):
        run = json.loads(subprocess.check_output([wandb, "leet", "inspect", "--summary", "--json", folder]))
        runs[run["name"]] = run | {"records": next(folder.glob("*.wandb")).read_bytes()}
    return runs


def test_wandb_offline_has_a_group_a_study_and_a_run_a_trial(published):
    runs = published.runs
    assert all(b"my-study" in run["records"] for run in runs.values()), "the group"
    trials = {"trial-0", "trial-1", "trial-2"}
    repeats = {name for name in runs if name.endswith("-repeat-1")}
    assert repeats and {name.removesuffix("-repeat-1") for name in repeats} <= trials
    assert runs.keys() - repeats == trials | {"frozen base", "all blocks", "selected mask"}
    report = MemorizationReport.from_json(published.folder / "memorization_report.json")
    for trial in report.search["trials"]:
        run = runs[f"trial-{trial['number']}"]
        assert [run["summary"]["eval/loss"], run["summary"]["eval/membership_auc"]] == trial["values"]
        assert run["config"]["learning_rate"] == trial["learning_rate"]
        assert run["config"]["objectives"] == ["loss", "membership_auc"]
    final = runs["selected mask"]
    assert final["config"]["mask"] == report.mask
    assert final["summary"]["eval/amd"] == report.figures["selected mask"]["amd"]
    assert final["summary"]["hub"].endswith("/tester/adapter/commit/main")


def test_the_final_run_holds_the_front_the_block_map_the_report_and_the_adapter(published):
    report = MemorizationReport.from_json(published.folder / "memorization_report.json")
    tables = {}
    for where, data in published.sent.items():
        if where.endswith(".table.json"):
            tables[re.match(r"(\w+?)_\d+_", Path(where).name)[1]] = json.loads(data)
    assert len(tables["front"]["data"]) == 3
    assert [row[1:3] for row in tables["front"]["data"]] == [trial["values"] for trial in report.search["trials"]]
    assert tables["block_map"]["data"] == [list(row) for row in block_map(report.mask)]
    effects = {block: values for block, _, *values in tables["block_effects"]["data"]}
    assert effects == report.search["block_effects"] and effects
    assert any(where.endswith(".png") and "front_plot" in where for where in published.sent)
    staged = [data for where, data in published.sent.items() if "/artifacts/staging/" in where]
    assert any(b'"schema_version": 4' in data for data in staged), "the report"
    assert (published.folder / "adapter_model.safetensors").read_bytes() in staged


def test_images_of_the_public_prompt_are_shown_unless_they_may_be_copies(published):
    shown = [where for where in published.sent if "/media/images/generated_" in where]
    withheld = published.runs["selected mask"]["summary"]["generated_withheld"]
    assert len(shown) + withheld == 3


def test_a_push_uploads_the_public_files_and_peft_loads_them(published, assets):
    repo = published.hub.repos["tester/adapter"]
    assert repo.private and len(repo.commits) == 1 and sorted(repo.files) == PUBLIC
    assert repo.files["README.md"] == (published.folder / "README.md").read_bytes()
    code = (
        "import memcontrol_hf, torch; from diffusers import UNet2DConditionModel as U; from peft import PeftModel;"
        f"m = PeftModel.from_pretrained(U.from_pretrained({str(assets / 'tiny-sd')!r}, subfolder='unet'), "
        "'tester/adapter'); print(sum(p.double().sum() for n, p in m.named_parameters() if 'memcontrol_' in n).item())"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **published.environment}, capture_output=True, text=True
    )
    saved = load_file(published.folder / "adapter_model.safetensors")
    total = sum(tensor.double().sum().item() for tensor in saved.values())
    assert total and float(loaded.stdout.split()[-1]) == pytest.approx(total), loaded.stderr[-2000:]


def test_the_pushed_card_agrees_with_the_pushed_report(published):
    files = published.hub.repos["tester/adapter"].files
    report = json.loads(files["memorization_report.json"])
    card = ModelCard(files["README.md"].decode())
    figures = report["figures"]["selected mask"]
    index = {(r.dataset_config, r.metric_type): r.metric_value for r in card.data.eval_results}
    for name in ("fid", "membership_auc", "amd", "noise_norm"):
        assert index["fine-tune", name] == figures[name]
    measured = {name: of["model"]["value"] for name, of in report["audit"]["measures"].items()}
    assert {name: value for (part, name), value in index.items() if part == "audit"} == {
        name: value for name, value in measured.items() if value is not None
    }
    assert "**Release gate: passed.**" in card.text and "at most 1 ✓" in card.text
    assert '(pipe.unet, "tester/adapter")' in card.text and card.data.datasets is None


def test_a_shared_mask_is_taken_by_its_repository(published, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    address = published.environment["HF_ENDPOINT"]
    files = address + "/{repo_id}/resolve/{revision}/{filename}"
    told = {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": files, "HF_HUB_OFFLINE": False}
    for name, value in told.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    push_mask(published.folder, "tester/mask")
    report = MemorizationReport.from_json(published.folder / "memorization_report.json")
    assert mask_from("tester/mask") == report.mask
    with pytest.raises(ValueError, match="--mask_from 'tester/unknown' cannot be read"):
        mask_from("tester/unknown")


def test_a_failed_gate_is_not_pushed(script, assets, finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serve() as (hub, address), pytest.raises(SystemExit) as stopped:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        script.main([*flags(assets, tmp_path / "out", mask_from=finished), "--push_to_hub"])
    assert stopped.value.code == 3 and hub.repos == {}
    assert "the release gate failed" in capsys.readouterr().err
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    text = ModelCard.load(tmp_path / "out" / "README.md").text
    assert text.index("**Release gate: FAILED.**") < text.index("## Use")


def test_a_refused_token_is_said_before_the_long_work(script, assets, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(MemControlTrainer, "train", lambda self, **kwargs: pytest.fail("training began"))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with serve() as (_, address), pytest.raises(SystemExit) as stopped:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        script.main([*flags(assets, tmp_path / "out"), "--push_to_hub"])
    assert stopped.value.code == 2
    assert "error: a push would fail: the Hub does not know your token" in capsys.readouterr().err


_GENERATE = """
import sys
import torch
import memcontrol_hf
from peft import PeftModel

def generate(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe("grinning face", num_inference_steps=4, generator=generator, output_type="pt").images

pipe = memcontrol_hf.demo_pipeline()
base = generate(pipe)
pipe.unet = PeftModel.from_pretrained(pipe.unet, sys.argv[1])
tuned = generate(pipe)
pipe.unet = pipe.unet.merge_and_unload()
torch.save({"base": base, "tuned": tuned, "merged": generate(pipe)}, sys.argv[2])
"""


def test_an_adapter_of_the_demo_generates_in_a_new_process_what_the_trainer_generates(script, tmp_path):
    (tmp_path / "mask.json").write_text(json.dumps({"mid_block.attentions.0": True, "up_blocks.3.attentions.2": True}))
    arguments = ["--mask_from", str(tmp_path / "mask.json"), "--max_train_steps", "3"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--learning_rate", "0.1"]
    args = FlagParser().script_arguments(arguments)
    trainer, *_ = make_trainer(args)
    trainer.train()
    trainer.save_model()
    with denoiser_in_place(trainer.pipeline, trainer.model):
        generator = torch.Generator().manual_seed(0)
        own = trainer.pipeline("grinning face", num_inference_steps=4, generator=generator, output_type="pt").images
    code = [sys.executable, "-c", _GENERATE, str(tmp_path / "out"), str(tmp_path / "images.pt")]
    subprocess.run(code, check=True, capture_output=True)
    images = torch.load(tmp_path / "images.pt")
    assert torch.equal(images["tuned"], own)
    assert (images["tuned"] - images["base"]).abs().max() > 0.01
    torch.testing.assert_close(images["merged"], images["tuned"], atol=1e-5, rtol=0)
