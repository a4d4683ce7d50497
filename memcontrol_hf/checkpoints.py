"""Which of the Trainer's checkpoints a training can go on from, and what none of them may hold."""

import json
import logging
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .adapter_checks import check_finite
from .adapter_folder import ADAPTER, adapter_parts

logger = logging.getLogger(__name__)


def newest_whole(folder: str | Path) -> str | None:
    """The newest checkpoint in an output folder that can be gone on from; `None` when there is none.

    A checkpoint that is damaged, or lacks a part of the training's state, is named in a warning and left as it is.
    """
    found = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    numbered = {int(number): path for path in found if (number := path.name.rpartition("-")[2]).isdigit()}
    for _, checkpoint in sorted(numbered.items(), reverse=True):
        reason = damage(checkpoint)
        if reason is None:
            return str(checkpoint)
        logger.warning(f"{checkpoint} is not gone on from, and is left as it is: {reason}")
    return None


def damage(checkpoint: str | Path) -> str | None:
    """Why a training cannot go on from a checkpoint, in words; `None` for a whole checkpoint.

    The files are read once. Without the optimizer's state, say, the Trainer would go on in silence, to another result.
    """
    checkpoint = Path(checkpoint)
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        if not isinstance(state.get("global_step"), int):
            return f"{TRAINER_STATE_NAME} holds no step"
        for name in (OPTIMIZER_NAME, SCHEDULER_NAME):
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
        if not (random_states := sorted(checkpoint.glob("rng_state*.pth"))):
            return "rng_state.pth is missing"
        for file in (checkpoint / OPTIMIZER_NAME, checkpoint / SCHEDULER_NAME, *random_states):
            with zipfile.ZipFile(file) as archive:  # the format of torch.save, which holds checksums
                if broken := archive.testzip():
                    return f"{file.name} is damaged in {broken}"
        if not (parts := adapter_parts(checkpoint)):
            return f"{ADAPTER} or its configuration is missing"
        for part in parts:
            check_finite(load_file(checkpoint / part / ADAPTER))
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, zipfile.BadZipFile, SafetensorError, EOFError) as error:
        return f"it is damaged: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return None


def check_whole(checkpoint: str | Path) -> None:
    """Raise `ValueError` for a folder that is there, but is no checkpoint that a training can go on from."""
    if Path(checkpoint).is_dir() and (reason := damage(checkpoint)):
        raise ValueError(
            f"the checkpoint {checkpoint} cannot be gone on from: {reason}. Give an earlier one, or leave "
            "--resume_from_checkpoint out to start again"
        )


def check_parameters(model: torch.nn.Module, step: int, learning_rate: float) -> None:
    """Raise [`Diverged`] when a trained parameter is not finite."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not all(torch.isfinite(parameter).all() for parameter in trained):
        raise Diverged("a trained parameter", step, learning_rate)


class Diverged(ValueError):
    """A training has left the finite numbers.

    Args:
        what (`str`): What is not finite.
        step (`int`): Number of the step, from 1.
        learning_rate (`float`): The learning rate.
    """

    def __init__(self, what: str, step: int, learning_rate: float) -> None:
        super().__init__(
            f"{what} is not finite at step {step} with the learning rate {learning_rate:.3g}, so the training ends: "
            "try a lower learning rate, a warmup, a lower max_grad_norm, or bf16 in the place of fp16"
        )
