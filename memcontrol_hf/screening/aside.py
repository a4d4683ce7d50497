"""A training in between others, of which no trace is left in the trainer."""

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import DefaultFlowCallback, ProgressCallback, Trainer, TrainerControl
from transformers.trainer_callback import CallbackHandler

_QUIET = {
    "save_strategy": "no",
    "eval_strategy": "no",
    "logging_strategy": "no",
    "eval_on_start": False,
    "load_best_model_at_end": False,
}


@contextmanager
def training_aside(trainer: Trainer, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Let a trainer train something else, and put everything back afterwards, also after an error.

    Within the context the trainer has a copy of its arguments, some of them changed. It saves, evaluates and logs
    nothing by itself, and none of its callbacks is called, trackers included; only the progress bar stays. Afterwards
    its attributes, the global random states, the gradient scaler and the modules' training modes are as before. The
    caller takes off the adapters that are put on in between.

    Args:
        trainer (`transformers.Trainer`): The trainer.
        arguments (`dict`): Training arguments that are different within the context.
    """
    accelerator = trainer.accelerator
    attributes, prepared = dict(vars(trainer)), dict(vars(accelerator))
    scaler = accelerator.scaler and accelerator.scaler.state_dict()
    modes = [(module, module.training) for module in trainer.model.modules()]
    bars = [type(bar)() for bar in trainer.callback_handler.callbacks if isinstance(bar, ProgressCallback)]
    with global_random_states_kept(trainer.args.device):
        trainer.args = copy.copy(trainer.args)
        for name, value in {**_QUIET, **arguments}.items():
            setattr(trainer.args, name, value)
        trainer.control = TrainerControl()
        trainer.callback_handler = CallbackHandler([DefaultFlowCallback(), *bars], trainer.model, None, None, None)
        try:
            yield
        finally:
            accelerator.free_memory()
            for restored, kept in ((trainer, attributes), (accelerator, prepared)):
                vars(restored).clear()
                vars(restored).update(kept)
            if scaler is not None:
                accelerator.scaler.load_state_dict(scaler)
            for module, mode in modes:
                module.training = mode


@contextmanager
def global_random_states_kept(device: torch.device) -> Iterator[None]:
    """Keep the global random states of Python, NumPy and PyTorch, on the CPU and on a CUDA device."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
