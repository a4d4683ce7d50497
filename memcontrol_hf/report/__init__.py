"""The memorization report, the release gate, the plots and the cards.

Reading and rendering a report needs neither PyTorch nor Optuna. The cards (`card`) and the plots (`plots`, which load
Matplotlib) are imported by their own names.
"""

from .gate import DEFAULT_GATE, LIMITS, MEASURES, load_gate
from .report import (
    ALL_ON,
    FROZEN_BASE,
    REPORT_SCHEMA,
    SCHEMA_VERSION,
    SELECTED,
    MemorizationReport,
    check_no_training,
)
from .verdict import NOT_APPLICABLE, verdict

__all__ = [
    "ALL_ON",
    "DEFAULT_GATE",
    "FROZEN_BASE",
    "LIMITS",
    "MEASURES",
    "NOT_APPLICABLE",
    "REPORT_SCHEMA",
    "SCHEMA_VERSION",
    "SELECTED",
    "MemorizationReport",
    "check_no_training",
    "load_gate",
    "verdict",
]
