"""What a search needs, from a model's configs alone: no weight is loaded, every tensor is on the meta device."""

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..demo import DEMO_PIPELINE
from ..error_lines import first_line
from ..families import Family, family_of
from ..report.escaping import readable_bytes
from ..tuners import MemControlConfig
from ..tuners.svd import decomposition_seconds, factors_folder

CONFIGS = ("model_index.json", "*/config.json", "*/scheduler_config.json")
"""The files that are read."""


def load_architecture(name: str, revision: str | None = None) -> DiffusionPipeline:
    """A pipeline whose models have shapes but no values, and which has no tokenizers.

    Args:
        name (`str`): Folder or Hub id with a `model_index.json` and configs; weights may be missing. `"demo"` is the
            pipeline in the package.
        revision (`str`, *optional*): Revision of the pipeline on the Hub.

    Raises:
        ValueError: When a config is missing, or no model can be built from a config.
    """
    folder = DEMO_PIPELINE if name == "demo" else Path(name)
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=CONFIGS))
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = first_line(error)
        raise ValueError(f"a dry run needs the model_index.json and the configs of {name!r}: {reason}") from None
    if not isinstance(index, dict) or "_class_name" not in index:
        raise ValueError(
            f"the model_index.json of {name!r} names no pipeline (_class_name): give a diffusers pipeline"
        )
    components: dict[str, Any] = {}
    for component, value in index.items():
        if component.startswith("_"):
            continue
        if not isinstance(value, list):
            components[component] = value
            continue
        library = {"diffusers": diffusers, "transformers": transformers}.get(value[0])
        try:
            components[component] = _without_weights(getattr(library, value[1] or "", None), folder / component)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"cannot build the {component} of {name!r} from its config: {error}") from None
    if "requires_safety_checker" in components:
        components["requires_safety_checker"] = False
    cls = getattr(diffusers, index["_class_name"], None)
    if cls is None:
        raise ValueError(f"{name!r} is a {index['_class_name']}, which diffusers lacks")
    try:
        return cls(**components)
    except TypeError as error:
        raise ValueError(f"the model_index.json of {name!r} lacks components: {error}") from None


def _without_weights(cls: type | None, folder: Path) -> Any:
    """A component from its config; `None` for tokenizers, image processors and safety checkers: a plan needs none."""
    if cls is None or not issubclass(cls, (ModelMixin, SchedulerMixin, PreTrainedModel)):
        return None
    if issubclass(cls, SchedulerMixin):
        return cls.from_pretrained(folder)
    with torch.device("meta"):
        if issubclass(cls, PreTrainedModel):
            return cls(cls.config_class.from_pretrained(folder)).eval()
        return cls.from_config(cls.load_config(folder)).eval()


@dataclass(frozen=True)
class Plan:
    """What a search needs.

    Args:
        denoiser (`str`): Class of the denoiser.
        denoiser_parameters (`int`): Number of the denoiser's parameters.
        text_encoder_parameters (`int`): Number of the text encoders' parameters, where text encoders are a part of
            the search space; else 0.
        blocks (`dict[str, int]`): Number of trainable parameters of each block of the search space, when this block
            alone is on.
        trainable (`int`): Number of trainable parameters with every block on.
        adapter_bytes (`int`): Size on disk of the tensors of an adapter with every block on.
        memory (`dict[str, int]`): Bytes in a training step with every block on, by what takes them.
        decomposed (list of pairs of `int`): Shapes of the weights that SV-DIFF decomposes.
    """

    denoiser: str
    denoiser_parameters: int
    text_encoder_parameters: int
    blocks: dict[str, int]
    trainable: int
    adapter_bytes: int
    memory: dict[str, int]
    decomposed: tuple[tuple[int, int], ...] = ()

    def text(self) -> str:
        """The plan to print."""
        width = max(map(len, (*self.blocks, "all blocks")))
        share = 100 / (self.denoiser_parameters + self.text_encoder_parameters)
        rows = [*self.blocks.items(), ("all blocks", self.trainable)]
        lines = [
            f"{self.denoiser}: {self.denoiser_parameters:,} parameters, {len(self.blocks)} blocks"
            + (f" with the text encoders' ({self.text_encoder_parameters:,})" if self.text_encoder_parameters else ""),
            "",
            f"{'block'.ljust(width)}  trainable parameters, when it alone is on",
            *(f"{name.ljust(width)}  {count:>13,}  {count * share:.4g} %" for name, count in rows),
            "",
            f"adapter with every block on: {readable_bytes(self.adapter_bytes)}",
            f"memory of a training step, about: {readable_bytes(sum(self.memory.values()))}",
            *(f"  {name}: {readable_bytes(size)}" for name, size in self.memory.items()),
        ]
        if self.decomposed:
            lines.append(
                f"SV-DIFF decomposes {len(self.decomposed)} weights, once on a machine: about "
                f"{_readable_seconds(decomposition_seconds(self.decomposed))} here, and "
                f"{readable_bytes(_svd_bytes(self.decomposed))} in {factors_folder()}"
            )
        return "\n".join(lines)


def plan(
    pipeline: DiffusionPipeline,
    config: PeftConfig,
    granularity: str | Sequence[str] = "block",
    text_encoder_blocks: bool = False,
    resolution: int = 512,
    batch_size: int = 4,
    weight_bytes: float = 4,
    optimizer_bytes: int = 8,
    low_precision: bool = False,
) -> Plan:
    """What a search needs: the blocks with their trainable parameters, the adapter's size, and memory.

    The memory of the activations is what autograd keeps in the denoiser, with fused attention and without gradient
    checkpointing.

    Args:
        pipeline (`DiffusionPipeline`): Pipeline from [`load_architecture`].
        config (`PeftConfig`): PEFT method of the search.
        granularity (`str` or list of `str`), text_encoder_blocks (`bool`): Blocks; see [`Family.search_space`].
        resolution (`int`): Side of the images in pixels.
        batch_size (`int`): Images of a training step.
        weight_bytes (`float`): Bytes of one parameter of the frozen denoiser: 4, 2, or 1 and 0.5 when quantized.
        optimizer_bytes (`int`): Bytes of the optimizer's state for one trained parameter: 8 for AdamW, 2 for an 8-bit
            optimizer.
        low_precision (`bool`): Whether activations are 16-bit.

    Returns:
        [`Plan`].

    Raises:
        ValueError: When the family or the search space refuses the arguments.
    """
    family = family_of(pipeline)
    family.check_resolution(resolution)
    space = family.search_space(granularity, text_encoder_blocks).narrowed(config)
    owners = {module: block for block, names in space.blocks.items() for module in names}
    blocks, sizes, decomposed = dict.fromkeys(space.blocks, 0), {}, []
    for folder in ("", *space.text_encoders):
        part, restricted = family.parts[folder], space.apply(config, space.mask(True), folder)
        modules = {name: part.get_submodule(name) for name in restricted.target_modules}
        sizes[folder] = sum(p.numel() for p in part.parameters())
        if not folder:
            activations = _activation_bytes(family, modules.values(), resolution, text_encoder_blocks)
        if isinstance(config, MemControlConfig) and config.method == "svdiff":
            decomposed += [(len(m.weight), m.weight[0].numel()) for m in modules.values()]
        for module, count in _trainable(part, restricted, modules).items():
            blocks[owners[f"{folder}.{module}".lstrip(".")]] += count
    trainable = sum(blocks.values())
    encoders = (p for module in family.encoder_modules for p in module.parameters())
    memory = {
        "frozen denoiser": int(sizes[""] * weight_bytes),
        "autoencoder and text encoders": sum(p.numel() * p.element_size() for p in encoders),
        "adapter and gradients": 8 * trainable,
        "optimizer": optimizer_bytes * trainable,
        "singular value decompositions": _svd_bytes(decomposed),
        f"activations of {batch_size} images": batch_size * activations // (2 if low_precision else 1),
    }
    return Plan(
        denoiser=type(family.denoiser).__name__,
        denoiser_parameters=sizes[""],
        text_encoder_parameters=sum(sizes.values()) - sizes[""],
        blocks=blocks,
        trainable=trainable,
        adapter_bytes=4 * trainable,
        memory={name: size for name, size in memory.items() if size},
        decomposed=tuple(decomposed),
    )


def _trainable(part: nn.Module, config: PeftConfig, modules: Collection[str]) -> dict[str, int]:
    """Number of parameters that the method trains in each of the modules; the part is left without an adapter."""
    counts = dict.fromkeys(modules, 0)
    if not modules:  # the expressions of the search space find nothing in this part
        return counts
    with torch.device("meta"):
        adapted = get_peft_model(part, config)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            counts[next(m for m in modules if name.startswith(f"base_model.model.{m}."))] += parameter.numel()
    adapted.unload()
    return counts


def _svd_bytes(shapes: Iterable[tuple[int, int]]) -> int:
    """Bytes of the float32 singular vectors and values of weights of these shapes, which SV-DIFF keeps."""
    return sum(min(shape) * (sum(shape) + 1) * 4 for shape in shapes)


def _readable_seconds(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def _activation_bytes(family: Family, tuned: Iterable[nn.Module], resolution: int, through: bool) -> int:
    """Float32 bytes that the denoiser's forward pass keeps for the backward pass, for one image.

    Args:
        tuned (`Iterable[nn.Module]`): Modules of the denoiser that are trained.
        through (`bool`): Whether the backward pass goes on to text encoders that are trained, too.
    """
    denoiser = family.denoiser
    side = resolution // family.pixels_per_latent
    latents = torch.empty(1, family.latent_channels, side, side, device="meta")
    condition = {k: t.requires_grad_(through and t.is_floating_point()) for k, t in family.meta_condition().items()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage  # held, so that no address is used twice
        return tensor

    denoiser.requires_grad_(False)
    for module in tuned:
        module.requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _FusedAttention():
        family.denoise(denoiser, latents, torch.zeros(1, device="meta"), condition)
    denoiser.requires_grad_(False)
    return sum(storage.nbytes() for storage in kept.values())


class _FusedAttention(TorchFunctionMode):
    """Attention as GPUs compute it: the matrix of weights, which the meta device would keep, is never held."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        named = dict(zip(("query", "key", "value"), args)) | (kwargs or {})
        return _Attention.apply(named["query"], named["key"], named["value"])


class _Attention(torch.autograd.Function):
    """Keeps for the backward pass what fused attention keeps; has no backward pass, since no gradient is computed."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output
