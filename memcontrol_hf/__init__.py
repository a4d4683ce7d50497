"""Fine-tune diffusion models on images that must not leak.

Importing the package makes its PEFT method known to PEFT, whichever of the two is imported first, so that
`PeftModel.from_pretrained` can load the package's adapters.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from wrapt import when_imported

if TYPE_CHECKING:
    from . import metrics, workflow
    from .audit import audit_memorization
    from .demo import demo_dataset, demo_pipeline
    from .report import MemorizationReport
    from .screening import Screening
    from .search import select_run
    from .search_space import SearchSpace
    from .trainer import MemControlTrainer
    from .training_arguments import MemControlTrainingArguments
    from .tuners import MemControlConfig

__version__ = "0.1.0.dev0"  # what the package is built with

__all__ = [
    "MemControlConfig",
    "MemControlTrainer",
    "MemControlTrainingArguments",
    "MemorizationReport",
    "Screening",
    "SearchSpace",
    "audit_memorization",
    "demo_dataset",
    "demo_pipeline",
    "metrics",
    "select_run",
    "workflow",
]

_MODULE_OF_NAME = {
    "MemControlConfig": "tuners",
    "MemControlTrainer": "trainer",
    "MemControlTrainingArguments": "training_arguments",
    "MemorizationReport": "report",
    "Screening": "screening",
    "SearchSpace": "search_space",
    "audit_memorization": "audit",
    "demo_dataset": "demo",
    "demo_pipeline": "demo",
    "select_run": "search",
}
_MODULES = ("demo", "metrics", "search", "tuners", "workflow")


@when_imported("peft")
def _register_peft_method(peft: ModuleType) -> None:
    """Import `tuners`, which registers the method. Without PEFT nothing can ask for the method, so that can wait."""
    # `tuners` itself may be what imports PEFT now: it is then half imported, and registers the method at its end.
    import_module(".tuners", __name__)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: a card needs no PyTorch, and loading an adapter no Optuna."""
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF_NAME[name]}", __name__), name)
