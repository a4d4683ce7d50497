"""One layer for all methods: a module that is called with tuned versions of its own weight and bias."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.weak import WeakIdKeyDictionary

from .config import MemControlConfig

TUNABLE_TYPES = {
    "svdiff": "Linear, Conv1d and Conv2d",
    "difffit": "norms, layers with a bias and the Linear modules that scale_modules names",
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
        if (tensor := module._parameters.get(kind)) is not None and tensor.is_floating_point()
    )
    rms_norm = type(module).__name__.endswith(("RMSNorm", "T5LayerNorm"))
    is_norm = rms_norm or isinstance(module, (nn.GroupNorm, nn.LayerNorm))
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
    if is_norm:
        return own
    ends = tuple(f".{end}" for end in scale_modules)
    scaled = isinstance(module, nn.Linear) and is_linear_map and f".{name}".endswith(ends)
    return (("gamma",) if scaled else ()) + biases


class SVDFactors:
    """The reduced singular value decomposition of a weight, flattened to `[out, in * kernel]`.

    It is computed on the CPU in float64 and kept in float32. So the tuned weights agree to float32's last digit on
    every device and at any number of threads; a float32 decomposition would turn close singular vectors differently
    each time. For the same reason a shift means something else for a rounded weight: use an adapter on a base model
    of the dtype that it was trained on, or merge it first.

    Args:
        weight: A weight of shape `[out, ...]`, of any floating dtype.

    Attributes:
        u: `[out, k]`, with `k = min(out, in * kernel)`.
        s: `[k]`, the singular values, at least 0.
        vh: `[k, in * kernel]`.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        # The first call may come from inference mode, whose tensors could not be used in training afterwards.
        with torch.inference_mode(False), torch.no_grad():
            matrix = weight.detach().to("cpu", torch.float64).flatten(1)
            # LAPACK is three times as fast for a tall matrix (7 s, not 21 s, for a 3x3 convolution of 1280 channels).
            wide = matrix.shape[0] < matrix.shape[1]
            u, s, vh = torch.linalg.svd(matrix.T if wide else matrix, full_matrices=False)
            u, vh = (vh.T, u.T) if wide else (u, vh)
            self.u, self.s, self.vh = (factor.float().contiguous() for factor in (u, s, vh))

    def difference(self, delta: torch.Tensor, scale: float) -> torch.Tensor:
        """`U diag(relu(s + scale * delta) - s) V^T`, all zeros at `delta = 0`.

        The formula is that of [SV-DIFF](https://huggingface.co/papers/2303.11305).

        Args:
            delta: `[k]`, the trained shift.
            scale: Its factor.

        Returns:
            `[out, in * kernel]`, what is added to the flattened weight.
        """
        if self.u.device != delta.device:
            with torch.inference_mode(False):
                self.u, self.s, self.vh = (factor.to(delta.device) for factor in (self.u, self.s, self.vh))
        return (self.u * (torch.relu(self.s + scale * delta.float()) - self.s)) @ self.vh

    def __deepcopy__(self, memo: dict) -> SVDFactors:
        return self


_FACTORS_BY_CONTENT: WeakValueDictionary[tuple, SVDFactors] = WeakValueDictionary()
_FACTORS_BY_WEIGHT = WeakIdKeyDictionary()  # keeps the factors alive as long as the weight


def svd_factors(weight: torch.Tensor) -> SVDFactors:
    """The factors of a weight, computed once per process for the same values and freed with the weight.

    All adapters, copies of a model and trials of a search that share a base weight share its factors. It is the values
    that are compared, because torch does not count changes made through `weight.data`.

    Args:
        weight: A weight of shape `[out, ...]`.
    """
    values = weight.detach().cpu().contiguous()
    content = (weight.dtype, weight.shape, hashlib.sha256(values.flatten().view(torch.uint8).numpy()).digest())
    factors = _FACTORS_BY_CONTENT.get(content)
    if factors is None:
        factors = _FACTORS_BY_CONTENT[content] = SVDFactors(values)
    _FACTORS_BY_WEIGHT[weight] = factors
    return factors


class MemControlLayer(nn.Module, BaseTunerLayer):
    """A module of the base model together with what the adapters train in it.

    With `W`, `b` the base layer's weight and bias, the layer computes `gamma * f(x; W', b')` with

        W' = W + sum of (memcontrol_weight + SV-DIFF's difference)    over the active adapters
        b' = b + sum of memcontrol_bias
        gamma = product of memcontrol_gamma

    where an adapter has just the parameters of its method. Weights and biases are trained as differences, so several
    adapters add up, weight decay pulls towards the base model, and a new adapter changes no bit of the output. Sums
    are taken in the adapter's float32 and rounded once to the base layer's dtype.

    Args:
        base_layer: The module to tune.
        adapter_name: The first adapter's name.
        config: Its configuration.
        name: The module's full name in the model.
    """

    adapter_layer_names = ("memcontrol_delta", "memcontrol_gamma", "memcontrol_weight", "memcontrol_bias")
    other_param_names = ("memcontrol_scale",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MemControlConfig, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features = getattr(base_layer, "in_features", getattr(base_layer, "in_channels", None))
        self.out_features = getattr(base_layer, "out_features", getattr(base_layer, "out_channels", None))
        self.memcontrol_delta = nn.ParameterDict()  # [k], shift of the singular values
        self.memcontrol_gamma = nn.ParameterDict()  # [out], scale of the output
        self.memcontrol_weight = nn.ParameterDict()  # as the weight, added to it
        self.memcontrol_bias = nn.ParameterDict()  # as the bias, added to it
        self.memcontrol_scale: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._originals: dict[str, torch.Tensor] = {}  # the base layer's own tensors while others are merged in
        self._svd: tuple[Any, SVDFactors] | None = None  # the weight's state when it was last read, its factors
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, name)

    def update_layer(self, adapter_name: str, config: MemControlConfig, name: str) -> None:
        """Add the parameters of one more adapter, in float32 whatever the base layer's dtype."""
        for kind in check_tunable(self.base_layer, config, name):
            if kind == "delta":
                weight = self.base_layer.weight
                initial = torch.zeros(min(weight.shape[0], weight[0].numel()))
            elif kind == "gamma":
                initial = torch.ones(self.base_layer.out_features)
            else:
                initial = torch.zeros(getattr(self.base_layer, kind).shape)
            getattr(self, f"memcontrol_{kind}")[adapter_name] = nn.Parameter(initial)
        self.memcontrol_scale[adapter_name] = config.scale
        self._svd = None
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(*args, **kwargs)
        tuned = {kind: self._tuned(kind, self.active_adapters) for kind in ("weight", "bias")}
        tuned = {kind: tensor.to(self._original(kind).dtype) for kind, tensor in tuned.items() if tensor is not None}
        output = self._call_base_layer(tuned, *args, **kwargs)
        gamma = self._gamma(self.active_adapters)
        return output if gamma is None else output * gamma.to(output.dtype)

    def _call_base_layer(self, tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        # An attribute hides the parameter of the same name. torch.func.functional_call swaps the parameters, which has
        # no effect under FSDP: there, attributes hide them already.
        attributes = self.base_layer.__dict__
        hidden = {name: attributes[name] for name in tensors if name in attributes}
        attributes.update(tensors)
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            for name in tensors:
                del attributes[name]
            attributes.update(hidden)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the tuned tensors in the place of the base layer's own, which are kept for [`unmerge`].

        Args:
            safe_merge: Refuse a result that is not finite.
            adapter_names: The adapters to merge, by default the active ones.

        Raises:
            ValueError: If `safe_merge` finds NaN or infinity; the layer is left as it was.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self._get_available_adapters()]
        if not names:
            return
        adapters = self.merged_adapters + names
        merged = {}
        gamma = self._gamma(adapters)
        for kind in ("weight", "bias"):
            tensor, original = self._tuned(kind, adapters), self._original(kind)
            if gamma is not None and original is not None:
                tensor = original if tensor is None else tensor
                tensor = tensor * gamma.reshape(-1, *[1] * (tensor.dim() - 1))
            if tensor is not None:
                merged[kind] = tensor.to(original.dtype)
        if safe_merge and not all(tensor.isfinite().all() for tensor in merged.values()):
            raise ValueError(f"NaN or infinity in the merged weights: the adapter {', '.join(names)} seems broken.")
        for kind, tensor in merged.items():
            parameter = getattr(self.base_layer, kind)
            self._originals.setdefault(kind, parameter.data)
            parameter.data = tensor
        self.merged_adapters = adapters

    def unmerge(self) -> None:
        """Give the base layer its own tensors back, bit for bit."""
        if not self.merged:
            warnings.warn("No adapter is merged into this layer, so there is nothing to undo.", stacklevel=2)
            return
        for kind, original in self._originals.items():
            parameter = getattr(self.base_layer, kind)
            parameter.data = original.to(parameter)  # a no-op unless the model was moved or cast in between
        self._originals = {}
        self.merged_adapters = []

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer on its own, with the adapters merged in or with its own tensors."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        elif self.merged:
            self.unmerge()
        return self.base_layer

    def cast_adapter(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Cast one adapter's parameters."""
        for parameters in self._parameters_of(adapter_name):
            parameters[adapter_name].data = parameters[adapter_name].data.to(dtype)

    def _parameters_of(self, adapter_name: str) -> list[nn.ParameterDict]:
        dicts = [getattr(self, name) for name in self.adapter_layer_names]
        return [parameters for parameters in dicts if adapter_name in parameters]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Unlike PEFT's own version, this keeps the dtype: through half precision a float32 adapter would lose digits.
        device = self._device() if device is None else device
        for parameters in self._parameters_of(adapter_name):
            if not parameters[adapter_name].is_meta:
                parameters[adapter_name].data = parameters[adapter_name].data.to(device)

    def _original(self, kind: str) -> torch.Tensor | None:
        return self._originals.get(kind, getattr(self.base_layer, kind, None))

    def _tuned(self, kind: str, adapters: list[str]) -> torch.Tensor | None:
        """The base layer's weight or bias plus the adapters' differences, not yet rounded; None if there are none."""
        original = self._original(kind)
        differences = getattr(self, f"memcontrol_{kind}")
        # Autocast would multiply the SVD factors in half precision.
        with torch.autocast(device_type=self._device().type, enabled=False):
            tensor = None
            for adapter in adapters:
                if adapter in differences:
                    difference = differences[adapter]
                elif kind == "weight" and adapter in self.memcontrol_delta:
                    factors, scale = self._factors(original), self.memcontrol_scale[adapter]
                    difference = factors.difference(self.memcontrol_delta[adapter], scale)
                else:
                    continue
                tensor = (original if tensor is None else tensor) + difference.view_as(original)
        return tensor

    def cache_factors(self) -> None:
        """Compute what the next forward pass would: inside the transforms of torch.func it cannot."""
        if any(adapter in self.memcontrol_delta for adapter in self.active_adapters):
            self._factors(self._original("weight"))

    @torch.compiler.disable
    def _factors(self, weight: torch.Tensor) -> SVDFactors:
        # FSDP puts a new view in the parameter's place for each forward pass: no state to compare.
        state = (weight.data_ptr(), weight._version, weight.dtype) if isinstance(weight, nn.Parameter) else None
        if self._svd is None or self._svd[0] != state:
            self._svd = (state, svd_factors(weight))
        return self._svd[1]

    def _gamma(self, adapters: list[str]) -> torch.Tensor | None:
        """The product of the adapters' output scales, `[out]`; None if there are none."""
        gamma = None
        for adapter in adapters:
            if adapter in self.memcontrol_gamma:
                gamma = self.memcontrol_gamma[adapter] if gamma is None else gamma * self.memcontrol_gamma[adapter]
        return gamma

    def _device(self) -> torch.device:
        return next(self.base_layer.parameters()).device

    def __getattr__(self, name: str) -> Any:
        """What the layer itself lacks is the base layer's: `stride`, `eps`, `num_groups`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def __repr__(self) -> str:
        return "memcontrol." + super().__repr__()


def check_tunable(module: nn.Module, config: MemControlConfig, name: str) -> tuple[str, ...]:
    """The kinds of parameters that a configuration trains in a module.

    Raises:
        ValueError: If its method cannot tune a module of this type.
    """
    kinds = tuned_tensors(module, config.method, name, config.scale_modules)
    if not kinds:
        raise ValueError(
            f"target_modules matches {name!r}, a {type(module).__name__}, which method={config.method!r} cannot tune: "
            f"it takes {TUNABLE_TYPES[config.method]}. Name those modules alone; tunable_modules(model, "
            f"{config.method!r}) lists them."
        )
    return kinds
