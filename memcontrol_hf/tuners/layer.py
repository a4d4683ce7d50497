"""One layer for all methods: a module that is called with tuned versions of its own weight and bias."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from .config import MemControlConfig
from .hooks import call_inside_hooks, has_hooks
from .svd import SVDFactors, svd_factors
from .tunable import check_tunable, number_of_singular_values

_NOT_YET = (
    "SV-DIFF's factors are computed in the first call: call the model once, or merge_adapter(), before it is traced"
)


class AdapterParameters(nn.ParameterDict):
    """The parameters of one kind, by adapter. Hooks that move parameters act when a module is called: so it can be."""

    __call__ = nn.Module.__call__

    def forward(self) -> dict[str, torch.Tensor]:
        # Views keep the values when the hooks put others in the parameters' place afterwards.
        return {adapter: parameter.view_as(parameter) for adapter, parameter in self.items()}

    def read(self) -> Mapping[str, torch.Tensor]:
        """The parameters, as hooks leave them for the computation."""
        return self() if len(self) and has_hooks(self) else self


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
    other_param_names = ("memcontrol_scale", "memcontrol_strength", "memcontrol_selected")
    cast_input_dtype_enabled = True  # of PEFT's layers; diffusers switches it off, though inputs are not cast here

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MemControlConfig, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features = getattr(base_layer, "in_features", getattr(base_layer, "in_channels", None))
        self.out_features = getattr(base_layer, "out_features", getattr(base_layer, "out_channels", None))
        self.memcontrol_delta = AdapterParameters()  # [k], shift of the singular values, or of those selected
        self.memcontrol_gamma = AdapterParameters()  # [out], scale of the output
        self.memcontrol_weight = AdapterParameters()  # as the weight, added to it
        self.memcontrol_bias = AdapterParameters()  # as the bias, added to it
        self.memcontrol_selected: dict[str, torch.Tensor] = {}  # [n], numbers of the singular values, if not all
        self.memcontrol_scale: dict[str, float] = {}
        self.memcontrol_strength: dict[str, float] = {}  # factor of an adapter's effect
        self.merged_adapters: list[str] = []
        self._originals: dict[str, nn.Parameter] = {}  # the base layer's own parameters while others are merged in
        self._sums: dict[str, float] = {}  # sums of the tensors that were merged in
        self._svd: tuple[Any, SVDFactors] | None = None  # the weight's state when it was last read, its factors
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, name)

    def update_layer(self, adapter_name: str, config: MemControlConfig, name: str) -> None:
        """Add the parameters of one more adapter, in float32 whatever the base layer's dtype."""
        for kind in check_tunable(self.base_layer, config, name):
            if kind == "delta":
                selected = (config.singular_values or {}).get(name)
                if selected is None:
                    initial = torch.zeros(number_of_singular_values(self.base_layer))
                else:
                    initial = torch.zeros(len(selected))
                    self.memcontrol_selected[adapter_name] = torch.tensor(selected)
            elif kind == "gamma":
                initial = torch.ones(self.base_layer.out_features)
            else:
                initial = torch.zeros(getattr(self.base_layer, kind).shape)
            getattr(self, f"memcontrol_{kind}")[adapter_name] = nn.Parameter(initial)
        self.memcontrol_scale[adapter_name] = config.scale
        self.memcontrol_strength[adapter_name] = 1.0
        self._svd = None
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(*args, **kwargs)
        if has_hooks(self.base_layer):
            return call_inside_hooks(self.base_layer, self._call_tuned, *args, **kwargs)
        return self._call_tuned(self.base_layer, *args, **kwargs)

    def _call_tuned(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the base layer, or the forward of the base layer, with tuned weights."""
        tuned = {kind: self._tuned(kind, self.active_adapters) for kind in ("weight", "bias")}
        tuned = {kind: tensor.to(self._original(kind).dtype) for kind, tensor in tuned.items() if tensor is not None}
        # An attribute hides the parameter of the same name. torch.func.functional_call swaps the parameters, which has
        # no effect under FSDP: there, attributes hide them already.
        attributes = self.base_layer.__dict__
        hidden = {name: attributes[name] for name in tuned if name in attributes}
        attributes.update(tuned)
        try:
            output = call(*args, **kwargs)
        finally:
            for name in tuned:
                del attributes[name]
            attributes.update(hidden)
        gamma = self._gamma(self.active_adapters)
        return output if gamma is None else output * gamma.to(output.dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the tuned tensors in the place of the base layer's own, which are kept for [`unmerge`].

        Args:
            safe_merge: Refuse a result that is not finite.
            adapter_names: The adapters to merge, by default the active ones.

        Raises:
            ValueError: If `safe_merge` finds NaN or infinity, and if hooks move or cast the layer's weights; the layer
                is left as it was.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self._get_available_adapters()]
        if not names:
            return
        if has_hooks(self.base_layer):
            raise ValueError(
                "hooks move or cast the weights of the base model (offloading, layerwise casting), so nothing can be "
                "merged into them: merge the adapter before they are enabled"
            )
        adapters = self.merged_adapters + names
        gamma = self._gamma(adapters)
        merged = {kind: self._merged(kind, adapters, gamma) for kind in ("weight", "bias")}
        merged = {kind: tensor for kind, tensor in merged.items() if tensor is not None}
        if safe_merge and not all(tensor.isfinite().all() for tensor in merged.values()):
            raise ValueError(f"NaN or infinity in the merged weights: the adapter {', '.join(names)} seems broken.")
        for kind, tensor in merged.items():
            # A parameter of its own: the base layer may share its parameter with layers that have other adapters.
            parameter = getattr(self.base_layer, kind)
            self._originals.setdefault(kind, parameter)
            self._sums[kind] = _sum(tensor)
            self.base_layer._parameters[kind] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
        self.merged_adapters = adapters

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the base layer its own parameters back, bit for bit.

        What another adapter, such as a LoRA, has merged or unmerged in the meantime is kept, up to rounding.
        """
        if not self.merged:
            warnings.warn("No adapter is merged into this layer, so there is nothing to undo.", stacklevel=2)
            return
        gamma = self._gamma(self.merged_adapters)
        for kind, original in self._originals.items():
            merged = getattr(self.base_layer, kind)
            moved = (merged.dtype, merged.device) != (original.dtype, original.device)
            change = 0.0 if moved else _sum(merged) - self._sums[kind]
            if change and math.isfinite(change):  # weights that are not finite hold nothing that could be kept
                original.data = original + (merged - self._merged(kind, self.merged_adapters, gamma))
            original.data = original.to(merged)  # a no-op unless the model was moved or cast in between
            self.base_layer._parameters[kind] = original
        self._originals, self._sums = {}, {}
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
        differences = getattr(self, f"memcontrol_{kind}").read()
        deltas = self.memcontrol_delta.read() if kind == "weight" else {}
        adapters = [adapter for adapter in adapters if adapter in differences or adapter in deltas]
        if not adapters:
            return None
        device = (self._device() if original.is_meta else original.device).type
        # Autocast would multiply the SVD factors in half precision.
        off = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        with off:
            tensor = None
            for adapter in adapters:
                if adapter in differences:
                    difference = differences[adapter]
                else:
                    factors, scale = self._factors(original), self.memcontrol_scale[adapter]
                    delta, selected = deltas[adapter], self.memcontrol_selected.get(adapter)
                    if selected is not None and selected.device != delta.device:
                        selected = self.memcontrol_selected[adapter] = selected.to(delta.device)
                    difference = factors.difference(delta, scale, selected)
                if (strength := self.memcontrol_strength[adapter]) != 1:
                    difference = strength * difference
                tensor = (original if tensor is None else tensor) + difference.view_as(original)
        return tensor

    def _merged(self, kind: str, adapters: list[str], gamma: torch.Tensor | None) -> torch.Tensor | None:
        """What the weight or bias becomes when adapters are merged into it; None if they leave it as it is."""
        tensor, original = self._tuned(kind, adapters), self._original(kind)
        if gamma is not None and original is not None:
            tensor = original if tensor is None else tensor
            tensor = tensor * gamma.reshape(-1, *[1] * (tensor.dim() - 1))
        return None if tensor is None else tensor.to(original.dtype)

    @property
    def r(self) -> dict[str, float]:
        """The adapters; diffusers counts those of a layer by a LoRA's `r`, to name the LoRA that it loads next."""
        return self.memcontrol_strength

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the factor of an adapter's effect: 0 leaves the base layer, 1 is the adapter as it was trained."""
        if adapter in self.memcontrol_strength:
            self.memcontrol_strength[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the factors of the active adapters."""
        for adapter in self.active_adapters:
            self.set_scale(adapter, self.memcontrol_strength.get(adapter, 1.0) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the factors of the active adapters, or set them to 1."""
        for adapter in self.active_adapters:
            self.set_scale(adapter, 1.0 if scale is None else self.memcontrol_strength.get(adapter, 1.0) / scale)

    def cache_factors(self) -> None:
        """Compute what the next forward pass would: inside the transforms of torch.func it cannot."""
        if any(adapter in self.memcontrol_delta for adapter in self.active_adapters):
            self._factors(self._original("weight"))

    def _factors(self, weight: torch.Tensor) -> SVDFactors:
        if torch.compiler.is_compiling():  # whoever traces the layer can neither read the weight nor decompose it
            if self._svd is not None:
                return self._svd[1]
            if torch.compiler.is_exporting():
                raise RuntimeError(_NOT_YET)
        return self._read_factors(weight)

    @torch.compiler.disable(reason=_NOT_YET)
    def _read_factors(self, weight: torch.Tensor) -> SVDFactors:
        # FSDP puts a new view in the parameter's place for each forward pass, hooks a new copy: no state to compare.
        state = None
        if isinstance(weight, nn.Parameter) and not has_hooks(self.base_layer):
            state = (weight.data_ptr(), weight._version, weight.dtype)
        if self._svd is None or self._svd[0] != state:
            self._svd = (state, svd_factors(weight))
        return self._svd[1]

    def _gamma(self, adapters: list[str]) -> torch.Tensor | None:
        """The product of the adapters' output scales, `[out]`; None if there are none."""
        gamma, gammas = None, self.memcontrol_gamma.read()
        for adapter in adapters:
            if adapter in gammas:
                factor, strength = gammas[adapter], self.memcontrol_strength[adapter]
                factor = factor if strength == 1 else 1 + strength * (factor - 1)
                gamma = factor if gamma is None else gamma * factor
        return gamma

    def _device(self) -> torch.device:
        """The device that the base layer computes on. Weights that accelerate offloads are on none in the meantime."""
        device = next(self.base_layer.parameters()).device
        hook = vars(self.base_layer).get("_hf_hook")
        return (
            torch.device(getattr(hook, "execution_device", None) or "cpu")
            if device.type == "meta" and hook
            else device
        )

    def __getattr__(self, name: str) -> Any:
        """What the layer itself lacks is the base layer's: `stride`, `eps`, `num_groups`; but not its hooks."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("_"):
                raise
            return getattr(self.base_layer, name)

    def __repr__(self) -> str:
        return "memcontrol." + super().__repr__()


def _sum(tensor: torch.Tensor) -> float:
    """A number by which a change of a tensor is seen that torch does not count: one through `data`."""
    return tensor.sum(dtype=torch.float64).item()
