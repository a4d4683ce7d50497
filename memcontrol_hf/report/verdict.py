"""The verdict of a release gate in words: whether a model leaks, and by which attack, or could not be measured."""

import math
from collections.abc import Iterable, Iterator, Mapping
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
    "attribute_",
    *_QUALITY,
)
CAPTIONS = "sampled captions"
_MORE_CAPTIONS = "--num_prompts, or --audit_num_prompts of a training"
_SAMPLED = ("extraction_", "copy_share", "partial_copy_share", "nearest_share")
"""Measures whose intervals depend on the number of sampled captions, or of generated images."""

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


def not_applicable(figures: Mapping[str, Any]) -> bool:
    """Whether a measure has no meaning for the model that was audited."""
    model = figures.get("model")
    return bool(model) and model["value"] is None and (model.get("note") or "").startswith(NOT_APPLICABLE)


def violation(
    name: str, kind: str, bound: float, figures: Mapping[str, Any], unit: str = "images"
) -> Violation | None:
    """Why a measure violates a limit; `None` when the measure keeps the limit.

    A limit holds for the bad end of the 95 % interval; a limit above a control, for that of the difference of the two.
    If the value itself keeps the limit, the number of images that would do follows from the interval's width, which
    shrinks with the root of their number (for a rate of 0, with their number).

    Args:
        name (`str`): Name of the measure.
        kind (`str`): Kind of the limit, one of `LIMITS`.
        bound (`float`): Bound of the limit.
        figures (`dict`): What the audit found: for the `model` and for each control its `value`, `low` and `high`.
        unit (`str`): What there must be more of for a narrower interval; see [`unit_of_measure`].
    """
    model = figures.get("model")
    if not_applicable(figures):
        return None
    if not model or model["value"] is None:
        reason = f"{name}: {(model or {}).get('note') or 'was not measured'}; what is not measured does not pass"
        return Violation(name, "unmeasured", reason)
    value, end, over = model["value"], _bad_end(model, upper=kind != "min"), bound
    if kind.startswith("max_above_"):
        control = kind.removeprefix("max_above_")
        reference = figures.get(control)
        if not reference or reference["value"] is None:
            reason = f"{name}: the control {control} was not measured, so {kind} cannot be judged"
            return Violation(name, "unmeasured", reason)
        # the bad end of the interval of the difference (Newcombe 1998, https://doi.org/10.1002/sim.857, method 10)
        end = value + math.hypot(end - value, reference["value"] - _bad_end(reference, upper=False))
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


def _bad_end(figure: Mapping[str, Any], upper: bool) -> float:
    """An end of a figure's interval; the value, where there is no interval.

    A report that was edited can hold an end that hides the value, and then the value is the end.
    """
    value, end = figure["value"], figure.get("high" if upper else "low")
    return value if end is None else (max if upper else min)(value, end)


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
        return said + (_passed_over(gate, audit) + _scope(audit) if audit else "")
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
        parts += [] if by_kind["leaks"] else ["It could not be measured well enough."]
        parts += _too_few(by_kind["unmeasured"], gate, audit)
    return " ".join(parts) + _scope(audit)


def _too_few(names: list[str], gate: Mapping[str, Any], audit: Mapping[str, Any]) -> Iterator[str]:
    """Of what there is too little to judge some measures, and how much would do, in sentences."""
    of_all = gate.get("factor")  # a report of an earlier version has one factor for all measures
    factors = gate.get("factors", dict.fromkeys(names, of_all) if of_all else {})
    if without := [name for name in names if name not in factors]:
        yield f"No figure could be had of {_listed(map(_attack, without))}."
    by_unit: dict[str, list[str]] = {}
    for name in names:
        if name in factors:
            by_unit.setdefault(unit_of_measure(name, audit), []).append(name)
    for unit, of_unit in by_unit.items():
        hint = f" ({_MORE_CAPTIONS})" if unit == CAPTIONS else ""
        text = f"There are too few {unit}{hint} to tell by {_listed(map(_attack, of_unit))}"
        if (factor := max(factors[name] for name in of_unit)) < 100:
            text += f": {_needed(unit, factor, audit)} would do if the figures stay as they are"
        yield text + "."


def _needed(unit: str, factor: float, audit: Mapping[str, Any]) -> str:
    """How much was attacked, and about how much more is needed."""
    if unit in (CAPTIONS, GENERATED):
        count = audit["settings"]["num_prompts"] if unit == CAPTIONS else audit["images"]["generated"]
        return f"there were {count}, and about {_round_up(factor * count)}"
    counts = audit[unit]
    train, held_out = (_round_up(factor * counts[name]) for name in ("train", "held_out"))
    return (
        f"{counts['train']} training and {counts['held_out']} held-out {unit} were attacked, and about {train} and "
        f"{held_out}"
    )


def unit_of_measure(name: str, audit: Mapping[str, Any]) -> str:
    """What there must be more of for a narrower interval of a measure.

    The interval of a share of generated images or of sampled captions shrinks with their number, and every other
    interval with the numbers of training and held-out images or persons.
    """
    unit, counts, settings = unit_of(audit), audit.get("images", {}), audit.get("settings", {})
    if unit == "images" and name.startswith(_SAMPLED):
        if "generated" in counts:
            return GENERATED
        if settings.get("num_prompts", math.inf) < counts.get("train", 0):
            return CAPTIONS
    return unit


def unit_of(audit: Mapping[str, Any]) -> str:
    """What the rates and intervals of an audit are of: `persons` where they are known, else `images`.

    Nobody knows whom a generated image shows.
    """
    return "persons" if audit.get("persons") and audit.get("subject") != GENERATED else "images"


def _scope(audit: Mapping[str, Any]) -> str:
    if audit.get("subject") != GENERATED:
        return ""
    return " Only generated images were looked at: the weights were not attacked, and nothing is said of them."


def _passed_over(gate: Mapping[str, Any], audit: Mapping[str, Any]) -> str:
    asked = [name for name in gate["limits"] if asked_of(name, audit.get("subject"))]
    names = [name for name in asked if not_applicable(audit["measures"].get(name) or {})]
    return f" Passed over, since not applicable to this model: {_listed(map(_attack, names))}." if names else ""


def _attack(name: str) -> str:
    short = _ATTACKS.get(name.removeprefix("membership_"))
    return f"{name} (attack by {short})" if short else name


def _listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _round_up(number: float) -> int:
    unit = 10 ** max(0, int(math.log10(max(number, 1))) - 1)
    return math.ceil(number / unit) * unit
