"""Threshold mitigation: samples that steer hard are left out of the loss."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..families import Family, null_like
from ..metrics import steering_norms
from .base import Mitigation

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainingArguments


@dataclass
class Threshold(Mitigation):
    """Leaves samples out of the loss whose text steers hard (https://huggingface.co/papers/2407.21720).

    Left out is each sample of a batch with `||ε(x_t, t, c) − ε(x_t, t, ∅)||₂` above `value`, or above the quantile `q`
    of the batch. It counts as a loss of 0, so that what is kept weighs the same whatever else is in the batch. A fixed
    value therefore does the same at every batch size. A quantile depends, by definition, on what is in the batch of
    each device: it leaves out at least the sample with the largest norm (unless there are ties), so one in four at
    batch size 4, and none at batch size 1.

    - Cost: one forward pass without a gradient more, for the null condition; the conditional one is the loss's own.
    - Against: captions that have begun to call up their image.
    - Not against: memorization that does not show in the norm, and whatever is learnt before it does.

    Args:
        value (`float`, *optional*):
            A fixed norm, in the units of the metric `noise_norm`.
        q (`float`, *optional*):
            A quantile instead; 0.9 when neither is given.
    """

    usage = "threshold[:value] with a norm above 0, or threshold[:q=0.9] with a quantile between 0 and 1, not both"
    value: float | None = None
    q: float | None = None

    def __post_init__(self) -> None:
        if self.value is not None and self.q is not None:
            raise ValueError(f"value is {self.value} and q is {self.q}")
        if self.value is not None and not 0 < self.value < math.inf:
            raise ValueError(f"value is {self.value}")
        if self.value is None and self.q is None:
            self.q = 0.9
        if self.q is not None and not 0 < self.q < 1:
            raise ValueError(f"q is {self.q}")
        self.dropped: int | torch.Tensor = 0  # since the last call of `counts`

    def check(self, family: Family, images: "Dataset", args: "TrainingArguments", tunes_text: bool) -> None:
        if "noise_norm" in family.not_applicable:
            raise ValueError(f"threshold needs the noise norm: {family.not_applicable['noise_norm']}; leave it out")

    def losses(self, losses, prediction, family, denoiser, null, batch):
        """The losses of a batch `[N]`, 0 for the samples that are left out."""
        without_text = null_like(null(), batch["condition"])
        with torch.no_grad():
            unconditional = family.predict(
                denoiser, batch["latents"], without_text, batch["timesteps"], batch["noise"]
            )
        norms = steering_norms(prediction.detach(), unconditional)
        drop = norms > (torch.quantile(norms, self.q) if self.value is None else self.value)
        self.dropped = self.dropped + drop.sum()
        return torch.where(drop, 0.0, losses)

    def counts(self) -> dict[str, int | torch.Tensor]:
        dropped, self.dropped = self.dropped, 0
        return {"dropped_samples": dropped}
