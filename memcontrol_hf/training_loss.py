"""The loss of a training step: what the step draws for each of its rows, and what mitigations change."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from .families import Condition, Family, null_like
from .mitigations import Mitigation, TrainingConditions
from .randomness import Purpose, seeded_generator


class TrainingLoss:
    """The denoising loss of training rows.

    Timestep, noise, caption dropout and the mitigations' draws of a row depend on the seed, the epoch and the row
    alone: the same rows give the same loss at any batch size, on any number of processes, and after resuming.

    Args:
        family ([`~memcontrol_hf.families.Family`]): family of the pipeline.
        mitigations (list of [`~memcontrol_hf.mitigations.Mitigation`]): in the order in which they apply.
        images (`Dataset`): the training images and captions.
        numbers (list of `int`): the number of each row.
    """

    def __init__(self, family: Family, mitigations: Sequence[Mitigation], images: Dataset, numbers: Sequence[int]):
        self._family, self._mitigations = family, mitigations
        self.conditions = TrainingConditions(mitigations, family, images, numbers)

    def draw(
        self,
        inputs: Mapping[str, torch.Tensor],
        seed: int,
        turn: int,
        null: Callable[[], Condition | None],
        caption_dropout: float = 0.0,
        snr_gamma: float | None = None,
        encode_captions: bool = False,
        purpose: Purpose = Purpose.TRAINING,
        timesteps: Sequence[torch.Tensor] | None = None,
    ) -> dict[str, Any]:
        """What a step draws for the rows of a batch.

        Args:
            inputs (`dict`): `latents` `[N, C, h, w]`, the cached conditions, and `row`, a list of the `N` rows'
                numbers.
            seed (`int`): random seed of the training.
            turn (`int`): number of the epoch or the step; a row draws once in each.
            null (`Callable`): gives the null condition, one row; called only where it is needed.
            caption_dropout (`float`): probability that a caption is replaced by the empty one.
            snr_gamma (`float`, *optional*): min-SNR weighting of the loss.
            encode_captions (`bool`): encode the captions, because text encoders are tuned.
            purpose ([`~memcontrol_hf.randomness.Purpose`]): purpose of the draws.
            timesteps (list of `torch.Tensor`, *optional*): timestep of each row, of shape `[]`, instead of drawn ones.

        Returns:
            `dict`: the arguments of [`Family.losses`] beside the denoiser.
        """
        latents, numbers = inputs["latents"], inputs["row"]
        noise, drawn, dropped = [], [], []
        for number in numbers:
            generator = seeded_generator(seed, purpose, turn, number)
            drawn.append(self._timestep(generator))
            dropped.append(torch.rand((), generator=generator) < caption_dropout)
            noise.append(torch.randn(latents.shape[1:], generator=generator))
        condition = {name: inputs[name] for name in self._family.conditions}
        condition = self.conditions(condition, numbers, (seed, Purpose.MITIGATIONS, turn), encode_captions)
        if any(dropped) and (empty := null()) is not None:
            empty, drop = null_like(empty, condition), _moved(torch.stack(dropped), latents.device)
            condition = {
                name: torch.where(drop.view(-1, *[1] * (tensor.dim() - 1)), empty[name], tensor)
                for name, tensor in condition.items()
            }
        timesteps = _moved(torch.stack(drawn if timesteps is None else timesteps), latents.device)
        return {
            "latents": latents,
            "condition": condition,
            "timesteps": timesteps,
            "noise": _moved(torch.stack(noise), latents.device),
            "weights": self._family.noise.loss_weights(timesteps, snr_gamma),
        }

    def _timestep(self, generator: torch.Generator) -> torch.Tensor:
        """The timestep of a row, as the mitigations leave it."""
        timestep = self._family.noise.sample_timestep(generator)
        for mitigation in self._mitigations:
            timestep = mitigation.timestep(timestep, self._family.noise, generator)
        return timestep

    def __call__(
        self, denoiser: nn.Module, batch: Mapping[str, Any], null: Callable[[], Condition | None]
    ) -> torch.Tensor:
        """The loss of each row of a drawn batch, as the mitigations leave it: `[N]`."""
        latents, timesteps, noise = (batch[name] for name in ("latents", "timesteps", "noise"))
        prediction = self._family.predict(denoiser, latents, batch["condition"], timesteps, noise)
        losses = self._family.losses_from_prediction(prediction, latents, timesteps, noise, batch["weights"])
        for mitigation in self._mitigations:
            losses = mitigation.losses(losses, prediction, self._family, denoiser, null, batch)
        return losses


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on a device; a GPU is not waited for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
