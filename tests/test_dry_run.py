"""What a search needs, and loading a pipeline in other ways than the plain one."""

import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from conftest import RESOLUTION, adapter_of, images_of, tiny_pipeline, tiny_trainer
from original_layout import save_original
from safetensors.torch import load_file
from tiny_families import PIPELINES, sd3
from transformers.trainer_optimizer import _BITSANDBYTES_OPTIMIZERS
from transformers.training_args import OptimizerNames

from memcontrol_hf import (
    MemControlConfig,
    MemControlTrainingArguments,
    SearchSpace,
    audit_memorization,
    demo_pipeline,
)
from memcontrol_hf.audit import AuditSettings
from memcontrol_hf.demo import DEMO_PIPELINE
from memcontrol_hf.dry_run import audit_stage, figures_stage, load_architecture, plan
from memcontrol_hf.evaluation import METRICS
from memcontrol_hf.families import family_of, load_pipeline
from memcontrol_hf.flags import ScriptArguments
from memcontrol_hf.public_facts import card_facts, model_name
from memcontrol_hf.report import MemorizationReport
from memcontrol_hf.report.loading_snippet import loading_snippet
from memcontrol_hf.sampling import denoiser_in_place, generate

ARCHITECTURES = Path(__file__).parent / "architectures"
LORA = peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
SVDIFF = MemControlConfig(method="svdiff")


def without_weights(pipeline, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return folder


@pytest.mark.parametrize(
    ("name", "resolution", "parameters", "blocks"),
    [
        ("stable-diffusion-v1-5", 512, 859_520_964, 16),
        ("stable-diffusion-xl-base-1.0", 1024, 2_567_463_684, 11),
        # the weights' file holds 2,084,951,104 values: the position embedding of 192² × 1536 is no parameter
        ("stable-diffusion-3-medium", 1024, 2_084_951_104 - 192**2 * 1536, 24),
        ("flux-1-dev", 1024, 11_901_408_320, 19 + 38),
    ],
)
def test_the_large_models_have_their_known_sizes(name, resolution, parameters, blocks):
    planned = plan(load_architecture(str(ARCHITECTURES / name)), LORA, resolution=resolution, batch_size=1)
    assert planned.denoiser_parameters == parameters
    assert len(planned.blocks) == blocks and all(planned.blocks.values())
    assert sum(planned.blocks.values()) == planned.trainable == planned.adapter_bytes // 4
    assert planned.memory["frozen denoiser"] == 4 * parameters
    assert f"{parameters:,} parameters, {blocks} blocks" in planned.text()


@pytest.mark.parametrize("name", PIPELINES)
def test_a_plan_is_what_the_training_has(tmp_path, name):
    """From a folder with configs alone, for each family."""
    config = peft.LoraConfig(r=2)
    planned = plan(load_architecture(str(without_weights(PIPELINES[name](), tmp_path))), config, resolution=RESOLUTION)
    family = family_of(PIPELINES[name]())
    assert planned.denoiser_parameters == sum(p.numel() for p in family.denoiser.parameters())
    condition = family.encode_prompts(["7"])
    example = family.meta_condition()
    assert {k: (t.shape, t.dtype) for k, t in example.items()} == {k: (t.shape, t.dtype) for k, t in condition.items()}
    space = SearchSpace.from_model(family.denoiser)
    block, count = list(planned.blocks.items())[-1]
    model = peft.get_peft_model(family.denoiser, space.apply(config, {block: True}))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_the_adapter_is_as_large_as_planned_and_single_blocks_add_up(tmp_path):
    trainer = tiny_trainer(tmp_path / "adapter")
    trainer.train()
    trainer.save_model()
    folder = without_weights(tiny_pipeline(), tmp_path / "model")
    planned = plan(load_architecture(str(folder)), MemControlConfig(), resolution=RESOLUTION)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert planned.adapter_bytes == sum(t.nbytes for t in tensors.values())
    assert planned.trainable == trainer.trainable_parameters
    block, count = list(planned.blocks.items())[1]
    trainer.set_mask({block: True})
    assert trainer.trainable_parameters == count
    assert sum(planned.blocks.values()) == planned.trainable


def test_activations_grow_with_the_batch_and_shrink_with_precision(tmp_path):
    folder = str(without_weights(tiny_pipeline(), tmp_path))
    sizes = [
        plan(load_architecture(folder), LORA, resolution=16, batch_size=size, low_precision=low).memory
        for size, low in ((1, False), (4, False), (4, True))
    ]
    one, four, half = (memory[f"activations of {n} images"] for memory, n in zip(sizes, (1, 4, 4)))
    assert one > 0 and four == 4 * one and half == four // 2


@pytest.fixture
def script():
    path = Path(__file__).parents[1] / "training_scripts" / "train_memcontrol.py"
    spec = importlib.util.spec_from_file_location("train_memcontrol_dry", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_plans_from_configs_alone(tmp_path, script, capsys):
    folder = without_weights(sd3(), tmp_path / "model")
    arguments = ["--pretrained_model_name_or_path", str(folder), "--resolution", "16", "--method", "lora"]
    arguments += ["--train_data_dir", str(tmp_path), "--encoder", "demo"]
    script.main([*arguments, "--dry_run", "--output_dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "SD3Transformer2DModel" in printed and "transformer_blocks.1" in printed
    assert "memory of a training step, about: " in printed
    assert re.search(r"^trials +8 +1,000 +0 +0 +training 5, validation 5$", printed, re.M)
    assert re.search(r"^audit +1 +0 +3,512 +", printed, re.M), "3 x 100 x 10 images of prompts, 2 x 256 of quality"
    assert "images: 16 x 16 pixels, the middle of what is not square; white under" in printed
    assert not (tmp_path / "out").exists(), "nothing is written"


def counted_passes(pipeline) -> list[int]:
    """The images in each forward pass of the denoiser from now on."""
    counts = []
    pipeline.unet.register_forward_hook(lambda module, given, output: counts.append(len(output[0])))
    return counts


def test_the_time_and_the_room_of_the_decompositions_are_said():
    pipeline = load_architecture("demo")
    text = plan(pipeline, SVDIFF).text()
    assert re.search(r"SV-DIFF decomposes 192 weights, once on a machine: about \d+ s here, and \d.* MB in /", text)
    assert "decomposes" not in plan(pipeline, LORA).text()


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_an_audit_has_the_passes_that_are_planned(guidance):
    pipeline = tiny_pipeline()
    settings = AuditSettings(
        resolution=RESOLUTION, num_prompts=4, images_per_prompt=3, num_quality_images=5, inference_steps=2,
        guidance_scale=guidance, num_timesteps=3, near_duplicates=0, batch_size=7,
    )  # fmt: skip
    counts = counted_passes(pipeline)
    audit_memorization(
        images_of(9, seed=1), images_of(12, seed=2), pipeline, base_pipeline=pipeline, settings=settings,
        encoder=torch.nn.Flatten(),
    )  # fmt: skip
    stage = audit_stage(family_of(pipeline), settings)
    assert stage.total(**{"training": 9, "held-out": 12}) == sum(counts)
    assert stage.generated == 3 * 4 * 3 + 2 * 5
    searched = audit_stage(family_of(pipeline), replace(settings, embedding_attack=2))
    assert searched.trained == 3 * 2 * 2 * 400 and searched.generated == stage.generated + 3 * 2 * 2 * 3


@pytest.mark.parametrize("metrics", [["fid", "membership_auc"], ["loss"], list(METRICS)])
def test_figures_have_the_passes_that_are_planned(tmp_path, metrics):
    trainer = tiny_trainer(tmp_path, mask={}, eval_num_timesteps=5)
    counts = counted_passes(trainer.pipeline)
    trainer.evaluate(metrics=metrics)
    stage = figures_stage(trainer.family, "base", metrics, ("training", "validation"), (6, 2, 2.0))
    assert stage.total(training=10, validation=8) == sum(counts)


def broken(folder: Path) -> str:
    without_weights(sd3(), folder)
    (folder / "transformer" / "config.json").unlink()
    return str(folder)


def index(content: object) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        folder.mkdir(exist_ok=True)
        (folder / "model_index.json").write_text(json.dumps(content))
        return str(folder)

    return make


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        (lambda path: str(path), "a dry run needs the model_index.json"),
        (broken, "cannot build the transformer"),
        (index({"_class_name": "NoPipeline"}), "is a NoPipeline, which diffusers lacks"),
        (index([]), "names no pipeline"),
        (index({}), "names no pipeline"),
        (index({"_class_name": "DDPMPipeline"}), "lacks components: .*'unet' and 'scheduler'"),
    ],
)
def test_configs_that_do_not_suffice_are_named(tmp_path, folder, message):
    with pytest.raises(ValueError, match=message):
        load_architecture(folder(tmp_path))


# --- loading


def test_a_base_in_half_precision_is_tuned_in_full(tmp_path):
    sd3().save_pretrained(tmp_path / "model", variant="bf16")
    pipeline = load_pipeline(str(tmp_path / "model"), variant="bf16", dtype="bfloat16")
    assert pipeline.transformer.dtype == pipeline.text_encoder_3.dtype == torch.bfloat16
    trainer = tiny_trainer(tmp_path, pipeline=pipeline, config=LORA, train=images_of(4), max_steps=1)
    before = adapter_of(trainer.model)
    trainer.train()
    after = adapter_of(trainer.model)
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in after)


def test_a_single_file_in_the_original_layout_trains_and_samples_as_the_folder(tmp_path):
    file = save_original(demo_pipeline(), tmp_path / "demo.safetensors")
    adapters, images = [], []
    for pipeline in (demo_pipeline(), load_pipeline(str(file), config=str(DEMO_PIPELINE))):
        assert not hasattr(pipeline.unet, "hf_device_map"), "the Trainer would not move it to the accelerator"
        folder, given = (
            tmp_path / str(len(images)),
            {"resolution": 64, "train": images_of(4), "max_steps": 2, "learning_rate": 1.0},
        )
        # Adam would blow up the last digits, in which the two differ as their weights lie elsewhere in memory.
        trainer = tiny_trainer(folder, pipeline, per_device_train_batch_size=2, optim="sgd", **given)
        before = adapter_of(trainer.model)
        trainer.train()
        assert any(not torch.allclose(before[k], t, atol=1e-4) for k, t in adapter_of(trainer.model).items())
        adapters.append(adapter_of(trainer.model))
        with denoiser_in_place(pipeline, trainer.model):
            images.append(generate(pipeline, ["grinning face"], [(0,)], 64, num_inference_steps=3))
    torch.testing.assert_close(*adapters, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*images, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float8"}, "unknown dtype 'float8': use float32, float16, bfloat16"),
        ({"quantization": "int3"}, "unknown quantization 'int3': use bnb_4bit, bnb_8bit, torchao_int8"),
        ({"name": "none.safetensors"}, "cannot load the pipeline 'none.safetensors': there is no such file"),
    ],
)
def test_wrong_ways_to_load_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_pipeline(**{"name": "demo", **arguments})


def test_the_cards_snippet_loads_a_single_file_as_it_was_trained_on(tmp_path, monkeypatch):
    file = save_original(demo_pipeline(), tmp_path / "demo.safetensors")
    args = ScriptArguments(pretrained_model_name_or_path=str(file), single_file_config=str(DEMO_PIPELINE))
    card = card_facts(args, tiny_trainer(tmp_path / "out", demo_pipeline()))
    report = MemorizationReport(base_model=model_name(args), method="lora", card=card)
    lines = loading_snippet(report, "adapter", "lora", ("",)).splitlines()
    assert 'StableDiffusionPipeline.from_single_file("demo.safetensors", config="YOUR_SINGLE_FILE_CONFIG")' in lines[2]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec("\n".join(lines[:3]).replace("YOUR_SINGLE_FILE_CONFIG", str(DEMO_PIPELINE)), names)
    assert torch.equal(names["pipe"].unet.conv_in.weight, demo_pipeline().unet.conv_in.weight)
    report.card["base_class"] = "os; evil()"
    assert "evil" not in loading_snippet(report, "adapter", "lora", ("",))


def test_a_single_file_whose_architecture_is_not_at_hand_names_the_flag(tmp_path):
    file = str(save_original(demo_pipeline(), tmp_path / "demo.safetensors"))
    with pytest.raises(ValueError, match=r"stable-diffusion-v1-5', which it is taken for: .*--single_file_config"):
        load_pipeline(file)
    with pytest.raises(ValueError, match=r"no model_index.json of '/none': name .* built alike with --single_file_c"):
        load_pipeline(file, config="/none")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_a_missing_bitsandbytes_is_said_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="quantization bnb_4bit needs bitsandbytes: pip install bitsandbytes"):
        load_pipeline("demo", quantization="bnb_4bit")
    refused = []
    for optim in OptimizerNames:
        try:
            MemControlTrainingArguments(output_dir=str(tmp_path), optim=optim)
        except ValueError as error:
            assert str(error) == f"the optimizer {optim.value} needs bitsandbytes: pip install bitsandbytes"
            refused.append(optim)
    assert sorted(refused) == sorted(_BITSANDBYTES_OPTIMIZERS) and len(refused) > 10


def test_a_quantized_base_takes_lora_alone(tmp_path):
    sd3().save_pretrained(tmp_path / "model")
    pipeline = load_pipeline(str(tmp_path / "model"), quantization="torchao_int8")
    with pytest.raises(ValueError, match="svdiff cannot be trained on a quantized base: use LoRA"):
        tiny_trainer(tmp_path, pipeline=pipeline)
    trainer = tiny_trainer(tmp_path, pipeline=pipeline, config=LORA, train=images_of(4), max_steps=1)
    before = adapter_of(trainer.model)
    trainer.train()
    assert any(not torch.equal(before[name], tensor) for name, tensor in adapter_of(trainer.model).items())
