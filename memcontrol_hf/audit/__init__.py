"""The audit: every attack on a model or on generated images, beside the controls of the attack."""

from .attributes import check_attribute
from .audit import TooFewImages, audit_memorization
from .captions import MARKERS, caption_identifiers, caption_markers
from .least_data import cannot_pass, least_images
from .private import write_split
from .settings import FALSE_ALARMS, LEAST_IMAGES, AuditSettings, Figure

__all__ = [
    "FALSE_ALARMS",
    "LEAST_IMAGES",
    "MARKERS",
    "AuditSettings",
    "Figure",
    "TooFewImages",
    "audit_memorization",
    "cannot_pass",
    "caption_identifiers",
    "caption_markers",
    "check_attribute",
    "least_images",
    "write_split",
]
