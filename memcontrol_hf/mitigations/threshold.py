"""Threshold mitigation: rows whose caption steers hard do not count in the loss."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback

from ..families import Family, null_like
from ..metrics import steering_norms
from .base import Mitigation

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainingArguments


@dataclass
class Threshold(Mitigation):
    """Leaves rows out of the loss whose caption steers hard (https://huggingface.co/papers/2407.21720).

    A row of a batch is left out when its `||ε(x_t, t, c) − ε(x_t, t, ∅)||₂` is above `value`, or above the quantile
    `q` of the batch. A row that is left out counts as a loss of 0, so the weight of the other rows does not change. A
    fixed value therefore works the same at every batch size. A step of which every row is left out changes nothing:
    neither momentum nor weight decay moves the parameters. A quantile depends on the other rows in the batch of the
    same device: it leaves out at least the row with the largest norm (unless there are ties), so one of four rows at
    batch size 4, and none at batch size 1.

    - Cost: one further forward pass without a gradient, for the null condition.
    - Against: captions that have begun to call up their image.
    - Not against: memorization that the norm does not show, and what is learnt before the norm shows it.

    Args:
        value (`float`, *optional*):
            Fixed limit of the norm, in the units of the metric `noise_norm`.
        q (`float`, *optional*):
            Quantile of the batch that is the limit instead of `value`; 0.9 when neither is given.
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
        self.dropped: int | torch.Tensor = 0  # number of rows since the last call of `counts`

    def check(self, family: Family, images: "Dataset", args: "TrainingArguments", tunes_text: bool) -> None:
        if "noise_norm" in family.not_applicable:
            raise ValueError(f"threshold needs the noise norm: {family.not_applicable['noise_norm']}; leave it out")

    def losses(self, losses, prediction, family, denoiser, null, batch):
        """The losses of a batch, `[N]`, with 0 for the rows that are left out."""
        without_text = null_like(null(), batch["condition"])
        with torch.no_grad():
            unconditional = family.predict(
                denoiser, batch["latents"], without_text, batch["timesteps"], batch["noise"]
            )
        scales = family.noise.epsilon_scales(batch["timesteps"])
        norms = scales * steering_norms(prediction.detach(), unconditional)
        drop = norms > (torch.quantile(norms, self.q) if self.value is None else self.value)
        self.dropped = self.dropped + drop.sum()
        return torch.where(drop, 0.0, losses)

    def callback(self, evaluate):
        return SkipEmptySteps()

    def counts(self) -> dict[str, int | torch.Tensor]:
        dropped, self.dropped = self.dropped, 0
        return {"dropped_samples": dropped}


class SkipEmptySteps(TrainerCallback):
    """Skips the optimizer's step where no row has counted, which would still apply momentum and weight decay."""

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        unscaled = not args.fp16 or args.max_grad_norm  # a gradient scaler that has seen no gradient refuses the step
        if unscaled and not any(p.grad.any() for p in model.parameters() if p.grad is not None):
            optimizer.zero_grad(set_to_none=True)  # an optimizer leaves parameters without a gradient alone
