"""The audit of a trained model, and the figures that the studies keep of an audit."""

from typing import Any

from datasets import Dataset
from diffusers import DiffusionPipeline

from memcontrol_hf import MemControlTrainer, audit_memorization
from memcontrol_hf.audit import AuditSettings
from memcontrol_hf.audit.coins import canary_losses, epsilon_from_coins
from memcontrol_hf.sampling import denoiser_in_place


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


LATER_ATTACKS = {"trajectory_norm_low"}
"""Attacks of the audit that the committed tables were made without."""


def canaries_caught(audit: dict[str, Any]) -> dict[str, int]:
    """The columns `canaries_<attack>`: how many of the repeated training images each attack caught."""
    return {f"canaries_{name}": counts["caught"] for name, counts in _caught(audit).items()}


def best_attack(audit: dict[str, Any]) -> float:
    """The percentage of its canaries that the best attack of an audit caught; NaN without canaries."""
    shares = [100 * counts["caught"] / counts["of"] for counts in _caught(audit).values() if counts["of"]]
    return max(shares, default=float("nan"))


def _caught(audit: dict[str, Any]) -> dict[str, dict[str, int]]:
    return {name: counts for name, counts in audit["canaries"]["caught"].items() if name not in LATER_ATTACKS}
