"""Trackers, as far as the Trainer's own callbacks do not go: one run a trial, in Weights & Biases one group a study.

Aggregates only, and nothing that names a place of this machine.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback

if TYPE_CHECKING:
    from .trainer import MemControlTrainer


def start_tracking(
    trainer: "MemControlTrainer", study_name: str, name: str, job_type: str, hyperparameters: Mapping[str, Any]
) -> None:
    """Begin a run in the trackers that are asked for; the Trainer's own callbacks then log into it.

    A study is a group in Weights & Biases, and each trial a run; a folder each in TensorBoard; a name each in Trackio.
    """
    trainer.args.run_name = f"{study_name}-{name}"
    for callback in trainer.callback_handler.callbacks:
        # What is measured after a training would be logged into a run that the next training goes on with.
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = str(Path(trainer.args.output_dir) / "runs" / study_name / name)
            callback.on_train_end(trainer.args, trainer.state, trainer.control)
        elif isinstance(callback, TrackioCallback):
            callback.on_train_end(trainer.args, trainer.state, trainer.control)
    if "wandb" not in trainer.args.report_to or not trainer.is_world_process_zero():
        return
    import wandb

    wandb.init(
        project=os.getenv("WANDB_PROJECT", "memcontrol"),
        group=study_name,
        name=name,
        job_type=job_type,
        config={**hyperparameters, "objectives": list(trainer.args.objectives)},
        dir=os.getenv("WANDB_DIR", trainer.args.output_dir),
        reinit="finish_previous",
        # Neither the command line, the working directory, the host and the user, nor what is printed, nor the code.
        settings=wandb.Settings(
            x_disable_meta=True,
            console="off",
            disable_git=True,
            disable_code=True,
            host="-",
            username="-",
            program="-",
        ),
    )


def end_tracking() -> None:
    """End the current run, if there is one, in a process that may be killed before its exit."""
    if run := current_run():
        run.finish()


def run_url() -> str | None:
    """The address of the current run, if it has one."""
    return run.url if (run := current_run()) else None


def log_push(address: str) -> None:
    """Link the current run to what was pushed, if there is a run."""
    if run := current_run():
        run.summary["hub"] = address


def current_run():
    """The current run of Weights & Biases, without importing it."""
    return getattr(sys.modules.get("wandb"), "run", None)
