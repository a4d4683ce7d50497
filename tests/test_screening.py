"""Screening: one training with every block on says what each block learns and memorizes."""

import itertools
import json
import math
import random
import subprocess
import sys
import weakref
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from accelerate import PartialState
from conftest import adapter_of, images_of, tiny_pipeline, tiny_trainer
from test_dry_run import LORA
from test_families import family_trainer
from test_import import HEAVY, loaded_by
from tiny_families import PIPELINES, sd3
from transformers import TrainerCallback

import memcontrol_hf.screening.run
from memcontrol_hf import MemControlConfig, MemControlTrainer, Screening, SearchSpace
from memcontrol_hf.families import family_of
from memcontrol_hf.families.loading import load_pipeline
from memcontrol_hf.randomness import Purpose
from memcontrol_hf.report.plots import plot_screening
from memcontrol_hf.screening.estimates import standard_error
from memcontrol_hf.screening.probes import BlockProbes, ProbeImages, parameters_by_block
from memcontrol_hf.screening.settings import ScreeningSettings

SGD = {"optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
PEFT_CONFIGS = {
    "lora": peft.LoraConfig(r=2, target_modules=["to_q", "to_v"]),
    "loha": peft.LoHaConfig(r=2, target_modules=["to_q", "to_v"]),
    "ia3": peft.IA3Config(target_modules=["to_k", "ff.net.2"], feedforward_modules=["ff.net.2"]),
    "ln_tuning": peft.LNTuningConfig(target_modules=["norm1", "norm2", "norm3"]),
    "oft": peft.OFTConfig(target_modules=["to_q"], oft_block_size=4),
    **{name: MemControlConfig(method=name) for name in ("svdiff", "difffit", "weights", "norm", "bias")},
}

QUERIES = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
SINGLE = MemControlConfig(singular_values={QUERIES: [0, 2], QUERIES.replace("attn1", "attn2"): [1]})


def made_up(count: int, seed: int, **settings) -> Screening:
    """A screening with random figures, some of them negative, zero or equal."""
    draw = random.Random(seed)
    names = [f"down_blocks.{i}.attentions.0" for i in range(count)]
    figures = [{name: draw.choice([-1, 0, 0.005, 1, 2, 3, draw.random()]) for name in names} for _ in range(4)]
    figures[2:] = [{name: abs(value) for name, value in errors.items()} for errors in figures[2:]]
    settings = {"steps": 8, "learning_rate": 1e-3, **settings}
    return Screening(*figures, parameters=dict.fromkeys(names, 3), settings=settings)


def figures_of(screening: Screening) -> list[float]:
    return [*screening.learns.values(), *screening.memorizes.values()]


@pytest.fixture(autouse=True)
def all_images_are_probed(monkeypatch):
    monkeypatch.setattr("memcontrol_hf.screening.run.PROBE_SHARE", 16)


# ---- the figures of a run ----


def fixed_probes(monkeypatch) -> None:
    """Every probe draws as in the first step, so that all of them measure one and the same loss."""
    rows, losses = ProbeImages.rows, ProbeImages.losses
    monkeypatch.setattr(ProbeImages, "rows", lambda self, step: rows(self, 0))
    monkeypatch.setattr(ProbeImages, "losses", lambda self, model, which, step: losses(self, model, which, 0))


def probe_losses(trainer) -> dict[str, float]:
    """The losses of the first step's probes, of the trainer's model as it is."""
    sets = {
        "train": (trainer.train_dataset, Purpose.SCREENING_TRAIN),
        "validation": (trainer.encode(trainer.eval_dataset), Purpose.SCREENING_VALIDATION),
    }
    means = {}
    trainer.model.eval()
    for name, (data, purpose) in sets.items():
        images = ProbeImages(data, purpose, trainer.family, trainer.args.seed, trainer.args.device, False, count=64)
        with torch.no_grad():
            means[name] = images.losses(trainer.model, images.rows(0), 0).double().mean().item()
    return means


def test_the_blocks_owe_the_whole_fall_of_both_losses(tmp_path, monkeypatch):
    fixed_probes(monkeypatch)
    trainer = tiny_trainer(tmp_path, config=MemControlConfig(method="weights"), max_steps=8, **SGD)
    before = probe_losses(trainer)
    screening = trainer.screen(every=1)
    trainer.train()  # the same training, without probes
    fall = {name: loss - probe_losses(trainer)[name] for name, loss in before.items()}
    assert fall["validation"] > 0.01
    learned = sum(screening.learns.values())
    assert learned == pytest.approx(fall["validation"], rel=0.01)
    assert learned + sum(screening.memorizes.values()) == pytest.approx(fall["train"], rel=0.01)


@pytest.mark.parametrize("method", ["weights", "svdiff", "ia3"])
def test_a_block_owes_what_its_own_update_changes(tmp_path, method):
    """By hand, in one step: the loss with the block before and after its update, all others in the middle."""
    trainer = tiny_trainer(tmp_path, config=PEFT_CONFIGS[method], max_steps=1, **SGD)
    screening = trainer.screen(every=1)
    start = adapter_of(trainer.model)
    trainer.train()
    end, parameters = adapter_of(trainer.model), dict(trainer.model.named_parameters())

    def losses(block: str, share: float) -> dict[str, float]:
        with torch.no_grad():
            for name in start:
                parameters[name].copy_(torch.lerp(start[name], end[name], share if block in name else 0.5))
        return probe_losses(trainer)

    for block in screening.learns:
        first, last = losses(block, 0.0), losses(block, 1.0)
        fall = {name: first[name] - last[name] for name in first}
        assert screening.learns[block] == pytest.approx(fall["validation"], rel=0.05, abs=2e-7)
        memorized = fall["train"] - fall["validation"]
        assert screening.memorizes[block] == pytest.approx(memorized, rel=0.05, abs=4e-7)


def test_a_singular_value_owes_what_its_own_shift_changes(tmp_path):
    """By hand, as above; and the figures of the blocks are as in a screening that does not tell single ones."""
    trainer = tiny_trainer(tmp_path, max_steps=1, **SGD)
    plain, screening = trainer.screen(every=1), trainer.screen(every=1, singular_values=True)
    assert figures_of(screening) == pytest.approx(figures_of(plain), rel=1e-4, abs=1e-9)
    assert plain.singular_values is None and screening.parameters == plain.parameters
    assert_sums_of_single_values(screening, trainer.search_space)
    start = adapter_of(trainer.model)
    trainer.train()
    end, parameters = adapter_of(trainer.model), dict(trainer.model.named_parameters())

    def loss(module: str, number: int, share: float) -> float:
        with torch.no_grad():
            for name in start:
                middle = torch.lerp(start[name], end[name], 0.5)
                if f".{module}." in name:
                    middle[number] = torch.lerp(start[name][number], end[name][number], share)
                parameters[name].copy_(middle)
        return probe_losses(trainer)["validation"]

    module, figures = max(screening.singular_values.items(), key=lambda of: max(of[1]["learns"]))
    number = figures["learns"].index(max(figures["learns"]))
    fall = loss(module, number, 0.0) - loss(module, number, 1.0)
    assert figures["learns"][number] == pytest.approx(fall, rel=0.05, abs=2e-7)


def test_the_gradients_of_one_backward_pass_of_a_probe_are_gone_before_the_next(tmp_path, monkeypatch):
    earlier, alive, gradients_of = [], [], BlockProbes._gradients

    def gradients(self, loss):
        alive.append(sum(gradient() is not None for gradient in earlier))
        found = gradients_of(self, loss)
        earlier[:] = [weakref.ref(gradient) for gradient in found]
        return found

    monkeypatch.setattr(BlockProbes, "_gradients", gradients)
    trainer = tiny_trainer(tmp_path, config=LORA, train=images_of(4), per_device_train_batch_size=1, max_steps=2)
    trainer.screen(every=2)
    assert len(alive) > 2 and not any(alive)


def test_probes_do_not_depend_on_the_batches_that_they_are_made_in(tmp_path):
    """Nor does the training, whose steps are accumulated from as many rows."""
    runs = [
        tiny_trainer(
            tmp_path, config=LORA, train=images_of(8), per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size, max_steps=4, **{**SGD, "learning_rate": 0.1},
        ).screen(every=2)
        for size in (4, 1)
    ]  # fmt: skip
    assert figures_of(runs[1]) == pytest.approx(figures_of(runs[0]), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize(
    ("arguments", "tolerance"),
    [({"gradient_checkpointing": True}, 1e-4), ({"bf16": True, "use_cpu": True}, 0.2)],
    ids=["gradient checkpointing", "bfloat16"],
)
def test_memory_and_precision_change_the_figures_by_rounding_alone(tmp_path, arguments, tolerance):
    plain, other = (
        tiny_trainer(tmp_path, config=MemControlConfig(method="weights"), max_steps=4, **{**SGD, **more}).screen(
            every=2
        )
        for more in ({}, arguments)
    )
    largest = max(plain.learns.values())
    assert figures_of(other) == pytest.approx(figures_of(plain), rel=0, abs=tolerance * largest)


def screened_with_scaler(folder, **options) -> tuple[Screening, MemControlTrainer]:
    """A screening whose gradients are scaled as in float16 training, which the Trainer offers on a GPU alone."""
    trainer = tiny_trainer(folder, config=LORA, max_steps=4, **SGD)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", **options) if options else None
    return trainer.screen(every=1), trainer


def test_a_gradient_scaler_changes_nothing_and_keeps_its_scale(tmp_path):
    plain, _ = screened_with_scaler(tmp_path)
    scaled, trainer = screened_with_scaler(tmp_path, init_scale=2.0**16, growth_interval=1)
    assert figures_of(scaled) == pytest.approx(figures_of(plain), rel=1e-3, abs=1e-8)
    assert trainer.accelerator.scaler.get_scale() == 2.0**16


def test_a_step_that_the_gradient_scaler_skips_moves_nothing(tmp_path):
    skipped, trainer = screened_with_scaler(tmp_path, init_scale=2.0**127)
    assert figures_of(skipped) == [0.0] * 8, "every step overflowed"
    assert trainer.accelerator.scaler.get_scale() == 2.0**127
    fewer, _ = screened_with_scaler(tmp_path, init_scale=2.0**127, backoff_factor=2.0**-100)
    assert any(figures_of(fewer)) and all(map(math.isfinite, figures_of(fewer))), "one step overflowed"


def screened(folder: str, **arguments) -> dict[bool, Screening]:
    """Screenings without and with blocks of the text encoder, whose probes draw all images."""
    memcontrol_hf.screening.run.PROBE_SHARE = 16
    results = {}
    for text in (False, True):
        pipeline = tiny_pipeline()
        space = family_of(pipeline).search_space(text_encoder_blocks=text)
        trainer = tiny_trainer(folder, pipeline, space=space, train=images_of(8), max_steps=3, **arguments)
        results[text] = trainer.screen(every=1, seeds=2, singular_values=text)
    return results


def assert_sums_of_single_values(screening: Screening, space: SearchSpace) -> None:
    """The figures of a block are the sums over its single singular values, which have four significant digits."""
    for kind in ("learns", "memorizes"):
        values = {module: figures[kind] for module, figures in screening.singular_values.items()}
        rounding = 1e-3 * max(abs(value) for numbers in values.values() for value in numbers)
        for block, modules in space.blocks.items():
            numbers = [value for module in modules for value in values.get(module, [])]
            assert len(numbers) == screening.parameters[block]
            assert sum(numbers) == pytest.approx(getattr(screening, kind)[block], rel=1e-3, abs=rounding)


def one_of_two(folder: str) -> None:
    """What each of the two processes runs."""
    results = screened(folder, per_device_train_batch_size=2, use_cpu=True)
    assert PartialState().num_processes == 2
    for text, screening in results.items():
        screening.to_json(f"{folder}/{text}-{PartialState().process_index}")


def test_two_processes_screen_as_one(tmp_path):
    one = screened(tmp_path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launch, __file__, str(tmp_path)], check=True, timeout=300)
    for text, screening in one.items():
        first, second = (Screening.from_json(tmp_path / f"{text}-{process}") for process in (0, 1))
        assert first == second
        largest = max(map(abs, figures_of(screening)))
        assert figures_of(first) == pytest.approx(figures_of(screening), rel=0.01, abs=1e-3 * largest)
        assert first.parameters == screening.parameters and first.settings.keys() == screening.settings.keys()
    single = one[True].singular_values
    assert {module.split(".")[0] for module in single} >= {"text_encoder", "down_blocks"}
    assert_sums_of_single_values(one[True], family_of(tiny_pipeline()).search_space(text_encoder_blocks=True))


@pytest.mark.parametrize("text", [False, True], ids=["denoiser", "text encoders too"])
@pytest.mark.parametrize("name", PIPELINES)
def test_every_family_is_screened(tmp_path, name, text):
    pipeline = PIPELINES[name]()
    family = family_of(pipeline)
    if text and not family.text_encoders:
        pytest.skip("no text encoder")
    space = family.search_space(text_encoder_blocks=text)
    config = MemControlConfig(method="weights")
    if len(space.blocks) < 2:  # two blocks of the one: its queries and what is left
        space = family.search_space(["to_q", r"to_[kv]|to_out"])
    trainer = family_trainer(tmp_path, name, pipeline, config=config, space=space)
    screening = trainer.screen(steps=2, every=1)
    assert sum(screening.parameters.values()) == trainer.trainable_parameters
    assert list(screening.learns) == list(space.blocks) and all(map(math.isfinite, figures_of(screening)))
    assert all(screening.learns[block] != 0 for block in space.blocks)


@pytest.mark.parametrize("granularity", ["block", "site", "module", ["to_q$", "to_[kv]$|norm|proj|net|to_out"]])
@pytest.mark.parametrize("method", PEFT_CONFIGS)
def test_every_method_is_allocated_to_the_blocks_that_it_trains(tmp_path, method, granularity):
    pipeline = tiny_pipeline()
    space = SearchSpace.from_model(pipeline.unet, granularity)
    try:
        space.apply(PEFT_CONFIGS[method], space.mask(True))
    except ValueError:
        pytest.skip("no module for this method")
    trainer = tiny_trainer(tmp_path, pipeline, config=PEFT_CONFIGS[method], space=space, train=images_of(4))
    owned = parameters_by_block(trainer.family, space)
    assert sum(parameter.numel() for parameter, _ in owned) == trainer.trainable_parameters
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    for parameter, block in owned:
        modules = list(space.blocks.values())[block]
        assert any(f".{module}." in names[parameter] for module in modules)


def test_parameters_that_blocks_share_are_no_blocks(tmp_path):
    config = peft.VBLoRAConfig(target_modules=["to_q"], num_vectors=4, vector_length=4, topk=2, r=2)
    trainer = tiny_trainer(tmp_path, config=config, train=images_of(4), max_steps=2)
    screening = trainer.screen(every=1)
    bank = 4 * 4
    assert sum(screening.parameters.values()) == trainer.trainable_parameters - bank
    assert any(figures_of(screening))


def test_a_quantized_base_is_screened(tmp_path):
    sd3().save_pretrained(tmp_path / "model")
    pipeline = load_pipeline(str(tmp_path / "model"), quantization="torchao_int8")
    trainer = tiny_trainer(tmp_path, pipeline, config=LORA, train=images_of(4), max_steps=2)
    assert any(trainer.screen(every=1).learns.values())


def test_every_stretch_of_steps_is_probed_in_its_middle():
    settings = ScreeningSettings(steps=10, every=4, learning_rate=1.0, seeds=2, seed=5)
    assert settings.stretches == {1: 4, 5: 4, 8: 2} and settings.run_seeds == [5, 6]
    assert list(replace(settings, every=1).stretches) == list(range(10))


def test_the_standard_error_is_the_noise_without_the_trend():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 1, 20, 1, generator=generator)
    trend = 10 * torch.linspace(1, 0, 20).view(1, 20, 1)
    errors = torch.stack([standard_error(sample + trend) for sample in noise])
    assert errors.square().mean().sqrt().item() == pytest.approx(noise.sum(2).std().item(), rel=0.1)
    assert math.isnan(standard_error(torch.ones(1, 1, 1)).item())
    far_apart = torch.tensor([[[0.0], [0.0]], [[1.0], [1.0]]])
    assert standard_error(far_apart).item() == pytest.approx(1.0)


def test_seeds_are_averaged_and_the_first_is_the_trainers_own(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=4)
    both, first = trainer.screen(every=2, seeds=2), trainer.screen(every=2)
    trainer.args.seed += 1
    second = trainer.screen(every=2)
    mean = np.mean([figures_of(first), figures_of(second)], axis=0)
    assert figures_of(both) == pytest.approx(mean) and both.settings["seeds"] == 2
    assert figures_of(first) != figures_of(second)


# ---- what a screening leaves alone ----


class Counter(TrainerCallback):
    """Counts the trainings that a user's callback sees."""

    count = 0

    def on_train_begin(self, *args, **kwargs):
        self.count += 1


@pytest.mark.parametrize("text", [False, True], ids=["denoiser", "text encoders too"])
@pytest.mark.parametrize("fails", [False, True], ids=["finished", "failed"])
@pytest.mark.parametrize("method", ["svdiff", "lora"])
def test_the_trainer_is_as_before(tmp_path, method, fails, text):
    pipeline = tiny_pipeline()
    space = family_of(pipeline).search_space(text_encoder_blocks=text)
    mask = dict(itertools.islice(space.mask(True).items(), 2, None))
    config = peft.LoraConfig(r=2, init_lora_weights=False) if method == "lora" else PEFT_CONFIGS[method]
    trainer = tiny_trainer(
        tmp_path / "one", pipeline, config=config, space=space, mask=mask, max_steps=3, caption_dropout=0.5
    )
    counter = Counter()
    trainer.add_callback(counter)
    trainer.train()
    figures, weights = trainer.evaluate(metrics=["loss"]), adapter_of(trainer.model)
    attributes, settings = dict(vars(trainer)), dict(vars(trainer.args))
    callbacks, modes = list(trainer.callback_handler.callbacks), [m.training for m in trainer.model.modules()]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    if fails:
        with pytest.raises(ValueError, match=r"losses are not finite in step .* use a lower learning rate"):
            trainer.screen(every=1, learning_rate=1e30)
    else:
        trainer.screen(every=1)

    assert vars(trainer).keys() == attributes.keys()
    assert all(value is attributes[name] for name, value in vars(trainer).items())
    assert vars(trainer.args) == settings and trainer.callback_handler.callbacks == callbacks
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert [m.training for m in trainer.model.modules()] == modes and counter.count == 1
    assert all(torch.equal(tensor, weights[name]) for name, tensor in adapter_of(trainer.model).items())
    assert trainer.evaluate(metrics=["loss"]) == figures
    assert not list(tmp_path.glob("*/checkpoint*"))
    trainer.train()
    assert trainer.evaluate(metrics=["loss"]) == figures, "a training after the screening is as one before"
    trainer.set_mask({})
    base = tiny_pipeline()
    for part, reference in ((trainer.denoiser, base.unet), (pipeline.text_encoder, base.text_encoder)):
        assert all(torch.equal(t, reference.state_dict()[name]) for name, t in part.state_dict().items())


def test_the_frozen_base_can_be_screened_first(tmp_path):
    trainer = tiny_trainer(tmp_path, mask={}, max_steps=2)
    model = trainer.model
    assert any(trainer.screen(every=1).learns.values())
    assert trainer.model is model and trainer.trainable_parameters == 0


@pytest.mark.parametrize(
    ("screening", "given", "message"),
    [
        ({"every": 0}, {}, "every of a screening must be at least 1, but is 0"),
        ({"seeds": 0}, {}, "seeds of a screening must be at least 1, but is 0"),
        ({"steps": 0}, {}, "steps of a screening must be at least 1, but is 0"),
        ({"steps": 3}, {}, "a screening of 3 steps has no probe every 4 steps: give more steps"),
        ({}, {"max_steps": -1}, "steps of a screening must be at least 1, but is -1"),
        ({"learning_rate": 0.0}, {}, "learning rate of a screening must be positive, but is 0.0"),
        ({}, {"mitigations": ["dp_sgd:delta=0.01"]}, "outside of the account of dp_sgd"),
        ({}, {"space": "one"}, "the search space has only one: use a finer granularity"),
        ({}, {"validation": "none"}, "there are none: give an eval_dataset"),
        ({"singular_values": True}, {"config": PEFT_CONFIGS["lora"]}, "are tuned by SV-DIFF alone: give its config"),
        ({"singular_values": True}, {"config": MemControlConfig(method="bias")}, "are tuned by SV-DIFF alone"),
        ({"singular_values": True}, {"config": SINGLE}, "names single singular values already"),
    ],
)
def test_errors_cost_nothing(tmp_path, monkeypatch, screening, given, message):
    pipeline, given = tiny_pipeline(), dict(given)
    if "space" in given:
        given["space"] = SearchSpace.from_model(pipeline.unet, ["to_q$"])
    nothing = given.pop("validation", None) and images_of(8).select([])
    trainer = tiny_trainer(tmp_path, pipeline, **{"max_steps": 6, **given})
    if nothing is not None:
        trainer.eval_dataset = nothing
    monkeypatch.setattr(trainer, "train", lambda: pytest.fail("a training was begun"))
    with pytest.raises(ValueError, match=message):
        trainer.screen(**screening)


# ---- masks, files, tables, plots ----


@pytest.mark.parametrize("seed", range(20))
def test_the_masks_are_the_front_of_the_additive_model(seed):
    screening = made_up(7, seed)
    if max(screening.learns.values()) <= 0:
        assert screening.masks(3) == []
        return
    able = [b for b, learns in screening.learns.items() if learns > 0.01 * max(screening.learns.values())]
    subsets = [
        screening.predict(dict.fromkeys(on, True))
        for size in range(len(able) + 1)
        for on in itertools.combinations(able, size)
    ]
    masks = screening.masks(100)
    figures = [screening.predict(mask) for mask in masks]
    assert all(any(mask.values()) and list(mask) == list(screening.learns) for mask in masks)
    assert len({tuple(mask.values()) for mask in masks}) == len(masks)
    for learns, memorizes in figures:
        assert not any(a >= learns and b <= memorizes and (a, b) != (learns, memorizes) for a, b in subsets)
    for price in [0, *(10 ** random.Random(seed).uniform(-3, 3) for _ in range(50))]:
        best = max(a - price * b for a, b in subsets)
        found = max([0, *(a - price * b for a, b in figures)])  # 0: the empty mask, which is left out
        assert found == pytest.approx(best)
    assert figures == sorted(figures, reverse=True)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 9])
def test_a_longer_front_is_thinned_evenly(n):
    names = [f"{i}" for i in range(6)]
    figures = {name: 1.0 + i for i, name in enumerate(names)}
    screening = Screening(dict.fromkeys(names, 1.0), figures, figures, figures, dict.fromkeys(names, 1))
    sizes = [sum(mask.values()) for mask in screening.masks(n)]
    assert sizes == {1: [4], 2: [6, 1], 3: [6, 4, 1], 5: [6, 5, 4, 2, 1]}.get(n, [6, 5, 4, 3, 2, 1])
    with pytest.raises(ValueError, match="must be at least 1, but is 0"):
        screening.masks(0)


def test_a_mask_memorizes_no_less_for_a_block_with_a_negative_figure():
    screening = made_up(3, 0)
    screening.learns.update(zip(screening.learns, (1.0, 2.0, 4.0)))
    screening.memorizes.update(zip(screening.memorizes, (-1.0, 2.0, 3.0)))
    first, second, _ = screening.learns
    assert screening.predict({first: True, second: True}) == (3.0, 2.0)
    with pytest.raises(ValueError, match="not screened: up"):
        screening.predict({"up": True})


def with_single_values() -> Screening:
    """A made-up screening of three modules with three singular values each; the last module learns nothing."""
    screening = made_up(2, 0)
    screening.singular_values = {
        "a": {"learns": [4.0, 2.0, -1.0], "memorizes": [2.0, -1.0, -9.0]},
        "b": {"learns": [1.0, 8.0, 3.0], "memorizes": [0.0, 8.0, 0.0]},
        "c": {"learns": [0.0, 0.0, -1.0], "memorizes": [0.0, 1.0, 0.0]},
    }
    return screening


def test_the_cheapest_singular_values_memorize_least_for_what_they_learn():
    screening = with_single_values()
    assert screening.cheapest_singular_values(1) == {"b": [2]}  # free, and learns more than the other free ones
    assert screening.cheapest_singular_values(2) == {"a": [1], "b": [2]}
    assert screening.cheapest_singular_values(4) == {"a": [0, 1], "b": [0, 2]}
    assert screening.cheapest_singular_values(5) == {"a": [0, 1], "b": [0, 1, 2]}
    for number in (0, 6):
        with pytest.raises(ValueError, match=f"from 1 to 5, since so many of 9 lower the loss .* but is {number}"):
            screening.cheapest_singular_values(number)
    with pytest.raises(ValueError, match=r"were not screened: give screen\(singular_values=True\)"):
        made_up(2, 0).cheapest_singular_values(1)


def test_the_front_of_single_singular_values_is_in_shares_of_all():
    front = with_single_values().singular_value_front(9)
    assert front == [(1, 3 / 18, 0.0), (2, 5 / 18, 0.0), (5, 1.0, 1.0)]
    with pytest.raises(ValueError, match="were not screened"):
        made_up(2, 0).singular_value_front(2)
    nothing = made_up(2, 0)
    nothing.singular_values = {"a": {"learns": [1.0, 1.0], "memorizes": [-1.0, 0.0]}}
    assert nothing.singular_value_front(1) == [(2, 1.0, 0.0)]


def test_the_trainer_tunes_the_singular_values_that_were_chosen(tmp_path):
    trainer = tiny_trainer(tmp_path, config=SINGLE, train=images_of(4), max_steps=2)
    assert list(trainer.search_space.blocks) == ["down_blocks.0.attentions.0"] and trainer.trainable_parameters == 3
    trainer.train()
    with pytest.raises(ValueError, match=r"names 1 module.* that no block has, such as up.to_q$"):
        tiny_trainer(tmp_path, config=MemControlConfig(singular_values={"up.to_q": [0]}), train=images_of(4))
    with pytest.raises(ValueError, match=r"such as text_encoder.q: .* with --text_encoder_blocks"):
        tiny_trainer(tmp_path, config=MemControlConfig(singular_values={"text_encoder.q": [0]}), train=images_of(4))


def test_a_stored_screening_is_read_as_it_was(tmp_path):
    single = with_single_values()
    single.to_json(tmp_path / "single.json")
    assert Screening.from_json(tmp_path / "single.json") == single
    screening = made_up(3, 1, loss_before=0.5)
    screening.learns_error[next(iter(screening.learns))] = math.nan
    screening.to_json(tmp_path / "screening.json")
    again = Screening.from_json(tmp_path / "screening.json")
    assert again.to_dict() == screening.to_dict() and again.masks(2) == screening.masks(2)
    assert not HEAVY & loaded_by("from memcontrol_hf import Screening; Screening.from_json(sys.argv[1]).table()",
                                 tmp_path / "screening.json")  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "is no screening: Expecting"),
        ("[]", "is a list, not an object"),
        ({"version": 9}, "has version 9, but this package reads 1"),
        ({"learns": None}, "learns is a NoneType, not an object"),
        ({"learns": {"a": 1.0}}, "memorizes and learns are of different blocks: a, down_blocks"),
        ({"parameters": {"a": 1.5}}, "parameters of a is 1.5, not a number"),
        ({"memorizes": {"a": "much"}}, "memorizes of a is 'much', not a number"),
        ({"memorizes": {"a": float("nan")}}, "memorizes of a is nan"),
        ({"extra": 1}, r"unknown field\(s\) extra"),
        ({"settings": ...}, "lacks settings"),
        ({"singular_values": [1]}, "singular_values has no lists learns and memorizes of equal length"),
        ({"singular_values": {"a": {"learns": [1]}}}, "singular_values of a has no lists learns and memorizes"),
        ({"singular_values": {"a": {"learns": [1], "memorizes": []}}}, "lists learns and memorizes of equal length"),
        ({"singular_values": {"a": {"learns": [1], "memorizes": ["b"]}}}, "singular_values of a are not all numbers"),
    ],
)
def test_a_broken_file_says_what_is_wrong(tmp_path, change, message):
    file = tmp_path / "screening.json"
    if isinstance(change, dict):
        content = {name: value for name, value in {**made_up(2, 0).to_dict(), **change}.items() if value is not ...}
        change = json.dumps(content)
    file.write_text(change)
    with pytest.raises(ValueError, match=f"screening.json .*{message}"):
        Screening.from_json(file)


def test_the_table_has_a_row_for_each_block():
    screening = made_up(2, 0)
    name = next(iter(screening.learns))
    screening.learns[name], screening.learns_error[name], screening.parameters[name] = 0.0123, 0.001, 12345
    screening.memorizes[name], screening.memorizes_error[name] = -0.5, math.nan
    head, row, _ = screening.table()
    assert head == ["block", "parameters", "learns", "memorizes"]
    assert row == [name, "12,345", "+0.0123 ± 0.0010", "-0.5000"]


def test_a_screening_is_drawn(tmp_path):
    screening = made_up(4, 0)
    screening.learns_error[next(iter(screening.learns))] = math.nan
    plot_screening(screening.to_dict(), tmp_path / "screening.png")
    assert (tmp_path / "screening.png").read_bytes().startswith(b"\x89PNG")


if __name__ == "__main__":
    one_of_two(sys.argv[1])
