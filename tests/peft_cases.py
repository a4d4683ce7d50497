"""A pytest plugin that puts this package's methods in the place of PEFT's, in PEFT's own tests of custom models.

PEFT's tests are not part of its package; training_scripts/README.md says how to get and to run them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import peft.mapping
import pytest
import torch

from memcontrol_hf.tuners import METHODS, MemControlConfig, MemControlLayer, tunable_modules


@dataclass
class Config(MemControlConfig):
    """Knows PEFT's switch by which its tests get adapters that are not at their start, where they change nothing."""

    init_weights: bool = True


peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["MEMCONTROL"] = Config
_update_layer = MemControlLayer.update_layer


def _update_and_disturb(self: MemControlLayer, adapter_name: str, config: Config, name: str) -> None:
    _update_layer(self, adapter_name, config, name)
    if not config.init_weights:
        for parameters in self._parameters_of(adapter_name):
            parameters[adapter_name].data += 0.3 * torch.randn_like(parameters[adapter_name])


MemControlLayer.update_layer = _update_and_disturb

# PEFT's tables hold MHA, whose only linear map is never called, and models that no method here can tune.
_LEFT_OUT = ("MHA", "MlpUsingParameters", "Conv3d")


def cases(peft_tests: ModuleType) -> Iterator[tuple[str, str, type, dict[str, Any]]]:
    """Rows of PEFT's table: name, model, class and arguments of the configuration, for each model and method."""
    models = {row[1] for row in peft_tests.TEST_CASES} - {*_LEFT_OUT}
    for model in sorted(models):
        base = peft_tests.MockTransformerWrapper.from_pretrained(model)
        for method in METHODS:
            names = tunable_modules(base, method)
            for targets in filter(None, (names, names[:1] if len(names) > 1 else None)):
                kwargs = {"method": method, "target_modules": targets}
                yield f"{model} {method} {len(targets)}", model, Config, kwargs


def pairs() -> Iterator[tuple[str, str, type, dict[str, Any], dict[str, Any]]]:
    """Rows of PEFT's table of two adapters in one model."""
    for method in ("svdiff", "difffit", "weights", "bias"):
        for name, second in (("Same", "lin0"), ("Different", "lin1")):
            one, two = (
                {"method": method, "target_modules": [target], "init_weights": False} for target in ("lin0", second)
            )
            yield f"{method} {name}", "memcontrol", Config, one, two


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    module = metafunc.module
    if getattr(module, "TEST_CASES", None) and module.TEST_CASES[0][2] is not Config:
        module.TEST_CASES[:] = cases(module)
        module.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = pairs()
