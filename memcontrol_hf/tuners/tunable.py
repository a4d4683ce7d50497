"""Which parameters of a module a method of the tuner can train."""

from __future__ import annotations

from collections.abc import Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from .config import METHODS, MemControlConfig

CLASS_EMBEDDINGS = ("class_embedder.embedding_table", "class_embedding")
"""Ends of the names of the class embeddings in diffusers' denoisers, which DiffFit trains as a whole."""

TUNABLE_TYPES = {
    "svdiff": "Linear, Conv1d and Conv2d",
    "difffit": "norms, class embeddings, layers with a bias and the Linear modules that scale_modules names",
    "weights": "Linear, Conv1d, Conv2d, Embedding and norms",
    "norm": "GroupNorm, LayerNorm and RMSNorm",
    "bias": "layers with a bias",
}


def tuned_tensors(module: nn.Module, method: str, name: str, scale_modules: Sequence[str]) -> tuple[str, ...]:
    """The kinds of parameters that a method trains in one module.

    Args:
        module: The module of the base model.
        method: A method of [`MemControlConfig`].
        name: The module's full name, for `scale_modules`.
        scale_modules: DiffFit: ends of the names of the `Linear` modules whose output is scaled.

    Returns:
        Some of `"delta"`, `"gamma"`, `"weight"` and `"bias"`; empty if the method cannot tune this module.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return ()  # nn.MultiheadAttention reads this layer's weight and never calls it: an adapter would do nothing
    own = tuple(
        kind
        for kind in ("weight", "bias")
        if (tensor := module._parameters.get(kind)) is not None
        and tensor.is_floating_point()
        and not is_traceable_wrapper_subclass(tensor)
    )
    # Norms of transformers and diffusers that are not PyTorch's end with these names.
    is_norm = isinstance(module, nn.GroupNorm) or type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
    is_linear_map = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) and "weight" in own
    biases = ("bias",) if "bias" in own and hasattr(module, "weight") else ()

    if method == "svdiff":
        return ("delta",) if is_linear_map else ()
    if method == "weights":
        return own if is_linear_map or is_norm or isinstance(module, nn.Embedding) else ()
    if method == "norm":
        return own if is_norm else ()
    if method == "bias":
        return biases
    if is_norm or (isinstance(module, nn.Embedding) and name.endswith(CLASS_EMBEDDINGS)):
        return own
    ends = tuple(f".{end}" for end in scale_modules)
    scaled = isinstance(module, nn.Linear) and is_linear_map and f".{name}".endswith(ends)
    return (("gamma",) if scaled else ()) + biases


def quantized_type(module: nn.Module) -> str | None:
    """The type of a module's weight if it is quantized by torchao, whose tensors call themselves floating-point."""
    weight = module._parameters.get("weight")
    return type(weight).__name__ if weight is not None and is_traceable_wrapper_subclass(weight) else None


def number_of_singular_values(module: nn.Module) -> int:
    """The number of singular values of a module's weight, flattened to `[out, in * kernel]`."""
    return min(module.weight.shape[0], module.weight[0].numel())


def check_tunable(module: nn.Module, config: MemControlConfig, name: str) -> tuple[str, ...]:
    """The kinds of parameters that a configuration trains in a module.

    Raises:
        ValueError: If its method cannot tune a module of this type, or the module has fewer singular values.
    """
    kinds = tuned_tensors(module, config.method, name, config.scale_modules)
    if not kinds and (quantized := quantized_type(module)):
        raise ValueError(
            f"target_modules matches {name!r}, whose weight is quantized ({quantized}), which method="
            f"{config.method!r} cannot tune: take a base model that is not quantized, or method='bias' or PEFT's LoRA."
        )
    if not kinds:
        raise ValueError(
            f"target_modules matches {name!r}, a {type(module).__name__}, which method={config.method!r} cannot tune: "
            f"it takes {TUNABLE_TYPES[config.method]}. Name those modules alone; tunable_modules(model, "
            f"{config.method!r}) lists them."
        )
    selected = (config.singular_values or {}).get(name)
    if selected is not None and selected[-1] >= (count := number_of_singular_values(module)):
        raise ValueError(f"singular_values[{name!r}] names number {selected[-1]}, but there are {count}, from 0.")
    return kinds


def tunable_modules(
    model: nn.Module, method: str, prefix: str = "", scale_modules: Sequence[str] | None = None
) -> list[str]:
    """The full names, in the model's order, of the modules that a method can tune.

    Args:
        model: A base model, without adapters.
        method: A method of [`MemControlConfig`].
        prefix: Only the module of this name and those inside it, for instance `"down_blocks.0.attentions.0"`.
        scale_modules: DiffFit: as in [`MemControlConfig`].

    Returns:
        Names for `target_modules`.

    Raises:
        ValueError: If `method` is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown, it must be one of: {', '.join(METHODS)}.")
    if scale_modules is None:
        scale_modules = MemControlConfig().scale_modules
    return [
        name
        for name, module in model.named_modules()
        if name
        and (not prefix or name == prefix or name.startswith(f"{prefix}."))
        and tuned_tensors(module, method, name, scale_modules)
        and not _is_never_called(model, name, module)
    ]


def _is_never_called(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether a module only holds a weight for others, as `shared` does in the models of the T5 and BART families."""
    if name.rpartition(".")[2] != "shared" or not isinstance(module, nn.Embedding):
        return False
    embeddings = (other for other in model.modules() if isinstance(other, nn.Embedding) and other is not module)
    return any(other.weight is module.weight for other in embeddings)


def linear_modules(model: nn.Module) -> list[str]:
    """The full names, in the model's order, of what PEFT calls `"all-linear"`, whatever adapters the model has.

    The output layer of a language model is none of them, nor is a layer that is never called.
    """
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    names, inside = [], ()
    for name, module in model.named_modules():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        skipped = name.startswith(inside) or module is output or isinstance(base, NonDynamicallyQuantizableLinear)
        if isinstance(base, (nn.Linear, Conv1D)) and not skipped:
            names.append(name)
        if isinstance(module, BaseTunerLayer):
            inside += (f"{name}.",)
    return names
