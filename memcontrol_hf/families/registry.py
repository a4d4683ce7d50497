"""The list of families, and the family of a pipeline."""

from typing import TYPE_CHECKING

from .base import Family
from .dit import DiTFamily
from .flux import FluxFamily
from .pixart import PixArtFamily
from .stable_diffusion import StableDiffusionFamily
from .stable_diffusion_3 import StableDiffusion3Family
from .stable_diffusion_xl import StableDiffusionXLFamily
from .unconditional import UnconditionalFamily

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


FAMILIES: list[type[Family]] = [
    StableDiffusionFamily,
    StableDiffusionXLFamily,
    StableDiffusion3Family,
    FluxFamily,
    PixArtFamily,
    DiTFamily,
    UnconditionalFamily,
]
"""The families, each found by the pipeline's class; append your own (docs/families.md)."""


def family_of(pipeline: "DiffusionPipeline") -> Family:
    """The family of a pipeline.

    Raises:
        ValueError: for a pipeline class that no family names, a pipeline that lacks a part, and an unknown prediction
            type.
    """
    for family in FAMILIES:
        if type(pipeline).__name__ in family.pipeline_classes:
            return family(pipeline)
    known = ", ".join(name for family in FAMILIES for name in family.pipeline_classes)
    raise ValueError(
        f"{type(pipeline).__name__} is no pipeline that can be tuned here; known: {known}. For another, append "
        "a subclass of memcontrol_hf.families.Family to FAMILIES: it names pipeline_classes, denoiser_name, encoders "
        "and conditions, and writes encode() (captions to tensors) and call_denoiser(); see docs/families.md"
    )
