"""What transformers' Trainer and Optuna take: each argument works, or is refused in one line that names the way."""

import pytest
import torch
from conftest import images_of, tiny_pipeline, tiny_trainer
from datasets import DatasetDict
from optuna.pruners import MedianPruner
from transformers import TrainingArguments

from memcontrol_hf import MemControlConfig, MemControlTrainer, MemControlTrainingArguments

DATA = DatasetDict(train=images_of(4, seed=1), validation=images_of(4, seed=2))


def made_with(folder, **arguments) -> MemControlTrainer:
    defaults = {
        "pipeline": tiny_pipeline(),
        "peft_config": MemControlConfig(),
        "args": MemControlTrainingArguments(output_dir=str(folder), resolution=16, max_steps=1),
        "train_dataset": DATA["train"],
        "eval_dataset": DATA["validation"],
        "encoder": torch.nn.Flatten(),
    }
    return MemControlTrainer(**defaults | arguments)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from DATA["train"]


TRAINER = [
    ({"optimizers": (torch.optim.SGD([torch.zeros(1)]), None)}, r"optimizers is not .*optimizer_cls_and_kwargs=\("),
    ({"compute_metrics": lambda prediction: {}}, r"compute_metrics is not .*evaluate\(metrics=.*compute_objective"),
    ({"model": torch.nn.Linear(1, 1)}, "model is not supported: give pipeline="),
    ({"model_init": lambda: None}, "model_init is not supported: give pipeline="),
    ({"data_collator": list}, "data_collator is not supported: leave it out"),
    ({"processing_class": object()}, "processing_class is not supported: leave it out"),
    ({"compute_loss_func": max}, "compute_loss_func is not supported: use snr_gamma or mitigations="),
    ({"train_dataset": DATA}, r"got a DatasetDict: give one of 'train', 'validation', as in .*data\['train'\]"),
    ({"eval_dataset": dict(DATA)}, "got a dict: give one of .*metric_key_prefix"),
    ({"train_dataset": DATA["train"].to_iterable_dataset()}, "got a IterableDataset: .*without streaming=True"),
    ({"train_dataset": Stream()}, "got a Stream: .*without streaming=True"),
    ({"train_dataset": [{"image": None}]}, r"got a list: make one with datasets\.Dataset\.from_list"),
    ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1.0})}, "has lr=1.0, .*give learning_rate="),
]
SEARCH = [
    ({"callbacks": [print]}, "callbacks is not supported in a search: give the trainer callbacks="),
    ({"pruner": MedianPruner()}, "pruner is not supported in a search: .*prune_at=0.25"),
    ({"timeout": 60}, "timeout is not supported in a search: give n_trials, and trial_timeout="),
    ({"n_jobs": 2}, "n_jobs is not supported in a search: .*one storage="),
    ({"load_if_exists": True}, "load_if_exists is not supported in a search: leave it out"),
    ({"directions": ["minimize"]}, r"directions is not supported in a search: give direction=\["),
]


@pytest.mark.parametrize(("arguments", "message"), TRAINER, ids=[next(iter(of)) for of, _ in TRAINER])
def test_what_a_trainer_cannot_take_is_refused_in_one_line_that_names_the_way(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        made_with(tmp_path, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", ["optuna", "ray"])
@pytest.mark.parametrize(("options", "message"), SEARCH, ids=[next(iter(of)) for of, _ in SEARCH])
def test_what_a_search_cannot_take_is_refused_before_the_first_trial(tmp_path, backend, options, message):
    trainer = tiny_trainer(tmp_path / "out")
    with pytest.raises(ValueError, match=message) as error:
        trainer.hyperparameter_search(n_trials=1, backend=backend, **options)
    assert "\n" not in str(error.value) and not (tmp_path / "out" / "study.journal").exists()


def test_plain_training_arguments_are_refused_with_the_class_to_use(tmp_path):
    with pytest.raises(ValueError, match=r"args is a TrainingArguments: give MemControlTrainingArguments"):
        made_with(tmp_path, args=TrainingArguments(output_dir=str(tmp_path)))


def test_arguments_that_say_nothing_are_taken_and_unknown_ones_are_not(tmp_path):
    made_with(tmp_path, optimizers=(None, None), compute_metrics=None)
    with pytest.raises(TypeError, match="unexpected keyword argument 'optimiser'"):
        made_with(tmp_path, optimiser=None)


def test_a_users_optimizer_has_the_learning_rate_of_each_run(tmp_path):
    trainer = tiny_trainer(tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, {"momentum": 0.5}), learning_rate=0.1)
    found = []
    for rate in (0.1, 0.02):
        trainer.apply_hyperparameters({"learning_rate": rate})
        trainer.train()
        optimizer = trainer.optimizer.optimizer
        group = optimizer.param_groups[0]
        found.append((type(optimizer), group["initial_lr"], group["momentum"]))
    assert found == [(torch.optim.SGD, 0.1, 0.5), (torch.optim.SGD, 0.02, 0.5)]
    assert trainer.recipe()["optimizer_cls_and_kwargs"] == (torch.optim.SGD, {"momentum": 0.5})
