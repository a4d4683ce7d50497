"""An adapter for people without this package: a merged pipeline, a LoRA file, or the plain PEFT adapter."""

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import nn

from ..adapter_folder import ADAPTER, PLOT, REPORT, adapter_digests, adapter_parts
from ..families import family_of, load_pipeline
from ..report import MemorizationReport
from ..report.card import write_card

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FORMATS = ("merged", "lora", "peft")


def export(folder: str | Path, output_dir: str | Path, to: str, pipeline: str | None = None, rank: int = 64) -> str:
    """Write an adapter in another form, with its report and a card.

    Args:
        folder (`str`): of the adapter, with its report.
        output_dir (`str`): a new or empty folder.
        to (`str`):
            `"merged"` (or `"pipeline"`): a whole pipeline. `"lora"`: a file for `pipe.load_lora_weights`, exact for an
            adapter that is a LoRA; for any other the best approximation of `rank` of each changed weight matrix.
            `"peft"`: the adapter as it is, for the methods that PEFT has itself.
        pipeline (`str`, *optional*): base pipeline; the adapter's own by default.
        rank (`int`): of such an approximation, at most.

    Returns:
        `str`: what was written, and how near it is.

    Raises:
        ValueError: for an unknown format, a folder without adapter, one that is not empty, a base that cannot be
            loaded, and an adapter that the format cannot hold.
    """
    folder, output_dir = Path(folder), Path(output_dir)
    to = "merged" if to == "pipeline" else to
    if to not in FORMATS:
        raise ValueError(f"unknown format {to!r}: use one of {', '.join(FORMATS)}")
    if rank < 1:
        raise ValueError(f"the rank must be at least 1, but is {rank}")
    parts = adapter_parts(folder)
    for name, is_there in ((f"{ADAPTER} with adapter_config.json", parts), (REPORT, (folder / REPORT).is_file())):
        if not is_there:
            raise ValueError(f"{str(folder)!r} holds no {name}: give the folder that a fine-tune left")
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"{str(output_dir)!r} is there and not empty: give another --output_dir")
    if to == "lora" and parts != ("",):
        raise ValueError("this adapter tunes text encoders, which a LoRA file is not written for: export it to merged")
    config = PeftConfig.from_pretrained(folder / parts[0])
    report = MemorizationReport.from_json(folder / REPORT)
    facts = {"format": to}
    if to == "peft":
        if config.peft_type == "MEMCONTROL":
            raise ValueError(f"PEFT alone cannot read the method {config.method!r}: export it to merged or lora")
        for part in parts:
            (output_dir / part).mkdir(parents=True, exist_ok=True)
            for name in (ADAPTER, "adapter_config.json"):
                shutil.copy(folder / part / name, output_dir / part / name)
        said = "the adapter, which PEFT reads without memcontrol_hf"
    else:
        base = _base(pipeline) if pipeline else _base(report.base_model, report.card.get("base_revision"))
        if to == "lora" and not hasattr(base, "save_lora_weights"):
            raise ValueError(f"{type(base).__name__} has no load_lora_weights: export to merged")
        family = family_of(base)
        name = family.denoiser_name
        if to == "merged":
            for part in parts:
                adapted = PeftModel.from_pretrained(family.parts[part], str(folder), subfolder=part or None)
                setattr(base, part or name, adapted.merge_and_unload())
            for part in (base, *base.components.values()):  # a config holds the folder that it was loaded from
                if hasattr(part, "register_to_config"):
                    part.register_to_config(_name_or_path="")
            base.save_pretrained(output_dir)
            said = "a whole pipeline, which diffusers reads without memcontrol_hf"
        else:
            before = {key: value.clone() for key, value in family.denoiser.state_dict().items()}
            merged = PeftModel.from_pretrained(copy.deepcopy(family.denoiser), str(folder)).merge_and_unload()
            native = isinstance(config, LoraConfig)
            layers = _lora_of_adapter(folder) if native else _lora_of_difference(merged, before, rank)
            metadata = config.to_dict() if native else _metadata(layers)
            type(base).save_lora_weights(
                output_dir, **{f"{name}_lora_layers": layers, f"{name}_lora_adapter_metadata": metadata}
            )
            error = _relative_error(base, name, output_dir, before, merged.state_dict())
            if native and error > 1e-3:
                raise RuntimeError(f"diffusers does not read this LoRA as PEFT does: relative error {error:.2g}")
            said = f"a LoRA for pipe.load_lora_weights; relative error of the change of the weights: {error:.2g}"
            facts |= {} if native else {"rank": metadata["r"], "relative_error": error}
    report.card = {key: value for key, value in report.card.items() if key not in ("hub_model_id", "revision")}
    report.card |= {"location": output_dir.name, "export": facts}
    report.weights = adapter_digests(output_dir)
    report.to_json(output_dir / REPORT)
    if (folder / PLOT).is_file():
        shutil.copy(folder / PLOT, output_dir / PLOT)
    write_card(output_dir)
    return f"{output_dir}: {said}"


def _base(name: str, revision: str | None = None) -> "DiffusionPipeline":
    try:
        return load_pipeline(name, revision)
    except ValueError as error:
        raise ValueError(f"{error}. Say where the adapter's base is with --pipeline") from None


def _lora_of_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """A LoRA's own tensors by the names that diffusers gives them."""
    return {name.removeprefix("base_model.model."): value for name, value in load_file(folder / ADAPTER).items()}


def _lora_of_difference(merged: nn.Module, before: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """The best approximation of rank `rank` of each weight matrix that changed: a truncated SVD (Eckart-Young).

    All modules get the same rank, padded with zeros, so that no loader has to know of several.
    """
    differences = {}
    for name, module in merged.named_modules():
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            difference = module.weight.detach().double() - before[f"{name}.weight"].double()
            if difference.any():
                differences[name] = difference
    if not differences:
        raise ValueError(
            "this adapter changes biases and norms but no weight matrix, and a LoRA file holds nothing else: "
            "export it to merged"
        )
    rank = min(rank, max(min(d.flatten(1).shape) for d in differences.values()))
    layers = {}
    for name, difference in differences.items():
        u, s, vh = torch.linalg.svd(difference.flatten(1), full_matrices=False)
        size, kept = difference.shape, min(rank, len(s))
        root = s[:kept].sqrt()
        a, b = torch.zeros(rank, vh.shape[1]), torch.zeros(size[0], rank)
        a[:kept], b[:, :kept] = (root[:, None] * vh[:kept]).float(), (u[:, :kept] * root).float()
        layers[f"{name}.lora_A.weight"] = a.reshape(rank, *size[1:])
        layers[f"{name}.lora_B.weight"] = b.reshape(size[0], rank, *[1] * (len(size) - 2))
    return layers


def _metadata(layers: dict[str, torch.Tensor]) -> dict:
    names = sorted({name.rsplit(".lora_", 1)[0] for name in layers})
    rank = len(layers[f"{names[0]}.lora_A.weight"])
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=names).to_dict()


def _relative_error(
    pipeline: "DiffusionPipeline",
    name: str,
    folder: Path,
    before: dict[str, torch.Tensor],
    wanted: dict[str, torch.Tensor],
) -> float:
    """How far the file, loaded as anybody loads it, is from the adapter: 0 is exact, 1 as far as the bare base.

    `||W_file - W_adapter|| / ||W_base - W_adapter||`, the Frobenius norm over all tensors of the denoiser.
    """
    pipeline.load_lora_weights(str(folder))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    found = getattr(pipeline, name).state_dict()

    def distance(state: dict[str, torch.Tensor]) -> float:
        return sum((state[key].double() - wanted[key].double()).square().sum().item() for key in wanted) ** 0.5

    return distance(found) / max(distance(before), torch.finfo(torch.float32).tiny)
