"""Hooks by which accelerate and diffusers move and cast the weights of a module, for as long as it computes.

Both put a wrapper in the place of the module's `forward`: offloading (`cpu_offload`, `disk_offload`, group offloading)
and layerwise casting. What reads the weights has to run inside of all wrappers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Whether the weights of a module may be others while it computes than they are before and after."""
    return bool(module._forward_pre_hooks) or "_hf_hook" in vars(module) or "_diffusers_hook" in vars(module)


def call_inside_hooks(module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a module, with another function in the place of its own `forward`, inside of all wrappers.

    Args:
        module: The module.
        call: The function. It gets the module's `forward`, and the arguments of the call as its wrappers leave them.
        *args, **kwargs: The arguments of the call.
    """
    holder, name = _innermost_forward(module)
    wrapped = name in holder
    forward = holder[name] if wrapped else module.forward
    holder[name] = partial(call, forward)
    try:
        return module(*args, **kwargs)
    finally:
        if wrapped:
            holder[name] = forward
        else:
            del holder[name]


def _innermost_forward(module: nn.Module) -> tuple[dict[str, Any], str]:
    """Where the module's own `forward` is kept, inside of all wrappers: a dictionary and the key in it."""
    places = [(vars(module), "_old_forward")]  # accelerate.hooks.add_hook_to_module
    registry = vars(module).get("_diffusers_hook")  # diffusers.hooks.HookRegistry
    if registry is not None and registry._fn_refs:
        first = vars(registry._fn_refs[0])
        places.append((first, "forward" if first["original_forward"] is None else "original_forward"))
    for holder, name in places:
        if name in holder and not isinstance(holder[name], partial):  # which the wrappers of both are
            return holder, name
    return vars(module), "forward"
