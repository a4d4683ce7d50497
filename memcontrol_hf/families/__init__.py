"""Model families: how images and captions are encoded, how the denoiser is called, and which noise process it has.

A family is one short class in a file of its own; [`family_of`] picks it by the pipeline's class. docs/families.md says
how to add one.
"""

from .base import Condition, Family, null_like
from .loading import DTYPES, QUANTIZATIONS, load_pipeline
from .noise import DDPMNoise, FlowMatchingNoise
from .registry import FAMILIES, family_of
from .stable_diffusion import StableDiffusionFamily

__all__ = [
    "DTYPES",
    "FAMILIES",
    "QUANTIZATIONS",
    "Condition",
    "DDPMNoise",
    "Family",
    "FlowMatchingNoise",
    "StableDiffusionFamily",
    "family_of",
    "load_pipeline",
    "null_like",
]
