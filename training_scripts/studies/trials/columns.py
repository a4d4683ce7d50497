"""The table of real trials that trial_table.py writes: when a run is measured, and columns that follow from others."""

from pathlib import Path

import pandas as pd

from common.audits import LATER_ATTACKS

STAGES = (0.25, 0.5)  # shares of the training after which the cheap rewards are measured
NOISE_TIMESTEPS = (100, 300, 500, 700, 900)
OBJECTIVES = ["fid", "membership_auc"]


def masks(runs: pd.DataFrame) -> list[str]:
    """The columns of the mask, one for each group of blocks."""
    return [column for column in runs if column.startswith("mask.")]


def read(file: Path) -> pd.DataFrame:
    """The table, with the columns that follow from others."""
    runs = pd.read_parquet(file)
    runs["loss_gap"] = runs["loss"] - runs["loss_train"]
    runs["noise_norm"] = runs[[f"noise_norm_{timestep}_train" for timestep in NOISE_TIMESTEPS]].mean(axis=1)
    runs["negative_amd"] = -runs["audit_amd"]
    later = {f"canaries_{name}" for name in LATER_ATTACKS}  # only some of the rows of a table have them
    caught = [column for column in runs if column.startswith("canaries_") and column not in later]
    runs["canaries"] = runs[caught].max(axis=1)
    return runs
