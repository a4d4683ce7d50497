"""Measures of quality and memorization: pure functions of tensors, and the evaluate modules that wrap them.

```python
from memcontrol_hf import metrics

metrics.amd(generated, train)  # the function
evaluate.load(metrics.path("amd"))  # the module
```
"""

from pathlib import Path

from .attacks import ExtractionResult, MembershipResult, extraction, membership, tile_distances
from .distances import (
    amd,
    auth_pct,
    c_t,
    fid,
    nearest_distances,
)
from .white_box import clid, denoising_losses, noise_norm, pia, secmi, steering_norms, trajectory_noise_norms

__all__ = [
    "MODULES",
    "ExtractionResult",
    "MembershipResult",
    "amd",
    "auth_pct",
    "c_t",
    "clid",
    "denoising_losses",
    "extraction",
    "fid",
    "membership",
    "nearest_distances",
    "noise_norm",
    "path",
    "pia",
    "secmi",
    "steering_norms",
    "tile_distances",
    "trajectory_noise_norms",
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
