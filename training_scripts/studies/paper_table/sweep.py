"""Size alone: memorization and quality against the trainable parameters, over the masks of the real trials."""

from pathlib import Path
from typing import Any

from trials.columns import read
from trials.rewards import correlations

SWEPT = {
    "audit_membership_auc_loss": "membership AUC",
    "canaries": "canaries caught by the best attack",
    "audit_copy_share": "copies",
    "audit_extraction_rate_calibrated": "extracted, calibrated",
    "fid": "fid",
}


def sweep_of(file: Path) -> dict[str, Any] | None:
    """Rank correlations of the trainable parameters with the columns `SWEPT`; `None` when there is no table.

    Args:
        file: The table that trial_table.py writes.
    """
    if not file.is_file():
        return None
    runs = read(file)
    ranked = correlations(runs, True, ["trainable_parameters"], list(SWEPT))["trainable_parameters"]
    return {"runs": int((runs["trainable_parameters"] > 0).sum()), "correlations": ranked}
