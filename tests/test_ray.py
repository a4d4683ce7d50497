import logging
import os
import signal
import sys
import time

import optuna
import pytest
from conftest import tiny_trainer
from optuna.trial import TrialState

from memcontrol_hf.ray_workers import run_search_on_ray
from memcontrol_hf.search import SeededSampler

N_TRIALS, RATES = 8, (1e-2, 1e-1)


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine, for two workers."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def space_of(blocks, together: bool):
    """The default space; a trial of the first two waits for the other worker's, if they are to work together."""

    def hp_space(trial: optuna.Trial) -> dict:
        mask = {name: trial.suggest_categorical(f"mask.{name}", [True, False]) for name in blocks}
        hyperparameters = {"mask": mask, "learning_rate": trial.suggest_float("learning_rate", *RATES, log=True)}
        deadline = time.monotonic() + 120
        while together and len(workers_of(trial.study)) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        return hyperparameters

    return hp_space


def workers_of(study: optuna.Study) -> set[int]:
    return {t.user_attrs["worker"][1] for t in study.get_trials(deepcopy=False) if "worker" in t.user_attrs}


def objective_that_fails_once(figures: dict[str, float]) -> list[float]:
    """One trial, the frozen base, has no training loss that differs from what it was."""
    if figures["eval_fid"] == figures["eval_fid_of_base"]:
        raise ArithmeticError
    return [figures["eval_fid"], figures["eval_membership_auc"]]
