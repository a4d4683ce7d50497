"""Runs in trackers, where the Trainer's own callbacks do not suffice: one run for each trial.

A run gets aggregate figures only, and nothing that names a place of this machine. An error of a tracker is said, and
ends neither a trial nor a training.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.integrations.integration_utils import (
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    WandbLogModel,
    get_reporting_integration_callbacks,
)

from .error_lines import first_line
from .progress import bar

logger = logging.getLogger(__name__)


class _LossProgressCallback(ProgressCallback):
    """The Trainer's progress bar, on a terminal only, with the loss in it instead of a printed line for each log."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar = bar(text="training", total=state.max_steps)
        self.current_step = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=logs["loss"])


class _TensorBoardCallback(TensorBoardCallback):
    """The Trainer's own, without the model's config, which it can read from a transformers model only."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control)


def adjust_trackers(trainer: Trainer) -> None:
    """Fit the Trainer's own trackers and progress bar to models of diffusers, and let no tracker end a training."""
    for callback in trainer.callback_handler.callbacks:
        # With WANDB_LOG_MODEL it would upload the arguments too, and it cannot read a denoiser's config.
        if isinstance(callback, WandbCallback):
            callback._log_model = WandbLogModel.FALSE
    if (tensorboard := trainer.pop_callback(TensorBoardCallback)) is not None:
        trainer.add_callback(_TensorBoardCallback(tensorboard.tb_writer))
    trackers = tuple(get_reporting_integration_callbacks(trainer.args.report_to))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, trackers):
            _shield(callback)
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_LossProgressCallback)


@contextmanager
def tolerated(what: str) -> Iterator[None]:
    """Say an error of a tracker in one line and go on; the line begins with what does not work."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        logger.warning(f"{what} ({type(error).__name__}: {reason}): everything else goes on without")


def _shield(callback: TrainerCallback) -> None:
    """Let an error of a tracker's callback be said once; nothing more is logged there."""
    failed = False

    def shielded(method: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal failed
            if failed:
                return None
            with tolerated(f"{type(callback).__name__.strip('_')} fails"):
                return method(*args, **kwargs)
            failed = True

        return call

    for name in dir(TrainerCallback):
        if name.startswith("on_"):
            setattr(callback, name, shielded(getattr(callback, name)))


def start_tracking(trainer: Trainer, study_name: str, name: str, job_type: str, config: Mapping[str, Any]) -> None:
    """Begin a run in the trackers of `args.report_to`; the Trainer's own callbacks then log into this run.

    A study is a group in Weights & Biases, and each trial is a run of the group. In TensorBoard each trial has a
    folder, in Trackio a name.

    Args:
        trainer (`transformers.Trainer`):
            The trainer whose figures are logged.
        study_name (`str`):
            Name of the study.
        name (`str`):
            Name of the run within the study.
        job_type (`str`):
            Kind of the run: `"trial"`, `"repeat"` or `"final"`.
        config (`dict`):
            Hyperparameters and other settings of the run, for Weights & Biases. Without a key, and where no server
            answers, the runs are kept offline.
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
    import wandb  # only where it is asked for: importing it takes a while

    folder = os.getenv("WANDB_DIR", trainer.args.output_dir)
    run = {"group": study_name, "name": name, "job_type": job_type, "config": dict(config), "dir": folder}
    with tolerated("Weights & Biases fails"):
        try:
            _start_wandb_run(**run)
        except wandb.Error as error:
            os.environ["WANDB_MODE"] = "offline"  # for the runs that follow, too
            logger.warning(
                f"Weights & Biases: {first_line(error)} The runs are kept offline from now on: "
                f"`wandb login`, then `wandb sync {folder}/wandb/offline-run-*` uploads them"
            )
            _start_wandb_run(**run)


def _start_wandb_run(**run: Any) -> None:
    import wandb

    wandb.init(
        project=os.getenv("WANDB_PROJECT", "memcontrol"),
        mode=os.getenv("WANDB_MODE"),  # wandb itself reads it once in a process
        reinit="finish_previous",
        **run,
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
        with tolerated("the tracker's run cannot be ended"):
            run.finish()


def run_url() -> str | None:
    """The address of the current run, if it has one."""
    return run.url if (run := current_run()) else None


def log_push(address: str) -> None:
    """Link the current run, if there is one, to the adapter that was pushed to `address`."""
    if run := current_run():
        with tolerated("the address of the adapter cannot be put into the tracker's run"):
            run.summary["hub"] = address


def current_run() -> Any | None:
    """The current run of Weights & Biases, without importing `wandb`."""
    return getattr(sys.modules.get("wandb"), "run", None)
