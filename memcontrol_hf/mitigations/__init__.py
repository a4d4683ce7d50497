"""What can be done against memorization beside a mask: mitigations, which combine with it and with each other.

Each is a small class, named and set up by `NAME[:arguments]`: positional (`rwa:4`), by name (`threshold:q=0.8`), with
commas between several (`early_stop:metric=noise_norm,limit=20`). They always apply in the order of `MITIGATIONS`.
Every draw depends on the seed, the epoch and the row alone, so that the batch size, the number of processes and
resuming play no part. `dp_sgd` alone gives a formal guarantee; its noise depends on a key that is kept secret. Those
that work while images are sampled are no protection once the weights are published.
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
from .threshold import Threshold

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
    "Threshold",
    "TrainingConditions",
    "parse_mitigations",
    "per_sample_gradients",
]

MITIGATIONS: dict[str, type[Mitigation]] = {
    "multiple_captions": MultipleCaptions,
    "rwa": RandomWordAddition,
    "gaussian_noise": GaussianNoise,
    "caption_dropout": CaptionDropout,
    "threshold": Threshold,
    "early_stop": EarlyStop,
    "dp_sgd": DPSGD,
    "prompt_embedding": PromptEmbedding,
    "anti_memorization_guidance": AntiMemorizationGuidance,
}
"""By name, in the order in which they apply."""

_KINDS = {int: "whole number", float: "number", float | None: "number"}


def parse_mitigations(texts: Iterable[str]) -> dict[str, Mitigation]:
    """Mitigations from `NAME[:arguments]`, by name and in the order in which they apply.

    Raises:
        ValueError: for an unknown name, one that is given twice, and arguments that it does not take.
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


def _arguments(mitigation: type[Mitigation], text: str) -> dict[str, Any]:
    """`"4"` or `"n=4"` -> `{"n": 4}`, cast as the mitigation's fields are."""
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
