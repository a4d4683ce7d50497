"""Mitigations of memorization, which can be added to any mask, and combined with each other.

Each mitigation is a small class. A user writes it as `NAME[:arguments]`: arguments by position (`rwa:4`) or by name
(`threshold:q=0.8`), with commas between several (`early_stop:metric=noise_norm,limit=20`). Mitigations always apply in
the order of `MITIGATIONS`, whatever the order in which they are given.

Random draws depend only on the seed, the epoch and the row, so the batch size, the number of processes and an
interruption do not change them. Only `dp_sgd` gives a formal guarantee; its draws depend on a secret key instead of
the seed. A mitigation that works while images are sampled gives no protection once the weights are published.
"""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from .anti_memorization_guidance import AntiMemorizationGuidance
from .base import Mitigation, PrivateTraining
from .captions import CaptionDropout, GaussianNoise, MultipleCaptions, RandomWordAddition
from .conditions import TrainingConditions
from .dp_sgd import DPSGD, PrivateGradients, per_sample_gradients
from .early_stop import EarlyStop, EarlyStopCallback
from .prompt_embedding import PromptEmbedding
from .skip_low_loss import SkipLowLoss
from .threshold import Threshold
from .timestep_range import TimestepRange

__all__ = [
    "DPSGD",
    "MITIGATIONS",
    "AntiMemorizationGuidance",
    "CaptionDropout",
    "EarlyStop",
    "EarlyStopCallback",
    "GaussianNoise",
    "Mitigation",
    "MultipleCaptions",
    "PrivateGradients",
    "PrivateTraining",
    "PromptEmbedding",
    "RandomWordAddition",
    "SkipLowLoss",
    "Threshold",
    "TimestepRange",
    "TrainingConditions",
    "parse_mitigations",
    "per_sample_gradients",
    "public_mitigations",
]

MITIGATIONS: dict[str, type[Mitigation]] = {
    "multiple_captions": MultipleCaptions,
    "rwa": RandomWordAddition,
    "gaussian_noise": GaussianNoise,
    "caption_dropout": CaptionDropout,
    "timestep_range": TimestepRange,
    "skip_low_loss": SkipLowLoss,
    "threshold": Threshold,
    "early_stop": EarlyStop,
    "dp_sgd": DPSGD,
    "prompt_embedding": PromptEmbedding,
    "anti_memorization_guidance": AntiMemorizationGuidance,
}
"""Mitigation classes by name, in the order in which they apply."""

_KINDS = {int: "whole number", float: "number", float | None: "number"}


def parse_mitigations(texts: Iterable[str]) -> dict[str, Mitigation]:
    """Parse mitigations that are written `NAME[:arguments]`.

    Args:
        texts (list of `str`): one text for each mitigation.

    Returns:
        `dict`: mitigations by name, in the order in which they apply.

    Raises:
        ValueError: for an unknown name, a name that is given twice, and arguments that the mitigation does not take.
    """
    parsed = {}
    for text in texts:
        name, _, arguments = text.partition(":")
        if name not in MITIGATIONS:
            raise ValueError(f"unknown mitigation {text!r}: use some of {', '.join(MITIGATIONS)}")
        if name in parsed:
            raise ValueError(f"the mitigation {name!r} is given twice: give it once, with all its arguments")
        try:
            parsed[name] = MITIGATIONS[name](**_arguments(MITIGATIONS[name], arguments))
        except ValueError as error:
            raise ValueError(f"mitigation {text!r}: {error}; use {MITIGATIONS[name].usage}") from None
    return {name: parsed[name] for name in MITIGATIONS if name in parsed}


def public_mitigations(texts: Iterable[str]) -> list[str]:
    """Mitigations as reports, commands and trackers show them: the name of a column may name persons."""
    named = "multiple_captions:"
    return [f"{named}column=YOUR_COLUMN" if text.startswith(named) else text for text in texts]


def _arguments(mitigation: type[Mitigation], text: str) -> dict[str, Any]:
    """`"4"` or `"n=4"` -> `{"n": 4}`; each value gets the type of the mitigation's field."""
    known = {f.name: f.type for f in fields(mitigation)}
    values = {}
    for position, part in enumerate(text.split(",") if text else ()):
        name, equals, value = part.partition("=")
        if not equals:
            name, value = list(known)[position] if position < len(known) else part, part
        if name not in known or name in values or not value:
            raise ValueError(f"cannot take {part!r}")
        try:
            values[name] = (known[name] if isinstance(known[name], type) else float)(value)
        except ValueError:
            raise ValueError(f"{name} is {value!r}, no {_KINDS[known[name]]}") from None
    return values
