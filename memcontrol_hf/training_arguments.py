"""The training arguments: the arguments of transformers' Trainer, and further ones for a diffusion model."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import is_bitsandbytes_available

from .evaluation import check_objectives
from .mitigations import parse_mitigations


@dataclass
class MemControlTrainingArguments(TrainingArguments):
    """The arguments of transformers' Trainer, and further ones for a diffusion model and its measures.

    Args:
        resolution (`int`):
            Side of the images in pixels.
        snr_gamma (`float`, *optional*):
            Min-SNR weighting of the loss (https://huggingface.co/papers/2303.09556); 5 is usual, none by default.
        caption_dropout (`float`):
            Share of the captions that are replaced by the empty caption in training, so that guidance keeps working.
        mitigations (`list[str]`):
            Further means against memorization, each written `NAME[:arguments]`; see [`~memcontrol_hf.mitigations`].
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
    snr_gamma: float | None = field(default=None, metadata={"help": "Min-SNR weighting of the loss; 5 is usual."})
    caption_dropout: float = field(default=0.0, metadata={"help": "Share of captions replaced by the empty caption."})
    mitigations: list[str] = field(
        default_factory=list, metadata={"help": "Means against memorization, each written NAME[:arguments]."}
    )
    search_fraction: float = field(default=1.0, metadata={"help": "Share of the training rows used in a trial."})
    search_max_steps: int | None = field(default=None, metadata={"help": "Number of training steps of a trial."})
    objectives: list[str] = field(
        default_factory=lambda: ["fid", "membership_auc"],
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

    def __post_init__(self) -> None:
        check_objectives(self.objectives)
        mitigations = parse_mitigations(self.mitigations)
        for name in ("caption_dropout", "search_fraction"):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (name == "search_fraction" and value == 0):
                raise ValueError(f"{name} must be a share between 0 and 1, but got {value}")
        for name in ("eval_num_images", "eval_inference_steps", "eval_num_timesteps", "resolution"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but got {getattr(self, name)}")
        super().__post_init__()
        if "bnb" in self.optim and not is_bitsandbytes_available():
            raise ValueError(f"the optimizer {self.optim.value} needs bitsandbytes: pip install bitsandbytes")
        for mitigation in mitigations.values():
            mitigation.check_arguments(self, mitigations)
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()

    def to_dict(self) -> dict[str, Any]:
        """The arguments that trackers get. A path on this machine is shortened to its last part."""
        return {
            name: Path(value).name if isinstance(value, str) and is_place(value) else value
            for name, value in super().to_dict().items()
        }


def is_place(text: str) -> bool:
    """Whether a text is a path on this machine."""
    return Path(text).is_absolute() or os.path.exists(text)
