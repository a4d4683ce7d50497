"""The table of attacks on a card and in a dossier: what was measured, beside its controls and the gate's limits."""

from collections.abc import Mapping
from typing import Any

from .report import MemorizationReport
from .verdict import asked_of, not_applicable

_ATTACKS = {
    "membership_auc_loss": "Tell training images from others by how well they are denoised. 0.5 is guessing, 1 (or 0, "
    "turned around) is always right",
    "membership_auc_secmi": "Tell them by the attack SecMI",
    "membership_auc_pia": "Tell them by the attack PIA",
    "membership_auc_clid": "Tell them by the attack CLiD",
    "membership_auc_secmi_several": "Tell training images from others by the attack SecMI at several noise levels",
    "membership_auc_sima": "Tell them by the attack SimA, one call of the model",
    "membership_auc_semantic_noise": "Tell them by how well the model finds back to an image from the noise that the "
    "image inverts to",
    "membership_auc_calibrated": "Tell them by how much better an image is denoised than by the base",
    "dataset_inference_p": "Tell the training set as a whole from other images, by all of these attacks together: a "
    "p-value, small where it can be told",
    "extraction_rate_calibrated": "Get training images back by asking with their captions: nearer to the training "
    "image than half the way to other real images",
    "extraction_rate": "Get training images back, by a fixed distance that was set for photographs",
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

_ON_CARD = ("extraction_rate", "attribute_advantage")
"""Attacks that a card shows in its table without a limit: one beside its better twin, and one that was asked for."""

_PERCENT = ("_share", "_share_real", "_rate", "_rate_calibrated", "_rate_held_out")

_LIMITS = {
    "max": "at most {}",
    "min": "at least {}",
    "max_above_frozen_base": "at most {} above the base",
    "max_above_held_out_as_train": "at most {} above the false alarms",
}


def attack_rows(report: MemorizationReport) -> list[dict[str, str]]:
    """Rows of the table: the measures that the gate limits, then all other attacks that there are words for.

    The extraction by an absolute distance is shown beside what it calls extracted among pairs of real images.

    Args:
        report ([`MemorizationReport`]): Report with an audit.

    Returns:
        list of `dict`: For each measure its `name`, `what` was tried, the figures of the `model`, the `frozen_base`
        and the `false_alarms`, the `limit` in words, and whether a card shows the row (`on_card`, any text) or names
        the figure below its table.
    """
    gate = report.gate or {"limits": {}, "failures": []}
    failed = {reason.split(":")[0] for reason in gate["failures"]}
    limited, others = [], []
    for name, figures in report.audit["measures"].items():
        limits = gate["limits"].get(name) if asked_of(name, report.audit.get("subject")) else None
        if not limits and name not in _ATTACKS:
            continue
        percent = name.endswith(_PERCENT) or "_tpr_" in name
        false_alarms = _figure(figures["held_out_as_train"], percent)
        pairs = report.audit["measures"].get("extraction_false_alarms")
        if name == "extraction_rate" and pairs:
            false_alarms += f"; {_number(pairs['model']['value'], True)} of pairs of real images"
        row = {
            "name": name,
            "what": _ATTACKS.get(name, name),
            "model": _figure(figures["model"], percent, with_interval=True),
            "frozen_base": _figure(figures["frozen_base"], percent),
            "false_alarms": false_alarms,
            "limit": _limits(limits, figures["model"], percent, name in failed) if limits else "none",
            "on_card": "yes" if limits or report.gate is None or name in _ON_CARD else "",
        }
        (limited if limits else others).append(row)
    return limited + others


def _limits(limits: Mapping[str, float], figure: Mapping[str, Any] | None, percent: bool, failed: bool) -> str:
    """The limits of a measure in words, and whether they are kept; a gate passes over what is not applicable."""
    if not_applicable({"model": figure}):
        return "not asked"
    texts = [_limit(kind, bound, percent) for kind, bound in limits.items()]
    return " and ".join(texts) + (" ✗" if failed else " ✓")


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
