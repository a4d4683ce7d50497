"""The measured epsilon of an audit: guesses at the coins of canaries, by their losses."""

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset

from .. import metrics
from ..data import INCLUDED, EncodedImages
from ..randomness import Purpose
from .attacks import evaluator_of
from .settings import CANARY_TIMESTEPS, AuditSettings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def check_canaries(canaries: Dataset, members: EncodedImages, others: EncodedImages, images: EncodedImages) -> None:
    """Raise `ValueError` for canaries without coins, or whose coins do not agree with the two sets.

    Args:
        canaries (`Dataset`): columns `image` and `included`.
        members, others ([`~memcontrol_hf.data.EncodedImages`]): training and held-out images.
        images ([`~memcontrol_hf.data.EncodedImages`]): images of the canaries.
    """
    if INCLUDED not in canaries.column_names:
        raise ValueError(
            f"the canaries have no column {INCLUDED!r}, only {', '.join(canaries.column_names)}: give the folder "
            "private/split/canaries of a training with --flip_canaries"
        )
    if (count := len(images.distinct)) < max(2, len(canaries)):
        raise ValueError(
            f"{len(canaries)} canaries with {count} different images: a coin is flipped for each image once, and 2 or "
            "more are guessed at"
        )
    train, held_out = set(members.digests), set(others.digests)
    coins = list(zip(images.digests, canaries[INCLUDED][:]))
    missing = sum(included and digest not in train for digest, included in coins)
    known = sum(not included and digest in train | held_out for digest, included in coins)
    if missing or known:
        raise ValueError(
            f"{missing} canaries whose coin says trained on are not among the training images, and {known} that were "
            "kept out are in train or held_out: give the training images with which the coins were flipped"
        )


@torch.no_grad()
def canary_losses(pipeline: "DiffusionPipeline", canaries: EncodedImages, settings: AuditSettings) -> torch.Tensor:
    """The denoising loss of each canary, `[m]`, at more timesteps than the membership attack takes: canaries are few.

    Args:
        pipeline (`DiffusionPipeline`): model, or its frozen base.
        canaries ([`~memcontrol_hf.data.EncodedImages`]): canaries, as the pipeline encodes them.
        settings ([`AuditSettings`]): settings of the audit.
    """
    evaluator = evaluator_of(pipeline, replace(settings, num_timesteps=CANARY_TIMESTEPS))
    return evaluator.losses(canaries, Purpose.AUDIT_CANARIES)


def epsilon_from_coins(
    losses: torch.Tensor, base_losses: torch.Tensor | None, canaries: Dataset, delta: float
) -> dict[str, Any]:
    """The part of a report on the measured epsilon.

    Args:
        losses (`torch.Tensor`): losses of the canaries by the model, `[m]`.
        base_losses (`torch.Tensor`, *optional*): losses by the frozen base, which tell how hard an image is.
        canaries (`Dataset`): the canaries, column `included`.
        delta (`float`): delta of the statement.
    """
    scores = -losses if base_losses is None else base_losses - losses
    coins = canaries[INCLUDED][:]
    return {
        **asdict(metrics.measured_epsilon(scores, coins, delta)),
        "score": "loss" if base_losses is None else "loss of the frozen base minus loss",
        "mu": asdict(metrics.measured_mu(scores, coins, delta)),
    }
