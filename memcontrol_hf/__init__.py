"""Fine-tune diffusion models on images that must not leak.

Importing the package registers its PEFT method, so that `PeftModel.from_pretrained` can load its adapters.
"""

from typing import TYPE_CHECKING

from .demo import demo_dataset, demo_pipeline
from .tuners import MemControlConfig

if TYPE_CHECKING:
    from . import metrics
    from .audit import audit_memorization
    from .report import MemorizationReport
    from .search import select_run
    from .search_space import SearchSpace
    from .trainer import MemControlTrainer
    from .training_arguments import MemControlTrainingArguments

__version__ = "0.1.0.dev0"

__all__ = [
    "MemControlConfig",
    "MemControlTrainer",
    "MemControlTrainingArguments",
    "MemorizationReport",
    "SearchSpace",
    "audit_memorization",
    "demo_dataset",
    "demo_pipeline",
    "metrics",
    "select_run",
]

_HOMES = {
    "MemControlTrainer": "trainer",
    "MemControlTrainingArguments": "training_arguments",
    "MemorizationReport": "report",
    "SearchSpace": "search_space",
    "audit_memorization": "audit",
    "select_run": "search",
}


def __getattr__(name: str):
    """Load what is heavy only when it is asked for: whoever only loads an adapter waits for nothing else."""
    from importlib import import_module

    if name == "metrics":
        return import_module(".metrics", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
