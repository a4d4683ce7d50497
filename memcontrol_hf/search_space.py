"""The search space: the named blocks of a denoiser (and of text encoders), and a mask of them on any `PeftConfig`.

A mask `{block name: bool}` says in which blocks the parameters of a PEFT method may move; whatever lies outside is
frozen (the ω of MemControl, https://huggingface.co/papers/2405.19458).
"""

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from .masks import BLOCK, GRANULARITIES, SITE, granularity_of_names
from .tuners import METHODS, MemControlConfig, tunable_modules

if TYPE_CHECKING:
    import optuna

_LINEAR_MAPS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class SearchSpace:
    """The blocks of a denoiser, and where wanted of text encoders, that a mask switches on and off.

    Args:
        blocks (`dict[str, list[str]]`):
            Block name -> full names of the modules in it that hold parameters of their own, in the model's order.
            Those of a text encoder begin with its name in the pipeline: `text_encoder.encoder.layers.0`.
        tunable (`dict[str, frozenset[str]]`):
            Method of [`MemControlConfig`] -> full names of the modules that it can tune; and `"linear"` -> the linear
            layers, for PEFT's own methods.
        text_encoders (tuple of `str`): their names, where they are a part of the space.
    """

    blocks: dict[str, list[str]]
    tunable: dict[str, frozenset[str]]
    text_encoders: tuple[str, ...] = ()

    @classmethod
    def from_model(
        cls,
        denoiser: nn.Module,
        granularity: str | Sequence[str] = "block",
        text_encoders: Mapping[str, nn.Module] | None = None,
        penultimate: Collection[str] = (),
    ) -> "SearchSpace":
        """Name the blocks.

        Args:
            denoiser (`nn.Module`):
                A diffusers UNet or transformer, without an adapter.
            granularity (`str` or list of `str`, *optional*, defaults to `"block"`):
                `"block"`: each attention site of a UNet, each block of a transformer. `"site"`: each `attn1`, `attn2`
                and `ff` inside them. `"module"`: each linear layer and each convolution inside them. A list of
                regular expressions: one block for each, holding the modules whose full name it finds (`re.search`).
            text_encoders (`dict[str, nn.Module]`, *optional*):
                By name in the pipeline: CLIPs and T5s, whose layers are blocks, too.
            penultimate (names of text encoders):
                Those whose last layer the pipeline does not read; it is no part of the space.

        Raises:
            ValueError: for an unknown granularity, an expression that is invalid or matches nothing, a module that two
                expressions match, and a model without attention blocks.
        """
        model = nn.Module()  # names its modules as the space does
        for name, module in (*denoiser.named_children(), *(text_encoders or {}).items()):
            model.add_module(name, module)
        modules = [name for name, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None]
        names = sorted((name for name, _ in model.named_modules() if BLOCK.search(name)), key=_stage)
        for part in {*penultimate} & {*(text_encoders or ())}:
            unread = [name for name in names if name.startswith(f"{part}.")][-1]
            names.remove(unread)
            modules = [name for name in modules if not name.startswith(f"{unread}.")]
        if granularity in GRANULARITIES:
            if not names:
                raise ValueError(
                    f"{type(denoiser).__name__} has no attention blocks: pass `granularity` as a list of regular "
                    "expressions over its module names"
                )
            if granularity == "site":
                sites = [name for name, _ in model.named_modules() if SITE.search(name)]
                inside = {block: [s for s in sites if s.startswith(block + ".")] for block in names}
                names = [name for block in names for name in inside[block] or [block]]
            elif granularity == "module":
                maps = {name for name, m in model.named_modules() if isinstance(m, _LINEAR_MAPS)}
                names = [m for block in names for m in modules if m in maps and m.startswith(block + ".")]
            blocks = {name: [m for m in modules if m == name or m.startswith(name + ".")] for name in names}
        elif isinstance(granularity, str):
            raise ValueError(
                f"unknown granularity {granularity!r}: use 'block', 'site', 'module' or a list of expressions"
            )
        else:
            blocks = {pattern: _matching(pattern, modules) for pattern in granularity}
            seen: dict[str, str] = {}
            for pattern, found in blocks.items():
                for module in found:
                    if module in seen:
                        raise ValueError(f"module {module!r} is matched by both {seen[module]!r} and {pattern!r}")
                    seen[module] = pattern
        tunable = {method: frozenset(tunable_modules(model, method)) for method in METHODS}
        tunable["linear"] = frozenset(name for name, m in model.named_modules() if isinstance(m, nn.Linear))
        return cls(blocks, tunable, tuple(text_encoders or ()))

    def narrowed(self, config: PeftConfig) -> "SearchSpace":
        """The space without the blocks in which a config with `singular_values` tunes none; the same for any other.

        Raises:
            ValueError: when the config names modules that no block has.
        """
        if (numbers := _singular_values(config)) is None:
            return self
        if unknown := sorted(numbers.keys() - {m for modules in self.blocks.values() for m in modules}):
            text = any(name.startswith("text_encoder") for name in unknown) and not self.text_encoders
            raise ValueError(
                f"singular_values names {len(unknown)} module(s) that no block has, such as {unknown[0]}"
                + (": those of text encoders are there with --text_encoder_blocks" if text else "")
            )
        return replace(self, blocks={n: modules for n, modules in self.blocks.items() if numbers.keys() & {*modules}})

    def mask(self, on: bool) -> dict[str, bool]:
        """The mask with every block on, or every block off."""
        return dict.fromkeys(self.blocks, on)

    def suggest(self, trial: "optuna.Trial") -> dict[str, bool]:
        """Draw a mask: one categorical parameter `mask.<block name>` for each block."""
        return {name: trial.suggest_categorical(f"mask.{name}", [False, True]) for name in self.blocks}

    def check(self, mask: Mapping[str, bool]) -> dict[str, bool]:
        """The mask over all blocks, in the model's order; blocks that it does not name are off.

        Raises:
            ValueError: when the mask names a block that the model lacks, or holds something else than booleans.
        """
        unknown = sorted(set(mask) - set(self.blocks))
        if unknown:
            text = any(name.startswith("text_encoder") for name in unknown) and not self.text_encoders
            granularity = granularity_of_names(mask)
            other = granularity not in (None, granularity_of_names(self.blocks))
            raise ValueError(
                f"the mask names {len(unknown)} block(s) that the model lacks: {', '.join(unknown)}; "
                f"it has: {', '.join(self.blocks)}"
                + (" (those of text encoders are there with --text_encoder_blocks)" if text else "")
                + (f" (by its names, it is a mask of --granularity {granularity})" if other else "")
            )
        wrong = {name: value for name, value in mask.items() if value not in (False, True)}
        if wrong:
            raise ValueError(f"a mask holds booleans, but got {wrong}")
        return {name: bool(mask.get(name, False)) for name in self.blocks}

    def apply(self, config: PeftConfig, mask: Mapping[str, bool], part: str = "") -> PeftConfig:
        """Restrict a PEFT method to what a mask selects in the denoiser, or in one text encoder.

        Args:
            config (`PeftConfig`):
                Any config with `target_modules`, left as it is. When it names target modules already (as PEFT matches
                them), only those inside the selected blocks remain; otherwise all that its method can tune: for
                [`MemControlConfig`] by its `method`, for PEFT's own methods every linear layer. When it names
                `singular_values`, only the modules that these are of.
            mask (`dict[str, bool]`):
                Over the block names; blocks that it does not name are off.
            part (`str`):
                Name of a text encoder; the denoiser by default. Each has an adapter of its own.

        Returns:
            `PeftConfig`: a copy whose `target_modules` are full module names of that part. They are empty where the
            mask selects nothing in it: PEFT has no adapter without modules. The all-off mask is the frozen base.

        Raises:
            ValueError: when the mask names a block that the model lacks, or selects blocks in which the method finds
                nothing to tune.
        """
        if not hasattr(config, "target_modules"):
            raise ValueError(f"{type(config).__name__} has no `target_modules`, so a mask cannot restrict it")
        mask = self.check(mask)
        prefix = part and f"{part}."
        inside = [m for name, modules in self.blocks.items() if mask[name] for m in modules if self._part(m) == part]
        method = config.method if isinstance(config, MemControlConfig) else "linear"
        if config.target_modules in (None, "all-linear"):
            selected = [m.removeprefix(prefix) for m in inside if m in self.tunable[method]]
        else:
            names = [m.removeprefix(prefix) for m in inside]
            selected = [name for name in names if check_target_module_exists(config, name)]
        if (numbers := _singular_values(config)) is not None:
            selected = [m for m in selected if f"{prefix}{m}" in numbers]
        if inside and not selected:
            on = ", ".join(name for name, modules in self.blocks.items() if mask[name] and {*modules} & {*inside})
            raise ValueError(f"{type(config).__name__} ({method}) finds no module to tune in the blocks {on}")
        config = copy.deepcopy(config)
        if getattr(config, "feedforward_modules", None):  # IA3 asks that they be among the target modules
            feedforward = copy.copy(config)
            feedforward.target_modules = config.feedforward_modules
            config.feedforward_modules = {m for m in selected if check_target_module_exists(feedforward, m)}
        config.target_modules = selected
        if isinstance(config, MemControlConfig):
            config.mask = mask
            if numbers is not None:
                config.singular_values = {m: numbers[f"{prefix}{m}"] for m in selected}
        return config

    def _part(self, module: str) -> str:
        """Which text encoder a module is in; of the denoiser's the empty name."""
        first = module.split(".")[0]
        return first if first in self.text_encoders else ""


def _singular_values(config: PeftConfig) -> dict[str, list[int]] | None:
    """Which singular values a config names, by module; `None` where it names none."""
    return config.singular_values if isinstance(config, MemControlConfig) else None


def _stage(name: str) -> int:
    """A UNet registers its middle block last: down, middle, up is the way of the data. Text encoders follow."""
    stage = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}.get(name.split(".")[0], 0)
    return 3 if name.startswith("text_encoder") else stage


def _matching(pattern: str, modules: Sequence[str]) -> list[str]:
    try:
        found = [module for module in modules if re.search(pattern, module)]
    except re.error as error:
        raise ValueError(f"granularity {pattern!r} is no regular expression: {error}") from None
    if not found:
        raise ValueError(f"granularity {pattern!r} matches no module; names look like {', '.join(modules[:3])}")
    return found
