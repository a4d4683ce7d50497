"""What a search would take, from a model's configs alone: no weight is loaded, every tensor is on the meta device."""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from .demo import DEMO_PIPELINE
from .families import Family, family_of
from .tuners import MemControlConfig

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

CONFIGS = ("model_index.json", "*/config.json", "*/scheduler_config.json")
"""The files that are read."""


def load_architecture(name: str, revision: str | None = None) -> "DiffusionPipeline":
    """A pipeline whose models have shapes but no values, and which has no tokenizers.

    Args:
        name (`str`): a folder or a Hub id with a `model_index.json` and configs; weights may be missing. `"demo"`: the
            pipeline in the package.

    Raises:
        ValueError: when a config is missing or no model can be built from it.
    """
    import diffusers
    import transformers
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    folder = DEMO_PIPELINE if name == "demo" else Path(name)
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=CONFIGS))
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"a dry run needs the model_index.json and the configs of {name!r}: {reason}") from None
    parts: dict[str, Any] = {}
    for part, value in index.items():
        if part.startswith("_"):
            continue
        if not isinstance(value, list):
            parts[part] = value
            continue
        source = {"diffusers": diffusers, "transformers": transformers}.get(value[0])
        cls = getattr(source, value[1] or "", None)
        try:
            parts[part] = _without_weights(cls, folder / part)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"cannot build the {part} of {name!r} from its config: {error}") from None
    if "requires_safety_checker" in parts:
        parts["requires_safety_checker"] = False
    cls = getattr(diffusers, index["_class_name"], None)
    if cls is None:
        raise ValueError(f"{name!r} is a {index['_class_name']}, which diffusers lacks")
    return cls(**parts)


def _without_weights(cls: type | None, folder: Path) -> Any:
    from diffusers import ModelMixin, SchedulerMixin
    from transformers import PreTrainedModel

    if cls is None or not issubclass(cls, (ModelMixin, SchedulerMixin, PreTrainedModel)):
        return None  # tokenizers, image processors, safety checkers: nothing here needs them
    if issubclass(cls, SchedulerMixin):
        return cls.from_pretrained(folder)
    with torch.device("meta"):
        if issubclass(cls, PreTrainedModel):
            return cls(cls.config_class.from_pretrained(folder)).eval()
        return cls.from_config(cls.load_config(folder)).eval()


@dataclass(frozen=True)
class Plan:
    """What a search would take.

    Args:
        denoiser (`str`): its class.
        denoiser_parameters (`int`): of the denoiser alone.
        text_encoder_parameters (`int`): of the text encoders, where they are a part of the search space, else 0.
        blocks (`dict[str, int]`): trainable parameters of each block of the search space, when it alone is on.
        trainable (`int`): those of the mask with every block on.
        adapter_bytes (`int`): size of the all-on adapter's tensors on disk.
        memory (`dict[str, int]`): bytes, by what takes them, in a training step with every block on.
        forward_flops (`int`): of one denoiser call for one image.
        search_flops (`int`): of all trials; see [`plan`].
    """

    denoiser: str
    denoiser_parameters: int
    text_encoder_parameters: int
    blocks: dict[str, int]
    trainable: int
    adapter_bytes: int
    memory: dict[str, int]
    forward_flops: int
    search_flops: int

    def text(self, flops_per_second: float | None = None) -> str:
        """The plan to print; with the speed of a device also the time."""
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
            f"adapter with every block on: {_bytes(self.adapter_bytes)}",
            f"memory of a training step, about: {_bytes(sum(self.memory.values()))}",
            *(f"  {name}: {_bytes(size)}" for name, size in self.memory.items()),
            f"one call of the denoiser for one image: {self.forward_flops / 1e12:.3g} TFLOP",
            f"the search, about: {self.search_flops / 1e15:.3g} PFLOP",
        ]
        if flops_per_second:
            hours, speed = self.search_flops / flops_per_second / 3600, f"{flops_per_second / 1e12:.2g} TFLOP/s"
            lines.append(f"  at the {speed} that a matrix product reaches on this machine: {hours:.3g} hours")
        return "\n".join(lines)


def plan(
    pipeline: "DiffusionPipeline",
    config: PeftConfig,
    granularity: str | Sequence[str] = "block",
    text_encoder_blocks: bool = False,
    resolution: int = 512,
    batch_size: int = 4,
    n_trials: int = 20,
    steps: int = 250,
    num_images: int = 256,
    inference_steps: int = 25,
    guidance: bool = True,
    weight_bytes: float = 4,
    optimizer_bytes: int = 8,
    eval_samplings: int = 1,
    low_precision: bool = False,
) -> Plan:
    """What a search would take.

    The time is that of the denoiser alone: an image of a training step is taken as three calls (forward, and twice as
    much backward), a sampled image as one call a step, two with guidance. The autoencoder, the text encoders and the
    attacks by the loss come on top. Activations are those of the denoiser that autograd keeps with fused attention and
    without gradient checkpointing.

    Args:
        pipeline: from [`load_architecture`].
        config (`PeftConfig`): as for the search.
        granularity (`str` or list of `str`), text_encoder_blocks (`bool`): as of [`Family.search_space`].
        resolution (`int`): in pixels.
        batch_size (`int`): images of a training step.
        n_trials, steps (`int`): trials, and training steps of each.
        num_images, inference_steps (`int`): images that each trial samples for each metric, and their steps.
        guidance (`bool`): whether sampling calls the denoiser twice.
        weight_bytes (`float`): of one of the frozen denoiser's parameters: 4, 2, or 1 and 0.5 when quantized.
        optimizer_bytes (`int`): of the optimizer's state for one trained parameter: 8 for AdamW, 2 for an 8-bit one.
        eval_samplings (`int`): metrics that sample images.
        low_precision (`bool`): whether activations are 16-bit.

    Returns:
        [`Plan`].

    Raises:
        ValueError: as the family and the search space raise it.
    """
    family = family_of(pipeline)
    family.check_resolution(resolution)
    space = family.search_space(granularity, text_encoder_blocks)
    owners = {module: block for block, names in space.blocks.items() for module in names}
    blocks, sizes, factors = dict.fromkeys(space.blocks, 0), {}, 0
    for folder in ("", *space.text_encoders):
        part, restricted = family.parts[folder], space.apply(config, space.mask(True), folder)
        modules = {name: part.get_submodule(name) for name in restricted.target_modules}
        sizes[folder] = sum(p.numel() for p in part.parameters())
        if not folder:
            flops, activations = _one_call(family, modules.values(), resolution, text_encoder_blocks)
        if isinstance(config, MemControlConfig) and config.method == "svdiff":
            shapes = [(len(m.weight), m.weight[0].numel()) for m in modules.values()]
            factors += sum(min(shape) * (sum(shape) + 1) * 4 for shape in shapes)
        if not modules:
            continue  # expressions that find nothing in this part
        with torch.device("meta"):
            adapted = get_peft_model(part, restricted)
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                module = next(m for m in modules if name.startswith(f"base_model.model.{m}."))
                blocks[owners[f"{folder}.{module}".lstrip(".")]] += parameter.numel()
        adapted.unload()
    encoders = sum(p.numel() * p.element_size() for module in family.encoder_modules for p in module.parameters())
    trainable = sum(blocks.values())
    samples = eval_samplings * num_images * inference_steps * (2 if guidance else 1)
    memory = {
        "frozen denoiser": int(sizes[""] * weight_bytes),
        "autoencoder and text encoders": encoders,
        "adapter and gradients": 8 * trainable,
        "optimizer": optimizer_bytes * trainable,
        "singular value decompositions": factors,
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
        forward_flops=flops,
        search_flops=n_trials * flops * (3 * steps * batch_size + samples),
    )


def _one_call(family: Family, tuned: Iterable[nn.Module], resolution: int, through: bool) -> tuple[int, int]:
    """FLOPs of the denoiser's forward pass for one image, and the float32 bytes that its backward pass keeps.

    The backward pass goes on to the text encoders where they are tuned, too (`through`).
    """
    denoiser = family.denoiser
    side = resolution // family.pixels_per_latent
    latents = torch.empty(1, family.latent_channels, side, side, device="meta")
    condition = {k: t.requires_grad_(through and t.is_floating_point()) for k, t in family.example().items()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage  # held, so that no address is used twice
        return tensor

    denoiser.requires_grad_(False)
    for module in tuned:
        module.requires_grad_(True)
    counter, attention = FlopCounterMode(display=False), _FusedAttention()
    timesteps = torch.zeros(1, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), counter, attention:
        family.denoise(denoiser, latents, timesteps, condition)
    denoiser.requires_grad_(False)
    return counter.get_total_flops() + attention.flops, sum(storage.nbytes() for storage in kept.values())


class _FusedAttention(TorchFunctionMode):
    """Attention as GPUs compute it: the matrix of weights, which the meta device would keep, is never held."""

    flops = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        named = dict(zip(("query", "key", "value"), args)) | (kwargs or {})
        query, key, value = named["query"], named["key"], named["value"]
        self.flops += 2 * query.numel() * key.shape[-2] + 2 * query[..., 0].numel() * value.shape[-2] * value.shape[-1]
        return _Attention.apply(query, key, value)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output


def measured_speed(device: torch.device, dtype: torch.dtype = torch.float32, size: int = 1024) -> float:
    """FLOP/s of a device in a matrix product: the most that a model can reach."""
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    (matrix @ matrix).sum().item()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.5:
        (matrix @ matrix)[0, 0].item()
        count += 1
    return count * 2 * size**3 / (time.perf_counter() - start)


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
