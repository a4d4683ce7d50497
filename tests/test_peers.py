"""What the tests of PEFT, diffusers, transformers' Trainer and Optuna ask of a guest, beside what they all run.

Each test is a kind of fault that those projects' own tests found here; training_scripts/README.md says how they are
run over this package.
"""

import dataclasses
from functools import cache

import numpy as np
import optuna
import pytest
import torch
from conftest import adapter_of, tiny_trainer
from optuna.trial import TrialState

from memcontrol_hf import MemControlTrainingArguments
from memcontrol_hf.search import claim_final, open_storage
from memcontrol_hf.search.study import SharedStudy
from memcontrol_hf.search.suggestions import all_suggested

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


# ---- Optuna: exhausted samplers, and exceptions where a trial is asked for and stored ----


def search(trainer, **arguments):
    """A search whose figures cost nothing: a trial's `eval_loss` is its learning rate."""
    trainer.train_and_evaluate = lambda: {"eval_loss": trainer.args.learning_rate, "eval_fid": 1.0}
    arguments = {"enqueue": [], "direction": "minimize", "compute_objective": lambda f: f["eval_loss"], **arguments}
    return trainer.hyperparameter_search(**arguments)


def study_of(folder):
    return optuna.load_study(study_name="memcontrol", storage=open_storage(str(folder / "study.journal")))


def rate(trial):
    return {"learning_rate": trial.suggest_categorical("learning_rate", [0.1, 0.2, 0.3])}


@pytest.mark.parametrize(
    ("sampler", "at_most"),
    [
        (lambda: optuna.samplers.GridSampler({"learning_rate": [0.1, 0.2, 0.3]}, seed=0), 3),
        (lambda: optuna.samplers.BruteForceSampler(seed=0), 3),
        (lambda: "random", 30),  # which draws one of three values until it has drawn all, and one of them again
        (lambda: "tpe", 30),
    ],
    ids=["grid", "brute force", "random", "tpe"],
)
def test_a_space_that_is_used_up_ends_the_search_with_its_best_run(tmp_path, sampler, at_most):
    trainer = tiny_trainer(tmp_path)
    for call in range(2):
        run = search(trainer, hp_space=rate, sampler=sampler(), n_trials=100)
        assert run.objective == 0.1
        trials = run.run_summary.trials
        assert all(trial.state == TrialState.COMPLETE for trial in trials)
        assert len([trial for trial in trials if "same_as" not in trial.user_attrs]) == 3
        assert len(trials) <= at_most + call


def test_a_tree_of_suggestions_is_used_up_when_all_of_its_leaves_are_there():
    def trials(space):
        study = optuna.create_study(sampler=optuna.samplers.BruteForceSampler(seed=0))
        study.optimize(lambda trial: space(trial) or 0.0, n_trials=100)
        return study.trials

    def tree(trial):
        if trial.suggest_categorical("text", [True, False]):
            trial.suggest_float("share", 0.1, 0.5, step=0.1)
        trial.suggest_int("rank", 1, 5, step=2)

    all_trials = trials(tree)
    assert len(all_trials) == 5 * 3 + 3 and all_suggested(all_trials)
    assert not any(all_suggested(all_trials[:i] + all_trials[i + 1 :]) for i in range(len(all_trials)))
    continuous = optuna.create_study()
    continuous.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    assert not all_suggested(continuous.trials) and not all_suggested([])


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (optuna.TrialPruned("too small"), TrialState.PRUNED),
        (KeyError("no such block"), TrialState.FAIL),
        (None, TrialState.FAIL),  # an object that no study can keep
    ],
    ids=["pruned", "error", "object"],
)
def test_a_trial_without_hyperparameters_ends_and_the_search_goes_on(tmp_path, error, state):
    def hp_space(trial):
        if trial.number == 1:
            if error is None:
                return {"learning_rate": object()}
            raise error
        return {"learning_rate": trial.suggest_float("learning_rate", 0.1, 0.2)}

    trainer = tiny_trainer(tmp_path)
    run = search(trainer, hp_space=hp_space, n_trials=3)
    trials = run.run_summary.trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE, state, TrialState.COMPLETE]
    assert trials[1].user_attrs["failure"].startswith("no hyperparameters were suggested: ")
    assert claim_final(trainer, run, poll_seconds=0.01), "no trial is left running"


def test_an_interrupt_in_hp_space_queues_the_trial_again(tmp_path):
    def interrupted(trial):
        trial.suggest_float("learning_rate", 0.1, 0.2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(tiny_trainer(tmp_path), hp_space=interrupted, n_trials=1)
    states = [trial.state for trial in study_of(tmp_path).trials]
    assert states == [TrialState.FAIL, TrialState.WAITING]


def test_numbers_of_numpy_and_torch_are_numbers(tmp_path):
    trainer = tiny_trainer(tmp_path)

    def hp_space(trial):
        mask = {name: np.bool_(True) for name in trainer.search_space.blocks}
        return {"learning_rate": np.float32(0.5), "per_device_train_batch_size": np.int64(2), "mask": mask}

    for objective in (np.float32, np.float64, torch.tensor, lambda value: [torch.tensor(value)]):
        run = search(
            trainer,
            hp_space=hp_space,
            compute_objective=lambda figures, objective=objective: objective(figures["eval_loss"]),
            study_name=str(objective),
            storage=str(tmp_path / "studies.journal"),
            n_trials=1,
        )
        assert run.objective == 0.5
        assert run.hyperparameters["per_device_train_batch_size"] == 2 and all(run.hyperparameters["mask"].values())


def test_a_trial_that_cannot_be_stored_has_failed(tmp_path, monkeypatch):
    def no_space_left(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(SharedStudy, "_finish", no_space_left)
    with pytest.raises(OSError, match="No space left"):
        search(tiny_trainer(tmp_path), hp_space=rate, n_trials=2)
    (trial,) = study_of(tmp_path).trials
    assert trial.state == TrialState.FAIL and "could not be recorded: OSError" in trial.user_attrs["failure"]


def test_a_sampler_of_one_objective_is_refused_for_two_before_the_first_trial(tmp_path):
    arguments = {"direction": ["minimize"] * 2, "compute_objective": lambda figures: [1.0, 2.0], "n_trials": 2}
    with pytest.raises(ValueError, match="CmaEsSampler knows one objective, not 2"):
        search(tiny_trainer(tmp_path), hp_space=rate, sampler=optuna.samplers.CmaEsSampler(), **arguments)


@pytest.mark.parametrize(
    ("direction", "value", "counts"),
    [(["minimize"] * 2, 1.0, "1 value.* 2 d"), ("minimize", [1.0, 2.0], "2 value.* 1 d")],
)
def test_another_number_of_values_than_directions_ends_the_search_at_the_first_trial(
    tmp_path, direction, value, counts
):
    trainer, calls = tiny_trainer(tmp_path), []

    def compute_objective(figures):
        calls.append(figures)
        return value

    with pytest.raises(ValueError, match=f"compute_objective returned {counts}"):
        search(trainer, hp_space=rate, direction=direction, compute_objective=compute_objective, n_trials=5)
    assert len(calls) == 1
    assert not [trial for trial in study_of(tmp_path).trials if trial.state == TrialState.RUNNING]
