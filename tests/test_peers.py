"""What the tests of PEFT, diffusers, transformers' Trainer and Optuna ask of a guest, beside what they all run.

Each test is a kind of fault that those projects' own tests found here; training_scripts/README.md says how they are
run over this package.
"""

import dataclasses
from functools import cache

import pytest
import torch
from conftest import adapter_of, tiny_trainer

from memcontrol_hf import MemControlTrainingArguments

# ---- the Trainer: every field of the arguments as a hyperparameter ----

OTHER_VALUES = {
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "lr_scheduler_kwargs": {"num_cycles": 3},
    "warmup_steps": 4,
    "optim": "sgd",
    "weight_decay": 0.9,
    "adam_beta1": 0.1,
    "adam_beta2": 0.1,
    "adam_epsilon": 1.0,
    "max_grad_norm": 1e-4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "num_train_epochs": 1,
    "search_max_steps": 2,
    "search_fraction": 0.4,
    "caption_dropout": 1.0,
    "snr_gamma": 0.1,
}


@pytest.fixture(scope="module")
def trained_with(tmp_path_factory):
    """Function from hyperparameters to the adapter that a trial trains with them."""
    trainers = {}

    def train(hyperparameters, **arguments):
        key = str(arguments)
        if key not in trainers:
            arguments = {"max_steps": 4, "lr_scheduler_type": "cosine_with_restarts", **arguments}
            trainers[key] = tiny_trainer(tmp_path_factory.mktemp("run"), **arguments)
            trainers[key].evaluate = dict
        trainers[key].apply_hyperparameters(hyperparameters)
        trainers[key].train_and_evaluate()
        return adapter_of(trainers[key].model)

    return train


@pytest.fixture(scope="module")
def usual(trained_with):
    return cache(lambda **arguments: trained_with({}, **arguments))


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_a_hyperparameter_changes_the_training(trained_with, usual, name):
    epochs = {"max_steps": -1, "num_train_epochs": 2} if name in ("max_steps", "num_train_epochs") else {}
    before, after = usual(**epochs), trained_with({name: OTHER_VALUES[name]}, **epochs)
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_nothing_of_a_hyperparameter_is_left_for_the_next_run(trained_with, usual):
    before, after = usual(), trained_with({})
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_every_other_argument_is_refused_as_a_hyperparameter_by_its_name(trained_with):
    for name in {f.name for f in dataclasses.fields(MemControlTrainingArguments)} - OTHER_VALUES.keys():
        with pytest.raises(ValueError, match=f"^{name} is no hyperparameter"):
            trained_with({name: None})


@pytest.mark.parametrize(
    ("hyperparameters", "message"),
    [
        ({"caption_dropout": 5.0}, "caption_dropout must be a share between 0 and 1, but got 5.0"),
        ({"learning_rate": -1.0}, "learning_rate must be above 0, but got -1.0"),
        ({"learning_rate": "high"}, "learning_rate must be a number, but got 'high'"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, but got 0"),
        ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps must be a whole number, but got 1.5"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, but got -0.1"),
        ({"lr_scheduler_type": "steep"}, "steep is not a valid SchedulerType"),
        ({"num_train_epochs": 2}, "num_train_epochs has no effect beside max_steps=4: search max_steps instead"),
    ],
)
def test_a_hyperparameter_out_of_its_range_is_refused_before_the_training(trained_with, hyperparameters, message):
    with pytest.raises(ValueError, match=message):
        trained_with(hyperparameters)


def test_the_batch_size_that_a_trial_falls_to_is_its_own(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, auto_find_batch_size=True, max_steps=1)
    sizes, step = [], trainer.training_step

    def out_of_memory_once(model, inputs, *rest):
        sizes.append(len(inputs["row"]))
        if len(sizes) == 1:
            raise RuntimeError("CUDA out of memory.")
        return step(model, inputs, *rest)

    monkeypatch.setattr(trainer, "training_step", out_of_memory_once)
    trainer.train()
    trainer.train()
    assert sizes[0] > sizes[1] and sizes[2] == sizes[0]
