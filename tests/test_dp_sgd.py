"""Differentially private training: its gradients, its draws, its account, and how it is reported and refused."""

import peft
import pytest
import torch
from conftest import adapter_of, images_of, tiny_pipeline, tiny_trainer
from opacus import PrivacyEngine
from opacus.accountants import RDPAccountant
from test_families import family_trainer
from test_trainer import equal
from tiny_families import PIPELINES
from torch.utils._pytree import tree_map

from memcontrol_hf import (
    MemControlConfig,
    MemControlTrainingArguments,
    MemorizationReport,
    demo_dataset,
    demo_pipeline,
)
from memcontrol_hf.mitigations import DPSGD, PrivateGradients, per_sample_gradients

SITE = "mid_block.attentions.0"
DP = "dp_sgd:epsilon=8,delta=0.001"
pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop", "ignore:Optimal order", "ignore:Secure RNG", "ignore:Full backward hook"
)


def rows_of(trainer, rows) -> dict:
    """What a training step sees of some rows."""
    return trainer._draws(trainer.data_collator(trainer.train_dataset.__getitems__(list(rows))))


def of_rows(batch, rows: slice) -> dict:
    return tree_map(lambda tensor: None if tensor is None else tensor[rows], batch)


def trainable(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ---- the gradients ----

METHODS = [MemControlConfig(method=method) for method in ("svdiff", "difffit", "weights", "norm", "bias")]


def agree_with_each_row_alone(trainer) -> None:
    batch, parameters = rows_of(trainer, range(3)), trainable(trainer.model)
    gradients, losses = per_sample_gradients(trainer.model, parameters, trainer.family.losses, batch)
    for row in range(3):
        loss = trainer.family.losses(trainer.model, **of_rows(batch, slice(row, row + 1))).sum()
        expected = torch.autograd.grad(loss, list(parameters.values()))
        assert losses[row].item() == pytest.approx(loss.item(), rel=1e-5)
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(gradients[name][row], gradient, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("config", [*METHODS, peft.LoraConfig()], ids=lambda config: getattr(config, "method", "lora"))
def test_gradients_are_those_of_each_row_alone(tmp_path, config):
    agree_with_each_row_alone(tiny_trainer(tmp_path, config=config, mask={SITE: True}, snr_gamma=5.0))


@pytest.mark.parametrize("name", PIPELINES)
def test_gradients_are_those_of_each_row_alone_in_every_family(tmp_path, name):
    agree_with_each_row_alone(family_trainer(tmp_path, name))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return tiny_trainer(tmp_path_factory.mktemp("dp"), mask={SITE: True})


def private(trainer, noise_multiplier, max_grad_norm=1.0, parts=1) -> PrivateGradients:
    dp_sgd = DPSGD(noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm, delta=1e-3)
    gradients = PrivateGradients(dp_sgd, rows=10, batch_size=4, parts=parts, steps=3)
    gradients.key = 1
    return gradients


def step(trainer, gradients, batches) -> torch.Tensor:
    """The gradient of a step, all of it in one vector."""
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        gradients.backward(trainer.model, trainer.family.losses, batch, 0, last=last)
    return torch.cat([p.grad.flatten() for p in trainable(trainer.model).values()])


def test_each_row_is_clipped_before_they_are_summed(trainer):
    batch = rows_of(trainer, range(4))
    alone = per_sample_gradients(trainer.model, trainable(trainer.model), trainer.family.losses, batch)[0]
    rows = torch.cat([gradient.flatten(1) for gradient in alone.values()], dim=1)
    norms = rows.norm(dim=1, keepdim=True)
    limit = norms.sort(dim=0).values[1:3].mean().item()  # two rows are longer, and two shorter
    noise = step(trainer, private(trainer, 0.01, limit), [{}])  # of the same key, so that it can be taken off
    found = step(trainer, private(trainer, 0.01, limit), [batch]) - noise
    torch.testing.assert_close(found, (rows * (limit / norms).clamp(max=1)).sum(0) / 4, atol=1e-6, rtol=1e-3)
    parts = [of_rows(batch, part) for part in (slice(0, 1), slice(1, 4))]
    in_parts = step(trainer, private(trainer, 0.01, limit, parts=3), [parts[0], {}, parts[1]]) - noise
    torch.testing.assert_close(in_parts, found, atol=1e-6, rtol=1e-3)


def test_the_noise_has_the_size_that_the_accountant_reckons_with(trainer):
    gradients = private(trainer, 3.0, max_grad_norm=0.5, parts=2)
    noise = step(trainer, gradients, [{}, {}]) * 4  # no row was drawn: noise alone, over the expected batch size
    assert noise.std().item() == pytest.approx(1.5, rel=0.15)
    assert gradients.accountant.history == [(3.0, 0.4, 1)], "once for a step, however many its parts"
    other = private(trainer, 3.0, max_grad_norm=0.5)
    assert torch.equal(step(trainer, other, [{}]) * 4, noise)
    other.key = 2
    assert not torch.equal(step(trainer, other, [{}]) * 4, noise)


def test_rows_and_noise_depend_on_every_bit_of_the_key(trainer):
    gradients = private(trainer, 3.0)
    found = set()
    for bit in range(128):
        gradients.key = 1 << bit
        found.add((gradients._draws(0, 0).random(), gradients._draws(1, 0).random(), gradients._draws(1, 1).random()))
    assert len({draw for draws in found for draw in draws}) == 3 * 128
    halves = gradients._draws(1, 0).bit_generator.state["state"]["key"].tolist()
    assert halves == [0, 1 << 63], "no digest, of which fewer bits might count"


def test_rows_are_drawn_independently_at_the_sampling_rate():
    gradients = PrivateGradients(DPSGD(delta=1e-3), rows=50, batch_size=10, parts=3, steps=400)
    gradients.key = 1
    batches = list(gradients)
    assert len(gradients) == len(batches) == 1200
    steps = [[row for part in batches[i : i + 3] for row in part] for i in range(0, 1200, 3)]
    assert all(len(set(drawn)) == len(drawn) for drawn in steps)
    sizes = torch.tensor([len(drawn) for drawn in steps]).float()
    assert sizes.mean().item() == pytest.approx(10, abs=0.6) and sizes.var().item() == pytest.approx(8, abs=2.5)
    counts = torch.bincount(torch.tensor([row for drawn in steps for row in drawn]), minlength=50)
    assert counts.min() > 45 and counts.max() < 120, "80 each on average"
    assert list(gradients) == batches
    assert list(PrivateGradients(DPSGD(delta=1e-3), 50, 10, 3, 400)) != batches, "each training has its own key"


@pytest.mark.parametrize("steps", [4, 9])
def test_with_a_given_noise_a_run_goes_on_as_long_as_one_likes(tmp_path, steps):
    settings = {"mitigations": ["dp_sgd:noise_multiplier=1,delta=0.001"], "save_strategy": "steps", "save_steps": 2}
    settings["lr_scheduler_type"] = "constant"
    tiny_trainer(tmp_path, max_steps=2, **settings).train()
    longer = tiny_trainer(tmp_path, max_steps=steps, **settings)
    longer.train(resume_from_checkpoint=True)
    account = RDPAccountant()
    account.history = [(1.0, 0.4, steps)]
    assert longer.privacy["epsilon"] == pytest.approx(account.get_epsilon(1e-3))


def test_parameters_that_would_round_the_clipped_sum_are_refused(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.unet.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"dp_sgd trains parameters of torch\.bfloat16 here"):
        tiny_trainer(tmp_path, pipeline, peft.LNTuningConfig(target_modules=["norm1"]), mitigations=[DP])


# ---- the account ----


def test_epsilon_is_as_opacus_accounts_it(tmp_path):
    trainer = tiny_trainer(tmp_path, train=images_of(8), mitigations=[DP], max_steps=6, mask={SITE: True})
    trainer.train()
    data = torch.utils.data.TensorDataset(torch.randn(8, 2))
    engine, toy = PrivacyEngine(accountant="rdp"), torch.nn.Linear(2, 1)
    toy, optimizer, loader = engine.make_private_with_epsilon(
        module=toy, optimizer=torch.optim.SGD(toy.parameters(), lr=0.1), target_epsilon=8, target_delta=1e-3,
        epochs=3, max_grad_norm=1.0, data_loader=torch.utils.data.DataLoader(data, batch_size=4),
    )  # fmt: skip
    for _ in range(3):
        for (x,) in loader:
            optimizer.zero_grad()
            toy(x).sum().backward()
            optimizer.step()
    spent = trainer.privacy
    assert spent["noise_multiplier"] == optimizer.noise_multiplier
    assert spent["epsilon"] == pytest.approx(engine.get_epsilon(1e-3), rel=1e-9)
    assert 7.9 < spent["epsilon"] <= 8 and spent["says_something"]
    assert (spent["delta"], spent["sample_rate"], spent["steps"]) == (1e-3, 0.5, 6)


def test_weights_that_did_not_move_are_an_error(tmp_path):
    trainer = tiny_trainer(tmp_path, mitigations=[DP], max_steps=1, learning_rate=0.0, mask={SITE: True})
    with pytest.raises(RuntimeError, match="left the adapter's weights as they were"):
        trainer.train()


def test_the_noise_does_not_follow_from_the_published_seed(tmp_path):
    runs = []
    for _ in range(2):
        trainer = tiny_trainer(tmp_path, mitigations=[DP], max_steps=1, mask={SITE: True})
        trainer.train()
        runs.append(adapter_of(trainer.model))
    assert any(not torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_a_resumed_run_ends_with_the_same_weights_and_the_same_account(tmp_path):
    """Combined with what changes captions, with a mask, and with batches that are read in parts."""
    settings = {
        "mitigations": [DP, "rwa:1", "gaussian_noise", "caption_dropout:0.3"], "mask": {SITE: True}, "max_steps": 4,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    whole = tiny_trainer(tmp_path / "whole", **settings)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "dp_sgd.json").stat().st_mode & 0o077 == 0
    resumed = tiny_trainer(tmp_path / "resumed", **settings)
    torch.manual_seed(123)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == whole.state.global_step == 4
    equal(adapter_of(whole.model), adapter_of(resumed.model))
    assert resumed.privacy == whole.privacy and whole.privacy["steps"] == 4
    longer = tiny_trainer(tmp_path / "longer", **{**settings, "max_steps": 40})
    for refuses in (longer.train, longer.check_resumes):  # the noise of 40 steps is larger, and the draws the same
        with pytest.raises(ValueError, match=r"has made 2 steps of dp_sgd with the noise multiplier 0\.\d+ "):
            refuses(str(checkpoint))
    (checkpoint / "dp_sgd.json").unlink()
    with pytest.raises(ValueError, match="checkpoint-2 was not trained with dp_sgd"):
        resumed.train(resume_from_checkpoint=str(checkpoint))


def test_membership_is_harder_to_tell_than_without(tmp_path, monkeypatch):
    """A fine-tune that learns its images by heart, beside the same one with DP-SGD."""
    monkeypatch.setattr("memcontrol_hf.mitigations.dp_sgd.secrets.randbits", lambda bits: 1)
    data, found = demo_dataset(), {}
    for mitigations in ([], [DP]):
        trainer = tiny_trainer(
            tmp_path, demo_pipeline(), MemControlConfig(method="weights"), data["train"].select(range(6)),
            data["validation"].select(range(16)), mitigations=mitigations, resolution=64, max_steps=25,
            per_device_train_batch_size=6, per_device_eval_batch_size=24, learning_rate=3e-3, eval_num_timesteps=4,
            lr_scheduler_type="constant",
        )  # fmt: skip
        trainer.train()
        found[bool(mitigations)] = trainer.evaluate(metrics=["membership_auc"])["eval_membership_auc"]
    assert found[False] > 0.85, found
    assert abs(found[True] - 0.5) < found[False] - 0.5 - 0.2, found


# ---- what is said of it ----


@pytest.mark.parametrize("noise_multiplier", [0.3, 0.01])
def test_too_little_noise_is_called_so(noise_multiplier):
    gradients = PrivateGradients(DPSGD(noise_multiplier=noise_multiplier, delta=1e-3), 10, 4, 1, 50)
    gradients.accountant.history = [(noise_multiplier, 0.4, 50)]
    spent = gradients.report()
    assert 10 < spent["epsilon"] < float("inf") and not spent["says_something"]
    statement = MemorizationReport(training={"dp_sgd": spent}).privacy()
    assert statement.startswith("Too little noise") and "guarantees next to nothing" in statement


def test_a_report_says_what_epsilon_covers_and_what_not():
    gradients = PrivateGradients(DPSGD(delta=1e-3), 10, 4, 1, 50)
    gradients.accountant.history = [(gradients.noise_multiplier, 0.4, 50)]
    training = {"dp_sgd": gradients.report()}
    searched = MemorizationReport(training=training, search={"trials": []})
    assert "learning rate, by the search, which trained on the same images." in searched.privacy()
    assert searched.privacy() in searched.summary()
    for statement in (searched.privacy(), MemorizationReport(training=training).privacy()):
        assert "for each row of the training data (Opacus, RDP" in statement
        assert "does not cover the figures of this report, nor the choice of" in statement
    assert MemorizationReport().privacy() is None


# ---- wrong use ----

EVALUATED = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mitigations": ["dp_sgd:0"]}, "mitigation 'dp_sgd:0': epsilon is 0.0; use dp_sgd"),
        ({"mitigations": ["dp_sgd:delta=1"]}, "delta is 1.0; use dp_sgd"),
        ({"mitigations": ["dp_sgd:8,noise_multiplier=1"]}, "epsilon is 8.0 and noise_multiplier is 1.0; use dp_sgd"),
        ({"mitigations": ["dp_sgd:noise_multiplier=inf"]}, "noise_multiplier is inf; use dp_sgd"),
        ({"mitigations": ["dp_sgd:noise_multiplier=0.001"]}, "noise_multiplier is 0.001, which is no noise; use"),
        ({"mitigations": ["dp_sgd", "threshold:2"]}, "cannot be combined with the mitigation threshold"),
        ({"mitigations": ["dp_sgd", "skip_low_loss"]}, "cannot be combined with the mitigation skip_low_loss"),
        ({"mitigations": ["dp_sgd", "early_stop"]}, "cannot be combined with the mitigation early_stop"),
        (
            {"mitigations": [DP], "activation_checkpointing": True},
            "combined with gradient checkpointing: train",
        ),
        ({"mitigations": [DP], "bf16": True, "use_cpu": True}, "combined with mixed precision"),
        ({"mitigations": [DP], "max_steps": -1}, "combined with num_train_epochs in the place of max_steps"),
        ({"mitigations": [DP], "auto_find_batch_size": True}, "combined with auto_find_batch_size"),
        ({"mitigations": [DP], "ignore_data_skip": True}, "combined with ignore_data_skip, with which a resumed"),
        ({"mitigations": [DP], "torch_compile": True}, "combined with torch_compile: train"),
        ({"mitigations": [DP], "push_to_hub": True}, "combined with the Trainer's own push_to_hub, whose checkpoints"),
        (
            {"mitigations": [DP], "load_best_model_at_end": True, **EVALUATED},
            "combined with load_best_model_at_end, which may choose by the training images",
        ),
        *(
            ({"mitigations": [DP], "lr_scheduler_type": name, **EVALUATED}, "combined with a schedule that goes by")
            for name in ("reduce_lr_on_plateau", "greedy")
        ),
    ],
)
def test_what_the_guarantee_does_not_allow_is_refused_in_one_line(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message) as raised:
        MemControlTrainingArguments(output_dir=str(tmp_path), **{"max_steps": 1, **arguments})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per_device_train_batch_size": 11}, "draws 11 of 10 rows a step: use a batch size of at most 10"),
        ({"mitigations": ["dp_sgd:delta=0.1"]}, "delta is 0.1, but must be below 1 / 10, the number of rows"),
        ({"config": peft.LoHaConfig(target_modules=["to_q"])}, "cannot compute the gradient of each row.*use svdiff"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_training(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message) as raised:
        tiny_trainer(tmp_path, **{"mitigations": [DP], **arguments})
    assert "\n" not in str(raised.value)


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(MemControlTrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="combined with several processes: train on one device"):
        MemControlTrainingArguments(output_dir=str(tmp_path), mitigations=[DP], max_steps=1)


def test_without_opacus_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("memcontrol_hf.mitigations.dp_sgd.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'memcontrol_hf\[dp\]'"):
        MemControlTrainingArguments(output_dir=str(tmp_path), mitigations=[DP])
