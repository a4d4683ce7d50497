"""Threshold mitigation: samples that steer hard are left out of the loss."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from ..families import Condition, Family, null_like
from ..metrics import steering_norms
from .base import Mitigation


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
        self.dropped: int | torch.Tensor = 0  # since it was last set to 0

    def losses(
        self,
        family: Family,
        denoiser: nn.Module,
        null: Condition,
        latents: torch.Tensor,
        condition: Condition,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
        weights: torch.Tensor | None,
    ) -> torch.Tensor:
        """[`Family.losses`] of a batch, 0 for those that are left out; `null` is the null condition."""
        prediction = family.predict(denoiser, latents, condition, timesteps, noise)
        with torch.no_grad():
            without = family.predict(denoiser, latents, null_like(null, condition), timesteps, noise)
        norms = steering_norms(prediction.detach(), without)
        drop = norms > (torch.quantile(norms, self.q) if self.value is None else self.value)
        self.dropped = self.dropped + drop.sum()
        losses = family.losses_of(prediction, latents, timesteps, noise, weights)
        return torch.where(drop, 0.0, losses)
