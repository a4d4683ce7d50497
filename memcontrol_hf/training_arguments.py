"""The arguments of a fine-tune: those of transformers' Trainer, and those of a diffusion model and its measures."""

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
    """The arguments of transformers' Trainer, and those of a diffusion model's fine-tune and its measures.

    Args:
        resolution (`int`):
            Side of the images in pixels.
        snr_gamma (`float`, *optional*):
            Min-SNR weighting of the loss (https://huggingface.co/papers/2303.09556); 5 is usual, none by default.
        caption_dropout (`float`):
            Share of the captions that training replaces by the empty one, so that guidance keeps working.
        mitigations (`list[str]`):
            Further means against memorization, each `NAME[:arguments]`; see `memcontrol_hf.mitigations`. They hold for
            every training, those of a search's trials too.
        search_fraction (`float`):
            Share of the training rows that each trial of a search is trained on.
        search_max_steps (`int`, *optional*):
            Steps of a trial; `max_steps` when not given.
        objectives (`list[str]`):
            The search's objectives: names out of `memcontrol_hf.evaluation.METRICS`, quality first.
        eval_num_images (`int`):
            How many images are generated for `fid` and as many for `amd`, at most one for each caption.
        eval_inference_steps (`int`):
            Sampling steps of these images.
        eval_guidance_scale (`float`):
            Their guidance scale.
        eval_num_timesteps (`int`):
            How many fixed timesteps the membership attack and the noise norm use.
    """

    resolution: int = field(default=512, metadata={"help": "Side of the images in pixels."})
    snr_gamma: float | None = field(default=None, metadata={"help": "Min-SNR weighting of the loss; 5 is usual."})
    caption_dropout: float = field(default=0.0, metadata={"help": "Share of captions replaced by the empty one."})
    mitigations: list[str] = field(default_factory=list, metadata={"help": "Each NAME[:arguments]."})
    search_fraction: float = field(default=1.0, metadata={"help": "Share of the training rows used in a trial."})
    search_max_steps: int | None = field(default=None, metadata={"help": "Steps of a trial of the search."})
    objectives: list[str] = field(
        default_factory=lambda: ["fid", "membership_auc"],
        metadata={"help": "Objectives of the search, quality first."},
    )
    eval_num_images: int = field(default=128, metadata={"help": "Images generated for fid and for amd."})
    eval_inference_steps: int = field(default=20, metadata={"help": "Sampling steps of these images."})
    eval_guidance_scale: float = field(default=7.5, metadata={"help": "Guidance scale of these images."})
    eval_num_timesteps: int = field(default=5, metadata={"help": "Timesteps of the membership attack."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The denoiser's inputs are made here."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "All adapter parts are used."})

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
        """The arguments for trackers, where a path on this machine is its last part only."""
        return {
            name: Path(value).name if isinstance(value, str) and is_place(value) else value
            for name, value in super().to_dict().items()
        }


def is_place(text: str) -> bool:
    """Whether a text is a path on this machine."""
    return Path(text).is_absolute() or os.path.exists(text)
