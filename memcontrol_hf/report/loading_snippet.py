"""The Python on a card that loads an adapter or an export and generates an image."""

import json
from collections.abc import Sequence

from .report import MemorizationReport

# `attention` is what the training script calls `weights`. Their adapters need this package; PEFT reads all others.
OUR_METHODS = ("svdiff", "difffit", "attention", "weights", "norm", "bias")


def loading_snippet(report: MemorizationReport, location: str, export_format: str | None, parts: Sequence[str]) -> str:
    """The lines that load the pipeline with the adapter and generate an image.

    Args:
        report ([`MemorizationReport`]): Report of the adapter. Its `card` names the denoiser, the revisions, the
            inputs of the example, the base's variant, and for a base in a single file its class and `config`.
        location (`str`): Folder or Hub id of the adapter or of the export.
        export_format (`str`, *optional*): `merged`, `lora` or `peft` for an export; `None` for what a fine-tune left.
        parts (list of `str`): Folders that hold an adapter: `""` for the denoiser, or the name of a text encoder.
    """
    from_demo = report.base_model == "demo" and export_format != "merged"
    as_adapter = export_format in (None, "peft")
    registers = report.method in OUR_METHODS and as_adapter
    pipeline, load = "DiffusionPipeline", "from_pretrained"
    if export_format != "merged" and report.card.get("base_class", "").isidentifier():  # no code from a report
        pipeline, load = report.card["base_class"], "from_single_file"
    lines = []
    if registers:
        lines.append("import memcontrol_hf  # registers the PEFT method; without it PEFT says KeyError: 'MEMCONTROL'")
    elif from_demo:
        lines.append("import memcontrol_hf")
    if report.half_precision:
        lines.append("import torch")
    if not from_demo:
        lines.append(f"from diffusers import {pipeline}")
    if as_adapter:
        lines.append("from peft import PeftModel")
    lines.append("")
    place = _python(location) + _argument("revision", report.card.get("revision"))
    dtype = f"torch_dtype=torch.{report.half_precision}" if report.half_precision else ""
    if export_format == "merged":
        lines.append(f"pipe = {pipeline}.{load}({', '.join(filter(None, (place, dtype)))})")
    elif from_demo:
        lines.append(f"pipe = memcontrol_hf.demo_pipeline({dtype})")
    else:
        base = _python(report.base_model)
        base += "".join(_argument(name, report.card.get(f"base_{name}")) for name in ("revision", "variant", "config"))
        lines.append(f"pipe = {pipeline}.{load}({', '.join(filter(None, (base, dtype)))})")
    if export_format == "lora":
        lines.append(f"pipe.load_lora_weights({place})")
    if as_adapter:
        lines += [_load_adapter(report, location, part) for part in parts]
    return "\n".join([*lines, f"image = pipe({_example_inputs(report)}).images[0]"])


def _load_adapter(report: MemorizationReport, location: str, part: str) -> str:
    """The line that puts the adapter of the denoiser or of a text encoder in its place."""
    name = part or report.card.get("denoiser", "unet")
    subfolder = f", subfolder={_python(part)}" if part else ""
    revision = _argument("revision", report.card.get("revision"))
    return f"pipe.{name} = PeftModel.from_pretrained(pipe.{name}, {_python(location)}{subfolder}{revision})"


def _example_inputs(report: MemorizationReport) -> str:
    inputs = report.card.get("example_inputs") or {"prompt": [""]}
    if "prompt" in inputs:
        return _python(inputs["prompt"][0])
    return ", ".join(f"{name}={_python(value)}" for name, value in inputs.items())


def _argument(name: str, value: str | None) -> str:
    return f", {name}={_python(value)}" if value else ""


def _python(value: str | int | list[int]) -> str:
    """A string, number or list as Python source, strings in double quotes."""
    return json.dumps(value, ensure_ascii=False)
