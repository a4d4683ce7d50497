"""The audit: every attack on a model or on generated images, beside the controls of the attack."""

from .audit import audit_memorization
from .captions import MARKERS, caption_markers
from .settings import FALSE_ALARMS, LEAST_IMAGES, AuditSettings, Figure

__all__ = [
    "FALSE_ALARMS",
    "LEAST_IMAGES",
    "MARKERS",
    "AuditSettings",
    "Figure",
    "audit_memorization",
    "caption_markers",
]
