"""What is published of the flags of a run: in its report, on its card, and as the command that repeats it."""

import os
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from .encoders import encoder_name
from .flags import ScriptArguments, on_demo, on_demo_data, without_place
from .mitigations import public_mitigations
from .tracking import run_url
from .trainer import MemControlTrainer


def report_facts(args: ScriptArguments, trainer: MemControlTrainer) -> dict[str, Any]:
    """The arguments of [`~memcontrol_hf.workflow.save`] that come from flags."""
    return {
        "base_model": model_name(args),
        "encoder": encoder_name(args.encoder),
        "canaries": _canaries(args),
        "command": f"accelerate launch -m memcontrol_hf.train {public_flags(args)}".strip(),
        "card": card_facts(args, trainer),
    }


def _canaries(args: ScriptArguments) -> dict[str, int] | None:
    if not args.canaries:
        return None
    flipped = {"flip_canaries": True} if args.flip_canaries else {}
    return {"canaries": args.canaries, "canary_repeats": args.canary_repeats, **flipped}


def model_name(args: ScriptArguments) -> str:
    """The published name of the base model. A local folder is named by its last part only."""
    name = args.pretrained_model_name_or_path
    return Path(name).resolve().name if os.path.exists(name) else name


def card_facts(args: ScriptArguments, trainer: MemControlTrainer) -> dict[str, Any]:
    """The facts on the card that are not figures."""
    demo = args.pretrained_model_name_or_path == "demo"
    single_file = args.pretrained_model_name_or_path.endswith(".safetensors")
    as_given = on_demo_data(args) and not Path(args.output_dir).is_absolute()  # a path can name a person or a place
    facts = {
        "hub_model_id": args.hub_model_id,
        "location": args.output_dir if as_given else Path(args.output_dir).name,
        "base_revision": args.revision,
        "base_variant": args.variant,
        "base_class": single_file and type(trainer.family.pipeline).__name__,
        "base_config": single_file and args.single_file_config and "YOUR_SINGLE_FILE_CONFIG",
        "denoiser": trainer.family.denoiser_name,
        "without_lora": not hasattr(trainer.family.pipeline, "load_lora_weights"),
        "example_inputs": example_inputs(args, trainer),
        "license": args.license or ("apache-2.0" if demo and on_demo_data(args) else None),
        "datasets": public_datasets(args),
        "run_url": run_url(),
    }
    return {name: value for name, value in facts.items() if value}


def example_inputs(args: ScriptArguments, trainer: MemControlTrainer) -> dict[str, Any]:
    """The arguments with which the card's snippet calls the pipeline."""
    if args.validation_prompt is not None:
        prompt = args.validation_prompt
    elif args.pretrained_model_name_or_path == "demo":
        prompt = "grinning face"
    else:
        prompt = "0" if "class_labels" in trainer.family.conditions else ""
    request = trainer.family.pipeline_arguments([prompt], args.resolution, args.eval_guidance_scale)
    return {name: request[name] for name in ("prompt", "class_labels", "batch_size") if name in request}


def public_datasets(args: ScriptArguments) -> list[str]:
    """The data set's name, if everybody can see it on the Hub."""
    if args.train_data_dir is not None or on_demo_data(args) or Path(args.dataset_name).exists():
        return []
    try:
        return [] if HfApi(token=False).dataset_info(args.dataset_name).private else [args.dataset_name]
    except Exception:  # offline, unknown or private: nothing is said
        return []


def public_flags(args: ScriptArguments) -> str:
    """The flags that differ from the defaults, as far as they may be published; see [`_flag`]."""
    publish = {flag.name: flag.metadata["publish"] for flag in fields(args)}
    if public_datasets(args):
        publish["dataset_name"] = "yes"
    if on_demo(args) and not Path(args.output_dir).is_absolute():
        publish["output_dir"] = "yes"
    default = ScriptArguments(pretrained_model_name_or_path=args.pretrained_model_name_or_path)
    if not on_demo_data(args):
        default.encoder = None
    default.mixed_precision = "no"
    default.pretrained_model_name_or_path = ScriptArguments().pretrained_model_name_or_path
    words: list[str] = []
    for name, how in publish.items():
        value = public_mitigations(args.mitigation) if name == "mitigation" else getattr(args, name)
        if value == getattr(default, name) or how == "never":
            continue
        if how == "placeholder" or (how == "unless_path" and without_place(value) != value):
            words.append(f"--{name} YOUR_{name.upper()}")
        else:
            values = [] if value is True else value if isinstance(value, list) else [value]
            words.append(shlex.join([f"--{name}", *map(str, values)]))
    return " ".join(words)
