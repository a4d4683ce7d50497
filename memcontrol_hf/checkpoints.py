"""Which of the Trainer's checkpoints a training can go on from, and what none of them may hold."""

import json
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import List
from datasets.fingerprint import Hasher
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .adapter_checks import check_finite
from .adapter_folder import ADAPTER, adapter_parts
from .data import EncodedImages, images_digest

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

RUN = "run.json"
"""File of a checkpoint with what its training was told; see [`run_facts`]."""

_ARGUMENTS = (
    "seed", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "adam_beta1",
    "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm", "snr_gamma", "caption_dropout", "mitigations",
    "resolution", "fit", "background",
)  # fmt: skip
# What decides the noise process, in the configuration of a scheduler.
_NOISE = (
    "prediction_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas",
    "rescale_betas_zero_snr", "shift", "use_dynamic_shifting", "base_shift", "max_shift",
)  # fmt: skip
# The schedules whose rate at a step is the same however many steps follow.
_WITHOUT_END = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")


def run_facts(
    args: "TrainingArguments",
    images: EncodedImages,
    base_weights: str,
    scheduler: Mapping[str, Any],
    mixed_precision: str = "no",
    optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """What a training was told that decides its result, besides mask, method and learning rate.

    How the rows of a step are divided into batches and among processes decides the result in the last step of an
    epoch alone, where that step has fewer rows: its batches are of different sizes then, and count alike. The number
    of steps decides the result where the schedule of the learning rate depends on it.

    Args:
        args ([`MemControlTrainingArguments`]): Training arguments.
        images ([`~memcontrol_hf.data.EncodedImages`]): Training images.
        base_weights (`str`): What [`~memcontrol_hf.adapter_checks.base_weights`] says of the frozen base.
        scheduler (mapping): Configuration of the scheduler by which noise is added.
        mixed_precision (`str`): Precision of the training: `no`, `fp16` or `bf16`.
        optimizer (tuple, *optional*): Class of an optimizer of the user's own, and its keyword arguments.
    """
    facts = {name: getattr(args, name) for name in _ARGUMENTS}
    batch, batches, processes = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    facts["rows of a step"] = batch * batches * processes
    if len(images) % facts["rows of a step"]:
        facts["division of a step"] = f"{processes} process(es) x {batches} batch(es) x {batch} row(s)"
    if args.lr_scheduler_type not in _WITHOUT_END or 0 < args.warmup_steps < 1:
        facts["end of the schedule"] = args.max_steps if args.max_steps > 0 else f"{args.num_train_epochs} epochs"
    facts["training images"] = images_digest(images)
    lists = [name for name, feature in images.images.features.items() if isinstance(feature, List)]
    facts["further captions"] = Hasher.hash([images.images[name][:] for name in lists])
    facts["base weights"] = base_weights
    facts |= {f"scheduler's {name}": scheduler.get(name) for name in _NOISE}
    facts["mixed_precision"] = mixed_precision
    facts["optimizer"] = None if optimizer is None else [optimizer[0].__qualname__, optimizer[1]]
    return json.loads(json.dumps(facts, default=str))


def differing_facts(checkpoint: str | Path, facts: dict[str, Any], max_steps: int) -> list[str]:
    """In which of [`run_facts`] a checkpoint's training was another, in words.

    Args:
        checkpoint (`str`): Folder of the checkpoint; one without the file, of an earlier version, agrees.
        facts (`dict`): Facts of the training that is to go on.
        max_steps (`int`): Its number of steps; fewer than the checkpoint has are a difference.
    """
    run, state = Path(checkpoint) / RUN, Path(checkpoint) / TRAINER_STATE_NAME
    stored = json.loads(run.read_text(encoding="utf-8")) if run.exists() else {}
    found = [
        f"{name} was {stored[name]} and is {value}"
        for name, value in facts.items()
        if name in stored and stored[name] != value
    ]
    step = json.loads(state.read_text(encoding="utf-8"))["global_step"] if state.exists() else 0
    if 0 < max_steps < step:
        found.append(f"it has made {step} steps, and {max_steps} are asked for")
    return found


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
