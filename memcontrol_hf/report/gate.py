"""The release gate: a file of limits for the measures of an audit."""

import math
from pathlib import Path

import yaml

DEFAULT_GATE = Path(__file__).with_name("gate.yaml")
"""The package's own gate."""

LIMITS = ("max", "min", "max_above_frozen_base", "max_above_held_out_as_train")
"""Kinds of limits. Each limit holds for the bad end of the model's 95 % interval."""

MEASURES = (
    *(f"membership_{kind}_{by}" for by in ("loss", "secmi", "pia", "clid") for kind in ("auc", "tpr", "tpr_strict")),
    "extraction_rate",
    "extraction_rate_calibrated",
    "extraction_false_alarms",
    "nearest_share",
    "copy_share",
    "copy_similarity",
    "copy_threshold",
    "amd",
    "amd_held_out",
    "c_t",
    "auth_pct",
    "trajectory_norm_auc",
    "trajectory_norm_auc_canaries",
    "fid",
    "kid",
    "precision",
    "recall",
    "clip_score",
)
"""Names of what an audit can measure and a gate can limit."""


def load_gate(path: str | Path = DEFAULT_GATE) -> dict[str, dict[str, float]]:
    """Read a gate file.

    Args:
        path (`str`): YAML file that names measures, each with one or more limits: `extraction_rate: {max: 0.05}`.

    Returns:
        `dict[str, dict[str, float]]`: For each measure of `MEASURES` the bound of each kind of `LIMITS`.

    Raises:
        ValueError: When the file cannot be read or is no gate, and for an unknown measure, an unknown kind of limit,
            or a bound that is no finite number.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the gate {str(path)!r}: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or not content or not all(isinstance(limit, dict) for limit in content.values()):
        raise ValueError(f"{str(path)!r} is no gate: a gate names measures, each with limits such as {{max: 0.05}}")
    for name, limit in content.items():
        if name not in MEASURES:
            raise ValueError(f"unknown measure {name!r} in {str(path)!r}: use some of {', '.join(MEASURES)}")
        for kind, bound in limit.items():
            if kind not in LIMITS:
                raise ValueError(f"unknown limit {kind!r} of {name} in {str(path)!r}: use {', '.join(LIMITS)}")
            if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not math.isfinite(bound):
                raise ValueError(f"the limit {kind} of {name} in {str(path)!r} must be a number, but is {bound!r}")
    return content
