"""A mitigation that leaves out rows whose loss is already low."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate.utils import reduce
from transformers.trainer_callback import ExportableState

from .base import Mitigation
from .threshold import SkipEmptySteps

if TYPE_CHECKING:
    from transformers import TrainingArguments

BINS = 50
"""Number of equal parts of the noise schedule, each with a running mean of its losses."""

DECAY = 0.8
"""Share of a running mean that a step keeps, as in the authors' code."""


@dataclass
class SkipLowLoss(Mitigation):
    """Leaves rows out of the loss that have already a low loss (AGC of https://huggingface.co/papers/2407.15328).

    The authors find that images that are memorized easily have a lower training loss than others. Their anti-gradient
    control keeps a running mean of the losses at each timestep, and leaves a row out of its step when its loss is
    below `ratio` times the mean at its timestep. The mean begins at 0, so that nothing is left out at first. (The
    other half of the paper, an ensemble over shards of the data, is not here.)

    Three things differ from the authors' code (`clients_fed_es.py` of github.com/liuxiao-guan/IET_AGC). A fine-tune
    sees too few rows for a mean at each of 1,000 timesteps, so that there is one for each of `BINS` equal parts of the
    schedule. The mean is updated once after each step, by the mean over the rows of the step on all processes, so that
    it does not depend on how a step's rows are divided into batches; checkpoints hold it. And a row that is left out
    counts as a loss of 0, so that the weight of the other rows does not change.

    `threshold` leaves rows out, too, but by another sign: how far the caption changes the prediction. A row without
    such a caption can have a low loss, and a row with one a high loss. Rows influence each other here, which
    differential privacy does not allow. A screening runs without this mitigation.

    - Cost: no forward pass.
    - Against: rows that are learned much better than others, such as repeated images.
    - Not against: images that are memorized while their loss is near the mean, and a data set whose losses fall
      together: the mean falls with them.

    Args:
        ratio (`float`):
            Share of the running mean below which a loss is low; the authors take 0.5.
    """

    usage = "skip_low_loss[:ratio], a share of the mean loss between 0 and 1, such as skip_low_loss:ratio=0.5"
    ratio: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio is {self.ratio}")
        self.means = torch.zeros(BINS)
        self.seen = torch.zeros(2, BINS)  # sum and number of the losses of the present step
        self.skipped: int | torch.Tensor = 0  # number of rows since the last call of `counts`

    def check_arguments(self, args: "TrainingArguments", others: Mapping[str, Mitigation]) -> None:
        if args.restore_callback_states_from_checkpoint:
            raise ValueError(
                "skip_low_loss restores its running means by itself: leave restore_callback_states_from_checkpoint out"
            )

    def losses(self, losses, prediction, family, denoiser, null, batch):
        """The losses of a batch, `[N]`, with 0 for the rows that are left out."""
        schedule = family.noise.scheduler.config.num_train_timesteps
        bins = (batch["timesteps"] * BINS / schedule).long().clamp(max=BINS - 1)
        found = losses.detach().float()
        self.means, self.seen = self.means.to(found.device), self.seen.to(found.device)
        self.seen = self.seen.index_add(1, bins, torch.stack([found, torch.ones_like(found)]))
        low = found < self.ratio * self.means[bins]
        self.skipped = self.skipped + low.sum()
        return torch.where(low, 0.0, losses)

    def begin(self, means: list[float] | None) -> None:
        """Begin a training, with the running means of a checkpoint or with new ones."""
        self.means = torch.zeros(BINS) if means is None else torch.tensor(means)
        self.seen = torch.zeros(2, BINS)

    def end_step(self, device: torch.device) -> None:
        """Update the running means by the losses of a step, of all processes."""
        total, count = reduce(self.seen.to(device), "sum")
        self.means = self.means.to(device)
        updated = DECAY * self.means + (1 - DECAY) * total / count.clamp(min=1)
        self.means = torch.where(count > 0, updated, self.means)
        self.seen = torch.zeros_like(self.seen)

    def callback(self, measure):
        return LossMeans(self)

    def reset(self) -> None:
        super().reset()
        self.begin(None)

    def counts(self) -> dict[str, int | torch.Tensor]:
        skipped, self.skipped = self.skipped, 0
        return {"low_loss_samples": skipped}


class LossMeans(SkipEmptySteps, ExportableState):
    """Updates the running means of a [`SkipLowLoss`] after each step; the Trainer's state in a checkpoint holds them.

    Args:
        mitigation ([`SkipLowLoss`]): mitigation whose means these are.
    """

    def __init__(self, mitigation: SkipLowLoss):
        self._mitigation = mitigation

    def state(self) -> dict[str, dict[str, list[float]]]:
        return {"args": {}, "attributes": {"means": self._mitigation.means.tolist()}}

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        self._mitigation.begin(saved["attributes"]["means"] if saved else None)

    def on_step_end(self, args, state, control, **kwargs):
        self._mitigation.end_step(args.device)
