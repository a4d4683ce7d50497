import math
import subprocess
import sys
from unittest.mock import patch

import peft
import pytest
import torch
from accelerate import PartialState
from conftest import RESOLUTION, adapter_of, images_of, tiny_pipeline, tiny_trainer, tiny_unet
from diffusers import DDPMScheduler
from peft import PeftModel
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from memcontrol_hf import MemControlConfig
from memcontrol_hf.adapters import _count
from memcontrol_hf.encoders import load_encoder
from memcontrol_hf.evaluation import METRICS
from memcontrol_hf.families import family_of
from memcontrol_hf.mitigations import skip_low_loss
from memcontrol_hf.randomness import Purpose, seeded_generator
from memcontrol_hf.trainer import MemControlTrainer

SITE = "mid_block.attentions.0"


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], **tolerance) -> None:
    assert a.keys() == b.keys() and a
    for name in a:
        if tolerance:
            torch.testing.assert_close(a[name], b[name], **tolerance)
        else:
            assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(
    "config", [MemControlConfig(method="svdiff"), MemControlConfig(method="weights"), peft.LoraConfig()]
)
def test_training_moves_the_selected_blocks_and_nothing_else(tmp_path, config):
    trainer = tiny_trainer(tmp_path, config=config, mask={SITE: True})
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    base = tiny_unet().state_dict()
    moved = set()
    for name, p in trainer.model.named_parameters():
        if p.requires_grad:
            moved.add(name)
            assert SITE in name
        else:
            original = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(p, base[original]), name
    assert moved and any(not torch.equal(trainer.model.get_parameter(n), before[n]) for n in moved)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_comes_before_the_first_selected_block_gets_no_backward_pass(tmp_path, checkpointing):
    trainer = tiny_trainer(tmp_path, mask={SITE: True}, max_steps=1, activation_checkpointing=checkpointing)
    before, after = ("conv_in", "down_blocks.0.resnets.0", "mid_block.resnets.0"), ("mid_block.resnets.1", "conv_out")
    tracked = {}
    for name in (*before, *after):
        trainer.denoiser.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: tracked.update({name: output.requires_grad})
        )
    trainer.train()
    assert tracked == {name: name in after for name in (*before, *after)}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_the_loss_follows_its_formula(prediction_type, snr_gamma):
    family = family_of(tiny_pipeline(prediction_type))
    unet, generator = family.pipeline.unet, torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    c, t = torch.randn(3, 8, 8, generator=generator), torch.tensor([10, 400, 900])
    alpha = DDPMScheduler.from_config(family.pipeline.scheduler.config).alphas_cumprod[t].view(-1, 1, 1, 1)
    target = {"epsilon": noise, "sample": x, "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * x}
    with torch.no_grad():
        prediction = unet(alpha.sqrt() * x + (1 - alpha).sqrt() * noise, t, c).sample
        losses = family.losses(unet, x, c, t, noise, family.noise.loss_weights(t, snr_gamma))
    expected = (prediction - target[prediction_type]).square().mean((1, 2, 3))
    snr = (alpha / (1 - alpha)).flatten()
    weight = {"epsilon": 1 / snr, "sample": torch.ones(3), "v_prediction": 1 / (snr + 1)}[prediction_type]
    if snr_gamma:
        expected = expected * snr.clamp(max=snr_gamma) * weight
    torch.testing.assert_close(losses, expected, atol=1e-6, rtol=1e-5)


def test_an_interrupted_and_resumed_run_ends_with_the_same_weights(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 7, "caption_dropout": 0.5}
    whole = tiny_trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = tiny_trainer(tmp_path / "resumed", **settings)
    torch.manual_seed(123)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed.state.global_step == 7
    equal(adapter_of(whole.model), adapter_of(resumed.model))


@pytest.mark.parametrize("config", [MemControlConfig(method="svdiff"), peft.LoraConfig(r=2)])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, config):
    settings = {"config": config, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    tiny_trainer(tmp_path, mask={SITE: True}, **settings).train()
    again = tiny_trainer(tmp_path, mask={SITE: True}, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
    trainer = tiny_trainer(tmp_path, **settings)
    other = r"checkpoint-2 is of another run: .*target_modules was .* and is .*Use the same settings .*or give another"
    with pytest.raises(ValueError, match=other):
        trainer.train(resume_from_checkpoint=True)
    trainer.apply_hyperparameters({"mask": {SITE: True}, "learning_rate": 0.5})
    with pytest.raises(ValueError, match=r"another run: the learning rate was 0\.01 and is 0\.5\. Use"):
        trainer.train(resume_from_checkpoint=True)
    other = peft.LoraConfig(r=4) if isinstance(config, peft.LoraConfig) else MemControlConfig(method="weights")
    with pytest.raises(ValueError, match=r"r was 2 and is 4|method was svdiff and is weights"):
        tiny_trainer(tmp_path, mask={SITE: True}, **{**settings, "config": other}).train(resume_from_checkpoint=True)


DIVIDED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, "another run: seed was 42 and is 7. Use"),
        ({"mitigations": ["rwa:1"]}, r"another run: mitigations was \[\] and is \['rwa:1'\]. Use"),
        ({"snr_gamma": 5.0}, "snr_gamma was None and is 5.0"),
        ({"per_device_train_batch_size": 8}, "rows of a step was 4 and is 8"),
        ({"train": images_of(10, seed=9)}, "training images was v.* and is v"),
        ({"max_steps": 1}, "it has made 2 steps, and 1 are asked for"),
        (
            {
                **{"adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-3, "bf16": True, "use_cpu": True},
                "optimizer_cls_and_kwargs": (torch.optim.SGD, {"momentum": 0.9}),
            },
            r"adam_beta1 was 0.9 and is 0.5; adam_beta2 was 0.999 and is 0.9; adam_epsilon was 1e-08 and is 0.001; "
            r"mixed_precision was no and is bf16; optimizer was None and is \['SGD', {'momentum': 0.9}\]",
        ),
        ({"max_steps": 3, "warmup_steps": 0.5}, "end of the schedule was 2 and is 3"),
        (
            {"max_steps": 3, "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2}},
            "end of the schedule was 2 and is 3; lr_scheduler_kwargs was .* and is {'num_cycles': 2}",
        ),
        ({"optim_args": "eps=1e-3"}, "optim_args was None and is eps=1e-3"),
        (DIVIDED, r"division of a step was 1 process\(es\) x 1 batch\(es\) x 4 row\(s\) and is 1 .* x 2 b.* x 2 row"),
    ],
)
def test_a_checkpoint_of_a_training_that_was_told_something_else_is_refused(tmp_path, change, message):
    told = {name: change[name] for name in ("lr_scheduler_type", "warmup_steps") if name in change}
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "lr_scheduler_type": "constant", **told}
    tiny_trainer(tmp_path, **settings).train()
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, **{**settings, **change}).train(resume_from_checkpoint=True)


def test_a_checkpoint_on_another_base_is_refused(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    tiny_trainer(tmp_path, max_steps=2, **settings).train()
    base = tiny_pipeline()
    next(base.unet.parameters()).data += 1e-3
    base.scheduler.register_to_config(prediction_type="v_prediction")
    message = r"base weights was float32:\w+ and is float32:\w+; scheduler's prediction_type was epsilon and is v_pred"
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, base, max_steps=4, **settings).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_other_further_captions_is_refused(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    images = images_of(8)
    for text in "ab":
        train = images.add_column("captions", [[text]] * 8)
        trainer = tiny_trainer(tmp_path, train=train, max_steps=2, mitigations=["multiple_captions"], **settings)
        if text == "a":
            trainer.train()
    with pytest.raises(ValueError, match="another run: further captions was"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("earlier", [False, True])
def test_batches_of_another_size_and_more_steps_are_no_other_run(tmp_path, earlier):
    """Where the rows of a step divide the epoch, and the rate does not depend on the number of steps."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "lr_scheduler_type": "constant"}
    tiny_trainer(tmp_path, train=images_of(8), **settings).train()
    if earlier:  # a version that wrote down less
        (tmp_path / "checkpoint-2" / "run.json").write_text('{"seed": 42}')
    trainer = tiny_trainer(tmp_path, train=images_of(8), **{**settings, **DIVIDED, "max_steps": 3})
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3


def test_one_batch_and_its_parts_train_the_same(tmp_path):
    runs = []
    for size, accumulation in ((4, 1), (1, 4)):
        trainer = tiny_trainer(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            train=images_of(8), max_steps=4, caption_dropout=0.3,
        )  # fmt: skip
        trainer.train()
        runs.append(adapter_of(trainer.model))
    equal(*runs, atol=2e-4, rtol=1e-3)


def test_gradient_checkpointing_trains_the_same(tmp_path):
    runs = []
    for checkpointing in (False, True):
        trainer = tiny_trainer(tmp_path, gradient_checkpointing=checkpointing)
        trainer.train()
        runs.append(adapter_of(trainer.model))
    equal(*runs, atol=1e-6, rtol=1e-4)


def test_dropped_captions_are_the_empty_one(tmp_path):
    """With every caption dropped, captions play no part in the training."""
    runs = []
    for letter in "xy":
        train = images_of(10, seed=1).map(lambda row, letter=letter: {"text": letter})
        trainer = tiny_trainer(tmp_path, train=train, caption_dropout=1.0)
        trainer.train()
        runs.append(adapter_of(trainer.model))
    equal(*runs)


def test_figures_do_not_depend_on_the_batch_size(tmp_path):
    figures = [
        tiny_trainer(tmp_path, per_device_eval_batch_size=size).evaluate(metrics=list(METRICS)) for size in (1, 5)
    ]
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)
    by_timestep = [
        value for name, value in figures[0].items() if name.startswith("eval_loss_t") and name[11:].isdigit()
    ]
    assert len(by_timestep) == 2 and sum(by_timestep) / 2 == pytest.approx(figures[0]["eval_loss"])
    assert len(figures[0]) == 10 + 2 and all(math.isfinite(value) for value in figures[0].values())


def test_figures_compare_with_the_images_that_are_given(tmp_path):
    trainer = tiny_trainer(tmp_path)
    members = trainer.evaluate(images_of(10, seed=1), metrics=["membership_auc", "amd"])
    others = trainer.evaluate(metrics=["membership_auc", "amd"])
    assert members["eval_amd"] == pytest.approx(members["eval_amd_held_out"])
    assert others["eval_amd"] != pytest.approx(others["eval_amd_held_out"])


def test_copies_of_the_prompts_own_images_are_seen_in_a_larger_training_set(tmp_path):
    trainer = tiny_trainer(tmp_path, train=images_of(60, seed=1), eval_num_images=20)
    train, validation = trainer.train_dataset, trainer.encode(trainer.eval_dataset)
    evaluator, features = trainer.evaluator(), train.features(trainer.encoder)
    own = evaluator.sampled(train, Purpose.TRAINING_CAPTIONS, 20)
    figures = evaluator.amd(features[own], own, features, validation.features(trainer.encoder))
    assert figures["amd"] == pytest.approx(0, abs=1e-6) and figures["amd_held_out"] > 0.001


def test_repeats_of_an_image_are_one_member(tmp_path):
    once = images_of(10, seed=1)
    repeated = once.select([*range(10), 0, 0, 0])
    counts = [len(tiny_trainer(tmp_path, train=data).train_dataset.distinct) for data in (once, repeated)]
    assert counts == [10, 10]


def test_the_all_off_mask_is_the_frozen_base(tmp_path):
    trainer = tiny_trainer(tmp_path)
    base = tiny_unet().eval()
    trainer.set_mask({})
    assert trainer.trainable_parameters == 0
    x, c = torch.randn(1, 4, 8, 8), torch.randn(1, 8, 8)
    with torch.no_grad():
        assert torch.equal(trainer.model(x, 5, c).sample, base(x, 5, c).sample)
    assert "eval_loss" in trainer.evaluate()
    with pytest.raises(ValueError, match="selects no block"):
        trainer.train()


def test_changing_the_mask_starts_from_the_base_again(tmp_path):
    trainer = tiny_trainer(tmp_path)
    fresh = trainer.evaluate()
    trainer.train()
    assert trainer.evaluate() != fresh
    trainer.set_mask(trainer.mask)
    assert trainer.evaluate() == fresh


def test_the_saved_adapter_is_the_selection_and_loads_with_peft(tmp_path):
    trainer = tiny_trainer(tmp_path, mask={SITE: True})
    trainer.train()
    trainer.save_model()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == trainer.trainable_parameters
    assert all(SITE in name for name in tensors)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = PeftModel.from_pretrained(tiny_unet(), tmp_path).eval()
    x, c = torch.randn(1, 4, 8, 8), torch.randn(1, 8, 8)
    with torch.no_grad():
        assert torch.equal(trainer.model.eval()(x, 5, c).sample, loaded(x, 5, c).sample)


def runs(folder: str, **arguments) -> dict:
    """Adapter and figures of short runs: plain, with blocks of the text encoder, and with rows left out by a mean."""
    results = {}
    for name in ("plain", "text encoder", "skip_low_loss"):
        pipeline = tiny_pipeline()
        space = family_of(pipeline).search_space(text_encoder_blocks=name == "text encoder")
        arguments["mitigations"] = ["skip_low_loss:0.99", "timestep_range:high=0.5"] if name == "skip_low_loss" else []
        trainer = tiny_trainer(folder, pipeline, space=space, train=images_of(8), max_steps=3, **arguments)
        with patch.multiple(skip_low_loss, BINS=1, DECAY=0.0):  # the mean of the step before, of all timesteps
            trainer.train()
        figures = trainer.evaluate(metrics=list(METRICS))
        results[name] = {"adapter": adapter_of(trainer.accelerator.unwrap_model(trainer.model)), **figures}
        results[name]["left out"] = sum(log.get("low_loss_samples", 0) for log in trainer.state.log_history)
    return results


def one_of_two(folder: str) -> None:
    """What each of the two processes runs."""
    results = runs(folder, per_device_train_batch_size=2, use_cpu=True)
    assert PartialState().num_processes == 2
    if PartialState().is_main_process:
        torch.save(results, folder + "/2")


def test_two_processes_train_and_measure_as_one(tmp_path):
    one = runs(tmp_path)
    # New processes, not forks: a fork waits for ever for the OpenMP threads of the tests before it.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launch, __file__, str(tmp_path)], check=True, timeout=300)
    two = torch.load(tmp_path / "2")
    for name, figures in one.items():
        equal(figures.pop("adapter"), two[name].pop("adapter"), atol=2e-4, rtol=1e-3)
        assert two[name] == pytest.approx(figures, rel=1e-3)
    assert one["skip_low_loss"]["left out"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objectives": ["fid", "psnr"]}, "unknown objective.*psnr: use some of fid"),
        ({"objectives": ["fid", "fid"]}, "named twice"),
        ({"objectives": []}, "unknown objective"),
        ({"caption_dropout": 1.5}, "caption_dropout must be a share between 0 and 1, but got 1.5"),
        ({"search_fraction": 0}, "search_fraction must be a share"),
        ({"resolution": RESOLUTION + 1}, "resolution 17 is not a positive multiple of 2"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, **arguments)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.LoraConfig(bias="all"), "bias='all' trains the base's own biases: use bias='none'"),
        (peft.LoraConfig(init_lora_weights="pissa_niter_4"), "'pissa_niter_4' changes the base's weights: use True"),
        (peft.LoraConfig(init_lora_weights="olora"), "'olora' changes the base's weights"),
        (MemControlConfig(modules_to_save=["conv_out"]), r"modules_to_save=\['conv_out'\] trains modules outside the"),
    ],
)
def test_a_config_that_changes_the_base_is_refused(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, config=config)


@pytest.mark.parametrize("init", [False, "gaussian", "eva", "orthogonal", "mica"])
def test_other_initialisations_leave_the_base_as_it_is(tmp_path, init):
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=init)
    trainer = tiny_trainer(tmp_path, config=config, max_steps=1)
    trainer.train()
    trainer.set_mask({})
    equal(trainer.denoiser.state_dict(), tiny_unet().state_dict())


def test_parameters_of_4_bits_are_counted_one_by_one():
    class Params4bit(torch.nn.Parameter):
        """As bitsandbytes names its own."""

    for dtype in (torch.uint8, torch.bfloat16):
        packed = torch.zeros(48, dtype=torch.uint8).view(dtype)
        assert _count(Params4bit(packed, requires_grad=False)) == 96
    assert _count(torch.nn.Parameter(torch.zeros(6, 8))) == 48


def test_an_unknown_hyperparameter_is_named(tmp_path):
    with pytest.raises(ValueError, match="unknown hyperparameter 'lr'"):
        tiny_trainer(tmp_path).apply_hyperparameters({"lr": 1.0})


def test_what_one_run_sets_is_undone_for_the_next(tmp_path):
    trainer = tiny_trainer(tmp_path)
    before = trainer.args.snr_gamma, trainer.args.learning_rate
    trainer.apply_hyperparameters({"snr_gamma": 5.0, "learning_rate": 0.5})
    assert (trainer.args.snr_gamma, trainer.args.learning_rate) == (5.0, 0.5)
    trainer.apply_hyperparameters({"learning_rate": 0.25})
    assert (trainer.args.snr_gamma, trainer.args.learning_rate) == (before[0], 0.25)
    trainer.apply_hyperparameters({})
    assert (trainer.args.snr_gamma, trainer.args.learning_rate) == before


def test_a_process_without_a_launcher_uses_one_gpu_and_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # nn.DataParallel fails where there are none
    trainer = tiny_trainer(tmp_path, max_steps=1)
    assert trainer.args.n_gpu == 1 and trainer.args.train_batch_size == 4
    assert "accelerate launch --num_processes 2" in caplog.text and "CUDA_VISIBLE_DEVICES" in caplog.text
    trainer.train()


def test_a_sharded_denoiser_is_refused(tmp_path, monkeypatch):
    make = MemControlTrainer.create_accelerator_and_postprocess

    def with_fsdp(self):  # as accelerate's settings for several processes bring it
        make(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(MemControlTrainer, "create_accelerator_and_postprocess", with_fsdp)
    with pytest.raises(ValueError, match="FSDP and DeepSpeed shard the denoiser"):
        tiny_trainer(tmp_path)


def test_an_encoder_that_reads_text_too_is_refused(tmp_path):
    text = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    vision = {**text, "image_size": 8, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no vision model"):
        load_encoder(str(tmp_path))


def test_an_unknown_pipeline_is_named():
    with pytest.raises(ValueError, match="UNet2DConditionModel is no pipeline that can be tuned here"):
        family_of(tiny_unet())


def test_a_key_has_one_stream_of_noise():
    draws = [torch.rand(2, generator=seeded_generator(*key)) for key in ((1, 2), (1, 2), (2, 1), (1, 2, 0))]
    assert torch.equal(draws[0], draws[1])
    assert not any(torch.equal(draws[0], other) for other in draws[2:])


if __name__ == "__main__":
    one_of_two(sys.argv[1])
