"""The settings of a search, which validate themselves."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.samplers import BaseSampler, CmaEsSampler

from .claims import check_study_name
from .sampler import check_sampler

QUALITY, MEMORIZATION = {"fid", "loss"}, {"amd", "membership_auc", "noise_norm"}
"""Objectives between which masks are a trade-off."""

_REFUSED = {
    "callbacks": "give the trainer callbacks=, which are called in each training, or watch the study with "
    "optuna.load_study in another process",
    "pruner": "no pruner of Optuna knows several objectives: prune_at=0.25 stops a trial that two others dominate",
    "timeout": "give n_trials, and trial_timeout= for each trial; a search that was interrupted goes on",
    "n_jobs": "start the same search in several processes with one storage=, or give backend='ray', num_workers=2",
    "load_if_exists": "leave it out, since a study that is in the storage is always gone on with",
    "directions": "give direction=[...]",
    "gc_after_trial": "leave it out, since each training begins with a collection of garbage",
    "catch": "leave it out, since a trial that fails is recorded and the search goes on",
    "show_progress_bar": "leave it out, since a terminal has a bar",
}
"""Options of Optuna that a search cannot take, and the way instead."""


def check_options(options: Iterable[str]) -> None:
    """Raise `ValueError` for an option of Optuna that a search cannot take; the error names the way instead."""
    for name in options:
        if name in _REFUSED:
            raise ValueError(f"{name} is not supported in a search: {_REFUSED[name]}")


@dataclass
class SearchSettings:
    """How a study is searched.

    Args:
        n_trials (`int`):
            Number of finished trials that the study shall hold in the end.
        directions (`str` or list of `str`):
            `"minimize"` or `"maximize"` for each objective.
        objectives (list of `str`, *optional*):
            Metrics that are the objectives; `None` when the caller computes the objectives from the figures.
        learning_rate_range (`tuple[float, float]`):
            Lowest and highest learning rate of the default `hp_space`, which searches on a logarithmic scale; the rate
            is fixed when both are equal.
        sampler (`str` or Optuna sampler):
            One of `SAMPLERS`; multivariate TPE by default. A sampler object is used as it is, so two workers need two
            objects with different seeds.
        storage (`str`, *optional*):
            Path of a journal file, address of a database, or `grpc://host:port` of a gRPC proxy; by default the file
            `study.journal` in the output folder. Any number of processes may work on one study.
        study_name (`str`):
            Name of the study in the storage, and of the group of runs in trackers. It must not end in `-final` or
            `-screening`.
        settings (`dict`, *optional*):
            Everything that the study's figures depend on, JSON-able. The study keeps these settings, and a search that
            would go on with others is refused.
        enqueue (list of `dict`, *optional*):
            Parameters of the first trials, such as `{"mask.mid_block.attentions.0": True, "learning_rate": 1e-4}`; one
            that is left out is drawn. By default all blocks on, and all blocks off (the frozen base).
        screen (`bool`, *optional*):
            Whether a screening is made before the first trial, whose masks are tried after those of `enqueue`; see
            [`~memcontrol_hf.screening.Screening`]. By default it is made for a quality and a memorization objective,
            unless there is an `hp_space`, or something that does not go with it. The study keeps it. It is no trial,
            and `trial_timeout` does not end it.
        screen_steps (`int`, *optional*):
            Number of steps of the screening; as many as a trial has by default.
        screen_seeds (`int`):
            Number of trainings of the screening, each with a random seed of its own, whose figures are averaged.
        memorization_budget (`float`, *optional*):
            Worst value of the second objective that is allowed. The budget is a constraint, which the sampler learns;
            trials over the budget are not on the front.
        max_trainable_percent (`float`, *optional*):
            Largest share of the parameters that a mask may train. A mask over this share is not tried and does not
            count.
        trial_timeout (`float`, *optional*):
            Seconds after which the training of a trial is stopped; the trial has failed then. A trial of another
            machine that runs for twice as long, or twice as long as the longest trial before, is given up.
        prune_at (`float`, *optional*):
            Share of a trial's steps, between 0 and 1, after which the trial is measured without sampling an image (by
            the `loss` on validation images instead of `fid`, by `membership_auc` instead of `amd`). The trial is
            stopped when two other trials dominate it there. A stopped trial counts, and is on no front.

    Raises:
        ValueError: says the value, what was allowed, and what to do.
    """

    n_trials: int
    directions: str | Sequence[str]
    objectives: Sequence[str] | None = None
    learning_rate_range: tuple[float, float] = (1e-5, 1e-3)
    sampler: str | BaseSampler = "tpe"
    storage: str | None = None
    study_name: str = "memcontrol"
    settings: Mapping[str, Any] | None = None
    enqueue: Sequence[Mapping[str, Any]] | None = None
    screen: bool | None = None
    screen_steps: int | None = None
    screen_seeds: int = 1
    memorization_budget: float | None = None
    max_trainable_percent: float | None = None
    trial_timeout: float | None = None
    prune_at: float | None = None

    def __post_init__(self) -> None:
        self.directions = [self.directions] if isinstance(self.directions, str) else list(self.directions)
        check_n_trials(self.n_trials)
        check_study_name(self.study_name)
        low, high = self.learning_rate_range
        if not 0 < low <= high:
            raise ValueError(f"the learning rates must be positive and in order, but got {low} to {high}")
        if self.screen_seeds < 1:
            raise ValueError(f"screen_seeds must be at least 1, but is {self.screen_seeds}")
        check_budget(self.memorization_budget, self.directions)
        check_prune_at(self.prune_at)
        if self.prune_at is not None and self.objectives is None:
            raise ValueError("prune_at knows the objectives of the arguments alone: leave compute_objective out")
        if self.objectives is not None and len(self.directions) != len(self.objectives):
            raise ValueError(
                f"direction has {len(self.directions)} value(s) for the {len(self.objectives)} objectives "
                f"{', '.join(self.objectives)}: give one for each, or a compute_objective, or other objectives"
            )
        if isinstance(self.sampler, str):
            check_sampler(self.sampler)
        if isinstance(self.sampler, CmaEsSampler) and len(self.directions) > 1:
            raise ValueError(f"CmaEsSampler knows one objective, not {len(self.directions)}: use another sampler")


def named_values(values: Sequence[float], objectives: Sequence[str] | None) -> str:
    """The values of the objectives in words, each with its name if the names are known."""
    names = [""] * len(values) if objectives is None else [f"{name} " for name in objectives]
    return ", ".join(f"{name}{value:.4g}" for name, value in zip(names, values, strict=True))


def check_n_trials(n_trials: int, name: str = "n_trials") -> None:
    """Raise `ValueError` for less than one trial; `name` is what the caller calls the setting."""
    if n_trials < 1:
        raise ValueError(f"{name} must be at least 1, but is {n_trials}")


def check_prune_at(prune_at: float | None, name: str = "prune_at") -> None:
    """Raise `ValueError` for a value that is no share of the steps; `name` is what the caller calls the setting."""
    if prune_at is not None and not 0 < prune_at < 1:
        raise ValueError(f"{name} must be a share of the steps between 0 and 1, but is {prune_at:g}")


def check_budget(budget: float | None, objectives: Sequence[Any], name: str = "a memorization budget") -> None:
    """Raise `ValueError` for a budget that limits nothing; `name` is what the caller calls the setting."""
    if budget is None:
        return
    if len(objectives) < 2:
        raise ValueError(f"{name} needs a second objective, the memorization")
    if not math.isfinite(budget):
        raise ValueError(f"{name} must be a number, but is {budget}")
    if objectives[1] in QUALITY:
        raise ValueError(
            f"{name} limits the second objective, and that is {objectives[1]}, a quality: name the memorization second"
        )
