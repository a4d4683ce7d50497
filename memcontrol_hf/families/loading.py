"""Loading a pipeline by name: from the Hub, a folder or a single file, in a precision, quantized or not."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import (
    SingleFileComponentError,
    fetch_diffusers_config,
    load_single_file_checkpoint,
)
from torch import nn

from ..demo import DEMO_PIPELINE
from .registry import FAMILIES

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Precisions of a pipeline's weights, by name."""

QUANTIZATIONS = {
    "bnb_4bit": ("bitsandbytes", 0.5),
    "bnb_8bit": ("bitsandbytes", 1.0),
    "torchao_int8": ("torchao", 1.0),
}
"""Quantizations of the denoiser: the package that does each, and its bytes for each parameter."""


def load_pipeline(
    name: str,
    revision: str | None = None,
    variant: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    config: str | None = None,
) -> "DiffusionPipeline":
    """A pipeline by name.

    Args:
        name (`str`): Hub id, folder or single `.safetensors` file; `"demo"` is the pipeline in this package.
        revision (`str`, *optional*): revision on the Hub.
        variant (`str`, *optional*): variant of the weights' files, say `"fp16"`.
        dtype (`str`, *optional*): precision of the weights, one of `DTYPES`; float32 by default.
        quantization (`str`, *optional*): quantization of the denoiser, one of `QUANTIZATIONS`; only LoRA trains on a
            quantized base.
        config (`str`, *optional*): folder or Hub id of a pipeline with the same architecture, for a single file; by
            default the one that diffusers recognizes in the file's tensors.

    Raises:
        ValueError: when the pipeline cannot be loaded, for an unknown precision or quantization, and for a
            quantization whose package is missing.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: use {', '.join(DTYPES)}")
    if quantization is not None:
        if quantization not in QUANTIZATIONS:
            raise ValueError(f"unknown quantization {quantization!r}: use {', '.join(QUANTIZATIONS)}")
        package = QUANTIZATIONS[quantization][0]
        if find_spec(package) is None:
            raise ValueError(f"quantization {quantization} needs {package}: pip install {package}")
    arguments: dict[str, Any] = {"dtype": DTYPES[dtype or "float32"]}
    name = str(DEMO_PIPELINE) if name == "demo" else name
    try:
        if name.endswith(".safetensors"):
            if quantization is not None:
                raise ValueError("a single file cannot be quantized: save it as a folder first (save_pretrained)")
            return _load_single_file(name, config, **arguments)
        if quantization is not None:
            parts = diffusers.DiffusionPipeline.load_config(name, revision=revision)
            arguments["quantization_config"] = _quantization(quantization, parts, arguments["dtype"])
        return diffusers.DiffusionPipeline.from_pretrained(name, revision=revision, variant=variant, **arguments)
    except (OSError, ValueError, KeyError, RuntimeError, SingleFileComponentError) as error:
        # Where there is no network, diffusers refers to a stack trace, which nobody sees here.
        said = error.__cause__ if error.__cause__ and "stacktrace above" in str(error) else error
        reason = (str(said).splitlines() or [type(said).__name__])[0]
        raise ValueError(f"cannot load the pipeline {name!r}: {reason}") from None


def _load_single_file(file: str, config: str | None, **arguments: Any) -> "DiffusionPipeline":
    if not Path(file).is_file():
        raise ValueError("there is no such file")
    known = config or fetch_diffusers_config(load_single_file_checkpoint(file))["pretrained_model_name_or_path"]
    try:
        index = diffusers.DiffusionPipeline.load_config(known)
    except OSError:
        guess = "" if config else ", which it is taken for"
        raise ValueError(
            f"there is no model_index.json of {known!r}{guess}: name the folder or Hub id of a pipeline that is built "
            "alike with --single_file_config"
        ) from None
    pipeline = getattr(diffusers, index["_class_name"]).from_single_file(file, config=known, **arguments)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            vars(part).pop("hf_device_map", None)  # else the Trainer would leave the denoiser on the CPU
    return pipeline


def _quantization(quantization: str, parts: Iterable[str], dtype: torch.dtype) -> diffusers.PipelineQuantizationConfig:
    """The quantization of the denoiser among a pipeline's parts, given by their names."""
    if quantization == "torchao_int8":
        from torchao.quantization import Int8WeightOnlyConfig  # an optional package

        config = diffusers.TorchAoConfig(Int8WeightOnlyConfig())
    elif quantization == "bnb_4bit":
        config = diffusers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    else:
        config = diffusers.BitsAndBytesConfig(load_in_8bit=True)
    denoisers = {family.denoiser_name for family in FAMILIES}
    return diffusers.PipelineQuantizationConfig(quant_mapping={name: config for name in parts if name in denoisers})
