"""From flags to objects: first all flags are checked; then the pipeline, the images and the trainer are made."""

import copy
import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from peft import LoraConfig, PeftConfig

from .adapter_folder import CONFIG, read_mask
from .audit import LEAST_IMAGES, AuditSettings, cannot_pass, check_attribute, least_images
from .checkpoints import check_whole, newest_whole
from .data import INCLUDED, check_near_duplicates, flip_canaries, images_digest, load_images, plant_canaries
from .demo import demo_dataset
from .dry_run import Stage, audit_stage, figures_stage, load_architecture, plan, stages_table
from .encoders import NEEDS_ENCODER, load_encoder
from .evaluation import METRICS, check_objectives
from .families import DTYPES, QUANTIZATIONS, Family, family_of, load_pipeline
from .flags import SEEN_LATER, ScriptArguments, on_demo_data, settings
from .images import Framing
from .masks import named_granularity
from .mitigations import parse_mitigations
from .public_facts import example_inputs, model_name
from .publish.hub import check_login
from .report import DEFAULT_GATE, load_gate
from .search import (
    check_budget,
    check_n_trials,
    check_prune_at,
    check_study,
    check_study_name,
    known_masks,
    middle_rate,
)
from .search.ray import check_ray
from .search.storage import storage_address
from .trainer import MemControlTrainer
from .training_arguments import MemControlTrainingArguments
from .tuners import MemControlConfig
from .whole_files import check_room, check_writable, read_json

logger = logging.getLogger(__name__)

# The projections of attention layers in denoisers, in CLIP and in T5.
ATTENTION = [*("to_q", "to_k", "to_v", "to_out.0"), *("q_proj", "k_proj", "v_proj", "out_proj"), *("q", "k", "v", "o")]

METHODS: dict[str, tuple[PeftConfig, tuple[float, float]]] = {
    "svdiff": (MemControlConfig(method="svdiff"), (1e-2, 1e-1)),
    "difffit": (MemControlConfig(method="difffit"), (3e-4, 3e-2)),
    "attention": (MemControlConfig(method="weights"), (1e-5, 1e-3)),
    "weights": (MemControlConfig(method="weights"), (1e-5, 1e-3)),
    "norm": (MemControlConfig(method="norm"), (3e-4, 3e-2)),
    "bias": (MemControlConfig(method="bias"), (3e-4, 3e-2)),
    "lora": (LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION), (1e-4, 1e-2)),
}
"""Values of `--method`, each with its PEFT config and the learning rates that are searched. `attention`, the paper's
name, is accepted for `weights`."""


def check(args: ScriptArguments, screens: bool = False) -> tuple[PeftConfig, tuple[float, float], dict | None]:
    """Check all flags before anything is loaded; where the run only `screens`, without those of search and audit.

    Returns:
        The PEFT config, the range of learning rates to search, and the mask of `--mask_from`.

    Raises:
        ValueError: for a wrong flag. The error names the value, what is allowed, and what to do.
    """
    config, rates = _method_and_rates(args)
    if args.encoder is None and not screens:
        raise ValueError(NEEDS_ENCODER)
    load_gate(args.gate or DEFAULT_GATE)
    _check_numbers(args)
    audit_settings(args)
    check_objectives(args.objectives)
    if args.backend == "ray":
        check_ray(ray_options(args).get("num_workers", 1))
    elif args.num_workers is not None:
        raise ValueError(f"--num_workers {args.num_workers} is for --backend ray: give that, too, or neither")
    if args.log_images and args.validation_prompt is None:
        raise ValueError("--log_images shows what the model makes of a --validation_prompt: give one")
    if args.log_images and "wandb" not in args.report_to:
        raise ValueError("--log_images is for --report_to wandb: give that, too, or neither")
    if args.push_to_hub:
        check_login(args.hub_model_id or Path(args.output_dir).resolve().name, args.hub_public)
    if (resume := args.resume_from_checkpoint) not in (None, "latest"):
        if not Path(resume).is_dir():
            raise ValueError(f"--resume_from_checkpoint {resume!r} is no folder: give a checkpoint's, or latest")
        check_whole(resume)
    if args.train_data_dir is not None and not Path(args.train_data_dir).is_dir():
        raise ValueError(f"--train_data_dir {args.train_data_dir!r} is no folder")
    if args.train_data_dir is not None and args.dataset_name != "demo":
        raise ValueError("give --dataset_name or --train_data_dir, not both")
    if args.attribute_column is not None and (on_demo_data(args) or not args.caption_column):
        raise ValueError(f"--attribute_column {args.attribute_column!r} needs images of your own with captions")
    mask = mask_from(args.mask_from) if args.mask_from else None
    if args.n_trials and not screens:
        check_study_name(args.study_name, "--study_name")
        check_own_study(args, settings(args), later=SEEN_LATER)
    return config, rates, mask


def _method_and_rates(args: ScriptArguments) -> tuple[PeftConfig, tuple[float, float]]:
    """The PEFT config, and the range of learning rates to search."""
    if args.peft_config is not None:
        config = peft_config_from(args.peft_config)
        rates = METHODS[config.method][1] if isinstance(config, MemControlConfig) else (1e-5, 1e-3)
    else:
        config, rates = copy.deepcopy(METHODS[args.method])
    if args.learning_rate is None:
        return config, rates
    if args.learning_rate <= 0:
        raise ValueError(f"--learning_rate must be positive, but is {args.learning_rate}")
    return config, (args.learning_rate, args.learning_rate)


def _check_numbers(args: ScriptArguments) -> None:
    """Raise `ValueError` for a number out of its range."""
    if args.n_trials or not args.mask_from:
        check_n_trials(args.n_trials, "--n_trials")
    for flag in ("max_trainable_percent", "trial_timeout"):
        if (value := getattr(args, flag)) is not None and not value > 0:  # NaN is neither
            raise ValueError(f"--{flag} must be positive, but is {value:g}")
    steps = {"max_train_steps": 1, "search_max_steps": 1, "screen_steps": 4, "screen_seeds": 1, "singular_values": 1}
    counts = {"n_finalists": 0, "finalist_repeats": 1, "eval_num_images": 2, "log_images": 0, "checkpointing_steps": 0}
    for flag, least in (counts | steps).items():
        if (value := getattr(args, flag)) is not None and value < least:
            raise ValueError(f"--{flag} must be at least {least}, but is {value}")
    if args.flip_canaries and args.canaries < 2:
        raise ValueError(
            f"--flip_canaries flips coins for --canaries, of which there are {args.canaries}: give 2 or more"
        )
    if args.flip_canaries and args.canary_repeats > 1 and "dp_sgd" in parse_mitigations(args.mitigation):
        raise ValueError(
            f"--flip_canaries with dp_sgd, whose epsilon is of one row, but each canary has {args.canary_repeats} "
            "rows: give --canary_repeats 1"
        )
    check_prune_at(args.prune_at, "--prune_at")
    check_budget(args.memorization_budget, args.objectives, "--memorization_budget")


def peft_config_from(path: str) -> PeftConfig:
    """A PEFT config from a JSON file or an adapter folder."""
    file = Path(path) / CONFIG if Path(path).is_dir() else Path(path)
    try:
        content = read_json(file)
        return PeftConfig.from_peft_type(**content)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--peft_config {path!r} is no PEFT config: {type(error).__name__}: {error}") from None


def mask_from(path: str) -> dict[str, bool]:
    """The mask of `--mask_from`; see [`~memcontrol_hf.adapter_folder.read_mask`]."""
    try:
        return read_mask(path)
    except ValueError as error:
        raise ValueError(f"--mask_from {error}") from None


def settings_with_images(args: ScriptArguments, trainer: MemControlTrainer) -> dict[str, Any]:
    """The settings that a study depends on: flags, and what is known when images are read and the trainer is made."""
    images = images_digest(trainer.train_dataset, trainer.encode(trainer.eval_dataset))
    chosen = getattr(trainer.peft_config, "singular_values_digest", None)
    seen = {"images": images, "world_size": trainer.args.world_size}
    return settings(args) | seen | ({"singular_values": chosen} if chosen else {})


def check_own_study(args: ScriptArguments, made_with: dict[str, Any], later: Sequence[str] = ()) -> None:
    """Raise `ValueError` when this command's study exists already and was made with other settings.

    Args:
        args ([`ScriptArguments`]): flags, which name the storage and the study.
        made_with (`dict`): settings of this command.
        later (list of `str`): names of settings that are not known yet, and are not compared.
    """
    storage = storage_address(args.storage, args.output_dir)
    check_study(storage, args.study_name, made_with, only_study=args.storage is None, ignore=later)


def ray_options(args: ScriptArguments) -> dict[str, int]:
    """The options of the search with `--backend ray`."""
    return {} if args.num_workers is None else {"num_workers": args.num_workers}


def audit_settings(args: ScriptArguments) -> AuditSettings:
    """The settings of the audit."""
    return AuditSettings(
        resolution=args.resolution,
        fit=args.fit,
        background=args.background,
        num_prompts=args.audit_num_prompts,
        images_per_prompt=args.audit_images_per_prompt,
        num_quality_images=args.eval_num_images,
        inference_steps=args.eval_inference_steps,
        guidance_scale=args.eval_guidance_scale,
        embedding_attack=args.embedding_attack,
        near_duplicates=args.near_duplicates,
        batch_size=args.eval_batch_size,
        seed=args.seed,
    )


def load(args: ScriptArguments) -> tuple[Any, DatasetDict]:
    """Load the pipeline and the images, check the resolution and near-duplicates, and plant the canaries."""
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
            args.attribute_column,
        )
        check_attribute(data["train"], data["held_out"])
    counts = ", ".join(f"{len(images)} {name}" for name, images in data.items())
    logger.info(f"{type(pipeline).__name__} {model_name(args)}; images: {counts}")
    check_near_duplicates(data, args.near_duplicates, Framing(args.fit, args.background))
    if args.flip_canaries:
        data["train"], data["canaries"] = flip_canaries(data["train"], args.canaries, args.canary_repeats, args.seed)
        logger.info(f"canaries: {sum(data['canaries'][INCLUDED])} of {args.canaries} are trained on, by their coins")
    else:
        data["train"] = plant_canaries(data["train"], args.canaries, args.canary_repeats, args.seed)
    return pipeline, data


def training_arguments(args: ScriptArguments) -> MemControlTrainingArguments:
    """The training arguments.

    Raises:
        ValueError: for `--trainer_args` that are no JSON object, have an unknown name, or have a flag of their own.
    """
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
        "fit": args.fit,
        "background": args.background,
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
    """The text that `--dry_run` prints: what the run needs, and its stages; see [`~memcontrol_hf.dry_run`]."""
    config, _, _ = check(args)
    optimizer = training_arguments(args).optim
    weight_bytes = DTYPES[args.dtype or "float32"].itemsize
    if args.quantization is not None:
        weight_bytes = QUANTIZATIONS[args.quantization][1]
    pipeline = load_architecture(args.single_file_config or args.pretrained_model_name_or_path, args.revision)
    planned = plan(
        pipeline,
        config,
        granularity_of(args),
        args.text_encoder_blocks,
        resolution=args.resolution,
        batch_size=args.train_batch_size,
        weight_bytes=weight_bytes,
        optimizer_bytes=2 if "8bit" in optimizer else 8,
        low_precision=args.mixed_precision != "no" or args.dtype in ("float16", "bfloat16"),
    )
    stages = stages_table(_stages(args, family_of(pipeline)))
    return "\n\n".join([planned.text(), stages, _what_becomes_of_images(args)])


def _stages(args: ScriptArguments, family: Family) -> list[Stage]:
    """The stages of the run that the flags describe, in their order."""
    a_step = args.train_batch_size * args.gradient_accumulation_steps
    trial_steps = args.search_max_steps or args.max_train_steps
    sampling = (args.eval_num_images, args.eval_inference_steps, args.eval_guidance_scale)
    trial = partial(figures_stage, family, metrics=args.objectives, splits=("training", "validation"))
    trial = partial(trial, sampling=sampling, trained=trial_steps * a_step)
    final = partial(figures_stage, family, metrics=METRICS, splits=("training", "held-out"), sampling=sampling)
    stages = []
    if args.n_trials and args.screen:  # by count of passes, it costs half as much again as its training
        steps = args.screen_steps or trial_steps
        rows, name = steps * a_step, "screening, if it is made"
        stages.append(Stage(name, times=args.screen_seeds, trained=rows, passes=rows // 2))
    if args.n_trials:
        stages.append(trial(name="trials", times=args.n_trials))
    if args.n_trials and args.n_finalists > 1:
        stages.append(trial(name="repeats of trials", times=args.n_finalists * args.finalist_repeats))
    stages.append(final(name="frozen base"))
    stages.append(final(name="fine-tunes: all blocks, and the mask", times=2, trained=args.max_train_steps * a_step))
    return [*stages, audit_stage(family, audit_settings(args))]


def _what_becomes_of_images(args: ScriptArguments) -> str:
    how = "the middle of what is not square" if args.fit == "crop" else "the whole image, between bars"
    return f"images: {args.resolution} x {args.resolution} pixels, {how}; {args.background} under what is transparent"


def granularity_of(args: ScriptArguments) -> str | list[str]:
    """The granularity: a name, or a list of regular expressions."""
    return named_granularity(args.granularity)


def _bytes_of_checkpoints(trainer: MemControlTrainer) -> int:
    """Bytes that the adapter of all blocks and its checkpoints take at most, with two moments of Adam in each."""
    args, count = trainer.args, 0
    if args.save_strategy == "steps":
        steps = args.save_steps if args.save_steps >= 1 else args.save_steps * args.max_steps
        count = min(math.ceil(args.max_steps / steps), args.save_total_limit or args.max_steps)
    return 4 * trainer.trainable_parameters * (1 + 3 * count)


def make_trainer(
    args: ScriptArguments, screens: bool = False
) -> tuple[MemControlTrainer, DatasetDict, tuple[float, float], dict | None]:
    """The trainer, the images, the range of learning rates to search, and the mask of `--mask_from`, all checked.

    A run that only `screens` needs no encoder, and is not checked for a search and an audit.

    Raises:
        ValueError: for a wrong flag, or a model and images that do not fit it. The error names the value, what is
            allowed, and what to do.
    """
    config, rates, mask = check(args, screens)
    trainer_args = training_arguments(args)
    check_writable(args.output_dir)
    pipeline, data = load(args)
    on_hub = args.pretrained_model_name_or_path != "demo" and not Path(args.pretrained_model_name_or_path).exists()
    config.base_model_name_or_path = args.pretrained_model_name_or_path if on_hub else None
    trainer = MemControlTrainer(
        pipeline=pipeline,
        peft_config=config,
        args=trainer_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        search_space=family_of(pipeline).search_space(granularity_of(args), args.text_encoder_blocks),
        mask=mask,
        encoder=load_encoder(args.encoder, trainer_args.device) if args.encoder else None,
    )
    if screens:
        return trainer, data, rates, mask
    check_room(args.output_dir, _bytes_of_checkpoints(trainer), "the adapter with its checkpoints")
    if args.n_trials:
        check_own_study(args, settings_with_images(args, trainer))
    example_inputs(args, trainer)  # a prompt that the pipeline cannot take is found before the search
    _warn_of_few_images(args, {name: len(set(trainer.encode(data[name]).units.values())) for name in LEAST_IMAGES})
    for name, least in LEAST_IMAGES.items():
        if (count := len(trainer.encode(data[name]).distinct)) < least:
            logger.warning(
                f"the {name} split has {count} different images, but the audit needs {least}: there will be no audit, "
                "and the gate will fail"
            )
    return trainer, data, rates, mask


def _warn_of_few_images(args: ScriptArguments, counts: dict[str, int]) -> None:
    """Warn before any training when the gate cannot pass, even for a model that learned nothing."""
    limits = load_gate(args.gate or DEFAULT_GATE)
    if names := cannot_pass(limits, counts["train"], counts["held_out"], args.audit_num_prompts):
        least = least_images(limits, counts["held_out"] / counts["train"])
        unit = "persons" if args.group_column else "images"
        needed = f"about {least[0]} training and {least[1]} held-out {unit}" if least else "another gate"
        logger.warning(
            f"TOO FEW {unit.upper()} TO PASS: with {counts['train']} training and {counts['held_out']} held-out "
            f"{unit} and {args.audit_num_prompts} captions, the gate fails whatever is trained, since the intervals "
            f"of {', '.join(names)} are too wide. It needs {needed}, and as many --audit_num_prompts. The run goes "
            "on, and its verdict will be that the model could not be measured"
        )


def search_options(
    args: ScriptArguments, trainer: MemControlTrainer, rates: tuple[float, float], mask: dict[str, bool] | None
) -> dict[str, Any]:
    """The arguments of [`~memcontrol_hf.workflow.search`]."""
    return {
        "n_trials": args.n_trials,
        "learning_rate_range": rates,
        "sampler": args.sampler,
        "storage": args.storage,
        "study_name": args.study_name,
        "settings": settings_with_images(args, trainer),
        "enqueue": known_masks(trainer.search_space, *rates, [mask] if mask else []),
        "screen": None if args.screen else False,
        "screen_steps": args.screen_steps,
        "screen_seeds": args.screen_seeds,
        "memorization_budget": args.memorization_budget,
        "max_trainable_percent": args.max_trainable_percent,
        "trial_timeout": args.trial_timeout,
        "prune_at": args.prune_at,
        "backend": args.backend,
        "n_finalists": args.n_finalists,
        "finalist_repeats": args.finalist_repeats,
        "gate": args.gate or DEFAULT_GATE,
        **ray_options(args),
    }


def fixed_rate(args: ScriptArguments, rates: tuple[float, float]) -> float:
    """The learning rate without a search: `--learning_rate`, or the geometric mean of the method's range."""
    return args.learning_rate or middle_rate(*rates)


def checkpoint_to_resume(args: ScriptArguments) -> str | None:
    """The checkpoint of the final fine-tune from which `--resume_from_checkpoint` goes on, if there is one."""
    if args.resume_from_checkpoint != "latest":
        return args.resume_from_checkpoint
    return newest_whole(args.output_dir)
