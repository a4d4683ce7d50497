"""The audit of a trained model, and the figures that the studies keep of an audit."""

from typing import Any

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from torch import nn

from memcontrol_hf import MemControlTrainer, audit_memorization, metrics
from memcontrol_hf.audit import AuditSettings
from memcontrol_hf.audit.coins import canary_losses, epsilon_from_coins
from memcontrol_hf.data import EncodedImages
from memcontrol_hf.families import Family
from memcontrol_hf.randomness import Purpose, row_keys
from memcontrol_hf.sampling import denoiser_in_place

PIA_TIMESTEP = 200
"""Timestep of PIA, of the demo's 1,000, as in the audit."""


def audit_trainer(
    trainer: MemControlTrainer, train: Dataset, held_out: Dataset, settings: AuditSettings
) -> dict[str, Any]:
    """Attack the model of a trainer, without the same attacks on its frozen base.

    Returns:
        The field `audit` of the memorization report.
    """
    with denoiser_in_place(trainer.pipeline, trainer.model):
        return audit_memorization(
            train, held_out, trainer.pipeline, encoder=trainer.encoder, settings=settings, control=False
        ).audit


def canary_epsilon(
    trainer: MemControlTrainer, base: DiffusionPipeline, canaries: Dataset, delta: float, seed: int
) -> dict[str, Any]:
    """The epsilon that is measured of a trainer's model from the coins of canaries.

    Args:
        base: Frozen base, a pipeline of its own: the trainer's pipeline holds the adapter.
        canaries: Columns `image`, `text` and `included`.
        delta: Delta of the statement.
        seed: Random seed of the noise of the losses.

    Returns:
        The field `audit.epsilon` of the memorization report.
    """
    settings = AuditSettings(resolution=trainer.args.resolution, seed=seed)
    images = trainer.encode(canaries)
    base_losses = canary_losses(base, images, settings)
    with denoiser_in_place(trainer.pipeline, trainer.model):
        losses = canary_losses(trainer.pipeline, images, settings)
    return epsilon_from_coins(losses, base_losses, canaries, delta)


def attack_scores(
    family: Family,
    denoiser: nn.Module,
    images: EncodedImages,
    purpose: Purpose,
    seed: int,
    num_timesteps: int = 5,
    batch_size: int = 32,
) -> dict[str, torch.Tensor]:
    """Scores of the attacks on each distinct image, higher for members: name of the attack -> `[N]`.

    The scores are those of the audit. SecMI, which costs as much as the other attacks together, is left out.
    """
    rows, timesteps = images.distinct, family.noise.timesteps(num_timesteps)
    keys = row_keys(seed, purpose, (images.numbers[row] for row in rows))
    inputs = (family, denoiser, images.encoded[rows]["latents"], images.condition(family.conditions, rows))
    losses = metrics.denoising_losses(*inputs, timesteps, keys, batch_size)
    null = family.null_condition()
    return {
        "loss": -losses.mean(1),
        "clid": metrics.clid(*inputs, null, timesteps, keys, batch_size, losses),
        "pia": metrics.pia(*inputs, PIA_TIMESTEP, batch_size=batch_size),
    }


LATER_ATTACKS = {
    "trajectory_norm_low",
    "membership_secmi_several",
    "membership_sima",
    "membership_semantic_noise",
    "partial_copy",
}
"""Attacks of the audit that the committed tables were made without: the best of more attacks catches more."""


def canaries_caught(audit: dict[str, Any]) -> dict[str, int]:
    """The columns `canaries_<attack>`: how many of the repeated training images each attack caught."""
    return {f"canaries_{name}": counts["caught"] for name, counts in _caught(audit).items()}


def best_attack(audit: dict[str, Any]) -> float:
    """The percentage of its canaries that the best attack of an audit caught; NaN without canaries."""
    shares = [100 * counts["caught"] / counts["of"] for counts in _caught(audit).values() if counts["of"]]
    return max(shares, default=float("nan"))


def _caught(audit: dict[str, Any]) -> dict[str, dict[str, int]]:
    return {name: counts for name, counts in audit["canaries"]["caught"].items() if name not in LATER_ATTACKS}
