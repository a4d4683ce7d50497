"""How a model gets the layers of the PEFT method MEMCONTROL."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from .config import MemControlConfig
from .layer import MemControlLayer
from .tunable import check_tunable, linear_modules


class MemControlModel(BaseTuner):
    """A model whose selected modules are tuned by one of the methods of [`MemControlConfig`].

    The subset of modules is what [MemControl](https://huggingface.co/papers/2405.19458) searches for. Everything that
    `target_modules` does not match is frozen.

    Args:
        model ([`torch.nn.Module`]): The base model.
        config ([`MemControlConfig`]): What to tune, and where.
        adapter_name (`str`): The adapter's name.
        low_cpu_mem_usage (`bool`): Create the adapter's parameters on the meta device, to be loaded afterwards.

    Example:

        ```py
        >>> from memcontrol_hf.tuners import MemControlConfig, tunable_modules
        >>> from peft import get_peft_model

        >>> names = tunable_modules(unet, "svdiff", prefix="mid_block.attentions.0")
        >>> unet = get_peft_model(unet, MemControlConfig(method="svdiff", target_modules=names))
        >>> unet.print_trainable_parameters()
        ```
    """

    prefix: str = "memcontrol_"
    tuner_layer_cls = MemControlLayer
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # PEFT shortens long lists of names to ends of names, in no fixed order. The saved configuration shall say
        # what was selected, and the same each time.
        config = self.peft_config[adapter_name]
        if isinstance(config.target_modules, str) and config.target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            config.target_modules = linear_modules(model)
        target_modules = config.target_modules
        layers = _layers(model)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            for name, layer in _layers(model).items():  # leave the model as it was
                if name in layers:
                    layer.delete_adapter(adapter_name)
                else:
                    model.set_submodule(name, layer.base_layer)
            raise
        config.target_modules = target_modules

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not supported: `NotImplementedError` says what to do instead."""
        raise NotImplementedError(
            "adapters of MEMCONTROL cannot be added up to a new one: activate them together by "
            "base_model.set_adapter([...]), each with the factor that set_scale(adapter, factor) gives its layers"
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names: a batch cannot hold rows of different MEMCONTROL adapters; call the model once for "
                "each adapter, after set_adapter(...)"
            )
        yield

    @staticmethod
    def _check_target_module_exists(peft_config: MemControlConfig, key: str) -> bool | re.Match[str] | None:
        # PEFT compares a name with the ends of all names that are tuned, but most names end in none of them.
        targets, parts = peft_config.target_modules, key.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        plain = not isinstance(targets, str) and not peft_config.exclude_modules and not peft_config.modules_to_save
        if plain and not any(end in targets for end in ends):
            return False
        return BaseTuner._check_target_module_exists(peft_config, key)

    def _prepare_adapter_config(self, peft_config: MemControlConfig, model_config: dict) -> MemControlConfig:
        if peft_config.target_modules is None:
            raise ValueError(
                "target_modules=None: name the modules to tune, for instance with "
                f"tunable_modules(model, {peft_config.method!r})."
            )
        return peft_config

    def _prepare_model(self, peft_config: MemControlConfig, model: nn.Module) -> None:
        # All modules are checked before the first is replaced, so that an error leaves the model as it was.
        inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        unknown = set(peft_config.singular_values or ())
        for name, module in model.named_modules():
            if name and not name.startswith(inside) and self._check_target_module_exists(peft_config, name):
                module = module.base_layer if isinstance(module, MemControlLayer) else module
                check_tunable(module, peft_config, name)
                unknown.discard(name)
        if unknown:
            raise ValueError(
                f"singular_values names modules that target_modules does not match: {', '.join(sorted(unknown))}."
            )

    def _create_and_replace(
        self,
        peft_config: MemControlConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if isinstance(target, MemControlLayer):
            target.update_layer(adapter_name, peft_config, current_key)
            return
        layer = MemControlLayer(target, adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        setattr(parent, target_name, layer)  # it is on the right device; the weights' may be "meta" in the meantime

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # New parameters are float32 already; without autocasting they take the base layer's dtype.
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for layer in self.model.modules():
                if isinstance(layer, MemControlLayer):
                    layer.cast_adapter(adapter_name, next(layer.base_layer.parameters()).dtype)


def _layers(model: nn.Module) -> dict[str, MemControlLayer]:
    """The layers of this tuner in a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MemControlLayer)}
