"""What all mitigations have in common."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass
class Mitigation:
    """A mitigation and its arguments, which are its fields.

    Attributes:
        usage (`str`): how its arguments are written.
        guards_weights (`bool`): whether it changes the weights. What works while images are sampled protects nobody
            once the weights are published: whoever has them samples without it.
    """

    usage: ClassVar[str]
    guards_weights: ClassVar[bool] = True
