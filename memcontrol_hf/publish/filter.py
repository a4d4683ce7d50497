"""A remedy for an adapter that failed, without data and without training: a smaller effect, or less of it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..adapter_folder import ADAPTER, CONFIG, REPORT, adapter_parts, read_config
from ..families import family_of
from ..report import MemorizationReport
from ..screening import Screening
from ..whole_files import check_writable, is_new_or_empty, write_whole
from .export import base_pipeline
from .spectral import filter_channels

_LINEAR = (
    "lora_B.weight",
    "lora_B.bias",
    "lora_embedding_B",
    "memcontrol_delta",
    "memcontrol_weight",
    "memcontrol_bias",
)
"""Ends of the names of tensors in which an adapter's effect is linear, and 0 is no effect."""

_UNSCALED = ("lora_A.weight", "lora_A.bias", "lora_embedding_A")


def filter_adapter(
    folder: str | Path,
    output_dir: str | Path,
    shrink: float | None = None,
    drop: Sequence[str] = (),
    screening: str | Path | None = None,
    spectral: float | None = None,
    pipeline: str | None = None,
) -> str:
    """Write an adapter whose effect is shrunk, or that lacks some blocks or some directions of its change.

    What was memorized fades with the effect, and what was learned fades with it, too. A filtered adapter is another
    adapter: its report is left behind, and it has to be audited anew. For SV-DIFF the shift of each singular value is
    shrunk, before it is cut at 0; for all other methods the change of the weights is.

    Args:
        folder (`str`): Folder of a LoRA, or of an adapter of this package's own methods.
        output_dir (`str`): A new or empty folder.
        shrink (`float`, *optional*): Factor of the adapter's effect, between 0 and 1.
        drop (list of `str`): Blocks to leave out, such as `up_blocks.1.attentions.0`.
        screening (`str`, *optional*):
            Screening of the same model and data, as `memcontrol screen` writes it: blocks that are off in its middle
            mask, which memorize much for what they learn, are left out, too.
        spectral (`float`, *optional*):
            Share of the spectral channels of each changed matrix that is removed, between 0 and 1: those that are
            aligned least with the base's weight, see [`~memcontrol_hf.publish.spectral.filter_channels`].
        pipeline (`str`, *optional*):
            Base pipeline, whose weights `spectral` reads: Hub id, folder or `demo`. By default the base that the
            adapter's report names, or else its configuration.

    Returns:
        `str`: What was written.

    Raises:
        ValueError: When nothing is to be done, for a factor or share out of range, a folder without an adapter or with
            one of another method, a block in which the adapter tunes nothing, an adapter of which nothing would be
            left, a base that is not known or does not fit, and an output folder that is not empty.
    """
    folder, output_dir = Path(folder), Path(output_dir)
    if shrink is None and not drop and screening is None and spectral is None:
        raise ValueError("nothing to do: give --shrink, --drop, --screening or --spectral")
    if pipeline is not None and spectral is None:
        raise ValueError(
            f"--pipeline {pipeline!r} is for --spectral alone, which reads the base: give both or neither"
        )
    for name, share in (("shrink", shrink), ("spectral", spectral)):
        if share is not None and not 0 < share < 1:
            raise ValueError(f"--{name} must lie between 0 and 1, but is {share:g}")
    if adapter_parts(folder) != ("",):
        raise ValueError(
            f"{str(folder)!r} holds no {ADAPTER} with {CONFIG} of a denoiser alone: give the folder of an adapter "
            "that tunes no text encoder"
        )
    if not is_new_or_empty(output_dir):
        raise ValueError(f"{str(output_dir)!r} is there and not empty: give another --output_dir")
    check_writable(output_dir)
    try:
        config, tensors = read_config(folder), load_file(folder / ADAPTER)
    except SafetensorError as error:
        raise ValueError(f"the adapter in {str(folder)!r} cannot be read: {error}") from None
    known = ("LORA", "MEMCONTROL")
    if config.get("peft_type") not in known or config.get("modules_to_save"):
        raise ValueError(
            f"the adapter in {str(folder)!r} is a {config.get('peft_type')}, of which this command knows no filter: "
            f"it takes {' and '.join(known)} without whole modules"
        )
    left_out = _left_out(drop, screening, tensors)
    if shrink is None and spectral is None and not left_out:
        raise ValueError(
            f"the middle mask of {str(screening)!r} has all blocks on in which the adapter tunes something, so "
            "nothing would be left out: give --shrink, --drop or --spectral"
        )
    kept = {name: tensor for name, tensor in tensors.items() if not any(_inside(name, block) for block in left_out)}
    if not kept:
        raise ValueError("nothing would be left of the adapter: leave fewer blocks out")
    if left_out:
        config = _without(config, left_out, kept)
    done = []
    if spectral is not None:
        weights = _BaseWeights(*((pipeline, None) if pipeline else _base_of(folder, config)))
        kept, removed, channels = filter_channels(kept, weights, spectral)
        done.append(f"without the {removed} of {channels} spectral channels that are aligned least with the base")
    if shrink is not None:
        kept = {name: _shrunk(name, tensor, shrink) for name, tensor in kept.items()}
    output_dir.mkdir(parents=True, exist_ok=True)
    save_file(kept, output_dir / ADAPTER, metadata={"format": "pt"})
    write_whole(output_dir / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    done += [f"effect times {shrink:g}"] if shrink is not None else []
    done += [f"without {', '.join(left_out)}"] if left_out else []
    return f"{output_dir}: {'; '.join(done)}; {len(kept)} of {len(tensors)} tensors are left"


def _base_of(folder: Path, config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Name and revision of an adapter's base, by its report or else by its configuration."""
    if (folder / REPORT).is_file():
        report = MemorizationReport.from_json(folder / REPORT)
        return report.base_model, report.card.get("base_revision")
    return config.get("base_model_name_or_path"), config.get("revision")


class _BaseWeights:
    """The weights of a base's denoiser by the names of modules. The base is loaded when the first one is read.

    Args:
        name (`str`, *optional*): Hub id, folder or `demo`.
        revision (`str`, *optional*): Revision on the Hub.
    """

    def __init__(self, name: str | None, revision: str | None) -> None:
        self._name, self._revision = name, revision
        self._state: dict[str, torch.Tensor] | None = None

    def __call__(self, module: str) -> torch.Tensor:
        """The weight of a module, `[out, ...]`."""
        if self._state is None:
            if not self._name:
                raise ValueError("--spectral reads the weights of the base, which nothing names here: give --pipeline")
            self._state = family_of(base_pipeline(self._name, self._revision)).denoiser.state_dict()
        if f"{module}.weight" not in self._state:
            raise ValueError(
                f"{self._name!r} has no weight of {module!r}: give the adapter's own base with --pipeline"
            )
        return self._state[f"{module}.weight"]


def _left_out(drop: Sequence[str], screening: str | Path | None, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The blocks to leave out, each of which holds a tensor."""
    for block in drop:
        if not any(_inside(name, block) for name in tensors):
            raise ValueError(f"the adapter tunes nothing in a block {block!r}")
    found = list(drop)
    if screening is not None:
        screened = Screening.from_json(screening)
        if not any(_inside(name, block) for name in tensors for block in screened.learns):
            raise ValueError(
                f"the adapter tunes nothing in any block of {str(screening)!r}, such as "
                f"{next(iter(screened.learns))}: that is a screening of another model"
            )
        masks = screened.masks(1)
        if not masks:
            raise ValueError(f"no block of {str(screening)!r} learns anything: there is nothing to choose by")
        off = [block for block, on in masks[0].items() if not on]
        found += [block for block in off if any(_inside(name, block) for name in tensors)]
    return list(dict.fromkeys(found))


def _inside(tensor: str, block: str) -> bool:
    """Whether a tensor of an adapter belongs to a block, or to the module of that name."""
    name = tensor.removeprefix("base_model.model.")
    return name == block or name.startswith(f"{block}.")


def _without(config: dict[str, Any], blocks: Sequence[str], kept: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The config without the modules of some blocks: their names, and where it has one, their bits of the mask."""
    modules = {name.removeprefix("base_model.model.").rpartition(".memcontrol_")[0] for name in kept}
    modules |= {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in kept}
    config = {**config, "target_modules": sorted(modules - {""})}
    if isinstance(chosen := config.get("singular_values"), dict):
        config["singular_values"] = {name: chosen[name] for name in chosen if name in modules}
    if isinstance(config.get("mask"), dict):
        config["mask"] = {
            name: on and not any(name == block or name.startswith(f"{block}.") for block in blocks)
            for name, on in config["mask"].items()
        }
    return config


def _shrunk(name: str, tensor: torch.Tensor, factor: float) -> torch.Tensor:
    if name.endswith("memcontrol_gamma"):  # a factor, of which 1 is no effect
        return 1 + factor * (tensor - 1)
    if name.endswith(_LINEAR):
        return factor * tensor
    if name.endswith(_UNSCALED):
        return tensor
    raise ValueError(f"the adapter has a tensor {name!r}, of which no shrinking is known: leave --shrink out")
