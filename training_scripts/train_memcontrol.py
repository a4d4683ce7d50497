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
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from transformers import HfArgumentParser
from transformers import logging as transformers_logging
from transformers.trainer_utils import BestRun, get_last_checkpoint

from memcontrol_hf import (
    MemControlConfig,
    MemControlTrainer,
    MemorizationReport,
    audit_memorization,
    select_run,
)
from memcontrol_hf.adapter_folder import LORA, PLOT, REPORT, adapter_digests
from memcontrol_hf.audit import LEAST_IMAGES
from memcontrol_hf.encoders import encoder_name, load_encoder
from memcontrol_hf.families import family_of
from memcontrol_hf.flags import ScriptArguments, on_demo_data, public_datasets, public_flags
from memcontrol_hf.from_flags import (
    audit_settings,
    check,
    check_own_study,
    dry_run,
    granularity_of,
    load,
    ray_options,
    settings_with_images,
    training_arguments,
)
from memcontrol_hf.mitigations import MITIGATIONS
from memcontrol_hf.publish.hub import GateFailed, PushError, push
from memcontrol_hf.publish.wandb_report import log_images, log_report, prompt_seeds
from memcontrol_hf.report import ALL_ON, DEFAULT_GATE, FROZEN_BASE, SELECTED, load_gate
from memcontrol_hf.report.card import write_card
from memcontrol_hf.report.plots import plot_search
from memcontrol_hf.report.search_summary import search_summary
from memcontrol_hf.sampling import denoiser_in_place, generate
from memcontrol_hf.search import claim_final, known_masks, public_address, repeat_runs
from memcontrol_hf.search.front import rank_runs
from memcontrol_hf.tracking import log_push, run_url, start_tracking
from memcontrol_hf.trainer import METRICS

logger = logging.getLogger("memcontrol_hf.script")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults, and the commands of the docstring as they are."""


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
    if args.log_images:
        show_images(args, trainer, data["held_out"])
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
        plot_search(report.search, report.mask, folder / PLOT, selected, distances)
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


def show_images(args: ScriptArguments, trainer: MemControlTrainer, held_out: Dataset) -> None:
    """Show what the tuned model makes of the validation prompt in the tracker, without what may be a copy."""
    with denoiser_in_place(trainer.pipeline, trainer.model):
        images = generate(
            trainer.pipeline,
            [args.validation_prompt] * args.log_images,
            prompt_seeds(trainer.args.seed, args.log_images),
            args.resolution,
            args.eval_inference_steps,
            args.eval_guidance_scale,
            args.eval_batch_size,
        )
    train, others = (trainer.real_features(data) for data in (trainer.train_dataset, trainer.encode(held_out)))
    log_images(images, args.validation_prompt, trainer.encoder(images), train, others)


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


def count_images(trainer: MemControlTrainer, data: DatasetDict) -> dict[str, int]:
    """Rows of each split, and how many different images they hold."""
    encoded = {name: trainer.encode(split) for name, split in data.items()}
    rows = {name: len(split) for name, split in encoded.items()}
    return rows | {f"{name}_different": len(split.unique) for name, split in encoded.items()}


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
