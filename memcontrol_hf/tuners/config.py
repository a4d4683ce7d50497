"""The configuration of the PEFT method MEMCONTROL."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from textwrap import shorten

from peft import PeftConfig

METHODS = ("svdiff", "difffit", "weights", "norm", "bias")


class MemControlType(str, Enum):  # noqa: UP042 (as PEFT declares its own)
    """The method's name. PEFT and transformers read `peft_type.value`, and PEFT's own `PeftType` is closed."""

    MEMCONTROL = "MEMCONTROL"


@dataclass
class MemControlConfig(PeftConfig):
    """What is tuned, and in which modules of a model.

    | method | what is trained in each target module | target modules |
    |---|---|---|
    | `svdiff` | a shift of the singular values of the weight ([SV-DIFF](https://huggingface.co/papers/2303.11305)) | `Linear`, `Conv1d`, `Conv2d` |
    | `difffit` | output scales, biases, norms and class embeddings ([DiffFit](https://huggingface.co/papers/2304.06648)) | `scale_modules`, norms, class embeddings, layers with a bias |
    | `weights` | the weight and the bias | `Linear`, `Conv1d`, `Conv2d`, `Embedding`, norms |
    | `norm` | the weight and the bias | `GroupNorm`, `LayerNorm`, RMSNorms |
    | `bias` | the bias | layers with a bias |

    Args:
        method (`str`, *optional*, defaults to `"svdiff"`):
            One of `svdiff`, `difffit`, `weights`, `norm` and `bias`.
        target_modules (`list[str]` or `str`):
            The modules to tune: names, ends of names (`"to_out.0"`), or one regular expression that matches the whole
            name. [`~memcontrol_hf.tuners.tunable_modules`] lists the full names that a method can take.
        exclude_modules (`list[str]` or `str`, *optional*):
            Modules to leave alone although `target_modules` matches them, written in the same way.
        scale (`float`, *optional*, defaults to 1.0):
            SV-DIFF only: the factor of the shift, `relu(s + scale * delta)`. Above 0.
        singular_values (`dict[str, list[int]]`, *optional*):
            SV-DIFF only: which singular values are tuned, by the full name of the target module, in ascending order;
            0 is the largest. All of them by default, and in a target module that the dictionary does not name. In a
            search space ([`~memcontrol_hf.SearchSpace`]) only the modules that it names are tuned.
        scale_modules (`list[str]`, *optional*):
            DiffFit only: ends of the names of the `Linear` modules whose output gets a scale. These are the last
            projections of each attention and feed-forward, before the residual is added.
        mask (`dict[str, bool]`, *optional*):
            The mask over a model's blocks, by block name, that `target_modules` was made from. Only recorded.
        search (`dict`, *optional*):
            How the mask was found; anything that JSON can hold. Only recorded.
        modules_to_save (`list[str]`, *optional*):
            Further modules to train as a whole and to save with the adapter.

    Raises:
        ValueError: If `method` is unknown, `scale` is not above 0, `mask` or `search` is not JSON-able, or
            `singular_values` is given for another method or is not ascending numbers.
    """  # noqa: E501

    method: str = field(
        default="svdiff",
        metadata={"help": f"What is trained in each target module, one of: {', '.join(METHODS)}."},
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names of the modules to tune, ends of names, or one regular expression."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Modules to leave alone although target_modules matches them."},
    )
    scale: float = field(
        default=1.0,
        metadata={"help": "SV-DIFF: the factor of the shift of the singular values, above 0."},
    )
    singular_values: dict[str, list[int]] | None = field(
        default=None,
        metadata={"help": "SV-DIFF: which singular values are tuned, by the full name of the target module."},
    )
    scale_modules: list[str] = field(
        default_factory=lambda: [
            *("to_out.0", "ff.net.2", "to_add_out", "ff_context.net.2"),
            *("self_attn.out_proj", "mlp.fc2", "SelfAttention.o", "DenseReluDense.wo"),  # of text encoders
        ],
        metadata={"help": "DiffFit: ends of the names of the Linear modules whose output gets a scale."},
    )
    mask: dict[str, bool] | None = field(
        default=None,
        metadata={"help": "The mask by block name that target_modules was made from. Only recorded."},
    )
    search: dict | None = field(
        default=None,
        metadata={"help": "How the mask was found. Only recorded."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Further modules to train as a whole and to save with the adapter."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MemControlType.MEMCONTROL
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is unknown, it must be one of: {', '.join(METHODS)}.")
        if not self.scale > 0:
            raise ValueError(f"scale={self.scale!r} must be above 0.")
        self._check_singular_values()
        try:
            json.dumps([self.mask, self.search])
        except TypeError as error:
            raise ValueError(f"mask and search are saved as JSON, which cannot hold them: {error}.") from error

    @property
    def singular_values_digest(self) -> str | None:
        """A digest of `singular_values`, by which two choices are told apart; `None` without a choice."""
        if self.singular_values is None:
            return None
        return hashlib.sha256(json.dumps(self.singular_values, sort_keys=True).encode()).hexdigest()[:16]

    def _check_singular_values(self) -> None:
        """Raise `ValueError` for singular values that cannot be those of any module."""
        if self.singular_values is None:
            return
        if self.method != "svdiff":
            raise ValueError(f"singular_values are tuned by method='svdiff', not by {self.method!r}: leave them out.")
        for name, numbers in self.singular_values.items():
            ascending = all(one < other for one, other in pairwise(numbers))
            if not (numbers and ascending and all(type(number) is int and number >= 0 for number in numbers)):
                raise ValueError(
                    f"singular_values[{name!r}] must be whole numbers from 0 in ascending order, at least one, but is "
                    f"{shorten(str(numbers), 80)}; leave a module without any out of target_modules."
                )
