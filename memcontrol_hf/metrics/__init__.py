"""Measures of quality and memorization: pure functions of tensors, and the evaluate modules that wrap them.

```python
from memcontrol_hf import metrics

metrics.amd(generated, train)  # the function
evaluate.load(metrics.path("amd"))  # the module
```
"""

from pathlib import Path

from .attacks import (
    ExtractionResult,
    MembershipResult,
    denoising_losses,
    extraction,
    membership,
    noise_norm,
    steering_norms,
    tile_distances,
)
from .distances import (
    amd,
    auth_pct,
    c_t,
    fid,
    nearest_distances,
)

__all__ = [
    "MODULES",
    "ExtractionResult",
    "MembershipResult",
    "amd",
    "auth_pct",
    "c_t",
    "denoising_losses",
    "extraction",
    "fid",
    "membership",
    "nearest_distances",
    "noise_norm",
    "path",
    "steering_norms",
    "tile_distances",
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
