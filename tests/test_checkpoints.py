"""Checkpoints: a training goes on from the newest whole one, and none holds a value that is not finite."""

import logging
import shutil

import pytest
import torch
from conftest import adapter_of, tiny_trainer
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from memcontrol_hf import MemControlConfig
from memcontrol_hf.checkpoints import newest_whole

SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run with checkpoints after the steps 2, 4 and 6, and its adapter in the end."""
    folder = tmp_path_factory.mktemp("run")
    trainer = tiny_trainer(folder, **SAVED)
    trainer.train()
    return folder, adapter_of(trainer.model)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_bits(file):
    """One bit in each fiftieth of the file, since not every byte of it is read."""
    content = bytearray(file.read_bytes())
    for place in range(0, len(content), len(content) // 50):
        content[place] ^= 1
    file.write_bytes(content)


def without_numbers(file):
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(file).items()}, file)


DAMAGES = [
    ("adapter_model.safetensors", cut, "damaged"),
    ("adapter_model.safetensors", lambda file: file.unlink(), "missing"),
    ("adapter_model.safetensors", without_numbers, "not finite"),
    ("trainer_state.json", cut, "damaged"),
    ("trainer_state.json", lambda file: file.unlink(), "trainer_state.json is missing"),
    ("optimizer.pt", cut, "damaged"),
    ("optimizer.pt", flip_bits, "damaged"),
    ("optimizer.pt", lambda file: file.unlink(), "optimizer.pt is missing"),
    ("scheduler.pt", lambda file: file.unlink(), "scheduler.pt is missing"),
    ("rng_state.pth", lambda file: file.write_bytes(b""), "damaged"),
    ("rng_state.pth", lambda file: file.unlink(), "rng_state.pth is missing"),
]


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run, tmp_path, caplog, name, damage, reason):
    shutil.copytree(run[0], tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoint-6" / name)
    with caplog.at_level(logging.WARNING, "memcontrol_hf"):
        assert newest_whole(tmp_path) == str(tmp_path / "checkpoint-4")
    assert "checkpoint-6 is not gone on from" in caplog.text and reason in caplog.text
    assert (tmp_path / "checkpoint-6").is_dir()


def test_a_run_that_was_killed_while_it_saved_ends_as_if_it_had_not_been(run, tmp_path):
    shutil.copytree(run[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()
    cut(tmp_path / "checkpoint-4" / "optimizer.pt")
    trainer = tiny_trainer(tmp_path, **SAVED)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6 and newest_whole(tmp_path) == str(tmp_path / "checkpoint-6")
    ended = adapter_of(trainer.model)
    assert all(torch.equal(tensor, run[1][name]) for name, tensor in ended.items())


def test_a_damaged_checkpoint_that_is_named_is_refused(run, tmp_path):
    shutil.copytree(run[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    trainer = tiny_trainer(tmp_path, **SAVED)
    with pytest.raises(ValueError, match=r"checkpoint-2 cannot be gone on from: optimizer.pt is missing. Give an"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match="there is no whole checkpoint in"):
        trainer.train(resume_from_checkpoint=True)


def test_a_training_that_diverges_leaves_no_checkpoint_and_says_what_to_try(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        config=MemControlConfig(method="weights"),
        learning_rate=1e30,
        max_grad_norm=0.0,
        optim="sgd",
        **SAVED,
    )
    with pytest.raises(
        ValueError, match=r"not finite at step 2 with the learning rate 1e\+30, .*try a lower learning"
    ):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint*"))


def test_a_finished_run_that_is_resumed_has_its_best_model_too(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
    trainer = tiny_trainer(tmp_path, **SAVED, **best)
    trainer.evaluate = lambda **_: {"eval_loss": trainer.state.global_step}  # the first checkpoint is the best one
    trainer.train()
    resumed = tiny_trainer(tmp_path, **SAVED, **best)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    first = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    for model in (trainer.model, resumed.model):
        assert {name: t.tolist() for name, t in get_peft_model_state_dict(model).items()} == {
            name: t.tolist() for name, t in first.items()
        }
