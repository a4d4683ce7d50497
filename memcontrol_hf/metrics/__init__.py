"""Measures of quality and memorization: pure functions of tensors, and the evaluate modules that wrap them.

```python
from memcontrol_hf import metrics

metrics.amd(generated, train)  # the function
evaluate.load(metrics.path("amd"))  # the module
```
"""

from pathlib import Path

from ..images import near_duplicates, tile_distances
from .attribute_inference import AttributeInferenceResult, attribute_inference
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
from .embedding_search import search_embeddings
from .extraction_attack import ExtractionResult, extraction
from .intervals import clopper_pearson
from .measured_epsilon import MeasuredEpsilon, measured_epsilon
from .measured_mu import MeasuredMu, epsilon_of_mu, measured_mu, refuted_mu
from .membership_inference import MembershipResult, membership
from .partial_copies import PartialCopiesResult, comparable, partial_copies
from .persons import (
    ReidentificationResult,
    WorstCase,
    mean_of_persons,
    person_distances,
    reidentification,
    worst_case,
)
from .quality import PrecisionRecall, clip_score, fid, kid, load_clip, precision_recall
from .semantic_noise import semantic_noise

__all__ = [
    "MODULES",
    "AttributeInferenceResult",
    "CopySimilarityResult",
    "ExtractionResult",
    "MeasuredEpsilon",
    "MeasuredMu",
    "MembershipResult",
    "NearestShareResult",
    "PartialCopiesResult",
    "PrecisionRecall",
    "ReidentificationResult",
    "WorstCase",
    "amd",
    "attribute_inference",
    "auth_pct",
    "c_t",
    "clid",
    "clip_score",
    "clopper_pearson",
    "comparable",
    "copy_similarity",
    "dataset_inference",
    "denoising_losses",
    "distances_to_both",
    "epsilon_of_mu",
    "extraction",
    "fid",
    "kid",
    "load_clip",
    "mean_of_persons",
    "measured_epsilon",
    "measured_mu",
    "membership",
    "near_duplicates",
    "nearest_distances",
    "nearest_share",
    "noise_norm",
    "partial_copies",
    "path",
    "person_distances",
    "pia",
    "precision_recall",
    "refuted_mu",
    "reidentification",
    "search_embeddings",
    "secmi",
    "secmi_errors",
    "semantic_noise",
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
    "dataset_inference",
    "extraction",
    "fid",
    "kid",
    "membership",
    "noise_norm",
    "partial_copies",
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
