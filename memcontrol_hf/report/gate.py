"""The release gate: a file of limits for the measures of an audit."""

import sys
from pathlib import Path
from textwrap import shorten
from typing import Any

import yaml

from ..error_lines import in_one_line

DEFAULT_GATE = Path(__file__).with_name("gate.yaml")
"""The package's own gate."""

LIMITS = ("max", "min", "max_above_frozen_base", "max_above_held_out_as_train")
"""Kinds of limits. Each limit holds for the bad end of the model's 95 % interval."""

_ATTACKS = ("loss", "secmi", "pia", "clid", "secmi_several", "sima", "semantic_noise", "calibrated")

MEASURES = (
    *(f"membership_{kind}_{by}" for by in _ATTACKS for kind in ("auc", "tpr", "tpr_strict")),
    "dataset_inference_p",
    "extraction_rate",
    "extraction_rate_calibrated",
    "extraction_false_alarms",
    "embedding_attack_auc",
    "embedding_attack_rate",
    "embedding_attack_rate_held_out",
    "nearest_share",
    "copy_share",
    "copy_similarity",
    "copy_threshold",
    "partial_copy_share",
    "amd",
    "amd_held_out",
    "c_t",
    "auth_pct",
    "trajectory_norm_auc",
    "trajectory_norm_auc_canaries",
    "attribute_advantage",
    "attribute_accuracy",
    "attribute_accuracy_held_out",
    "reidentified_share",
    "reidentified_share_real",
    "fid",
    "kid",
    "precision",
    "recall",
    "clip_score",
)
"""Names of what an audit can measure and a gate can limit."""


_LARGEST_GATE = 100_000  # bytes


class _GateLoader(yaml.SafeLoader):
    """Reads what a gate needs: no aliases, which can make a few bytes huge, and no name twice."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, f"a gate has no aliases, but *{event.anchor} is one")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"{shorten(twice, 80)} stands there twice")
        return super().construct_mapping(node, deep)


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
        if (size := Path(path).stat().st_size) > _LARGEST_GATE:
            raise ValueError(f"cannot read the gate {str(path)!r}: it has {size} bytes, more than {_LARGEST_GATE}")
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _GateLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the gate {str(path)!r}: {in_one_line(error)}") from None
    except RecursionError:
        raise ValueError(f"cannot read the gate {str(path)!r}: it is nested too deeply") from None
    return check_limits(content, repr(str(path)))


def check_limits(limits: Any, source: str) -> dict[str, dict[str, float]]:
    """Return limits as they are, once they are known to be those of a gate.

    Args:
        limits: What was read.
        source (`str`): Where it was read, for the error message.

    Raises:
        ValueError: When there is no limit, a measure without a limit, an unknown measure, an unknown kind of limit, or
            a bound that is no finite number.
    """
    if not isinstance(limits, dict) or not limits or not all(isinstance(limit, dict) for limit in limits.values()):
        raise ValueError(f"{source} is no gate: a gate names measures, each with limits such as {{max: 0.05}}")
    for name, limit in limits.items():
        if name not in MEASURES:
            raise ValueError(f"unknown measure {_short(name)} in {source}: use some of {', '.join(MEASURES)}")
        if not limit:
            raise ValueError(f"{name} has no limit in {source}: give one of {', '.join(LIMITS)}, or leave it out")
        for kind, bound in limit.items():
            if kind not in LIMITS:
                raise ValueError(f"unknown limit {_short(kind)} of {name} in {source}: use {', '.join(LIMITS)}")
            if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not abs(bound) <= sys.float_info.max:
                raise ValueError(f"the limit {kind} of {name} in {source} must be a number, but is {_short(bound)}")
    return limits


def _short(value: Any) -> str:
    return shorten(repr(value), 80)
