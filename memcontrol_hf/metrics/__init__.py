"""Measures of quality and memorization: pure functions of tensors, and the evaluate modules that wrap them.

```python
from memcontrol_hf import metrics

metrics.amd(generated, train)  # the function
evaluate.load(metrics.path("amd"))  # the module
```
"""

from pathlib import Path

from ..images import near_duplicates, tile_distances
from .dataset_inference import dataset_inference
from .denoiser_attacks import (
    clid,
    denoising_losses,
    noise_norm,
    pia,
    secmi,
    secmi_errors,
    sima,
    steering_norms,
    trajectory_noise_norms,
)
from .distances import (
    CopySimilarityResult,
    NearestShareResult,
    amd,
    auth_pct,
    c_t,
    copy_similarity,
    distances_to_both,
    nearest_distances,
    nearest_share,
)
from .extraction_attack import ExtractionResult, extraction
from .intervals import clopper_pearson
from .measured_epsilon import MeasuredEpsilon, measured_epsilon
from .membership_inference import MembershipResult, membership
from .persons import (
    ReidentificationResult,
    WorstCase,
    mean_of_persons,
    person_distances,
    reidentification,
    worst_case,
)
from .quality import PrecisionRecall, clip_score, fid, kid, load_clip, precision_recall

__all__ = [
    "MODULES",
    "CopySimilarityResult",
    "ExtractionResult",
    "MeasuredEpsilon",
    "MembershipResult",
    "NearestShareResult",
    "PrecisionRecall",
    "ReidentificationResult",
    "WorstCase",
    "amd",
    "auth_pct",
    "c_t",
    "clid",
    "clip_score",
    "clopper_pearson",
    "copy_similarity",
    "dataset_inference",
    "denoising_losses",
    "distances_to_both",
    "extraction",
    "fid",
    "kid",
    "load_clip",
    "mean_of_persons",
    "measured_epsilon",
    "membership",
    "near_duplicates",
    "nearest_distances",
    "nearest_share",
    "noise_norm",
    "path",
    "person_distances",
    "pia",
    "precision_recall",
    "reidentification",
    "secmi",
    "secmi_errors",
    "sima",
    "steering_norms",
    "tile_distances",
    "trajectory_noise_norms",
    "worst_case",
]

MODULES = (
    "amd",
    "clip_score",
    "copy_similarity",
    "extraction",
    "fid",
    "kid",
    "membership",
    "noise_norm",
    "precision_recall",
)


def path(name: str) -> str:
    """The folder of an evaluate module, for `evaluate.load`.

    Raises:
        ValueError: for a name that is not in `MODULES`.
    """
    if name not in MODULES:
        raise ValueError(f"unknown metric {name!r}: use one of {', '.join(MODULES)}")
    return str(Path(__file__).parent / "evaluate_modules" / name)
