import logging
import os
import signal
import sys
import time
from pathlib import Path

import optuna
import pytest
import ray
from conftest import images_of, tiny_trainer
from optuna.trial import TrialState
from transformers import TrainerCallback

from memcontrol_hf.search import SearchSettings, SeededSampler, SharedStudy

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find this file
RATES = (1e-2, 1e-1)


class Lines(logging.Handler):
    """What was logged."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def workers_of(study: optuna.Study) -> set[int]:
    return {t.user_attrs["worker"][1] for t in study.get_trials(deepcopy=False) if "worker" in t.user_attrs}


def space_of(blocks, workers: int):
    """The default space, but the fourth trial is wrong, and the first waits until so many workers have begun one."""

    def hp_space(trial: optuna.Trial) -> dict:
        mask = {name: trial.suggest_categorical(f"mask.{name}", [True, False]) for name in blocks}
        hyperparameters = {"mask": mask, "learning_rate": trial.suggest_float("learning_rate", *RATES, log=True)}
        deadline = time.monotonic() + 300
        while len(workers_of(trial.study)) < workers and time.monotonic() < deadline:
            time.sleep(0.1)
        return {**hyperparameters, "no_such_argument": 1} if trial.number == 3 else hyperparameters

    return hp_space


def search(folder, workers: int, **arguments):
    """A search of eight trials, of images whose captions are longer than the text encoder reads."""
    train = images_of(10, seed=1)
    train = train.remove_columns("text").add_column("text", ["confidential"] * len(train))
    trainer = tiny_trainer(folder, train=train, objectives=["amd", "membership_auc"])
    return trainer.hyperparameter_search(
        space_of(trainer.search_space.blocks, workers),
        n_trials=8,
        sampler="random",
        learning_rate_range=RATES,
        **arguments,
    )


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory):
    """The runs that two workers found, what they logged here, and the folder of Ray's own logs."""
    shown, logger = Lines(), logging.getLogger("memcontrol_hf")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(shown)
    session = ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False).address_info["session_dir"]
    try:
        runs = search(tmp_path_factory.mktemp("ray"), 2, backend="ray", num_workers=2)
        assert ray.is_initialized(), "who started Ray ends it"
        return runs, shown.lines, Path(session) / "logs"
    finally:
        ray.shutdown()
        logger.removeHandler(shown)
        logger.setLevel(level)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The runs of the same search in this process."""
    return search(tmp_path_factory.mktemp("plain"), 1)


def test_two_workers_of_ray_find_what_one_process_finds(on_ray, plain):
    runs, _, _ = on_ray
    trials, expected = runs[0].run_summary.trials, plain[0].run_summary.trials
    assert len(workers_of(runs[0].run_summary)) == 2 and os.getpid() not in workers_of(runs[0].run_summary)
    assert [t.params for t in trials[:8]] == [t.params for t in expected]
    assert [t.values for t in trials[:8]] == [t.values and pytest.approx(t.values, rel=1e-5) for t in expected]
    assert sum(t.state == TrialState.COMPLETE for t in trials) == 7, "each once"
    assert [run.run_id for run in runs] == [run.run_id for run in plain]
    assert [run.hyperparameters for run in runs] == [run.hyperparameters for run in plain]


def test_a_trial_that_fails_in_a_worker_is_recorded_and_the_search_goes_on(on_ray):
    failed = on_ray[0][0].run_summary.trials[3]
    assert failed.state == TrialState.FAIL
    assert failed.user_attrs["failure"].startswith("ValueError: unknown hyperparameter 'no_such_argument'")


def test_what_workers_log_is_logged_by_the_process_that_searches(on_ray):
    lines = [line for line in on_ray[1] if line.startswith("trial ")]
    assert sorted(int(line.split()[1]) for line in lines) == list(range(8))


def test_no_caption_is_in_the_logs_of_ray(on_ray):
    """Which diffusers, that cuts the captions off, would quote."""
    files = [file for file in on_ray[2].rglob("*") if file.is_file()]
    assert any(file.name.startswith("worker-") for file in files)
    assert not [file.name for file in files if b"confidential" in file.read_bytes()]


def dies_once(marker: str):
    """Objectives that kill their process when they are first asked for."""

    def objectives(figures: dict[str, float]) -> list[float]:
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return [figures["eval_loss"], figures["eval_membership_auc"]]
        os.kill(os.getpid(), signal.SIGKILL)

    return objectives


def test_a_worker_that_is_killed_is_replaced_and_its_trial_repeated(tmp_path):
    """Here Ray is started, and ended, by the search."""
    trainer = tiny_trainer(tmp_path, max_steps=2, objectives=["loss", "membership_auc"])
    runs = trainer.hyperparameter_search(
        compute_objective=dies_once(str(tmp_path / "died")), n_trials=3, backend="ray", num_workers=1
    )
    assert not ray.is_initialized()
    study = runs[0].run_summary
    assert [t.state.name for t in study.trials] == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert study.trials[0].user_attrs["failure"] == "its process ended"
    assert study.trials[1].params == study.trials[0].params
    assert len(workers_of(study)) == 2


def test_a_trial_of_another_machine_is_repeated_when_its_worker_is_known_to_be_dead():
    study, worker = optuna.create_study(), ["elsewhere", 1, 1.5]
    shared = SharedStudy(study, SearchSettings(1, "minimize"))
    trial = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
    trial.set_user_attr("worker", worker)
    trial.set_user_attr("hyperparameters", trial.params)
    shared.queue_again_what_died()
    shared.queue_again_what_died(["elsewhere", 2, 1.5])
    assert [t.state for t in study.trials] == [TrialState.RUNNING]
    shared.queue_again_what_died(worker)
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.WAITING]
    assert study.ask({"x": optuna.distributions.FloatDistribution(0, 1)}).params == trial.params


class Holding(TrainerCallback):
    """A callback that holds the trainer."""

    def __init__(self, trainer):
        self.trainer = trainer


def test_what_ray_cannot_do_is_refused_before_it_is_started(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(ValueError, match="num_workers must be at least 1, but is 0"):
        trainer.hyperparameter_search(backend="ray", num_workers=0)
    with pytest.raises(ValueError, match="would draw the same in each worker: use a name or a SeededSampler"):
        trainer.hyperparameter_search(backend="ray", sampler=optuna.samplers.RandomSampler())
    with pytest.raises(ValueError, match="unknown sampler 'cma'"):
        trainer.hyperparameter_search(backend="ray", sampler="cma")
    with pytest.raises(ValueError, match="callbacks must not hold the trainer"):
        trainer.add_callback(Holding(trainer))
        trainer.hyperparameter_search(backend="ray", sampler=SeededSampler(optuna.samplers.RandomSampler, 0))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"needs Ray: pip install 'memcontrol_hf\[ray\]'"):
        trainer.hyperparameter_search(backend="ray")
    assert not ray.is_initialized()


def test_a_launch_of_several_processes_is_refused_since_ray_starts_the_workers(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path)
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    with pytest.raises(ValueError, match="Ray starts the workers: launch one process, not 2"):
        trainer.hyperparameter_search(backend="ray")
    assert not ray.is_initialized()
