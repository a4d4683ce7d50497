"""An adapter for people without this package: a merged pipeline, a LoRA file, or the plain PEFT adapter."""

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import nn

from ..adapter_checks import check_base
from ..adapter_folder import ADAPTER, CONFIG, PLOT, REPORT, adapter_digests, adapter_parts, read_config
from ..families import family_of, load_pipeline
from ..report import MemorizationReport
from ..report.card import write_card
from ..whole_files import check_writable, is_new_or_empty

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FORMATS = ("merged", "lora", "peft")


def export(folder: str | Path, output_dir: str | Path, to: str, pipeline: str | None = None, rank: int = 64) -> str:
    """Write an adapter in another format, with its report and a card.

    Args:
        folder (`str`): Folder of the adapter, with its report.
        output_dir (`str`): A new or empty folder.
        to (`str`):
            `"merged"` (or `"pipeline"`): a whole pipeline. `"lora"`: a file for `pipe.load_lora_weights`, exact for an
            adapter that is a LoRA; for any other method the best approximation of each changed weight matrix by the
            given rank. `"peft"`: the adapter as it is, for the methods that PEFT has itself.
        pipeline (`str`, *optional*):
            Base pipeline: Hub id, folder or `demo`; the adapter's own base by default. It is loaded in the variant
            and the precision of the training, and a merged pipeline is saved in that precision.
        rank (`int`): Largest rank of such an approximation.

    Returns:
        `str`: What was written, and how near it is to the adapter.

    Raises:
        ValueError: For an unknown format, a folder without an adapter, an output folder that is not empty, a base that
            cannot be loaded or is another one than the adapter was trained on, and an adapter that the format cannot
            hold.
        RuntimeError: When diffusers reads an exported LoRA otherwise than PEFT reads the adapter.
    """
    folder, output_dir = Path(folder), Path(output_dir)
    to = "merged" if to == "pipeline" else to
    parts = _checked_parts(folder, output_dir, to, rank)
    config = PeftConfig.from_pretrained(folder / parts[0])
    report = MemorizationReport.from_json(folder / REPORT)
    if changed := report.files_not_measured(folder):
        raise ValueError(f"{', '.join(changed)} in {str(folder)!r}: not what {REPORT} was measured on")
    facts: dict[str, Any] = {"format": to}
    if to == "peft":
        _copy_adapter(folder, output_dir, parts, config)
        written = "the adapter, which PEFT reads without memcontrol_hf"
    else:
        name, revision = (pipeline, None) if pipeline else (report.base_model, report.card.get("base_revision"))
        # What a LoRA adds depends on no base, and is compared in float32; what other methods add is rounded with it.
        dtype = None if to == "lora" and isinstance(config, LoraConfig) else report.half_precision
        base = base_pipeline(name, revision, report.card.get("base_variant"), dtype)
        check_base(report.training, family_of(base).denoiser, pipeline or report.base_model)
        if to == "merged":
            _save_merged(base, folder, output_dir, parts)
            written = "a whole pipeline, which diffusers reads without memcontrol_hf"
        else:
            used_rank, error = _save_lora(base, folder, output_dir, config, rank)
            written = f"a LoRA for pipe.load_lora_weights; relative error of the change of the weights: {error:.2g}"
            facts |= {} if isinstance(config, LoraConfig) else {"rank": used_rank, "relative_error": error}
    report.card = {key: value for key, value in report.card.items() if key not in ("hub_model_id", "revision")}
    report.card |= {"location": output_dir.name, "export": facts}
    if (folder / PLOT).is_file():
        shutil.copy(folder / PLOT, output_dir / PLOT)
    report.weights = adapter_digests(output_dir)
    report.to_json(output_dir / REPORT)
    write_card(output_dir)
    return f"{output_dir}: {written}"


def _checked_parts(folder: Path, output_dir: Path, to: str, rank: int) -> tuple[str, ...]:
    """The parts of the adapter, once everything that needs no model is known to be right."""
    if to not in FORMATS:
        raise ValueError(f"unknown format {to!r}: use one of {', '.join(FORMATS)}")
    if rank < 1:
        raise ValueError(f"the rank must be at least 1, but is {rank}")
    parts = adapter_parts(folder)
    for name, found in ((f"{ADAPTER} with {CONFIG}", parts), (REPORT, (folder / REPORT).is_file())):
        if not found:
            raise ValueError(f"{str(folder)!r} holds no {name}: give the folder that a fine-tune left")
    for part in parts:
        read_config(folder / part)
    if not is_new_or_empty(output_dir):
        raise ValueError(f"{str(output_dir)!r} is there and not empty: give another --output_dir")
    check_writable(output_dir)
    if to == "lora" and parts != ("",):
        raise ValueError(
            "this adapter tunes text encoders, which a LoRA file of this package does not hold: export it to merged"
        )
    return parts


def _copy_adapter(folder: Path, output_dir: Path, parts: tuple[str, ...], config: PeftConfig) -> None:
    if config.peft_type == "MEMCONTROL":
        raise ValueError(f"PEFT alone cannot read the method {config.method!r}: export it to merged or lora")
    for part in parts:
        (output_dir / part).mkdir(parents=True, exist_ok=True)
        for name in (ADAPTER, CONFIG):
            shutil.copy(folder / part / name, output_dir / part / name)


def _save_merged(base: "DiffusionPipeline", folder: Path, output_dir: Path, parts: tuple[str, ...]) -> None:
    """Merge the adapters of all parts into the pipeline, and save the pipeline."""
    family = family_of(base)
    for part in parts:
        adapted = PeftModel.from_pretrained(family.parts[part], str(folder), subfolder=part or None)
        setattr(base, part or family.denoiser_name, adapted.merge_and_unload())
    for component in (base, *base.components.values()):  # a config holds the folder that it was loaded from
        if hasattr(component, "register_to_config"):
            component.register_to_config(_name_or_path="")
    base.save_pretrained(output_dir)


def _save_lora(
    base: "DiffusionPipeline", folder: Path, output_dir: Path, config: PeftConfig, rank: int
) -> tuple[int, float]:
    """Save the denoiser's adapter as a LoRA file of diffusers; returns its rank and its relative error."""
    if not hasattr(base, "save_lora_weights"):
        raise ValueError(f"{type(base).__name__} has no load_lora_weights: export to merged")
    family = family_of(base)
    name = family.denoiser_name
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
    return metadata["r"], error


def base_pipeline(
    name: str, revision: str | None = None, variant: str | None = None, dtype: str | None = None
) -> "DiffusionPipeline":
    """The base of an adapter; the arguments are those of [`~memcontrol_hf.families.load_pipeline`].

    Raises:
        ValueError: When it cannot be loaded; the message says to name it with `--pipeline`.
    """
    try:
        return load_pipeline(name, revision, variant, dtype)
    except ValueError as error:
        raise ValueError(f"{error}. Name the adapter's base with --pipeline") from None


def _lora_of_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA of PEFT by the names that diffusers gives them."""
    return {name.removeprefix("base_model.model."): value for name, value in load_file(folder / ADAPTER).items()}


def _lora_of_difference(merged: nn.Module, before: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """The best approximation of a given rank of each changed weight matrix: a truncated SVD (Eckart-Young theorem).

    All modules get the same rank, padded with zeros, so that every loader reads the file.

    Args:
        merged (`nn.Module`): Denoiser with the adapter merged.
        before (`dict[str, torch.Tensor]`): State of the base's denoiser.
        rank (`int`): Largest rank.

    Returns:
        `dict[str, torch.Tensor]`: Names and tensors of the LoRA layers, as diffusers names them.

    Raises:
        ValueError: When no weight matrix changed.
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


def _metadata(layers: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The configuration of a LoRA with these layers, which diffusers saves beside them."""
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
    """How far the file, loaded by diffusers, is from the adapter: 0 is exact, 1 is as far as the base.

    The error is `||W_file - W_adapter|| / ||W_base - W_adapter||`, with the Frobenius norm over all tensors of the
    denoiser.
    """
    pipeline.load_lora_weights(str(folder))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    found = getattr(pipeline, name).state_dict()

    def distance(state: dict[str, torch.Tensor]) -> float:
        return sum((state[key].double() - wanted[key].double()).square().sum().item() for key in wanted) ** 0.5

    return distance(found) / max(distance(before), torch.finfo(torch.float32).tiny)
