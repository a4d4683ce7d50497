"""The table of attacks on a card: the measures that the gate limits, beside their controls."""

from collections.abc import Mapping
from typing import Any

from .report import MemorizationReport
from .verdict import asked_of

_ATTACKS = {
    "membership_auc_loss": "Tell training images from others by how well they are denoised. 0.5 is guessing, 1 (or 0, "
    "turned around) is always right",
    "membership_auc_secmi": "The same by the attack SecMI",
    "membership_auc_pia": "The same by the attack PIA",
    "membership_auc_clid": "The same by the attack CLiD",
    "membership_auc_secmi_several": "The same by the attack SecMI at several noise levels",
    "membership_auc_sima": "The same by the attack SimA, one call of the model",
    "membership_auc_semantic_noise": "The same by how well the model finds back to an image from the noise that the "
    "image inverts to",
    "membership_auc_calibrated": "The same by how much better an image is denoised than by the base",
    "dataset_inference_p": "Tell the training set as a whole from other images, by all of these attacks together: a "
    "p-value, small where it can be told",
    "extraction_rate": "Get training images back by asking with their captions, by a fixed distance that was set for "
    "photographs",
    "extraction_rate_calibrated": "The same, nearer to the training image than half the way to other real images",
    "embedding_attack_auc": "Get training images back sooner than held-out ones, by searching the text embedding that "
    "brings each back. 0.5 is guessing",
    "embedding_attack_rate": "Training images that come back by such a search, nearer than half the way to other real "
    "images",
    "embedding_attack_rate_held_out": "The same for held-out images: what the search alone brings back",
    "nearest_share": "Generated images that are nearer to a training image than to other real images",
    "reidentified_share": "Persons whom a verifier finds again in images that are generated from their captions",
    "reidentified_share_real": "Held-out persons whom the verifier finds again in another real image of theirs",
    "attribute_advantage": "How much more often an attribute is guessed right of training persons than of held-out "
    "persons, by the caption that fits the image best: 0 is no more often",
    "copy_share": "Generated images that could pass for a copy of a training image",
    "partial_copy_share": "Generated images that hold a part, a quarter or more, of a training image",
}
"""What the table of attacks says about a measure. A measure that is not here goes by its own name."""

_PERCENT = ("_share", "_share_real", "_rate", "_rate_calibrated", "_rate_held_out")

_LIMITS = {
    "max": "at most {}",
    "min": "at least {}",
    "max_above_frozen_base": "at most {} above the base",
    "max_above_held_out_as_train": "at most {} above the false alarms",
}


def attack_rows(report: MemorizationReport, unlimited: bool = False) -> list[dict[str, str]]:
    """Rows of the table: the measures that the gate limits, or without a gate those with an interval.

    The extraction by an absolute distance is shown beside what it calls extracted among pairs of real images. The
    attribute advantage is shown where somebody asked for it.

    Args:
        report ([`MemorizationReport`]): Report with an audit.
        unlimited (`bool`): Whether to add the attacks that the gate does not limit, if there are words for them.
    """
    gate = report.gate or {"limits": {}, "failures": []}
    failed = {reason.split(":")[0] for reason in gate["failures"]}
    rows = []
    for name, figures in report.audit["measures"].items():
        limits = gate["limits"].get(name) if asked_of(name, report.audit.get("subject")) else None
        shown_without_gate = figures["model"]["low"] is not None and not name.startswith("membership_tpr")
        shown = name in ("extraction_rate", "attribute_advantage") or (unlimited and name in _ATTACKS)
        if limits is None and not shown and (report.gate or not shown_without_gate):
            continue
        percent = name.endswith(_PERCENT) or "_tpr_" in name
        texts = [_limit(kind, bound, percent) for kind, bound in (limits or {}).items()]
        false_alarms = _figure(figures["held_out_as_train"], percent)
        pairs = report.audit["measures"].get("extraction_false_alarms")
        if name == "extraction_rate" and pairs:
            false_alarms += f"; {_number(pairs['model']['value'], True)} of pairs of real images"
        rows.append(
            {
                "name": name,
                "what": _ATTACKS.get(name, name),
                "model": _figure(figures["model"], percent, with_interval=True),
                "frozen_base": _figure(figures["frozen_base"], percent),
                "false_alarms": false_alarms,
                "limit": " and ".join(texts) + (" ✗" if name in failed else " ✓") if texts else "none",
            }
        )
    return rows


def _limit(kind: str, bound: float, percent: bool) -> str:
    """A limit of the gate in words. A difference of percentages is in points."""
    text = f"{100 * bound:.3g} points" if percent and "_above_" in kind else _number(bound, percent)
    return _LIMITS[kind].format(text)


def _figure(figure: Mapping[str, Any] | None, percent: bool, with_interval: bool = False) -> str:
    """A figure of the audit (`value`, `low`, `high`, `note`) as a cell of the table."""
    if figure is None:
        return "not measured"
    if figure["value"] is None:
        return figure["note"] or "not estimable"
    text = _number(figure["value"], percent)
    if not with_interval or figure["low"] is None:
        return text
    return f"{text} ({_number(figure['low'], percent)} to {_number(figure['high'], percent)})"


def _number(value: float, percent: bool) -> str:
    return f"{100 * value:.3g} %" if percent else f"{value:.3g}"
