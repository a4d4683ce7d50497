"""From the probes of the runs to the figures of each block, with their standard errors."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from .probes import BlockProbes, SingularValueProbes
from .result import Screening
from .settings import ScreeningSettings


def estimate(
    blocks: Sequence[str], runs: Sequence[BlockProbes], settings: ScreeningSettings, facts: dict[str, Any]
) -> Screening:
    """The screening of the runs: means over runs of the sums over probes.

    Args:
        blocks (list of `str`): names of the blocks.
        runs (list of [`BlockProbes`]): finished probes of each run, whose sets are training and validation images.
        settings ([`ScreeningSettings`]): settings of the screening.
        facts (`dict`): further settings to keep.
    """
    probes = torch.stack([torch.stack(run.allocated) for run in runs])  # [runs, probes, 2, blocks]
    train, validation = probes.unbind(2)
    figures = {"learns": validation, "memorizes": train - validation}

    def by_block(values: Sequence[float]) -> dict[str, Any]:
        return dict(zip(blocks, values, strict=True))

    losses = {
        f"{name}_{when}": statistics.fmean(getattr(run, when)[name] for run in runs)
        for name in ("loss", "loss_train")
        for when in ("before", "after")
    }
    return Screening(
        **{name: by_block(values.sum(1).mean(0).tolist()) for name, values in figures.items()},
        **{f"{name}_error": by_block(standard_error(values).tolist()) for name, values in figures.items()},
        parameters=by_block(runs[0].sizes),
        settings={**asdict(settings), **facts, **losses},
        singular_values=_by_singular_value([run for run in runs if isinstance(run, SingularValueProbes)]),
    )


def _by_singular_value(runs: Sequence[SingularValueProbes]) -> dict[str, dict[str, list[float]]] | None:
    """The means over runs for each singular value, by module; `None` where the runs have not told them.

    They have four significant digits, far finer than their error, since there are many of them.
    """
    if not runs:
        return None
    train, validation = torch.stack([run.by_singular_value for run in runs]).mean(0)
    sizes = [*runs[0].modules.values()]

    def rounded(values: torch.Tensor) -> list[list[float]]:
        return [[float(f"{value:.4g}") for value in part.tolist()] for part in values.split(sizes)]

    figures = zip(runs[0].modules, rounded(validation), rounded(train - validation))
    return {module: {"learns": learns, "memorizes": memorizes} for module, learns, memorizes in figures}


def standard_error(probes: torch.Tensor) -> torch.Tensor:
    """The standard error of the mean over runs of sums over probes.

    The variance of a probe is estimated by half of the mean squared difference of successive probes, so that the trend
    of the training does not count as noise (von Neumann et al., 1941, https://doi.org/10.1214/aoms/1177731746). With
    several runs the standard error over runs is another estimate, which few runs can make too small by chance: the
    larger of the two is taken.

    Args:
        probes (`torch.Tensor`): `[runs, probes, blocks]`.

    Returns:
        `torch.Tensor`: `[blocks]`; NaN for one probe in one run.
    """
    runs, count = probes.shape[:2]
    estimates = []
    if count > 1:
        variance = probes.diff(dim=1).square().mean(1) / 2  # of one probe, in each run
        estimates.append((variance.mean(0) * count / runs).sqrt())
    if runs > 1:
        estimates.append(probes.sum(1).std(0) / runs**0.5)
    return torch.stack(estimates).amax(0) if estimates else torch.full_like(probes[0, 0], torch.nan)
