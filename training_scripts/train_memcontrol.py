r"""Search the parameters to tune, fine-tune them, measure what was memorized, and save the adapter with its report.

With no flags it runs the demo that ships in the package:

    accelerate launch training_scripts/train_memcontrol.py

Your own images, in a folder with a `metadata.jsonl` (`{"file_name": "1.png", "text": "a caption"}` a line):

    accelerate launch training_scripts/train_memcontrol.py \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --train_data_dir my_images --method svdiff --n_trials 20 --output_dir my_adapter

The same command goes on where it was interrupted.
"""

import argparse
import copy
import dataclasses
import hashlib
import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import DatasetDict
from huggingface_hub import HfApi
from peft import PeftConfig
from transformers import HfArgumentParser
from transformers import logging as transformers_logging
from transformers.trainer_utils import BestRun, get_last_checkpoint

from memcontrol_hf import (
    MemControlConfig,
    MemControlTrainer,
    MemControlTrainingArguments,
    MemorizationReport,
    audit_memorization,
    demo_dataset,
    select_run,
)
from memcontrol_hf.adapter_folder import LORA, MASK, PLOT, REPORT, adapter_digests
from memcontrol_hf.audit import LEAST_IMAGES, AuditSettings
from memcontrol_hf.data import check_near_duplicates, load_images, plant_canaries
from memcontrol_hf.dry_run import load_architecture, measured_speed, plan
from memcontrol_hf.encoders import encoder_name, load_encoder
from memcontrol_hf.families import DTYPES, QUANTIZATIONS, family_of, load_pipeline
from memcontrol_hf.mitigations import MITIGATIONS, parse_mitigations
from memcontrol_hf.publish.hub import GateFailed, PushError, check_login, push
from memcontrol_hf.report import ALL_ON, DEFAULT_GATE, FROZEN_BASE, SELECTED, load_gate
from memcontrol_hf.report.card import write_card
from memcontrol_hf.report.plots import plot_search
from memcontrol_hf.report.search_summary import search_summary
from memcontrol_hf.search import check_sampler, check_study, claim_final, known_masks, public_address, repeat_runs
from memcontrol_hf.search.front import rank_runs
from memcontrol_hf.search.ray import check_ray
from memcontrol_hf.tracking import log_images, log_push, log_report, run_url, start_tracking
from memcontrol_hf.trainer import METRICS, check_backend, check_objectives

# the projections of attention layers: of denoisers, of CLIP, of T5
ATTENTION = [*("to_q", "to_k", "to_v", "to_out.0"), *("q_proj", "k_proj", "v_proj", "out_proj"), *("q", "k", "v", "o")]
# method -> its config, and the learning rates that are searched
METHODS: dict[str, tuple[PeftConfig, tuple[float, float]]] = {
    "svdiff": (MemControlConfig(method="svdiff"), (1e-2, 1e-1)),
    "difffit": (MemControlConfig(method="difffit"), (3e-4, 3e-2)),
    "attention": (MemControlConfig(method="weights"), (1e-5, 1e-3)),
    "weights": (MemControlConfig(method="weights"), (1e-5, 1e-3)),
    "norm": (MemControlConfig(method="norm"), (3e-4, 3e-2)),
    "bias": (MemControlConfig(method="bias"), (3e-4, 3e-2)),
    "lora": (
        peft.LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION),
        (1e-4, 1e-2),
    ),
}
logger = logging.getLogger("memcontrol_hf.script")

# what a flag is when it is not given: for the demo's pipeline, which shall be done in minutes on two cores, and others
DEMO = {
    "resolution": 64,
    "train_batch_size": 32,
    "max_train_steps": 100,
    "search_max_steps": 50,
    "n_finalists": 0,
    "eval_num_images": 144,
    "eval_inference_steps": 10,
    "eval_guidance_scale": 3.0,
    "audit_num_prompts": 92,
    "audit_images_per_prompt": 4,
}
OTHER = {
    "resolution": 512,
    "train_batch_size": 4,
    "max_train_steps": 1000,
    "search_max_steps": 250,
    "n_finalists": 3,
    "eval_num_images": 256,
    "eval_inference_steps": 25,
    "eval_guidance_scale": 7.5,
    "audit_num_prompts": 100,
    "audit_images_per_prompt": 10,
}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults, and the commands of the docstring as they are."""


def _by_pipeline(name: str, text: str) -> Any:
    """A flag whose default depends on the pipeline."""
    return field(default=None, metadata={"help": f"{text} {DEMO[name]} for the demo's pipeline, else {OTHER[name]}."})


@dataclass
class ScriptArguments:
    """What is tuned, on which images, how it is searched, and where the result goes."""

    pretrained_model_name_or_path: str = field(
        default="demo",
        metadata={
            "help": "Pipeline to tune: a Hub id, a folder or a .safetensors file. `demo`: the one in the package."
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Of the pipeline on the Hub."})
    variant: str | None = field(default=None, metadata={"help": "Of the pipeline's weights, say fp16."})
    dtype: str | None = field(
        default=None, metadata={"help": f"Of the frozen weights: {', '.join(DTYPES)}. float32 if not given."}
    )
    quantization: str | None = field(
        default=None,
        metadata={"help": f"Of the frozen denoiser, for --method lora: {', '.join(QUANTIZATIONS)}."},
    )
    single_file_config: str | None = field(
        default=None,
        metadata={"help": "For a .safetensors file: a Hub id or folder of a pipeline that is built alike."},
    )
    dataset_name: str = field(
        default="demo",
        metadata={"help": "Images: a Hub id or a folder that `load_dataset` reads. `demo`: those in the package."},
    )
    train_data_dir: str | None = field(
        default=None, metadata={"help": "Images instead: a folder with a metadata.jsonl beside the files."}
    )
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    caption_column: str = field(default="text", metadata={"help": "Column with the captions."})
    group_column: str | None = field(
        default=None, metadata={"help": "Column that must not be torn apart by the splits: a patient's id, say."}
    )
    canaries: int = field(
        default=0,
        metadata={"help": "Training images that are repeated, to see whether the audit's attacks find them."},
    )
    canary_repeats: int = field(default=4, metadata={"help": "How often each canary occurs."})
    near_duplicates: float = field(
        default=0.05,
        metadata={"help": "How unlike images of different splits must be, 0 to 1; see metrics.near_duplicates."},
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Where the result goes. outputs/quickstart for the demo."}
    )

    method: str = field(
        default="svdiff",
        metadata={
            "help": f"What is tuned in a selected block: {', '.join(METHODS)} (weights is attention's other name)."
        },
    )
    peft_config: str | None = field(
        default=None,
        metadata={"help": "Any other PEFT method: a JSON file as save_pretrained writes it (adapter_config.json)."},
    )
    granularity: list[str] = field(
        default_factory=lambda: ["block"],
        metadata={
            "help": "What a bit of the mask stands for: block, site (attn1, attn2, ff), or regular expressions over "
            "the denoiser's module names, one for each bit."
        },
    )
    text_encoder_blocks: bool = field(
        default=False,
        metadata={"help": "Layers of the text encoders are blocks, too; captions are then encoded in each step."},
    )
    mask_from: str | None = field(
        default=None,
        metadata={
            "help": "Take the mask of this adapter folder, JSON file or Hub repository instead of searching; with "
            "--n_trials it is the third trial of a search."
        },
    )

    n_trials: int | None = field(
        default=None, metadata={"help": "Trials of the search, all in all: 8, or none with --mask_from."}
    )
    objectives: list[str] = field(
        default_factory=lambda: ["fid", "membership_auc"],
        metadata={"help": f"Out of {', '.join(METRICS)}; quality first, memorization second."},
    )
    memorization_budget: float | None = field(
        default=None,
        metadata={
            "help": "Worst second objective that is allowed, a constraint of the search. Without it: the front's knee."
        },
    )
    max_trainable_percent: float | None = field(
        default=None, metadata={"help": "Masks that train more of the parameters are not tried."}
    )
    n_finalists: int | None = _by_pipeline(
        "n_finalists", "Runs of the front that are repeated with new seeds before one is chosen by the repeats."
    )
    finalist_repeats: int = field(default=1, metadata={"help": "How often each of them is repeated."})
    trial_timeout: float | None = field(
        default=None, metadata={"help": "Seconds after which a trial's training is stopped; it has failed then."}
    )
    prune_at: float | None = field(
        default=None,
        metadata={"help": "Share of a trial's steps after which it is stopped if two others dominate it there."},
    )
    sampler: str = field(default="tpe", metadata={"help": "Of the search: tpe, nsga2, gp, random."})
    search_fraction: float = field(default=1.0, metadata={"help": "Share of the training rows in a trial."})
    search_max_steps: int | None = _by_pipeline("search_max_steps", "Steps of a trial of the search.")
    storage: str | None = field(
        default=None,
        metadata={
            "help": "Of the study, which any number of processes share: a journal file, a database's address, or "
            "grpc://host:port. See docs/search.md."
        },
    )
    study_name: str = field(default="memcontrol", metadata={"help": "Name of the study in its storage."})
    backend: str = field(
        default="optuna",
        metadata={"help": "optuna: the trials run in this process. ray: in workers that Ray places on its cluster."},
    )
    num_workers: int | None = field(
        default=None,
        metadata={"help": "Workers of --backend ray, each with a CPU and a GPU if there are any: 2."},
    )

    resolution: int | None = _by_pipeline("resolution", "Side of the images in pixels.")
    train_batch_size: int | None = _by_pipeline("train_batch_size", "Images a step on each device.")
    eval_batch_size: int = field(default=32, metadata={"help": "Images at once in measuring and sampling."})
    max_train_steps: int | None = _by_pipeline("max_train_steps", "Steps of the final fine-tune.")
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches for one step."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Less memory for more time."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "A fixed learning rate. Without it, it is searched with the mask."}
    )
    lr_scheduler: str = field(default="constant", metadata={"help": "As transformers calls it: cosine, ..."})
    lr_warmup_steps: int = field(default=0, metadata={"help": "Steps until the full learning rate."})
    snr_gamma: float | None = field(default=None, metadata={"help": "Min-SNR weighting of the loss; 5 is usual."})
    caption_dropout: float = field(default=0.1, metadata={"help": "Share of captions replaced by the empty one."})
    mitigation: list[str] = field(
        default_factory=list,
        metadata={
            "action": "extend",
            "help": f"Further means against memorization, NAME[:arguments]: {', '.join(MITIGATIONS)}. Several "
            "combine: rwa:n=4 threshold:q=0.9. See docs/mitigations.md.",
        },
    )
    mixed_precision: str = field(default="no", metadata={"help": "no, fp16 or bf16."})
    trainer_args: str = field(
        default="{}",
        metadata={"help": 'Any other argument of transformers\' Trainer as JSON: {"optim": "adamw_bnb_8bit"}.'},
    )

    encoder: str = field(
        default="demo",
        metadata={
            "help": "Image encoder of fid and amd: demo, a Hub id or folder of a model, or xrv:densenet121-res224-all."
        },
    )
    eval_num_images: int | None = _by_pipeline("eval_num_images", "Images generated for fid and for amd.")
    eval_inference_steps: int | None = _by_pipeline("eval_inference_steps", "Sampling steps of these images.")
    eval_guidance_scale: float | None = _by_pipeline("eval_guidance_scale", "Guidance scale of these images.")
    audit_num_prompts: int | None = _by_pipeline("audit_num_prompts", "Training captions that the audit samples.")
    audit_images_per_prompt: int | None = _by_pipeline("audit_images_per_prompt", "Images for each of them.")
    gate: str | None = field(
        default=None, metadata={"help": "Gate file of the audit: limits for its measures. The package's by default."}
    )
    validation_prompt: str | None = field(
        default=None, metadata={"help": "Prompt in the card's loading snippet. It is published."}
    )

    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Read nothing but the model's configs; print blocks, trainable parameters, adapter size, memory "
            "and time of the search, and stop."
        },
    )
    seed: int = field(default=0, metadata={"help": "Of everything."})
    checkpointing_steps: int | None = field(
        default=None, metadata={"help": "Save the state of the final fine-tune each so many steps."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "Go on with the final fine-tune: a checkpoint's folder, or latest."}
    )
    report_to: str = field(default="none", metadata={"help": "wandb, tensorboard, trackio, all or none."})
    log_images: int = field(
        default=0,
        metadata={"help": "Images of --validation_prompt to show in wandb, without those that may be copies."},
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the public files, to a private repository."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "The repository; the folder's name if not given."}
    )
    hub_revision: str | None = field(default=None, metadata={"help": "Branch to push to."})
    hub_public: bool = field(
        default=False, metadata={"help": "Make a new repository public, or push to one that is public."}
    )
    allow_failed_gate: bool = field(
        default=False, metadata={"help": "Push although the release gate failed; the card says so first."}
    )
    license: str | None = field(
        default=None, metadata={"help": "Of the adapter, as the Hub writes it: apache-2.0, ... It is on the card."}
    )

    def __post_init__(self) -> None:
        if self.n_trials is None:
            self.n_trials = 0 if self.mask_from else 8
        self.output_dir = self.output_dir or ("outputs/quickstart" if on_demo_data(self) else "outputs/memcontrol")
        for name, value in (DEMO if self.pretrained_model_name_or_path == "demo" else OTHER).items():
            if getattr(self, name) is None:
                setattr(self, name, value)


def check(args: ScriptArguments) -> tuple[PeftConfig, tuple[float, float], dict[str, bool] | None]:
    """Everything that can be seen to be wrong before anything is loaded.

    Returns:
        The PEFT config, the learning rates to search, and the mask that was given.

    Raises:
        ValueError: says the value, what was allowed, and what to do.
    """
    if args.peft_config is not None:
        config, rates = peft_config_from(args.peft_config), (1e-5, 1e-3)
    elif args.method in METHODS:
        config, rates = copy.deepcopy(METHODS[args.method])
    else:
        raise ValueError(f"unknown method {args.method!r}: use one of {', '.join(METHODS)}, or --peft_config")
    if args.learning_rate is not None:
        if args.learning_rate <= 0:
            raise ValueError(f"--learning_rate must be positive, but is {args.learning_rate}")
        rates = (args.learning_rate, args.learning_rate)
    load_gate(args.gate or DEFAULT_GATE)
    audit_settings(args)
    check_objectives(args.objectives)
    check_sampler(args.sampler)
    check_backend(args.backend)
    if args.backend == "ray":
        check_ray(ray_options(args).get("num_workers", 1))
    elif args.num_workers is not None:
        raise ValueError(f"--num_workers {args.num_workers} is for --backend ray: give that, too, or neither")
    for flag, known in (("dtype", DTYPES), ("quantization", QUANTIZATIONS)):
        if (value := getattr(args, flag)) is not None and value not in known:
            raise ValueError(f"unknown --{flag} {value!r}: use {', '.join(known)}")
    if args.log_images and args.validation_prompt is None:
        raise ValueError("--log_images shows what the model makes of a --validation_prompt: give one")
    if args.log_images and "wandb" not in args.report_to:
        raise ValueError("--log_images is for --report_to wandb: give that, too, or neither")
    if args.push_to_hub:
        check_login(args.hub_model_id or Path(args.output_dir).resolve().name, args.hub_public)
    if args.mixed_precision not in ("no", "fp16", "bf16"):
        raise ValueError(f"unknown mixed precision {args.mixed_precision!r}: use no, fp16 or bf16")
    if args.n_trials < (0 if args.mask_from else 1):
        raise ValueError(f"--n_trials must be at least 1, but is {args.n_trials}")
    for flag in ("max_trainable_percent", "trial_timeout"):
        if (value := getattr(args, flag)) is not None and value <= 0:
            raise ValueError(f"--{flag} must be positive, but is {value:g}")
    for flag, least in (
        ("n_finalists", 0),
        ("finalist_repeats", 1),
        ("max_train_steps", 1),
        ("search_max_steps", 1),
        ("eval_num_images", 2),
    ):
        if (value := getattr(args, flag)) is not None and value < least:
            raise ValueError(f"--{flag} must be at least {least}, but is {value}")
    if args.prune_at is not None and not 0 < args.prune_at < 1:
        raise ValueError(f"--prune_at must be a share of the steps between 0 and 1, but is {args.prune_at:g}")
    if args.memorization_budget is not None and len(args.objectives) < 2:
        raise ValueError("--memorization_budget needs a second objective, the memorization")
    resume = args.resume_from_checkpoint
    if resume not in (None, "latest") and not Path(resume).is_dir():
        raise ValueError(f"--resume_from_checkpoint {resume!r} is no folder: give a checkpoint's, or latest")
    if args.train_data_dir is not None and not Path(args.train_data_dir).is_dir():
        raise ValueError(f"--train_data_dir {args.train_data_dir!r} is no folder")
    if args.train_data_dir is not None and args.dataset_name != "demo":
        raise ValueError("give --dataset_name or --train_data_dir, not both")
    mask = mask_from(args.mask_from) if args.mask_from else None
    if args.n_trials:
        check_own_study(args, settings(args), later=_SEEN_LATER)
    return config, rates, mask


def peft_config_from(path: str) -> PeftConfig:
    """A PEFT config from a JSON file or an adapter folder."""
    file = Path(path) / "adapter_config.json" if Path(path).is_dir() else Path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return PeftConfig.from_peft_type(**content)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--peft_config {path!r} is no PEFT config: {type(error).__name__}: {error}") from None


def mask_from(path: str) -> dict[str, bool]:
    """The mask in an adapter's folder, in a JSON file, or of a mask's repository on the Hub."""
    file, names = Path(path), (MASK, REPORT, "adapter_config.json")
    try:
        if file.is_dir():
            file = next((file / name for name in names if (file / name).exists()), file)
        elif not file.exists() and path.count("/") == 1 and not file.is_absolute():
            file = Path(HfApi().hf_hub_download(path, MASK))
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--mask_from {path!r} cannot be read: {str(error).splitlines()[0]}") from None
    mask = content.get("mask", content) if isinstance(content, dict) else content
    if not isinstance(mask, dict) or not all(isinstance(value, bool) for value in mask.values()):
        raise ValueError(f"--mask_from {path!r} holds no mask, which is an object of block names and booleans")
    if not any(mask.values()):
        raise ValueError(f"--mask_from {path!r} selects no block: the frozen base has nothing to train")
    return mask


_SEEN_LATER = ("images", "world_size")


def settings(args: ScriptArguments) -> dict[str, Any]:
    """What a study depends on: going on with another value is refused."""
    depends_on = (
        *("pretrained_model_name_or_path", "revision", "variant", "dtype", "quantization", "single_file_config"),
        *("dataset_name", "train_data_dir", "image_column"),
        *("caption_column", "group_column", "method", "peft_config", "granularity", "objectives", "sampler"),
        *("search_fraction", "search_max_steps", "resolution", "train_batch_size", "gradient_accumulation_steps"),
        *("learning_rate", "lr_scheduler", "lr_warmup_steps", "snr_gamma", "caption_dropout", "mixed_precision"),
        *("trainer_args", "encoder", "eval_num_images", "eval_inference_steps", "eval_guidance_scale", "seed"),
    )
    values = {name: without_place(getattr(args, name)) for name in depends_on}
    if args.text_encoder_blocks:
        values["text_encoder_blocks"] = True
    if args.prune_at is not None:
        values["prune_at"] = args.prune_at
    if args.canaries:
        values |= {"canaries": args.canaries, "canary_repeats": args.canary_repeats}
    return values | ({"mitigation": sorted(args.mitigation)} if args.mitigation else {})


def settings_with_images(args: ScriptArguments, trainer: MemControlTrainer) -> dict[str, Any]:
    """What a study depends on once the images are read: they themselves, too, and how many processes share a trial."""
    digest = hashlib.blake2b(digest_size=8)
    for data in (trainer.train_dataset, trainer.encode(trainer.eval_dataset)):
        digest.update(repr([*data.encoded["pixels"]]).encode() + repr([*data.images["text"]]).encode())
    return settings(args) | {"images": digest.hexdigest(), "world_size": trainer.args.world_size}


def check_own_study(args: ScriptArguments, made_with: dict[str, Any], later: Sequence[str] = ()) -> None:
    """See that the study of this command, where there is one already, was made with these settings."""
    storage = args.storage or str(Path(args.output_dir) / "study.journal")
    check_study(storage, args.study_name, made_with, alone=args.storage is None, later=later)


def ray_options(args: ScriptArguments) -> dict[str, int]:
    """What `--backend ray` is given."""
    return {} if args.num_workers is None else {"num_workers": args.num_workers}


def audit_settings(args: ScriptArguments) -> AuditSettings:
    """How much the result is attacked."""
    return AuditSettings(
        resolution=args.resolution,
        num_prompts=args.audit_num_prompts,
        images_per_prompt=args.audit_images_per_prompt,
        num_quality_images=args.eval_num_images,
        inference_steps=args.eval_inference_steps,
        guidance_scale=args.eval_guidance_scale,
        near_duplicates=args.near_duplicates,
        batch_size=args.eval_batch_size,
        seed=args.seed,
    )


def without_place(value: Any) -> Any:
    """A path of this machine as its last part and a digest of the whole; anything else as it is."""
    if not isinstance(value, str) or not os.path.exists(value):  # of a text that is too long for a path: False
        return value
    path = Path(value).resolve()
    return f"{path.name} ({hashlib.sha256(str(path).encode()).hexdigest()[:8]})"


def load(args: ScriptArguments) -> tuple[Any, DatasetDict]:
    """The pipeline and the images, checked against each other."""
    pipeline = load_pipeline(
        args.pretrained_model_name_or_path,
        args.revision,
        args.variant,
        args.dtype,
        args.quantization,
        args.single_file_config,
    )
    family_of(pipeline).check_resolution(args.resolution)
    if on_demo_data(args):
        data = demo_dataset()
    else:
        several = parse_mitigations(args.mitigation).get("multiple_captions")
        data = load_images(
            None if args.train_data_dir else args.dataset_name,
            args.train_data_dir,
            args.image_column,
            args.caption_column,
            args.group_column,
            args.seed,
            several.column if several else None,
        )
    check_near_duplicates(data, args.near_duplicates)
    data["train"] = plant_canaries(data["train"], args.canaries, args.canary_repeats, args.seed)
    return pipeline, data


def training_arguments(args: ScriptArguments) -> MemControlTrainingArguments:
    """The Trainer's own arguments."""
    steps = args.checkpointing_steps
    try:
        other = dict(json.loads(args.trainer_args))
    except (ValueError, TypeError) as error:
        raise ValueError(f"--trainer_args is no JSON object: {error}") from None
    unknown = set(other) - {field.name for field in dataclasses.fields(MemControlTrainingArguments)}
    if unknown:
        raise ValueError(f"--trainer_args has unknown arguments: {', '.join(sorted(unknown))}")
    if hub := [name for name in other if name.startswith(("push_to_hub", "hub_"))]:
        raise ValueError(f"--trainer_args has {', '.join(hub)}: use --push_to_hub, --hub_model_id, --hub_revision")
    arguments = {
        "output_dir": args.output_dir,
        "run_name": f"{args.study_name}-final",
        "resolution": args.resolution,
        "per_device_train_batch_size": args.train_batch_size,
        "per_device_eval_batch_size": args.eval_batch_size,
        "max_steps": args.max_train_steps,
        "search_max_steps": args.search_max_steps,
        "search_fraction": args.search_fraction,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "activation_checkpointing": args.gradient_checkpointing,
        "learning_rate": args.learning_rate or 1e-4,
        "lr_scheduler_type": args.lr_scheduler,
        "warmup_steps": args.lr_warmup_steps,
        "snr_gamma": args.snr_gamma,
        "caption_dropout": args.caption_dropout,
        "mitigations": args.mitigation,
        "fp16": args.mixed_precision == "fp16",
        "bf16": args.mixed_precision == "bf16",
        "objectives": args.objectives,
        "eval_num_images": args.eval_num_images,
        "eval_inference_steps": args.eval_inference_steps,
        "eval_guidance_scale": args.eval_guidance_scale,
        "save_strategy": "steps" if steps else "no",
        "save_steps": steps or 500,
        "logging_steps": 10,
        "disable_tqdm": False,
        "report_to": args.report_to,
        "seed": args.seed,
    }
    if taken := sorted(set(other) & set(arguments) - {"logging_steps", "disable_tqdm"}):
        raise ValueError(f"--trainer_args has {', '.join(taken)}: there are flags for what these say, see --help")
    return MemControlTrainingArguments(**arguments | other)


def dry_run(args: ScriptArguments) -> str:
    """What the search would take, to print."""
    config, _, _ = check(args)
    trainer_args = training_arguments(args)
    weight_bytes = DTYPES[args.dtype or "float32"].itemsize
    if args.quantization is not None:
        weight_bytes = QUANTIZATIONS[args.quantization][1]
    planned = plan(
        load_architecture(args.single_file_config or args.pretrained_model_name_or_path, args.revision),
        config,
        granularity_of(args),
        args.text_encoder_blocks,
        resolution=args.resolution,
        batch_size=args.train_batch_size,
        n_trials=args.n_trials,
        steps=args.search_max_steps * args.gradient_accumulation_steps,
        num_images=args.eval_num_images,
        inference_steps=args.eval_inference_steps,
        guidance=args.eval_guidance_scale > 1,
        eval_samplings=len({"fid", "amd"} & {*args.objectives}),
        weight_bytes=weight_bytes,
        optimizer_bytes=2 if "8bit" in trainer_args.optim else 8,
        low_precision=args.mixed_precision != "no" or args.dtype in ("float16", "bfloat16"),
    )
    return planned.text(measured_speed(trainer_args.device))


def granularity_of(args: ScriptArguments) -> str | list[str]:
    """A name, or a list of expressions."""
    return args.granularity[0] if args.granularity in (["block"], ["site"]) else args.granularity


def prepare(argv: list[str] | None) -> tuple[ScriptArguments, MemControlTrainer, DatasetDict, tuple, dict | None]:
    """Parse, check and load; a dry run ends here."""
    parser = HfArgumentParser(ScriptArguments, description=__doc__, formatter_class=_HelpFormatter)
    (args,) = parser.parse_args_into_dataclasses(argv)
    if args.dry_run:
        print(dry_run(args))
        raise SystemExit
    config, rates, mask = check(args)
    trainer_args = training_arguments(args)
    pipeline, data = load(args)
    space = family_of(pipeline).search_space(granularity_of(args), args.text_encoder_blocks)
    on_hub = args.pretrained_model_name_or_path != "demo" and not Path(args.pretrained_model_name_or_path).exists()
    config.base_model_name_or_path = args.pretrained_model_name_or_path if on_hub else None
    trainer = MemControlTrainer(
        pipeline=pipeline,
        peft_config=config,
        args=trainer_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        search_space=space,
        mask=mask,
        encoder=load_encoder(args.encoder, trainer_args.device),
    )
    if args.n_trials:
        check_own_study(args, settings_with_images(args, trainer))
    example_inputs(args, trainer)  # a prompt that the pipeline cannot take is seen now
    for name, least in LEAST_IMAGES.items():
        if (count := len(trainer.encode(data[name]).unique)) < least:
            logger.warning(
                f"the {name} split has {count} different images, but the audit needs {least}: there will be none, and "
                "the gate will fail"
            )
    return args, trainer, data, rates, mask


def model_name(args: ScriptArguments) -> str:
    """What is published of the base model's address: of a local folder only its name."""
    name = args.pretrained_model_name_or_path
    return Path(name).resolve().name if os.path.exists(name) else name


def fine_tune_and_measure(trainer: MemControlTrainer, data: DatasetDict, resume: str | bool | None = None) -> dict:
    """Train the current mask, if it has a block on, and measure it against the held-out images."""
    if any(trainer.mask.values()):
        trainer.train(resume_from_checkpoint=resume)
    figures = trainer.evaluate(data["held_out"], metrics=list(METRICS))
    return {
        "trainable_parameters": trainer.trainable_parameters,
        "trainable_percent": trainer.trainable_percent,
        **{name.removeprefix("eval_"): value for name, value in figures.items()},
    }


def search(
    args: ScriptArguments, trainer: MemControlTrainer, rates: tuple[float, float], mask: dict[str, bool] | None
) -> BestRun | None:
    """Search, and choose a run; `None` in a process that leaves the final fine-tune to another."""
    runs = trainer.hyperparameter_search(
        n_trials=args.n_trials,
        learning_rate_range=rates,
        sampler=args.sampler,
        storage=args.storage,
        study_name=args.study_name,
        settings=settings_with_images(args, trainer),
        enqueue=known_masks(trainer.search_space, *rates, [mask] if mask else []),
        memorization_budget=args.memorization_budget,
        max_trainable_percent=args.max_trainable_percent,
        trial_timeout=args.trial_timeout,
        prune_at=args.prune_at,
        backend=args.backend,
        **ray_options(args),
    )
    if not claim_final(trainer, runs, args.trial_timeout):
        logger.info("another process that works on this study does the final fine-tune")
        return None
    ranked = rank_runs(runs, args.memorization_budget)
    finalists = ranked[: args.n_finalists]
    if len(finalists) < 2:  # repeats could not change the choice
        return ranked[0]
    return select_run(repeat_runs(trainer, finalists, args.finalist_repeats), args.memorization_budget)


def main(argv: list[str] | None = None) -> None:
    """Parse, load, search, select, fine-tune, measure, save, push."""
    transformers_logging.set_verbosity_error()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("memcontrol_hf").setLevel(logging.INFO)
    try:
        args, trainer, data, rates, mask = prepare(argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None

    study = selected = None
    if args.n_trials:
        try:
            run = search(args, trainer, rates, mask)
        except (ValueError, RuntimeError) as error:
            kept = public_address(args.storage) if args.storage else args.output_dir
            print(f"error: {error}. The trials are kept in {kept}", file=sys.stderr)
            raise SystemExit(1) from None
        if run is None:
            return
        study, selected, hyperparameters = run.run_summary, int(run.run_id), run.hyperparameters
        trainer.args.seed += 1  # the search never saw it
        if isinstance(trainer.peft_config, MemControlConfig):
            trainer.peft_config.search = {"study_name": args.study_name, "trial": selected, "sampler": args.sampler}
    else:
        rate = args.learning_rate or (rates[0] * rates[1]) ** 0.5
        hyperparameters = {"mask": trainer.mask, "learning_rate": rate}

    resume = args.resume_from_checkpoint
    if resume == "latest":
        resume = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    if resume:
        trainer.apply_hyperparameters(hyperparameters, final_model=True)
        try:
            trainer.check_resumes(resume)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None

    figures, stopped, failed = {}, {}, {}
    save_strategy = trainer.args.save_strategy
    everything, nothing = trainer.search_space.mask(True), trainer.search_space.mask(False)
    for name, blocks in ((FROZEN_BASE, nothing), (ALL_ON, everything), (SELECTED, hyperparameters["mask"])):
        trainer.apply_hyperparameters({**hyperparameters, "mask": blocks}, final_model=True)
        logger.info(f"{name}: {'fine-tune on all of the data, then ' if any(blocks.values()) else ''}held-out figures")
        start_tracking(trainer, args.study_name, name, "final", {**hyperparameters, "mask": blocks})
        trainer.args.save_strategy = save_strategy if name == SELECTED else "no"  # a checkpoint is the adapter's
        try:
            figures[name] = fine_tune_and_measure(trainer, data, resume if name == SELECTED else None)
        except ValueError as error:
            if name != ALL_ON:
                raise
            failed[name] = str(error)  # it is there to compare with, and has the learning rate of another mask
            logger.warning(f"{name} cannot be compared with: {error}")
            continue
        if any(blocks.values()) and trainer.state.global_step < trainer.args.max_steps:
            stopped[name] = trainer.state.global_step

    if trainer.is_world_process_zero():
        save(args, trainer, data, figures, stopped, failed, study, selected)


def save(
    args: ScriptArguments,
    trainer: MemControlTrainer,
    data: DatasetDict,
    figures: dict[str, dict[str, float]],
    stopped: dict[str, int],
    failed: dict[str, str],
    study: Any,
    selected: int | None,
) -> None:
    """The adapter, the report, the plot and the card; and the push, when asked."""
    folder = Path(args.output_dir)
    for stale in (PLOT, LORA):  # of an earlier command with this folder
        (folder / stale).unlink(missing_ok=True)
    trainer.save_model(args.output_dir)
    log_images(trainer, data["held_out"], args.validation_prompt, args.log_images)
    sampling = [m for m in args.mitigation if not MITIGATIONS[m.partition(":")[0]].guards_weights]
    report = MemorizationReport(
        base_model=model_name(args),
        method=args.method if args.peft_config is None else str(trainer.peft_config.peft_type),
        mask=trainer.mask,
        figures=figures,
        training={
            "learning_rate": trainer.args.learning_rate,
            "max_steps": trainer.args.max_steps,
            "batch_size": trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps,
            "world_size": trainer.args.world_size,
            "resolution": args.resolution,
            "seed": trainer.args.seed,
            "mitigations": [mitigation for mitigation in args.mitigation if mitigation not in sampling],
            **({"sampling_mitigations": sampling} if sampling else {}),
            **({"canaries": args.canaries, "canary_repeats": args.canary_repeats} if args.canaries else {}),
            **({"stopped_at_step": stopped} if stopped else {}),
            **({"failed": failed} if failed else {}),
            **({"dp_sgd": trainer.privacy} if trainer.privacy else {}),
        },
        images=count_images(trainer, data),
        encoder=encoder_name(args.encoder),
        command=f"accelerate launch training_scripts/train_memcontrol.py {public_flags(args)}".strip(),
        search=None if study is None else search_summary(study, args.sampler, trainer.args.objectives),
        card=card_facts(args, trainer),
        weights=adapter_digests(folder),
    )
    logger.info("audit: attacks on the adapter, on the frozen base and with held-out images as training images")
    trainer.set_mask(trainer.search_space.mask(False))  # the bare pipeline: what is attacked is what was saved
    limits = load_gate(args.gate or DEFAULT_GATE)
    report.gate = {"passed": False, "limits": limits, "failures": ["the audit did not end"]}
    report.to_json(folder / REPORT)  # so that what was measured is kept, whatever becomes of the audit
    try:
        report.audit = audit_memorization(
            data["train"],
            data["held_out"],
            pipeline=trainer.pipeline,
            adapter=folder if any(report.mask.values()) else None,
            encoder=trainer.encoder,
            settings=audit_settings(args),
        ).audit
        report.judge(limits)
    except ValueError as error:  # too few images, say: what was trained is kept, and it does not pass
        report.gate = {"passed": False, "limits": limits, "failures": [f"no audit: {error}"]}
    report.to_json(folder / REPORT)
    if study is not None:
        distances = report.audit and report.audit["distances"]
        plot_search(study, trainer.args.objectives, folder / PLOT, selected, distances)
    write_card(folder)
    log_report(report, folder)
    print("\n" + report.summary() + f"\n\nadapter, card and report: {args.output_dir}")
    if args.push_to_hub:
        try:
            address = push(
                args.output_dir,
                args.hub_model_id,
                revision=args.hub_revision,
                public=args.hub_public,
                allow_failed_gate=args.allow_failed_gate,
            )
            print("pushed:", address)
            log_push(address)
        except (GateFailed, PushError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(3 if isinstance(error, GateFailed) else 1) from None


def card_facts(args: ScriptArguments, trainer: MemControlTrainer) -> dict[str, Any]:
    """What the card says beside the figures."""
    demo = args.pretrained_model_name_or_path == "demo"
    as_given = on_demo_data(args) and not Path(args.output_dir).is_absolute()  # a path can name a person or a place
    facts = {
        "hub_model_id": args.hub_model_id,
        "location": args.output_dir if as_given else Path(args.output_dir).name,
        "base_revision": args.revision,
        "denoiser": trainer.family.denoiser_name,
        "example_inputs": example_inputs(args, trainer),
        "license": args.license or ("apache-2.0" if demo and on_demo_data(args) else None),
        "datasets": public_datasets(args),
        "run_url": run_url(),
    }
    return {name: value for name, value in facts.items() if value}


def example_inputs(args: ScriptArguments, trainer: MemControlTrainer) -> dict[str, Any]:
    """What the card's snippet calls the pipeline with."""
    if args.validation_prompt is not None:
        prompt = args.validation_prompt
    elif args.pretrained_model_name_or_path == "demo":
        prompt = "grinning face"
    else:
        prompt = "0" if "class_labels" in trainer.family.conditions else ""
    request = trainer.family.request([prompt], args.resolution, args.eval_guidance_scale)
    return {name: request[name] for name in ("prompt", "class_labels", "batch_size") if name in request}


def on_demo_data(args: ScriptArguments) -> bool:
    """Whether the images are those in the package."""
    return args.train_data_dir is None and args.dataset_name == "demo"


def public_datasets(args: ScriptArguments) -> list[str]:
    """The data set's name, if everybody can see it on the Hub."""
    if args.train_data_dir is not None or on_demo_data(args) or Path(args.dataset_name).exists():
        return []
    try:
        return [] if HfApi(token=False).dataset_info(args.dataset_name).private else [args.dataset_name]
    except Exception:  # offline, unknown or private: nothing is said
        return []


def count_images(trainer: MemControlTrainer, data: DatasetDict) -> dict[str, int]:
    """Rows of each split, and how many different images they hold."""
    encoded = {name: trainer.encode(split) for name, split in data.items()}
    rows = {name: len(split) for name, split in encoded.items()}
    return rows | {f"{name}_different": len(split.unique) for name, split in encoded.items()}


# Flags whose values are words of this script, and no folder that happens to have such a name.
CHOICES = ("method", "sampler", "backend", "dtype", "quantization", "mixed_precision", "lr_scheduler")


def public_flags(args: ScriptArguments) -> str:
    """The flags that differ from the defaults; a place, or a person's data, as `YOUR_...`, or left out."""
    private = {"train_data_dir", "dataset_name", "output_dir", "storage", "mask_from", "peft_config", "trainer_args",
               "resume_from_checkpoint", "gate", "pretrained_model_name_or_path", "single_file_config", "hub_model_id",
               "push_to_hub", "hub_revision", "hub_public", "allow_failed_gate", "report_to",
               "log_images"}  # fmt: skip
    needed = {"train_data_dir", "dataset_name", "pretrained_model_name_or_path", "single_file_config", "mask_from",
              "peft_config", "trainer_args"}  # fmt: skip
    if not os.path.exists(args.pretrained_model_name_or_path):
        private.remove("pretrained_model_name_or_path")
    if public_datasets(args):
        private.remove("dataset_name")
    default = ScriptArguments(pretrained_model_name_or_path=args.pretrained_model_name_or_path)
    default.pretrained_model_name_or_path = ScriptArguments().pretrained_model_name_or_path
    if on_demo_data(args) and args.pretrained_model_name_or_path == "demo":
        private -= {"output_dir"} if not Path(args.output_dir).is_absolute() else set()
    flags = []
    for name, value in dataclasses.asdict(args).items():
        place = name not in ("output_dir", *CHOICES) and without_place(value) != value
        if value == getattr(default, name):
            continue
        if name in private or place:
            flags += [f"--{name} YOUR_{name.upper()}"] if name in needed else []
            continue
        words = [] if value is True else value if isinstance(value, list) else [value]
        flags.append(shlex.join([f"--{name}", *map(str, words)]))
    return " ".join(flags)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
