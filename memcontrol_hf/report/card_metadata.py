"""The YAML head of a card: the base model, the task, and the figures of a report as a model index of the Hub."""

import re

from huggingface_hub import EvalResult, ModelCardData
from markupsafe import Markup

from .report import SELECTED, MemorizationReport

_INTERVAL_ENDS = ("_low", "_high")
_LEFT_OUT = re.compile(r"trainable_|loss_t\d")  # the losses at single timesteps are in the report


def as_yaml(data: ModelCardData) -> Markup:
    """The head as YAML that a template prints as it is: a value that needs quotes has them."""
    return Markup(data.to_yaml().strip())


def base_metadata(base_model: str, relation: str) -> dict[str, str]:
    """The fields that name a base model, if the Hub can have that model.

    Args:
        base_model (`str`): Hub id, name of a local folder, or `demo`.
        relation (`str`): What the card's model is to its base in the terms of the Hub: `adapter` or `merge`.
    """
    on_hub = base_model != "demo" and re.fullmatch(r"[\w.-]+/[\w.-]+", base_model)
    return {"base_model": base_model, "base_model_relation": relation} if on_hub else {}


def readable_base(base_model: str) -> str:
    """The base model's name within a sentence."""
    return "the demo pipeline of memcontrol_hf" if base_model == "demo" else base_model


def last_part(location: str) -> str:
    """The last part of a folder's path or of a Hub id."""
    return location.rstrip("/").split("/")[-1]


def pipeline_task(report: MemorizationReport) -> str:
    """The Hub's name for what the pipeline does."""
    inputs = report.card.get("example_inputs") or {"prompt": []}
    return "text-to-image" if "prompt" in inputs else "unconditional-image-generation"


def eval_results(report: MemorizationReport) -> list[EvalResult]:
    """The figures of the selected model for the model index: quality and memorization, with their intervals."""
    figures = report.figures.get(SELECTED, {})
    results = [
        _eval_result(report, "fine-tune", name, value, *(figures.get(name + end) for end in _INTERVAL_ENDS))
        for name, value in figures.items()
        if not name.endswith(_INTERVAL_ENDS) and not _LEFT_OUT.match(name)
    ]
    for name, measure in (report.audit or {"measures": {}})["measures"].items():
        model = measure["model"]
        if model["value"] is not None:
            results.append(_eval_result(report, "audit", name, model["value"], model["low"], model["high"]))
    if spent := report.guarantee():
        results += [_eval_result(report, "training", f"dp_{name}", spent[name]) for name in ("epsilon", "delta")]
    return results


def _eval_result(
    report: MemorizationReport,
    config: str,
    name: str,
    value: float,
    low: float | None = None,
    high: float | None = None,
) -> EvalResult:
    return EvalResult(
        task_type=pipeline_task(report),
        dataset_type="held-out-images",
        dataset_name="held-out images of the tuned domain",
        dataset_config=config,
        dataset_split="held_out",
        metric_type=name,
        metric_name=name,
        metric_value=value,
        metric_args=None if low is None else {"low": low, "high": high},
    )
