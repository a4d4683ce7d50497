"""Optuna's own cases for samplers, which ship with it, over our `SeededSampler` around each sampler of ours."""

from collections.abc import Callable
from functools import partial

import pytest
from optuna.samplers import BaseSampler, TPESampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase, MultiObjectiveSamplerTestCase, RelativeSamplerTestCase

from memcontrol_hf.search import SAMPLERS, SeededSampler

pytestmark = pytest.mark.filterwarnings("ignore")
# Optuna's cases of relative sampling ask for it in the second trial, so that no trial may be left to chance. A
# `GPSampler(n_startup_trials=0)` passes them, too, but takes a minute and a half.
RELATIVE = {"tpe": lambda seed: TPESampler(seed=seed, multivariate=True, n_startup_trials=0)}


def samplers(makers: dict[str, Callable[[int], BaseSampler]]) -> pytest.MarkDecorator:
    cases = [pytest.param(partial(SeededSampler, make, 0), id=name) for name, make in makers.items()]
    return pytest.mark.parametrize("sampler", cases)


@samplers(SAMPLERS)
class TestBasic(BasicSamplerTestCase):
    pass


@samplers(RELATIVE)
class TestRelative(RelativeSamplerTestCase):
    pass


@samplers(SAMPLERS)
class TestMultiObjective(MultiObjectiveSamplerTestCase):
    pass
