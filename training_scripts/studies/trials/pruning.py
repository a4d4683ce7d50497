"""Stop trials early? How many trials a rule stops, how many of them wrongly, and how much time it saves."""

import numpy as np
import pandas as pd

from memcontrol_hf.search import dominates

from .columns import OBJECTIVES, STAGES
from .replay import hypervolume

DOMINATORS = (1, 2, 3, 5)


def pruned(stage_values: np.ndarray, dominators: int) -> np.ndarray:
    """Which trials are stopped.

    Args:
        stage_values: Objectives at a stage `[N, 2]`, in the order of the trials; both are minimized.
        dominators: Number of earlier trials that must dominate a trial there.

    Returns:
        Booleans `[N]`.
    """
    return np.tril(dominates(stage_values), -1).sum(1) >= dominators


class Searches:
    """Searches of random trials of the table, and what they are without stopping.

    Args:
        runs: Runs that were measured at the stages.
        trials: Number of trials of a search.
        seeds: Number of searches.
    """

    def __init__(self, runs: pd.DataFrame, trials: int, seeds: int) -> None:
        self.values = runs[OBJECTIVES].to_numpy()
        self.reference = self.values.max(0)
        self.draws = [np.random.default_rng(seed).permutation(len(runs))[:trials] for seed in range(seeds)]
        self.fronts = [~dominates(self.values[draw]).any(1) for draw in self.draws]
        self.areas = [hypervolume(self.values[draw], self.reference) for draw in self.draws]

    def stop(
        self, at_stage: np.ndarray, dominators: int, until: np.ndarray, after: np.ndarray, without: np.ndarray
    ) -> dict[str, float]:
        """What a rule does, as means over the searches.

        Args:
            at_stage: Objectives at the stage `[N, 2]`.
            dominators: Number of earlier trials that must dominate a trial.
            until, after: CPU seconds of each run until the end of the stage, and after the stage: `[N]`.
            without: CPU seconds of each run without a stage: `[N]`.

        Returns:
            `stopped`: share of the trials. `wrong`: share of the stopped trials that would have been on the front.
            `hypervolume` and `seconds`: as shares of the same search without stopping.
        """
        found = []
        for draw, front, area in zip(self.draws, self.fronts, self.areas):
            stopped = pruned(at_stage[draw], dominators)
            kept = hypervolume(self.values[draw][~stopped], self.reference) / area
            seconds = (until[draw].sum() + after[draw][~stopped].sum()) / without[draw].sum()
            wrong = (stopped & front).sum() / max(1, stopped.sum())
            found.append((stopped.mean(), wrong, kept, seconds))
        return dict(zip(("stopped", "wrong", "hypervolume", "seconds"), np.mean(found, 0).tolist()))


def pruning(runs: pd.DataFrame, trials: int, seeds: int) -> list[dict[str, float | str | int]]:
    """What each rule stops, loses and saves in searches of random trials; an empty list with too few runs.

    Args:
        runs: The table, as [`~trials.columns.read`] returns it.
        trials: Number of trials of a search.
        seeds: Number of searches.
    """
    runs = runs[runs["stage0_fid"].notna()] if "stage0_fid" in runs else runs[:0]
    if len(runs) < trials:
        return []
    searches = Searches(runs, trials, seeds)
    measuring = runs["seconds_fid"] + runs["seconds_membership_auc"]
    training = runs["seconds_train_with_stages"] - len(STAGES) * measuring
    without = (training + measuring).to_numpy()
    rows = []
    for stage, share in enumerate(STAGES):
        for quality, cost in (("fid", measuring), ("loss", runs["seconds_membership_auc"])):
            at_stage = runs[[f"stage{stage}_{quality}", f"stage{stage}_membership_auc"]].to_numpy()
            until = (training * share + cost).to_numpy()
            after = (training * (1 - share) + measuring).to_numpy()
            for dominators in DOMINATORS:
                means = searches.stop(at_stage, dominators, until, after, without)
                rows.append({"after": share, "quality": quality, "dominators": dominators, **means})
    return rows
