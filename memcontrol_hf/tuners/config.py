"""The configuration of the PEFT method MEMCONTROL."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import Enum

from peft import PeftConfig

METHODS = ("svdiff", "difffit", "weights", "norm", "bias")


class MemControlType(str, Enum):
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
        ValueError: If `method` is unknown, `scale` is not above 0, or `mask` or `search` is not JSON-able.
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
        try:
            json.dumps([self.mask, self.search])
        except TypeError as error:
            raise ValueError(f"mask and search are saved as JSON, which cannot hold them: {error}.") from error
