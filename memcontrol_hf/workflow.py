"""The whole way from a trainer to a card, in the calls that `memcontrol train` makes.

```python
choice = workflow.search(trainer, n_trials=8, learning_rate_range=(1e-2, 1e-1))  # search a mask, choose a run
tuned = workflow.fine_tune(trainer, choice, data["held_out"])  # beside the frozen base and all blocks
report = workflow.save(trainer, choice, tuned, data)  # the adapter, and what was measured
workflow.audit(trainer, report, data)  # attacks on what was saved, and the verdict of the release gate
workflow.write_card(trainer, report, choice)  # plot and card
```
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import optuna
import torch
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset, DatasetDict
from transformers.trainer_utils import BestRun

from .adapter_folder import LORA, PLOT, REPORT, adapter_digests, file_digest
from .audit import AuditSettings, TooFewImages, audit_memorization
from .data import SPLITS
from .encoders import encoder_name
from .evaluation import METRICS
from .images import DEFAULT_FRAMING
from .mitigations import MITIGATIONS, public_mitigations
from .publish.wandb_report import log_images, log_report
from .randomness import Purpose, row_keys
from .report import ALL_ON, DEFAULT_GATE, FROZEN_BASE, SELECTED, MemorizationReport, load_gate
from .report.card import write_card as render_card
from .report.plots import plot_search
from .sampling import denoiser_in_place, generate
from .search import (
    claim_final,
    kept_screening,
    public_study_name,
    rank_runs,
    repeat_runs,
    search_summary,
)
from .search.processes import Processes, reason_in_words
from .search.protocol import HpSpace
from .tracking import start_tracking
from .trainer import MemControlTrainer
from .tuners import MemControlConfig

logger = logging.getLogger(__name__)


@dataclass
class Choice:
    """The hyperparameters of the final fine-tune, and the search that they come from.

    Args:
        hyperparameters (`dict`): `mask` and `learning_rate`, and whatever else the search has searched.
        study (`optuna.Study`, *optional*): the search; `None` when the mask was given.
        trial (`int`, *optional*): number of the chosen trial.
        sampler (`str`): name of the search's sampler.
        seed (`int`, *optional*): random seed of the final fine-tune; that of the trainer's arguments by default.
    """

    hyperparameters: dict[str, Any]
    study: optuna.Study | None = None
    trial: int | None = None
    sampler: str = ""
    seed: int | None = None


@dataclass
class FineTuned:
    """The figures of the three runs that are compared: `"frozen base"`, `"all blocks"` and `"selected mask"`.

    Args:
        figures (`dict[str, dict[str, float]]`): run -> `trainable_parameters`, `trainable_percent`, and all metrics
            against held-out images.
        stopped (`dict[str, int]`): run -> the step at which a mitigation stopped it, if one did.
        failed (`dict[str, str]`): run -> why it has no figures.
        base_weights (`str`): what [`~memcontrol_hf.adapter_checks.base_weights`] says of the frozen base's denoiser.
    """

    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    stopped: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    base_weights: str = ""


# ---- search and choose ----


def search(
    trainer: MemControlTrainer,
    n_trials: int = 20,
    memorization_budget: float | None = None,
    n_finalists: int = 0,
    finalist_repeats: int = 1,
    sampler: str = "tpe",
    trial_timeout: float | None = None,
    study_name: str = "memcontrol",
    gate: str | Path = DEFAULT_GATE,
    **options: Any,
) -> Choice | None:
    """Search the mask and the learning rate, and choose a run of the Pareto front.

    Any number of processes may search one study: exactly one of them is given the choice. The final fine-tune gets a
    seed that the search has not seen.

    Args:
        trainer ([`MemControlTrainer`]): its arguments name the objectives.
        n_trials (`int`): number of finished trials that the study shall hold in the end.
        memorization_budget (`float`, *optional*):
            The worst value of the second objective that is allowed; the knee of the front is chosen without it.
        n_finalists (`int`): number of runs of the front that are repeated with new seeds before one is chosen.
        finalist_repeats (`int`): how often each of them is repeated.
        sampler (`str`): one of [`~memcontrol_hf.search.SAMPLERS`].
        trial_timeout (`float`, *optional*): seconds after which the training of a trial is stopped.
        study_name (`str`): name of the study in its storage.
        gate (`str`):
            Gate file. Without a budget, runs whose membership AUC lies above the gate's limit of
            `membership_auc_loss` are not chosen.
        **options: further ones of [`MemControlTrainer.hyperparameter_search`], but no `compute_objective`.

    Returns:
        [`Choice`]; `None` in a process that leaves the final fine-tune to another one.

    Raises:
        ValueError: as `hyperparameter_search`, and when no run that trained anything can be chosen; before the first
            trial for a `compute_objective`, an `hp_space` without a mask, a number out of its range, and what is no
            gate.
        RuntimeError: when no trial succeeded.
    """
    load_gate(gate)
    for name, value, least in (("n_finalists", n_finalists, 0), ("finalist_repeats", finalist_repeats, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, but is {value}")
    if options.get("compute_objective") is not None:
        raise ValueError(
            "compute_objective is not supported in workflow.search, as gate, budget and report know objectives by "
            "their names: give the trainer's arguments objectives=[...]; or search by "
            "trainer.hyperparameter_search(compute_objective=...), choose a run, and give workflow.fine_tune its "
            "Choice(run.hyperparameters)"
        )
    if (hp_space := options.get("hp_space")) is not None:
        _check_suggests_mask(hp_space)
    runs = trainer.hyperparameter_search(
        n_trials=n_trials,
        sampler=sampler,
        memorization_budget=memorization_budget,
        trial_timeout=trial_timeout,
        study_name=study_name,
        **options,
    )
    if not claim_final(trainer, runs, trial_timeout):
        return None
    run = _choose(trainer, runs, memorization_budget, gate, n_finalists, finalist_repeats)
    unseen = trainer.args.seed + 1  # the search has not seen it
    choice = Choice(run.hyperparameters, run.run_summary, int(run.run_id), sampler, unseen)
    if isinstance(trainer.peft_config, MemControlConfig):
        trainer.peft_config.search = {
            "study_name": public_study_name(study_name),
            "trial": choice.trial,
            "sampler": sampler,
        }
    return choice


def _check_suggests_mask(hp_space: HpSpace) -> None:
    """Raise `ValueError` for a space without a mask, of which it is asked for a trial that is not run."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    suggested: Mapping[str, Any] = {"mask": {}}
    with suppress(Exception):  # as TrialPruned, which the search takes for an outcome of the trial
        suggested = hp_space(optuna.create_study().ask())
    if not isinstance(suggested, Mapping):
        raise ValueError(f"hp_space must return a dictionary of hyperparameters, but returned {suggested!r}")
    if "mask" not in suggested:
        raise ValueError(
            f"hp_space suggests {', '.join(suggested) or 'nothing'} and no mask, which is what is chosen: add "
            "'mask', for all blocks as in {'mask': trainer.search_space.mask(True), ...}"
        )


def within_gate(ranked: Sequence[BestRun], objectives: Sequence[str], gate: str | Path) -> list[BestRun]:
    """The ranked runs that the gate would not fail by the search's own membership AUC; what is left out is said.

    If all would fail, the run with the lowest membership AUC alone.

    Args:
        ranked (list of `BestRun`): runs, the best choice first.
        objectives (list of `str`): names of the search's objectives.
        gate (`str`): gate file.
    """
    limit = load_gate(gate).get("membership_auc_loss", {}).get("max")
    if limit is None or list(objectives[1:]) != ["membership_auc"]:
        return list(ranked)
    within = [run for run in ranked if run.objective[1] <= limit]
    if left_out := [run for run in ranked if run.objective[1] > limit]:
        aucs = ", ".join(f"trial {run.run_id}: {run.objective[1]:.3f}" for run in left_out)
        rest = "" if within else ". No other run is left: the one with the lowest is chosen, and the gate will fail"
        logger.warning(
            f"not chosen, since the membership AUC on the validation images is above the gate's limit {limit:g}: "
            f"{aucs}{rest}. Another limit: --memorization_budget"
        )
    return within or [min(ranked, key=lambda run: run.objective[1])]


def _choose(
    trainer: MemControlTrainer,
    front: BestRun | Sequence[BestRun],
    budget: float | None,
    gate: str | Path,
    n_finalists: int,
    repeats: int,
) -> BestRun:
    """The best run of the front, by the repeats of the first choices if there are several finalists.

    While the repeats of all finalists are over the budget, the next choices are finalists, too.

    Raises:
        ValueError: when no run is within the budget, by the repeats if there are any.
    """

    def ranked(runs: BestRun | Sequence[BestRun]) -> list[BestRun]:
        best_first = rank_runs(runs, budget, front)
        return best_first if budget is not None else within_gate(best_first, trainer.args.objectives, gate)

    choices, repeated = ranked(front), []
    if min(n_finalists, len(choices)) < 2:  # repeats could not change the choice
        return choices[0]
    for first in range(0, len(choices), n_finalists):
        repeated += repeat_runs(trainer, choices[first : first + n_finalists], repeats)
        try:
            return ranked(repeated)[0]
        except ValueError as over_budget:
            if first + n_finalists >= len(choices):
                raise
            logger.warning(f"by the repeats, {over_budget}. Now the next runs of the front are repeated")


# ---- fine-tune beside the baselines ----


def fine_tune(
    trainer: MemControlTrainer,
    choice: Choice,
    held_out: Dataset,
    resume_from_checkpoint: str | None = None,
    study_name: str = "memcontrol",
) -> FineTuned:
    """Measure the frozen base, fine-tune all blocks and the chosen mask on all of the data, and measure both.

    The trainer holds the model of the chosen mask afterwards, and the seed of the choice until the next search.

    Args:
        trainer ([`MemControlTrainer`]): the trainer.
        choice ([`Choice`]): the mask, and the learning rate of both fine-tunes.
        held_out (`Dataset`): columns `image`, `text`; images that neither training nor the search has seen.
        resume_from_checkpoint (`str`, *optional*): checkpoint of the chosen mask's fine-tune to go on with.
        study_name (`str`): group of the runs in trackers.

    Raises:
        ValueError: for a checkpoint of another run; see [`check_resumes`], which costs nothing.
    """
    tuned, save_strategy = FineTuned(), trainer.args.save_strategy
    processes = Processes(trainer.args.world_size)
    masks = {
        FROZEN_BASE: trainer.search_space.mask(False),
        ALL_ON: trainer.search_space.mask(True),
        SELECTED: choice.hyperparameters["mask"],
    }
    for name, mask in masks.items():
        hyperparameters = {**choice.hyperparameters, "mask": mask}
        trainer.apply_hyperparameters(hyperparameters, final_model=True, seed=choice.seed)
        if name == FROZEN_BASE:
            tuned.base_weights = trainer.base_weights
        logger.info(f"{name}: {'fine-tune on all of the data, then ' if any(mask.values()) else ''}held-out figures")
        config = {**hyperparameters, "objectives": list(trainer.args.objectives)}
        start_tracking(trainer, study_name, name, "final", config)
        trainer.args.save_strategy = save_strategy if name == SELECTED else "no"  # checkpoints hold the adapter only
        figures, error = {}, None
        try:
            resume = resume_from_checkpoint if name == SELECTED else None
            figures = fine_tune_and_measure(trainer, held_out, resume)
        except (ValueError, torch.OutOfMemoryError) as raised:
            if name != ALL_ON:
                raise
            error = reason_in_words(raised)
        # It is only compared with, and has the learning rate of another mask: a failure there ends nothing.
        if name == ALL_ON and (error := processes.first_error(error)):
            clear_device_cache(garbage_collection=True)
            tuned.failed[name] = error
            logger.warning(f"{name} cannot be compared with: {error}")
            continue
        tuned.figures[name] = figures
        if any(mask.values()) and trainer.state.global_step < trainer.state.max_steps:
            tuned.stopped[name] = trainer.state.global_step
    return tuned


def check_resumes(trainer: MemControlTrainer, choice: Choice, checkpoint: str) -> None:
    """Raise `ValueError` when a checkpoint is of another choice, or its training was told something else."""
    trainer.apply_hyperparameters(choice.hyperparameters, final_model=True, seed=choice.seed)
    trainer.check_resumes(checkpoint)


def fine_tune_and_measure(
    trainer: MemControlTrainer, held_out: Dataset, resume: str | None = None
) -> dict[str, float]:
    """Train the current mask, if it has a block on, and measure all metrics against the held-out images."""
    if any(trainer.mask.values()):
        trainer.train(resume_from_checkpoint=resume)
    figures = trainer.evaluate(held_out, metrics=list(METRICS))
    return {
        "trainable_parameters": trainer.trainable_parameters,
        "trainable_percent": trainer.trainable_percent,
        **{name.removeprefix("eval_"): value for name, value in figures.items()},
    }


# ---- save, audit, show ----


def save(
    trainer: MemControlTrainer,
    choice: Choice,
    tuned: FineTuned,
    data: DatasetDict,
    base_model: str | None = None,
    encoder: str | None = None,
    canaries: Mapping[str, int] | None = None,
    command: str | None = None,
    card: Mapping[str, Any] | None = None,
) -> MemorizationReport:
    """Save the adapter to the trainer's output folder, with a report of what was measured so far.

    Args:
        trainer ([`MemControlTrainer`]): holds the model of the chosen mask.
        choice ([`Choice`]): the search and its choice.
        tuned ([`FineTuned`]): the figures of the three runs.
        data (`DatasetDict`): `train`, `validation` and `held_out`, of which the report counts the images.
        base_model (`str`, *optional*): published name of the base; the pipeline's own by default.
        encoder (`str`, *optional*): published name of the encoder of `fid` and `amd`.
        canaries (`dict`, *optional*): `canaries` and `canary_repeats`, if some were planted.
        command (`str`, *optional*): the command that repeats all of it, without what names a place or a person.
        card (`dict`, *optional*): what else the card says; see [`MemorizationReport`].
    """
    folder = Path(trainer.args.output_dir)
    for stale in (PLOT, LORA):  # of an earlier run with this folder
        (folder / stale).unlink(missing_ok=True)
    trainer.save_model(str(folder))
    given, chosen = public_mitigations(trainer.args.mitigations), getattr(trainer.peft_config, "singular_values", None)
    sampling = [text for text in given if not MITIGATIONS[text.partition(":")[0]].guards_weights]
    report = MemorizationReport(
        base_model=base_model or trainer.base_model,
        method=trainer.method,
        mask=trainer.mask,
        figures=tuned.figures,
        training={
            "learning_rate": trainer.args.learning_rate,
            "max_steps": trainer.state.max_steps,  # of the arguments, or by their num_train_epochs
            "batch_size": trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps,
            "world_size": trainer.args.world_size,
            "resolution": trainer.args.resolution,
            **({} if trainer.args.framing == DEFAULT_FRAMING else asdict(trainer.args.framing)),
            "seed": trainer.args.seed,
            "mixed_precision": trainer.accelerator.mixed_precision,
            "mitigations": [text for text in given if text not in sampling],
            **({"sampling_mitigations": sampling} if sampling else {}),
            **(canaries or {}),
            **({"base_weights": tuned.base_weights} if tuned.base_weights else {}),
            **({"stopped_at_step": tuned.stopped} if tuned.stopped else {}),
            **({"failed": tuned.failed} if tuned.failed else {}),
            **({"dp_sgd": trainer.privacy} if trainer.privacy else {}),
            **({"singular_values": sum(map(len, chosen.values()))} if chosen else {}),
        },
        images=count_images(trainer, data),
        encoder=encoder or encoder_name(trainer.encoder),
        command=command,
        search=None if choice.study is None else search_summary(choice.study, choice.sampler, trainer.args.objectives),
        screening=None if choice.study is None else kept_screening(choice.study),
        card={"denoiser": trainer.family.denoiser_name, **(card or {})},
        weights=adapter_digests(folder),
    )
    report.to_json(folder / REPORT)
    return report


def audit(
    trainer: MemControlTrainer,
    report: MemorizationReport,
    data: DatasetDict,
    settings: AuditSettings | None = None,
    gate: str | Path = DEFAULT_GATE,
) -> bool:
    """Attack the adapter that was saved, beside its controls, judge it by a release gate, and write the report again.

    Args:
        trainer ([`MemControlTrainer`]): whose pipeline is attacked; it is afterwards as before.
        report ([`MemorizationReport`]): of [`save`]; it gets the audit and the verdict.
        data (`DatasetDict`): `train` and `held_out`, and `canaries` if coins were flipped.
        settings ([`AuditSettings`], *optional*): how much is attacked; images are sampled as the trainer does by
            default.
        gate (`str`): gate file; the package's own by default.

    Returns:
        `bool`: whether the gate has passed. A data set that is too small to be audited does not pass.
    """
    folder, limits = Path(trainer.args.output_dir), load_gate(gate)
    report.gate = {"passed": False, "limits": limits, "failures": ["the audit did not end"]}
    report.to_json(folder / REPORT)  # so that what was measured is kept, whatever becomes of the audit
    try:
        with trainer.adapters.set_aside():  # the bare pipeline: what is attacked is what was saved
            report.audit = audit_memorization(
                data["train"],
                data["held_out"],
                pipeline=trainer.pipeline,
                adapter=folder if any(report.mask.values()) else None,
                encoder=trainer.encoder,
                output_dir=folder,
                settings=settings or _audit_settings(trainer),
                canaries=data.get("canaries"),
                delta=report.training.get("dp_sgd", {}).get("delta", 1e-5),
            ).audit
        report.judge(limits)
    except ValueError as error:  # what was trained is kept, and it does not pass
        logger.error(f"no audit: {error}")
        # a message can hold a path or an id, and the report is published
        said = error if isinstance(error, TooFewImages) else "the log of the training says why"
        report.gate = {"passed": False, "limits": limits, "failures": [f"no audit: {said}"]}
    report.to_json(folder / REPORT)
    return report.gate["passed"]


def _audit_settings(trainer: MemControlTrainer) -> AuditSettings:
    args = trainer.args
    return AuditSettings(
        resolution=args.resolution,
        fit=args.fit,
        background=args.background,
        num_quality_images=args.eval_num_images,
        inference_steps=args.eval_inference_steps,
        guidance_scale=args.eval_guidance_scale,
        batch_size=args.per_device_eval_batch_size,
        seed=args.seed,
    )


def write_card(trainer: MemControlTrainer, report: MemorizationReport, choice: Choice) -> Path:
    """Draw the search, render the card into the output folder, and put the report into the tracker's run.

    Returns:
        `Path`: of the card.
    """
    folder = Path(trainer.args.output_dir)
    if report.search is not None:
        distances = report.audit and report.audit["distances"]
        plot_search(report.search, report.mask, folder / PLOT, choice.trial, distances, report.screening)
        report.weights[PLOT] = file_digest(folder / PLOT)
        report.to_json(folder / REPORT)
    card = render_card(folder)
    log_report(report, folder)
    return card


def show_images(trainer: MemControlTrainer, held_out: Dataset, prompt: str, count: int) -> None:
    """Show images of a prompt in the tracker's run, without those that may be copies of training images.

    Args:
        trainer ([`MemControlTrainer`]): holds the model of the chosen mask.
        held_out (`Dataset`): columns `image`, `text`; real images that nothing was trained on.
        prompt (`str`): a prompt that may be published.
        count (`int`): number of images to generate.
    """
    args = trainer.args
    with denoiser_in_place(trainer.pipeline, trainer.model):
        images = generate(
            trainer.pipeline,
            [prompt] * count,
            row_keys(args.seed, Purpose.TRACKED_IMAGES, range(count)),
            args.resolution,
            args.eval_inference_steps,
            args.eval_guidance_scale,
            args.per_device_eval_batch_size,
        )
    train, others = (data.features(trainer.encoder) for data in (trainer.train_dataset, trainer.encode(held_out)))
    log_images(images, prompt, trainer.encoder(images), train, others)


def count_images(trainer: MemControlTrainer, data: DatasetDict) -> dict[str, int]:
    """Number of rows of each split, and of the different images that they hold."""
    encoded = {name: trainer.encode(images) for name, images in data.items() if name in SPLITS}
    rows = {name: len(images) for name, images in encoded.items()}
    return rows | {f"{name}_different": len(images.distinct) for name, images in encoded.items()}
