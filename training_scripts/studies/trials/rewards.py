"""Which reward? Rank correlations of the cheap rewards with what the attacks of the audit find."""

from collections.abc import Collection

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from .columns import NOISE_TIMESTEPS, masks

REWARDS = {
    "membership_auc": "membership AUC by the loss, validation images (the default)",
    "stage0_membership_auc": "the same, a quarter of the way through the training",
    "loss_gap": "loss on validation minus on training images",
    "trainable_parameters": "trainable parameters",
    "noise_norm": "noise norm on training images, mean of all timesteps",
    **{f"noise_norm_{t}_train": f"noise norm at timestep {t}" for t in NOISE_TIMESTEPS},
    **{f"noise_norm_{t}_auc": f"membership AUC by the noise norm at timestep {t}" for t in NOISE_TIMESTEPS},
    "audit_trajectory_norm_auc": "membership AUC by the noise norm along trajectories, the audit's own",
    "negative_amd": "minus amd, of the audit's own images",
}
OUTCOMES = {
    "audit_membership_auc_loss": "membership, loss",
    "audit_membership_auc_clid": "membership, CLiD",
    "audit_membership_auc_pia": "membership, PIA",
    "audit_copy_share": "copies",
    "audit_extraction_rate_calibrated": "extracted, calibrated",
    "audit_nearest_share": "nearer to training",
    "canaries": "canaries caught by the best attack",
}
COSTS = {"membership_auc": "seconds_membership_auc", "loss_gap": "seconds_membership_auc"} | {
    name: "seconds_noise_norm" for name in REWARDS if name.startswith("noise_norm")
}
"""Reward -> the column with its CPU seconds."""

DRAWS = 999


def correlations(
    runs: pd.DataFrame,
    within_rates: bool,
    rewards: Collection[str] = tuple(REWARDS),
    outcomes: Collection[str] = tuple(OUTCOMES),
) -> dict[str, dict[str, dict[str, float] | None]]:
    """Spearman's correlation of each reward with each outcome, with a 95 % bootstrap interval over the runs.

    Args:
        runs: The table, as [`read`] returns it. The frozen base is left out, because it has no stages.
        within_rates: Rank the runs within each learning rate, so that masks alone are compared.

    Returns:
        reward -> outcome -> `rho`, `low`, `high`. `None` where the reward or the outcome is the same in all runs.
    """
    runs = runs[runs[masks(runs)].any(axis=1)]
    groups = [group for _, group in runs.groupby("learning_rate")] if within_rates else [runs]
    draws = np.random.default_rng(0).integers(len(runs), size=(DRAWS, len(runs)))
    draws = np.vstack([np.arange(len(runs)), draws])  # the runs themselves first

    def ranks(column: str) -> np.ndarray:
        """The standardized ranks of each draw `[1 + DRAWS, N]`; NaN where all values of a draw are the same."""
        values = np.concatenate([rankdata(group[column]) / (len(group) + 1) for group in groups])
        ranked = rankdata(values[draws], axis=1)
        ranked -= ranked.mean(1, keepdims=True)
        norms = np.linalg.norm(ranked, axis=1, keepdims=True)
        return np.divide(ranked, norms, out=np.full_like(ranked, np.nan), where=norms > 0)

    ranked_outcomes = {outcome: ranks(outcome) for outcome in outcomes}
    return {
        reward: {outcome: rank_correlation(x, y) for outcome, y in ranked_outcomes.items()}
        for reward, x in ((reward, ranks(reward)) for reward in rewards)
    }


def rank_correlation(x: np.ndarray, y: np.ndarray) -> dict[str, float] | None:
    """The correlation of standardized ranks, with the interval of its draws.

    Args:
        x, y: Ranks `[1 + draws, N]`, those of the runs themselves first.
    """
    drawn = (x * y).sum(1)
    if np.isnan(drawn[0]):
        return None
    low, high = np.nanquantile(drawn[1:], (0.025, 0.975))
    return {"rho": float(drawn[0]), "low": float(low), "high": float(high)}
