"""Blocks of text encoders as a part of the search space."""

import peft
import pytest
import torch
from conftest import RESOLUTION, adapter_of, images_of, tiny_pipeline, tiny_trainer
from peft import PeftModel
from test_dry_run import ARCHITECTURES
from tiny_families import PIPELINES, dit

from memcontrol_hf import MemControlConfig, metrics
from memcontrol_hf.adapters import load_adapter, unload_adapter
from memcontrol_hf.dry_run import load_architecture, plan
from memcontrol_hf.families import family_of
from memcontrol_hf.sampling import denoiser_in_place, generate

WITH_TEXT = ("sd", "sdxl", "sd3", "flux", "pixart")


def text_trainer(folder, name="sd", mask=None, pipeline=None, granularity="block", **arguments):
    pipeline = pipeline or PIPELINES[name]()
    space = family_of(pipeline).search_space(granularity, text_encoder_blocks=True)
    given = {"max_steps": 1, "per_device_train_batch_size": 2, "eval_num_images": 2, "train": images_of(4, 1)}
    return tiny_trainer(folder, pipeline, mask=mask, space=space, **{**given, **arguments})


def text_blocks(trainer) -> list[str]:
    return [name for name in trainer.search_space.blocks if name.startswith("text_encoder")]


def weights_of(pipeline) -> dict[str, torch.Tensor]:
    encoders = family_of(pipeline).text_encoders.items()
    return {f"{name}.{key}": tensor.clone() for name, part in encoders for key, tensor in part.state_dict().items()}


def sampled(pipeline) -> torch.Tensor:
    return generate(pipeline, ["abc", "x"], [(0,), (1,)], RESOLUTION, num_inference_steps=2, guidance_scale=3.0)


@pytest.mark.parametrize("name", WITH_TEXT)
def test_every_layer_that_is_read_is_a_block_and_moves(tmp_path, name):
    """SDXL does not read the last layer of its first text encoder: a bit for it would mean nothing."""
    trainer = text_trainer(tmp_path, name, config=MemControlConfig(method="weights"))
    encoders = trainer.family.text_encoders.values()
    layers = sum(getattr(part.config, "num_hidden_layers", 0) for part in encoders)
    assert len(text_blocks(trainer)) == layers - (name == "sdxl")
    before = adapter_of(trainer.model)
    trainer.train()
    after = adapter_of(trainer.model)
    for block in text_blocks(trainer):
        part, _, layer = block.partition(".")
        inside = [key for key in after if f".{part}." in key and f".{layer}." in key]
        assert any(not torch.equal(before[key], after[key]) for key in inside), block


@pytest.mark.parametrize("tuner", ["svdiff", "difffit", "weights", "norm", "lora"])
@pytest.mark.parametrize("name", WITH_TEXT)
def test_one_text_block_is_trained_saved_loaded_and_attacked(tmp_path, name, tuner):
    config = peft.LoraConfig(r=2) if tuner == "lora" else MemControlConfig(method=tuner)
    trainer = text_trainer(tmp_path, name, mask={}, config=config, caption_dropout=0.5)
    base = weights_of(trainer.pipeline)
    block = text_blocks(trainer)[-1]
    part, _, layer = block.partition(".")
    trainer.set_mask({block: True})
    before = adapter_of(trainer.model)
    assert before and all(f"{part}." in key and f".{layer}." in key for key in before), "nothing else can move"
    trainer.train()
    assert any(not torch.equal(before[key], tensor) for key, tensor in adapter_of(trainer.model).items())
    after = weights_of(trainer.pipeline)
    assert all(torch.equal(tensor, after[key]) for key, tensor in base.items() if key in after), "the base is frozen"

    trainer.save_model()
    files = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file())
    assert files == [f"{part}/adapter_config.json", f"{part}/adapter_model.safetensors"]
    pipeline = PIPELINES[name]()
    plain = sampled(pipeline)
    setattr(pipeline, part, PeftModel.from_pretrained(getattr(pipeline, part), str(tmp_path), subfolder=part).eval())
    with denoiser_in_place(trainer.pipeline, trainer.model):
        expected = sampled(trainer.pipeline)
    torch.testing.assert_close(sampled(pipeline), expected, atol=1e-6, rtol=1e-5)

    family, rows = family_of(pipeline), [0, 1]
    with torch.no_grad():  # another kernel computes attention when there is a graph
        condition = family.encode_prompts(trainer.train_dataset.images["text"][rows])
        ours = trainer.evaluator().condition_of(trainer.train_dataset, rows)
    torch.testing.assert_close(condition, ours, atol=1e-6, rtol=1e-5)
    cached = trainer.train_dataset.encoded[rows]
    torch.testing.assert_close(condition, ours, atol=1e-5, rtol=1e-5)
    assert any(not torch.equal(cached[key], ours[key]) for key in ours), "the cache is that of the base"
    assert torch.isfinite(metrics.pia(family, family.denoiser, cached["latents"], condition)).all()
    assert not torch.allclose(plain, expected, atol=1e-6)


@pytest.mark.parametrize("name", WITH_TEXT)
def test_the_all_off_mask_is_the_base_exactly(tmp_path, name):
    trainer = text_trainer(tmp_path, name, mask={})
    base, images = weights_of(trainer.pipeline), sampled(trainer.pipeline)
    losses = trainer.evaluate(metrics=["loss"])
    trainer.set_mask(trainer.search_space.mask(True))
    trainer.train()
    assert trainer.evaluate(metrics=["loss"]) != losses
    trainer.set_mask({})
    after = weights_of(trainer.pipeline)
    assert base.keys() == after.keys() and all(torch.equal(tensor, after[key]) for key, tensor in base.items())
    assert torch.equal(sampled(trainer.pipeline), images)
    assert trainer.evaluate(metrics=["loss"]) == losses, "what is cached was encoded by the base"


def test_both_parts_are_resumed_and_attacked_as_they_were_saved(tmp_path):
    given = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "caption_dropout": 0.3}
    trainer = text_trainer(tmp_path / "whole", **given)
    trainer.train()
    resumed = text_trainer(tmp_path / "resumed", **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = adapter_of(trainer.model)
    assert any("text_encoders.text_encoder" in key for key in expected) and any("denoiser" in key for key in expected)
    for key, tensor in adapter_of(resumed.model).items():
        torch.testing.assert_close(tensor, expected[key], atol=0, rtol=0)

    trainer.save_model()
    assert str(tmp_path) not in (tmp_path / "whole" / "text_encoder" / "adapter_config.json").read_text()
    pipeline = tiny_pipeline()
    plain = sampled(pipeline)
    load_adapter(pipeline, tmp_path / "whole")
    with denoiser_in_place(trainer.pipeline, trainer.model):
        torch.testing.assert_close(sampled(pipeline), sampled(trainer.pipeline), atol=1e-6, rtol=1e-5)
    unload_adapter(pipeline)
    assert torch.equal(sampled(pipeline), plain)


def test_the_cache_is_used_while_no_text_block_is_on(tmp_path):
    trainer, encoded = text_trainer(tmp_path, mask={}), []
    encode = trainer.family.encode
    trainer.family.encode = lambda prompts: encoded.append(prompts) or encode(prompts)
    trainer.set_mask({next(iter(trainer.search_space.blocks)): True})
    trainer.train()
    assert not encoded
    trainer.set_mask({text_blocks(trainer)[0]: True})
    trainer.train()
    assert [len(prompts) for prompts in encoded] == [2]


@pytest.mark.parametrize(("name", "moves"), [("sd", True), ("sdxl", False)])
def test_a_dropped_caption_is_the_null_condition_by_the_tuned_encoder(tmp_path, name, moves):
    """The empty caption is learnt, too; SDXL's null condition is zeros, from which nothing can be learnt."""
    trainer = text_trainer(tmp_path, name, mask={}, caption_dropout=1.0, config=MemControlConfig(method="weights"))
    trainer.set_mask({text_blocks(trainer)[0]: True})
    before = adapter_of(trainer.model)
    trainer.train()
    assert any(not torch.equal(before[key], tensor) for key, tensor in adapter_of(trainer.model).items()) == moves


def test_a_dry_run_plans_them(tmp_path):
    clip = plan(load_architecture(str(ARCHITECTURES / "stable-diffusion-v1-5")), peft.LoraConfig(r=4), "block", True)
    assert len(clip.blocks) == 16 + 12 and clip.text_encoder_parameters == 123_060_480
    assert "28 blocks with the text encoders' (123,060,480)" in clip.text()
    trainer = text_trainer(tmp_path, "sdxl")
    planned = plan(PIPELINES["sdxl"]().to("meta"), MemControlConfig(), "block", True, resolution=RESOLUTION)
    assert list(planned.blocks) == list(trainer.search_space.blocks)
    assert planned.trainable == sum(planned.blocks.values()) == trainer.trainable_parameters
    without = plan(PIPELINES["sdxl"]().to("meta"), MemControlConfig(), resolution=RESOLUTION)
    images = "activations of 4 images"
    assert planned.memory[images] > without.memory[images], "the backward pass goes on to the text encoders"


def test_sites_and_expressions_reach_into_text_encoders():
    family = family_of(PIPELINES["sd3"]())
    sites = family.search_space("site", text_encoder_blocks=True).blocks
    assert [name for name in sites if name.startswith("text_encoder.")] == [
        f"text_encoder.text_model.encoder.layers.{i}.{site}" for i in (0, 1) for site in ("self_attn", "mlp")
    ]
    assert "text_encoder_3.encoder.block.0.layer.0" in sites
    both = family.search_space([r"to_q$|q_proj$"], text_encoder_blocks=True)
    config = peft.LoraConfig(r=2)
    found = {part: both.apply(config, both.mask(True), part).target_modules for part in ("", *both.text_encoders)}
    assert found[""] and found["text_encoder"] and not found["text_encoder_3"]
    assert not any(name.startswith("text_encoder") for names in found.values() for name in names)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: tiny_trainer(path, mask={"text_encoder.encoder.layers.0": True}),
            r"lacks: text_encoder.encoder.layers.0; it has: .*those of text encoders are there with --text_encoder_bl",
        ),
        (
            lambda path: family_of(dit()).search_space(text_encoder_blocks=True),
            "--text_encoder_blocks: the DiTPipeline has no text encoder",
        ),
        (
            lambda path: text_trainer(path, mitigations=["dp_sgd"]),
            "text encoder blocks cannot be trained with dp_sgd: leave them out",
        ),
        (
            lambda path: text_trainer(path, config=peft.LoraConfig(target_modules=["to_q"])),
            r"LoraConfig \(linear\) finds no module to tune in the blocks text_encoder.encoder.layers.0",
        ),
    ],
)
def test_what_cannot_be_is_said_at_once(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path)
