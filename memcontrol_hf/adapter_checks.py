"""Whether an adapter was loaded whole, and onto the base that it was trained on.

PEFT and diffusers go on when tensors are missing or belong to no layer, and when the base is another one.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn

from .adapter_folder import ADAPTER, CONFIG
from .data import weights_digest

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Sizes in a configuration for which PEFT takes memory before it reads the weights.
_SIZES = ("r", "init_r", "target_r", "n_frequency", "num_vectors", "vector_length")


def weights_file(adapter: str | Path, folder: str) -> Path:
    """The safetensors file of an adapter's part, downloaded if the adapter is on the Hub.

    Raises:
        ValueError: When there is no such file. A pickle can run code, so no other file is read.
        OSError: When the Hub cannot be reached.
    """
    name = f"{folder}/{ADAPTER}".lstrip("/")
    if Path(adapter).exists():
        if not (file := Path(adapter) / name).is_file():
            raise ValueError(f"it holds no {name}, and weights in another format than safetensors are not read.")
        return file
    from huggingface_hub import hf_hub_download  # its HTTP client is slow to import, and a folder needs none

    return Path(hf_hub_download(str(adapter), name))


def check_sizes(config: PeftConfig, file: Path) -> None:
    """Raise `ValueError` for a size in an adapter's configuration that no tensor of its weights has.

    PEFT makes tensors of the configured sizes before it reads the weights: a rank of a billion would take all memory.
    """
    with safe_open(file, framework="pt") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.offset_keys()]
    largest = max((side for shape in shapes for side in shape), default=0)
    sizes = {name: getattr(config, name, None) for name in _SIZES}
    for name in ("rank_pattern", "n_frequency_pattern"):
        sizes |= {f"{name}[{key!r}]": size for key, size in (getattr(config, name, None) or {}).items()}
    for name, size in sizes.items():
        if size is not None and (not isinstance(size, int) or size > largest):
            raise ValueError(
                f"{name} is {size!r} in {CONFIG}, but the largest side of a tensor in {ADAPTER} is {largest}."
            )


def check_whole(adapted: PeftModel, file: Path) -> None:
    """Raise `ValueError` unless the tensors in a file are finite and are exactly those of the adapter on a model."""
    with safe_open(file, framework="pt") as tensors:
        stored = set(tensors.keys())
    loaded = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    _check_names(loaded.keys() - stored, stored - loaded.keys())
    check_finite(loaded)


def check_lora_whole(
    pipeline: "DiffusionPipeline", parts: Mapping[str, nn.Module], folder: str, **source: Any
) -> None:
    """Raise `ValueError` unless a pipeline's LoRA layers hold finite values and as many tensors as their file.

    Layers' names differ between the file and the model, where text encoders are loaded and files of kohya converted.

    Args:
        pipeline (`DiffusionPipeline`): Pipeline with the LoRA.
        parts (`dict`): Parts of the pipeline that can have LoRA layers, by name.
        folder (`str`): Folder or Hub id of the file.
        **source: `weight_name` and `use_safetensors`, as in `load_lora_weights`.
    """
    found = pipeline.lora_state_dict(folder, **source)
    stored = [name for name in (found[0] if isinstance(found, tuple) else found) if not name.endswith(".alpha")]
    loaded: dict[str, torch.Tensor] = {}
    for part, module in parts.items():
        if adapters := getattr(module, "peft_config", None):
            tensors = get_peft_model_state_dict(module, adapter_name=list(adapters)[-1])
            loaded |= {f"{part}.{name}": tensor for name, tensor in tensors.items()}
    if len(stored) != len(loaded) or not loaded:
        raise ValueError(f"of {len(stored)} tensors in the file, {len(loaded)} are needed by layers of the pipeline.")
    check_finite(loaded)


def _check_names(missing: Collection[str], unexpected: Collection[str]) -> None:
    for names, trouble in ((missing, "are missing"), (unexpected, "belong to no layer")):
        if names:
            first = f"{min(names)!r}{', ...' if len(names) > 1 else ''}"
            raise ValueError(f"{len(names)} of its tensors {trouble}: {first}.")


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    if not tensors:
        raise ValueError("it changes no layer of the model.")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name!r} holds values that are not finite.")


def base_weights(denoiser: nn.Module) -> str:
    """What tells a base from others: the type and a digest of its denoiser's weights; empty if they are quantized."""
    if getattr(denoiser, "hf_quantizer", None):
        return ""
    dtype = next(denoiser.parameters()).dtype
    return f"{str(dtype).removeprefix('torch.')}:{weights_digest(denoiser, dtype)}"


def check_base(training: Mapping[str, Any], denoiser: nn.Module, name: str) -> None:
    """Raise `ValueError` when a report's training was made on another base than this, as far as the report says.

    Args:
        training (`dict`): `training` of a report.
        denoiser (`nn.Module`): denoiser of the base, in any floating-point type.
        name (`str`): name of the base, for the message.
    """
    dtype, _, digest = training.get("base_weights", "").partition(":")
    if digest and weights_digest(denoiser, getattr(torch, dtype)) != digest:
        raise ValueError(
            f"{name!r} is not the base that this adapter was trained on: the denoiser's weights differ, and what was "
            "measured would not hold. Name the right one with --pipeline"
        )
