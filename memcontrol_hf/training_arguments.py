"""The training arguments: the arguments of transformers' Trainer, and further ones for a diffusion model."""

import copy
import dataclasses
import itertools
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import SchedulerType, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames
from transformers.utils import is_bitsandbytes_available

from .evaluation import check_objectives
from .images import Framing
from .mitigations import parse_mitigations, public_mitigations

logger = logging.getLogger(__name__)

# The ranges of the arguments that are numbers. transformers takes every value for its own.
_SHARES = ("caption_dropout", "search_fraction", "adam_beta1", "adam_beta2")
_POSITIVE = ("num_train_epochs", "snr_gamma")
_NOT_NEGATIVE = (
    "learning_rate",
    "weight_decay",
    "adam_epsilon",
    "max_grad_norm",
    "warmup_steps",
    "eval_guidance_scale",
)
_COUNTS = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "search_max_steps"),
    *("eval_num_images", "eval_inference_steps", "eval_num_timesteps", "resolution"),
)
# The trackers that are supported, and the packages of which each needs one.
_TRACKERS = {"wandb": ["wandb"], "tensorboard": ["tensorboard", "tensorboardX"], "trackio": ["trackio"]}
_OPTIONAL = ("snr_gamma", "search_max_steps")
# What a training reads anew each time. All else is read once when the trainer is made, changes no training, or would
# make the figures of two runs incomparable.
_HYPERPARAMETERS = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs"),
    *("search_max_steps", "search_fraction", "caption_dropout", "snr_gamma"),
)
# Beginnings of the names of optimizers that transformers takes from bitsandbytes.
_OF_BITSANDBYTES = ("adamw_bnb", "adamw_8bit", "ademamix", "lion", "paged", "rmsprop_bnb")
# Arguments of transformers that would have no effect, or break the training.
_REFUSED = {
    "remove_unused_columns": "the trainer itself makes the denoiser's inputs from the columns; leave it out",
    "bf16_full_eval": "all is measured in the precision of the training; load the pipeline in bfloat16, or use bf16",
    "fp16_full_eval": "all is measured in the precision of the training; load the pipeline in float16, or use fp16",
    "label_smoothing_factor": "the loss of a denoiser has no labels; leave it out",
    "neftune_noise_alpha": "a denoiser has no token embeddings; the mitigation gaussian_noise adds noise to captions'",
}
# Arguments of transformers' Trainer that a trainer of denoisers cannot take, and the way instead.
_REFUSED_BY_TRAINER = {
    "model": "give pipeline=, whose denoiser is tuned",
    "model_init": "give pipeline=, whose denoiser gets new adapters for each mask",
    "data_collator": "leave it out, since the trainer reads latents and conditions that it has encoded",
    "processing_class": "leave it out, since the pipeline has its own tokenizers",
    "compute_loss_func": "use snr_gamma or mitigations= of the arguments, or override compute_loss",
    "compute_metrics": "a denoiser predicts no labels: name metrics in evaluate(metrics=[...]), and give "
    "hyperparameter_search a compute_objective, which gets their figures",
    "preprocess_logits_for_metrics": "a denoiser has no logits: name metrics in evaluate(metrics=[...])",
    "optimizers": "each run trains new parameters: give optimizer_cls_and_kwargs=(AdamW, {...}), or optim= and "
    "lr_scheduler_type= of the arguments",
}


def check_trainer_arguments(args: Any, optimizer: Any, others: Mapping[str, Any]) -> None:
    """Check what a trainer is made with beside the pipeline and the images.

    Args:
        args ([`MemControlTrainingArguments`]): arguments of the training.
        optimizer (tuple, *optional*): the class of the optimizer, and its keyword arguments.
        others (`dict`): further keyword arguments.

    Raises:
        ValueError: for an argument of transformers that the trainer cannot take; the error names the way instead.
        TypeError: for an argument that transformers does not know.
    """
    for name, value in others.items():
        if name not in _REFUSED_BY_TRAINER:
            raise TypeError(f"MemControlTrainer got an unexpected keyword argument {name!r}")
        if value is not None and value != (None, None):
            raise ValueError(f"{name} is not supported: {_REFUSED_BY_TRAINER[name]}")
    if not isinstance(args, MemControlTrainingArguments):
        raise ValueError(
            f"args is a {type(args).__name__}: give MemControlTrainingArguments(...), which takes every argument of "
            "TrainingArguments and those of the images"
        )
    if optimizer is not None and "lr" in optimizer[1]:
        raise ValueError(
            f"optimizer_cls_and_kwargs has lr={optimizer[1]['lr']}, which a search varies: give learning_rate= of the "
            "arguments"
        )


def _check_trackers(names: Sequence[str]) -> None:
    """Raise `ValueError` for a tracker that is unknown, or whose package is missing."""
    for name in names:
        packages = _TRACKERS.get(name, [])
        if not packages and name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"unknown tracker {name!r}: use {', '.join(_TRACKERS)}, all or none")
        if packages and not any(map(find_spec, packages)):
            raise ValueError(f"the tracker {name} needs its package, which is missing: pip install {packages[0]}")


@dataclass
class MemControlTrainingArguments(TrainingArguments):
    """The arguments of transformers' Trainer, and further ones for a diffusion model and its measures.

    Args:
        resolution (`int`):
            Side of the images in pixels.
        fit (`str`), background (`str`):
            How an image becomes a square; see [`~memcontrol_hf.images.Framing`].
        snr_gamma (`float`, *optional*):
            Min-SNR weighting of the loss (https://huggingface.co/papers/2303.09556); 5 is usual, none by default.
        caption_dropout (`float`):
            Share of the captions that are replaced by the empty caption in training, so that guidance keeps working.
        mitigations (`list[str]`):
            Mitigations of memorization, each written `NAME[:arguments]`; see [`~memcontrol_hf.mitigations`].
            Mitigations apply to every training, also to the trials of a search.
        search_fraction (`float`):
            Share of the training rows on which each trial of a search is trained.
        search_max_steps (`int`, *optional*):
            Number of training steps of a trial; `max_steps` by default.
        objectives (`list[str]`):
            Objectives of the search: names in [`~memcontrol_hf.evaluation.METRICS`], quality first.
        eval_num_images (`int`):
            Number of images generated for `fid`, and as many again for `amd`; at most one for each caption.
        eval_inference_steps (`int`):
            Number of sampling steps of the generated images.
        eval_guidance_scale (`float`):
            Guidance scale of the generated images.
        eval_num_timesteps (`int`):
            Number of fixed timesteps that the membership attack and the noise norm use.

    Raises:
        ValueError: for a value out of its range, an unknown objective or mitigation, a mitigation that does not work
            with the other arguments, and an 8-bit optimizer without bitsandbytes.
    """

    resolution: int = field(default=512, metadata={"help": "Side of the images in pixels."})
    fit: str = field(default="crop", metadata={"help": "How an image becomes a square: crop or pad."})
    background: str = field(default="white", metadata={"help": "Colour of bars, and under what is transparent."})
    snr_gamma: float | None = field(default=None, metadata={"help": "Min-SNR weighting of the loss; 5 is usual."})
    caption_dropout: float = field(default=0.0, metadata={"help": "Share of captions replaced by the empty caption."})
    mitigations: list[str] = field(
        default_factory=list, metadata={"help": "Means against memorization, each written NAME[:arguments]."}
    )
    search_fraction: float = field(default=1.0, metadata={"help": "Share of the training rows used in a trial."})
    search_max_steps: int | None = field(default=None, metadata={"help": "Number of training steps of a trial."})
    objectives: list[str] = field(
        default_factory=lambda: ["loss", "membership_auc"],
        metadata={"help": "Objectives of the search, quality first."},
    )
    eval_num_images: int = field(default=128, metadata={"help": "Number of images generated for fid and for amd."})
    eval_inference_steps: int = field(default=20, metadata={"help": "Number of sampling steps of generated images."})
    eval_guidance_scale: float = field(default=7.5, metadata={"help": "Guidance scale of generated images."})
    eval_num_timesteps: int = field(
        default=5, metadata={"help": "Number of timesteps of the membership attack and the noise norm."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "False by default: the trainer itself makes the denoiser's inputs."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "False by default: every trainable parameter is used in each step."}
    )

    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "False by default: a loss is logged as it is, and no step waits for a GPU."}
    )

    def __post_init__(self) -> None:
        for name, reason in _REFUSED.items():
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} is not supported: {reason}")
        self._check_numbers()
        super().__post_init__()
        if self.n_gpu > 1:
            logger.warning(
                f"this process uses one of the {self.n_gpu} GPUs, which CUDA_VISIBLE_DEVICES can name: start it with "
                f"accelerate launch --num_processes {self.n_gpu} to use all of them for each training"
            )
            self._n_gpu = 1  # the Trainer would use nn.DataParallel, which the adapters do not go with
        self._check()
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()

    def _check(self) -> None:
        """Raise `ValueError` for arguments that are out of range or do not go together."""
        self._check_numbers()
        _ = self.framing  # a wrong one is an error
        check_objectives(self.objectives)
        if self.optim.startswith(_OF_BITSANDBYTES) and not is_bitsandbytes_available():
            raise ValueError(f"the optimizer {self.optim.value} needs bitsandbytes: pip install bitsandbytes")
        _check_trackers(self.report_to)
        self._check_schedule()
        mitigations = parse_mitigations(self.mitigations)
        for mitigation in mitigations.values():
            mitigation.check_arguments(self, mitigations)

    def _check_schedule(self) -> None:
        """Raise `ValueError` for a schedule of the learning rate that cannot be made."""
        optimizer, steps = torch.optim.SGD([torch.zeros(1, requires_grad=True)]), max(self.max_steps, 1)
        kwargs = self.lr_scheduler_kwargs or {}
        try:
            get_scheduler(self.lr_scheduler_type, optimizer, self.get_warmup_steps(steps), steps, dict(kwargs))
        except (TypeError, ValueError, KeyError, AssertionError, RuntimeError) as error:
            raise ValueError(
                f"the schedule {self.lr_scheduler_type.value} cannot be made: {error}. What it needs is given as "
                f"lr_scheduler_kwargs (--trainer_args '{{\"lr_scheduler_kwargs\": {{...}}}}'), which is {kwargs}"
            ) from None

    @property
    def framing(self) -> Framing:
        """How an image becomes a square."""
        return Framing(self.fit, self.background)

    def _check_numbers(self) -> None:
        """Raise `ValueError` for an argument that is no number or out of its range."""
        for name in dict.fromkeys((*_SHARES, *_POSITIVE, *_NOT_NEGATIVE, *_COUNTS, "max_steps")):
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            whole = name in (*_COUNTS, "max_steps")
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise ValueError(f"{name} must be a {'whole ' if whole else ''}number, but got {value!r}")
            if (name in _SHARES and not 0 <= value <= 1) or (name == "search_fraction" and value == 0):
                raise ValueError(f"{name} must be a share between 0 and 1, but got {value}")
            if name in _COUNTS and value < 1:
                raise ValueError(f"{name} must be at least 1, but got {value}")
            if name in _POSITIVE and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0, but got {value}")
            if name in _NOT_NEGATIVE and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0, but got {value}")

    def replaced(self, hyperparameters: Mapping[str, Any]) -> "MemControlTrainingArguments":
        """These arguments with other values, validated as when they are made.

        Args:
            hyperparameters (`dict[str, Any]`): arguments that a run of a search may change, by name.

        Raises:
            ValueError: for a name that is no argument, for an argument that a run cannot change, and for a value that
                is out of its range or has no effect beside the other arguments.
        """
        known = {f.name for f in dataclasses.fields(self)}
        for name in hyperparameters:
            if name not in known:
                raise ValueError(
                    f"unknown hyperparameter {name!r}: use 'mask' or one of {', '.join(_HYPERPARAMETERS)}"
                )
            if name not in _HYPERPARAMETERS:
                raise ValueError(
                    f"{name} is no hyperparameter, since it is the same for all runs of a trainer: give it to "
                    f"MemControlTrainingArguments; a run may change {', '.join(_HYPERPARAMETERS)}"
                )
        new = copy.copy(self)  # made anew, they would set up the devices anew, under the trainer's feet
        for name, value in hyperparameters.items():
            setattr(new, name, value)
        new.optim, new.lr_scheduler_type = OptimizerNames(new.optim), SchedulerType(new.lr_scheduler_type)
        new._check()
        for name, other in itertools.combinations(("num_train_epochs", "max_steps", "search_max_steps"), 2):
            if name in hyperparameters and (getattr(new, other) or 0) > 0:
                raise ValueError(f"{name} has no effect beside {other}={getattr(new, other)}: search {other} instead")
        for name, value in hyperparameters.items():
            if getattr(new, name) != value:
                raise ValueError(f"{name}={value} has no effect, since a mitigation sets it to {getattr(new, name)}")
        return new

    def to_dict(self) -> dict[str, Any]:
        """The arguments that trackers get: a path on this machine is its last part, and no column is named."""
        shown = super().to_dict() | {"mitigations": public_mitigations(self.mitigations)}
        return {
            name: Path(value).name if isinstance(value, str) and is_place(value) else value
            for name, value in shown.items()
        }


def is_place(text: str) -> bool:
    """Whether a text is a path on this machine."""
    return Path(text).is_absolute() or os.path.exists(text)
