"""The verdict of a release gate in words: whether a model leaks, and by which attack, or could not be measured."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

NOT_APPLICABLE = "not applicable"
"""First words of a measure's note when the measure has no meaning for a model; a gate passes over that measure."""

GENERATED = "generated images"
"""Subject of an audit that had no weights to attack."""

_ENDLESS = 1e9
"""Factor of a limit that no number of images would keep, in a report that holds finite numbers alone."""

_QUALITY = ("fid", "kid", "precision", "recall", "clip_score")
_OF_A_MODEL = (
    *("membership_", "dataset_inference_", "extraction_", "embedding_attack_", "trajectory_norm_", "reidentified_"),
    *_QUALITY,
)
_ATTACKS = {"auc_loss": "loss", "auc_secmi": "SecMI", "auc_pia": "PIA", "auc_clid": "CLiD"}


@dataclass(frozen=True)
class Violation:
    """Why a limit is not kept.

    Args:
        name (`str`): name of the measure.
        kind (`str`): `leaks` where the measured value itself lies beyond the limit, `unmeasured` where only the bad
            end of its interval does or there is no value, `poor` for a measure of quality.
        reason (`str`): one line, which begins with the name.
        factor (`float`, *optional*): about how many times as many images would bring the interval within the limit.
    """

    name: str
    kind: str
    reason: str
    factor: float | None = None


def asked_of(name: str, subject: str | None) -> bool:
    """Whether a gate's limit of a measure is asked of what was audited: generated images alone have no weights."""
    return subject != GENERATED or not name.startswith(_OF_A_MODEL)


def violation(
    name: str, kind: str, bound: float, figures: Mapping[str, Any], unit: str = "images"
) -> Violation | None:
    """Why a measure violates a limit; `None` when the measure keeps the limit.

    A limit holds for the bad end of the 95 % interval. If the value itself keeps the limit, the number of images that
    would do follows from the interval's width, which shrinks with the root of their number (for a rate of 0, with
    their number).

    Args:
        name (`str`): Name of the measure.
        kind (`str`): Kind of the limit, one of `LIMITS`.
        bound (`float`): Bound of the limit.
        figures (`dict`): What the audit found: for the `model` and for each control its `value`, `low` and `high`.
        unit (`str`): What the figures are of: `images` or `persons`.
    """
    model = figures.get("model")
    if model and model["value"] is None and (model.get("note") or "").startswith(NOT_APPLICABLE):
        return None
    if not model or model["value"] is None:
        reason = f"{name}: {(model or {}).get('note') or 'was not measured'}; what is not measured does not pass"
        return Violation(name, "unmeasured", reason)
    value, end, over = model["value"], model["low" if kind == "min" else "high"], bound
    worst = min if kind == "min" else max
    end = value if end is None else worst(value, end)  # a report that was edited can hold an end that hides the value
    if kind.startswith("max_above_"):
        control = kind.removeprefix("max_above_")
        reference = figures.get(control)
        if not reference or reference["value"] is None:
            reason = f"{name}: the control {control} was not measured, so {kind} cannot be judged"
            return Violation(name, "unmeasured", reason)
        over += reference["value"]
        excess = f"{end - reference['value']:.3f} above {control} ({reference['value']:.3f})"
        said = f"may be {excess}, over the limit {bound:g}"
    elif kind == "min":
        said = f"may be as low as {end:.3f}, below the limit {bound:g}"
    else:
        said = f"may be as high as {end:.3f}, above the limit {bound:g}"
    sign = -1 if kind == "min" else 1
    if sign * (end - over) <= 0:
        return None
    if sign * (value - over) > 0:
        found = "poor" if name in _QUALITY else "leaks"
        return Violation(name, found, f"{name}: {said}; the value itself, {value:.3f}, is beyond it, too")
    room, width = abs(over - value), abs(end - value)
    ratio = width / room if room else _ENDLESS
    factor = min(ratio if value == 0 else ratio**2, _ENDLESS)
    more = ""
    if name.startswith("membership_auc") and (model["low"] or 0) > 0.5:
        more = ", but the attack is better than guessing"
    more += f": about {factor:.2g} times as many {unit} would tell" if factor < 100 else ""
    return Violation(name, "unmeasured", f"{name}: {said}; the value itself, {value:.3f}, is within it{more}", factor)


def verdict(gate: Mapping[str, Any], audit: Mapping[str, Any] | None) -> str:
    """What happened, in a few sentences: it leaks by these attacks, or could not be measured for want of images.

    Args:
        gate (`dict`): `gate` of a report.
        audit (`dict`, *optional*): `audit` of the report.
    """
    if gate["passed"]:
        said = (
            "In every attack that the gate limits, the model stayed within the limit at the bad end of the interval."
        )
        return said + (_scope(audit) if audit else "")
    if audit is None:
        return "Nothing was attacked, so nothing is known."
    kinds = gate.get("kinds")
    if kinds is None:  # a report of an earlier version
        return "It leaks more than the gate allows, or was not measured well enough to tell."
    parts = []
    by_kind = {kind: [name for name, of in kinds.items() if of == kind] for kind in ("leaks", "poor", "unmeasured")}
    if by_kind["leaks"]:
        parts.append(f"It leaks, by {_listed(map(_attack, by_kind['leaks']))}.")
    if by_kind["poor"]:
        parts.append(f"Its images are poorer than the gate allows, by {_listed(by_kind['poor'])}.")
    if by_kind["unmeasured"]:
        factor, unit = gate.get("factor"), unit_of(audit)
        counts = audit[unit]
        also = "" if by_kind["leaks"] else "It could not be measured well enough. "
        by = _listed(map(_attack, by_kind["unmeasured"]))
        text = f"{also}There are too few {unit} to tell by {by}" if factor else f"{also}No figure could be had of {by}"
        if factor and factor < 100:
            needed = {name: _round_up(factor * counts[name]) for name in ("train", "held_out")}
            text += (
                f": {counts['train']} training and {counts['held_out']} held-out {unit} were attacked, and about "
                f"{needed['train']} and {needed['held_out']} would do if the figures stay as they are"
            )
        parts.append(text + ".")
    return " ".join(parts) + _scope(audit)


def unit_of(audit: Mapping[str, Any]) -> str:
    """What the rates and intervals of an audit are of: `persons` where they are known, else `images`."""
    return "persons" if audit.get("persons") else "images"


def _scope(audit: Mapping[str, Any]) -> str:
    if audit.get("subject") != GENERATED:
        return ""
    return " Only generated images were looked at: the weights were not attacked, and nothing is said of them."


def _attack(name: str) -> str:
    short = _ATTACKS.get(name.removeprefix("membership_"))
    return f"{name} (attack by {short})" if short else name


def _listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _round_up(number: float) -> int:
    unit = 10 ** max(0, int(math.log10(max(number, 1))) - 1)
    return math.ceil(number / unit) * unit
