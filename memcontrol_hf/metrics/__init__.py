"""Measures of quality and memorization: pure functions of tensors, and the evaluate modules that wrap them.

```python
from memcontrol_hf import metrics

metrics.amd(generated, train)  # the function
evaluate.load(metrics.path("amd"))  # the module
```
"""

from pathlib import Path

from .functional import (
    MembershipResult,
    amd,
    denoising_losses,
    fid,
    membership,
    nearest_distances,
    noise_norm,
    steering_norms,
)

__all__ = [
    "MODULES",
    "MembershipResult",
    "amd",
    "denoising_losses",
    "fid",
    "membership",
    "nearest_distances",
    "noise_norm",
    "path",
    "steering_norms",
]

MODULES = ("amd", "fid", "membership", "noise_norm")


def path(name: str) -> str:
    """The folder of an evaluate module, for `evaluate.load`.

    Raises:
        ValueError: for a name that is none of `MODULES`.
    """
    if name not in MODULES:
        raise ValueError(f"unknown metric {name!r}: use one of {', '.join(MODULES)}")
    return str(Path(__file__).parent / name)
