"""The audit: every attack on a model or on images, beside its controls."""

from .audit import (
    FALSE_ALARMS,
    LEAST_IMAGES,
    AuditSettings,
    Figure,
    audit_memorization,
    caption_markers,
    load_adapter,
)

__all__ = [
    "FALSE_ALARMS",
    "LEAST_IMAGES",
    "AuditSettings",
    "Figure",
    "audit_memorization",
    "caption_markers",
    "load_adapter",
]
