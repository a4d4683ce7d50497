"""A `transformers.Trainer` that fine-tunes the selected blocks of a denoiser and measures the result.

The loop, checkpoints, resuming, mixed precision, distribution, schedulers and trackers are the Trainer's own. All this
is one file, because the Trainer is extended by overriding its methods in one class.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftType
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    BestRun,
    PredictionOutput,
    TrainOutput,
    rotate_checkpoints,
)

from .adapter_checks import base_weights
from .adapter_folder import REPORT
from .adapters import MaskedAdapters, merged
from .checkpoints import RUN, check_parameters, check_whole, differing_facts, newest_whole, run_facts
from .data import EncodedImages, warn_of_crops, weights_digest
from .demo import DEMO_PIPELINE
from .encoders import Encoder, load_encoder, named_encoder
from .evaluation import METRICS, Evaluator, check_objectives
from .families import Condition, Family, family_of
from .mitigations import PrivateTraining, parse_mitigations
from .mitigations.base import overrides
from .model_walks import restore_walks, shorten_walks, trained_parameters, walks_are_short
from .publish.hub import push
from .randomness import Purpose, seeded_generator
from .report import MemorizationReport
from .report.card import write_card
from .screening import Screening
from .screening.run import check_screening, run_screening
from .screening.settings import ScreeningSettings
from .search import check_options, run_search
from .search.ray import run_search_on_ray
from .search_space import SearchSpace
from .tracking import adjust_trackers
from .training_arguments import MemControlTrainingArguments, check_trainer_arguments, is_place
from .training_loss import TrainingLoss
from .tuners import MemControlConfig, quantized_type
from .whole_files import move_whole, write_whole

if TYPE_CHECKING:
    import optuna
    from diffusers import DiffusionPipeline


def check_backend(backend: str) -> None:
    """Raise `ValueError` for a search backend that is neither `optuna` nor `ray`."""
    if backend not in ("optuna", "ray"):
        raise ValueError(f"backend {backend!r} is not supported: use 'optuna' or 'ray'")


class MemControlTrainer(Trainer):
    """Fine-tunes the blocks of a pipeline that a mask selects, and searches the mask.

    Args:
        pipeline (`DiffusionPipeline`): pipeline to tune. Its own weights do not change; adapters are added to the
            denoiser, and to each text encoder in which the mask selects a block.
        peft_config (`PeftConfig`): PEFT method with `target_modules`, which the mask restricts.
        args ([`MemControlTrainingArguments`]): arguments of transformers and of this package.
        train_dataset (`Dataset`): training images: columns `image`, `text`.
        eval_dataset (`Dataset`): validation images, which the search's rewards may use: columns `image`, `text`.
        search_space ([`SearchSpace`], *optional*): blocks that a mask switches; the denoiser's attention blocks by
            default. [`~memcontrol_hf.families.Family.search_space`] can add the blocks of text encoders.
        mask (`dict[str, bool]`, *optional*): mask of the first fine-tune; every block is on by default.
        encoder (`str` or `nn.Module`, *optional*): image encoder of `fid` and `amd`; see
            [`~memcontrol_hf.encoders.load_encoder`]. It can be left out for the demo's images, which the demo's
            encoder judges then, and while neither `fid` nor `amd` is measured.
        callbacks (list of `TrainerCallback`, *optional*): callbacks, as in transformers.
        optimizer_cls_and_kwargs (tuple, *optional*): class of the optimizer and its keyword arguments, as in
            transformers, but without `lr`: the learning rate is that of `args` or of a trial.
        **others: not supported; an argument of transformers' Trainer gets an error that names the way instead.

    Raises:
        ValueError: before anything is trained, when the resolution, the objectives, the mitigations, the mask or the
            PEFT method do not fit the model or the images, and for an argument that is not supported.
    """

    def __init__(
        self,
        pipeline: "DiffusionPipeline",
        peft_config: PeftConfig,
        args: MemControlTrainingArguments,
        train_dataset: Dataset,
        eval_dataset: Dataset,
        search_space: SearchSpace | None = None,
        mask: Mapping[str, bool] | None = None,
        encoder: str | nn.Module | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        **others: Any,
    ):
        check_trainer_arguments(args, optimizer_cls_and_kwargs, others)
        _check_one_dataset(train_dataset, eval_dataset)
        self.family = family_of(pipeline)
        _check_fits(self.family, args, peft_config)
        self._mitigations = parse_mitigations(args.mitigations)
        self.pipeline = pipeline
        self.base_model = _published_name(pipeline)
        self.denoiser: nn.Module = self.family.denoiser.requires_grad_(False)
        self.denoiser.register_to_config(_name_or_path=self.base_model)  # trackers get the denoiser's config
        self.peft_config = peft_config
        self.search_space = (search_space or self.family.search_space()).narrowed(peft_config)
        for mitigation in self._mitigations.values():
            mitigation.check(
                self.family, *_images_of(train_dataset), args, tunes_text=bool(self.search_space.text_encoders)
            )
        self.adapters = MaskedAdapters(self.family, self.search_space, peft_config)
        self.mask = self.search_space.check(self.search_space.mask(True) if mask is None else mask)
        self._encoder: str | nn.Module | Encoder | None = encoder
        measured = {name for mitigation in self._mitigations.values() for name in mitigation.measured}
        if measured and eval_dataset is None:
            raise ValueError(f"a mitigation measures {', '.join(sorted(measured))} with validation images: give them")
        if {"fid", "amd"} & (measured | {*args.objectives}):
            self._encoder = named_encoder(encoder, *_images_of(train_dataset, eval_dataset))
        self._given_optimizer = optimizer_cls_and_kwargs
        self._aside: Path | None = None  # where a checkpoint is written at this moment
        self._replaced: dict[str, Any] = {}  # values of the arguments before `apply_hyperparameters`
        self._encoded: dict[str, EncodedImages] = {}  # key: fingerprint of the images
        self._trial_rows: dict[tuple[int, float], EncodedImages] = {}  # key: seed and share
        if args.gradient_checkpointing or args.activation_checkpointing:
            self.denoiser.enable_gradient_checkpointing()  # diffusers' switch differs from the Trainer's
            args.gradient_checkpointing = args.activation_checkpointing = False
        for part in self.family.encoder_modules:
            part.requires_grad_(False).to(args.device)
        self._digests = [weights_digest(part) for part in self.family.encoder_modules]
        self._base_null = self.family.null_condition()
        self._resolution, self._framing = (
            args.resolution,
            args.framing,
        )  # `encode` needs both before `self.args` is set
        if isinstance(train_dataset, Dataset):
            warn_of_crops(train_dataset, self._framing, "training")
        train_dataset = self._full_train_dataset = self.encode(train_dataset)
        super().__init__(
            args=args,
            model_init=self._init_model,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=partial(_collate, names=("latents", *self.family.conditions, "row")),
            callbacks=callbacks,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "FSDP and DeepSpeed shard the denoiser, which cannot be sampled and saved here: use several processes "
                "without (accelerate launch --multi_gpu), or --quantization, which makes it small"
            )
        adjust_trackers(self)
        self.loss_is_scaled_for_ga = False
        self._loss = TrainingLoss(
            self.family, [*self._mitigations.values()], train_dataset.images, train_dataset.numbers
        )
        self._private: PrivateTraining | None = None
        if self.adapters.adapted and (private := self._private_training()):
            inputs = self._prepare_inputs(self.data_collator(self.train_dataset.__getitems__([0])))
            private.check_layers(self.model, self.family.losses, self._draws(inputs))
        for mitigation in self._mitigations.values():
            if callback := mitigation.callback(self.evaluate_mid_training):
                self.add_callback(callback)
        given = callbacks or []
        self._own_callbacks = [c for c in self.callback_handler.callbacks if c not in given and type(c) not in given]

    # ---- the model ----

    def _init_model(self) -> nn.Module:
        """The model with new adapters for the current mask. With all blocks off, it is the frozen denoiser alone."""
        return self.adapters.put_on(self.mask)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in transformers. A class of the user gets the learning rate of the arguments."""
        if self._given_optimizer is not None:
            optimizer, options = self._given_optimizer
            self.optimizer_cls_and_kwargs = optimizer, {**options, "lr": self.args.learning_rate}
        return super().create_optimizer(model)

    def _null(self) -> Condition | None:
        """The null condition, encoded by the present text encoders."""
        return self.family.null_condition() if self.adapters.tunes_text else self._base_null

    def set_mask(self, mask: Mapping[str, bool]) -> None:
        """Discard the trained adapters, and add new ones to the blocks that `mask` selects."""
        self.mask = self.search_space.check(mask)
        self.model = self.model_wrapped = self._init_model()
        self._move_model_to_device(self.model, self.args.device)

    @property
    def method(self) -> str:
        """The name of the PEFT method: `svdiff`, `lora`, ..."""
        config = self.peft_config
        return config.method if isinstance(config, MemControlConfig) else config.peft_type.value.lower()

    @property
    def trainable_parameters(self) -> int:
        """Number of parameters that the current mask trains."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def trainable_percent(self) -> float:
        """Trained parameters in percent of all parameters of the denoiser and the tuned text encoders."""
        return 100 * self.trainable_parameters / self.adapters.base_size

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """As in transformers.

        Raises:
            ValueError: for a mask that selects no block, for a checkpoint that is damaged or of another run, and when
                a trained parameter is not finite before a checkpoint is written or in the end.
        """
        if not any(self.mask.values()):
            raise ValueError("the mask selects no block: the frozen base can be evaluated, but not trained")
        latest = resume_from_checkpoint is True
        checkpoint = newest_whole(self.args.output_dir) if latest else resume_from_checkpoint
        if latest and not checkpoint:
            raise ValueError(
                f"there is no whole checkpoint in {self.args.output_dir}: leave resume_from_checkpoint out"
            )
        if checkpoint:
            self.check_resumes(checkpoint)
        for mitigation in self._mitigations.values():
            mitigation.reset()
        self._private = self._private_training()
        if self._private is not None and checkpoint:
            self._private.load(checkpoint)
        # A run may have its own batch size, and `auto_find_batch_size` may have made that of an earlier run smaller.
        self._train_batch_size = self.args.train_batch_size
        if checkpoint and (state := self._finished(checkpoint)):
            self._load_from_checkpoint(checkpoint)  # the Trainer would train further
            self.state = state
            if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
                self._load_best_model()
            return TrainOutput(state.global_step, 0.0, {})
        if self.args.save_strategy != "no":
            _ = self.base_weights  # which each checkpoint holds; adapters are taken off before the training alone
        try:
            output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        finally:
            for model in (self.model, self.model_wrapped):
                restore_walks(model)
        self._check_finite()
        if self._private is not None:
            self._private.check_moved()
        return output

    def check_resumes(self, checkpoint: str) -> None:
        """Raise `ValueError` for a checkpoint that is damaged, or of a training that was told something else."""
        check_whole(checkpoint)
        differing = self.adapters.differences(Path(checkpoint))
        file = Path(checkpoint) / SCHEDULER_NAME
        rates = torch.load(file, map_location="cpu", weights_only=True).get("base_lrs", []) if file.exists() else []
        if rates and not math.isclose(rates[0], self.args.learning_rate):
            differing.append(f"the learning rate was {rates[0]:g} and is {self.args.learning_rate:g}")
        differing += differing_facts(checkpoint, self._run_facts(), self.args.max_steps)
        if not differing and (private := self._private_training()):
            private.load(checkpoint)  # refuses a checkpoint of other noise
        if differing:
            raise ValueError(
                f"the checkpoint {checkpoint} is of another run: {'; '.join(sorted(differing))}. Use the same "
                "settings to go on with it, delete it, or give another output_dir (--output_dir)"
            )

    def _run_facts(self) -> dict[str, Any]:
        """What this training is told that decides its result."""
        return run_facts(
            self.args,
            self.train_dataset,
            self.base_weights,
            self.family.noise.scheduler.config,
            self.accelerator.mixed_precision,
            self._given_optimizer,
        )

    @cached_property
    def base_weights(self) -> str:
        """What tells the frozen base from others; see [`~memcontrol_hf.adapter_checks.base_weights`]."""
        with self.adapters.set_aside():
            return base_weights(self.denoiser)

    def _finished(self, checkpoint: str) -> TrainerState | None:
        """The state in a checkpoint if its run made all steps or was stopped early, and `None` otherwise."""
        file = Path(checkpoint) / TRAINER_STATE_NAME
        if not file.exists():
            return None
        state = TrainerState.load_from_json(str(file))
        stopped = any(mitigation.stopped(state) for mitigation in self._mitigations.values())
        done = 0 < self.args.max_steps <= state.global_step or stopped
        return state if done else None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The mean denoising loss of a batch; see [`~memcontrol_hf.training_loss.TrainingLoss`]."""
        return self._loss(model, self._draws(inputs), self._null).mean()

    def _draws(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        """The random draws of this step for a batch: the arguments of [`~memcontrol_hf.families.Family.losses`]."""
        # With DP-SGD the whole training is one epoch, in which a row can be drawn many times.
        turn = int(self.state.epoch or 0) if self._private is None else self.state.global_step
        return self._loss.draw(
            inputs,
            self.args.seed,
            turn,
            self._null,
            self.args.caption_dropout,
            self.args.snr_gamma,
            encode_captions=self.adapters.tunes_text,
        )

    # ---- differentially private training ----

    @property
    def privacy(self) -> dict[str, Any] | None:
        """Epsilon that the last training with `dp_sgd` spent, with its settings; `None` without `dp_sgd`."""
        return None if self._private is None else self._private.report()

    def _private_training(self) -> PrivateTraining | None:
        """The object by which a mitigation replaces batches and gradients of this training, if one does."""
        args, rows = self.args, len(self.train_dataset)
        size = args.train_batch_size * args.gradient_accumulation_steps
        sizes = (rows, size, args.gradient_accumulation_steps, args.max_steps)
        candidates = (mitigation.private_training(*sizes) for mitigation in self._mitigations.values())
        return next((private for private in candidates if private is not None), None)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """As in transformers. With the mitigation `dp_sgd`, all steps are one epoch, and each step draws its rows."""
        if self._private is None:
            return super().get_train_dataloader()
        loader = torch.utils.data.DataLoader(
            self.train_dataset,
            batch_sampler=self._private,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """As in transformers. With the mitigation `dp_sgd`, the gradient of each row is computed by itself."""
        if not walks_are_short(model):
            shorten_walks(model)
        if self._private is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        batch = self._draws(self._prepare_inputs(inputs)) if inputs else {}
        with self.compute_loss_context_manager():
            return self._private.backward(
                model, self.family.losses, batch, self.state.global_step, last=self.accelerator.sync_gradients
            )

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        """As in transformers, without a visit to every module: only trained parameters have gradients."""
        return self.accelerator.clip_grad_norm_(trained_parameters(model), self.args.max_grad_norm)

    def _check_finite(self) -> None:
        """Raise `ValueError` when a trained parameter is not finite: nothing that is saved may hold such a value."""
        check_parameters(self.model, self.state.global_step, self.args.learning_rate)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in transformers, but a checkpoint has its name only when it is whole and on the disk."""
        self._check_finite()
        writes, state, folder = self.args.should_save, self.state, Path(self._get_output_dir(trial))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        unfinished = folder / ".unfinished" / checkpoint.name
        if writes:
            shutil.rmtree(unfinished.parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._aside = unfinished.parent
        try:
            super()._save_checkpoint(model, trial)
            if state.best_model_checkpoint == str(unfinished):
                state.best_model_checkpoint = str(checkpoint)
                if writes:
                    state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
            if writes:
                write_whole(unfinished / RUN, json.dumps(self._run_facts(), indent=1) + "\n")
            if self._private is not None and writes:
                self._private.save(unfinished)
            self.accelerator.wait_for_everyone()  # each process saves its own random state
            if writes:
                move_whole(unfinished, checkpoint)
        finally:
            self._aside = None
            if writes:
                shutil.rmtree(unfinished.parent, ignore_errors=True)
        if writes:
            rotate_checkpoints(str(folder), self.args.save_total_limit, state.best_model_checkpoint, use_mtime=True)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in transformers. Counts of the mitigations since the last log, such as `dropped_samples`, are added."""
        if "loss" in logs or "train_loss" in logs:
            for mitigation in self._mitigations.values():
                for name, count in mitigation.counts().items():
                    logs[name] = int(self.accelerator.reduce(torch.as_tensor(count, device=self.args.device), "sum"))
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:  # the Trainer's own method would pickle the arguments
            self.adapters.save(Path(output_dir or self.args.output_dir), state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.adapters.tunes_text:
            self.adapters.load(Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self.adapters.tunes_text:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    # ---- publishing ----

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        allow_failed_gate: bool = False,
    ) -> str | None:
        """Save the adapter and upload it with its report and card: [`~memcontrol_hf.publish.hub.push`].

        If the output folder holds no report, the card says that nothing was measured.

        Args:
            commit_message, blocking, token, revision, private: arguments as in transformers, except that the
                repository is private by default, a push always blocks, and the token is that of the Hub login.
            allow_failed_gate (`bool`): whether to push although the release gate failed; the card says so first.

        Returns:
            `str`: address of the commit; `None` on other processes than the first.

        Raises:
            ValueError: for a token, and for a report of another mask than the trainer's.
        """
        if token is not None or self.args.hub_token is not None:
            raise ValueError("give no token: log in with `hf auth login`, or set HF_TOKEN")
        if self.is_world_process_zero():
            self._check_report()  # before the adapter that an earlier report is of is written over
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        return push(
            self.args.output_dir,
            self.args.hub_model_id,
            revision=revision or self.args.hub_revision,
            public=private is False or (private is None and self.args.hub_private_repo is False),
            allow_failed_gate=allow_failed_gate,
            **({"commit_message": commit_message} if commit_message else {}),
        )

    def _check_report(self) -> None:
        """Write a report in which nothing was measured, if there is none; `ValueError` for one of another mask."""
        file = Path(self.args.output_dir) / REPORT
        if not file.exists():
            card = {"denoiser": self.family.denoiser_name}
            MemorizationReport(self.base_model, self.method, mask=self.mask, card=card).to_json(file)
        elif MemorizationReport.from_json(file).mask != self.mask:
            raise ValueError(f"{file} is the report of another mask: measure this model, or use another output_dir")

    def create_model_card(self, **texts: Any) -> None:
        """Render the card from the report in the output folder, as `memcontrol card` does.

        Raises:
            ValueError: for texts, which transformers would write into the card, and for a report of another mask.
        """
        if texts:
            raise ValueError(f"the card is rendered from the report, so it cannot be given {', '.join(sorted(texts))}")
        if self.is_world_process_zero():
            self._check_report()
            write_card(self.args.output_dir)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Does nothing: the push itself makes the repository, private by default."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Does nothing: a checkpoint is not measured yet, and it holds files that may not be published."""

    # ---- measuring ----

    def encode(self, images: Dataset | EncodedImages) -> EncodedImages:
        """Images with their latents and conditions, which the base model's encoders compute once for each dataset."""
        if isinstance(images, EncodedImages):
            return images
        key = images._fingerprint
        if key not in self._encoded:
            with self.adapters.text_encoders_disabled():
                encoded = EncodedImages(images, self._resolution, framing=self._framing)
                self._encoded[key] = encoded.encoded_by(self.family, self._digests)
        return self._encoded[key]

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        metrics: list[str] | None = None,
    ) -> dict[str, float]:
        """Measure the present model.

        Args:
            eval_dataset (`Dataset`, *optional*): images that the training images are compared with, columns `image`
                and `text`. The default is the validation images; final figures need the held-out images.
            ignore_keys (list of `str`, *optional*): argument of transformers, not used here.
            metric_key_prefix (`str`): prefix of the figures' names.
            metrics (list of `str`, *optional*): names in [`~memcontrol_hf.evaluation.METRICS`]; the objectives by
                default.

        Returns:
            `dict[str, float]`: the figures, some with a further figure to compare them with. `loss` is of
            `eval_dataset`, `loss_train` of the training images, each once. `loss_t100` and the like are the loss of
            `eval_dataset` at each fixed timestep: a mean over timesteps hides where a model learns. `membership_auc`
            has the ends `membership_auc_low` and `membership_auc_high` of its 95 % interval. `noise_norm` is of the
            training images, `noise_norm_held_out` of `eval_dataset`; both are left out for an unconditional model.
            `fid` compares images generated from the captions of `eval_dataset` with its images. `amd` compares images
            generated from training captions with the training images, and `amd_held_out` with those of `eval_dataset`.
        """
        wanted = self.args.objectives if metrics is None else metrics
        check_objectives(wanted)
        _check_one_dataset(eval_dataset)
        if (given := self.eval_dataset if eval_dataset is None else eval_dataset) is None:
            raise ValueError("there are no images to measure with: give an eval_dataset")
        others = self.encode(given)
        measured = self.measure(wanted, self.train_dataset, others)
        figures = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.log(dict(figures))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Not supported: `NotImplementedError` says what to call instead."""
        raise NotImplementedError(
            "a denoiser predicts noise, which is no prediction for a data set: measure the model with "
            "evaluate(dataset), or sample images with the pipeline"
        )

    evaluation_loop = prediction_step = predict

    def measure(self, wanted: Sequence[str], train: EncodedImages, others: EncodedImages) -> dict[str, float]:
        """Figures of the model as it is on some training images and others: [`Evaluator.measure`]."""
        training, _ = self.model.training, self.model.eval()
        with torch.no_grad(), self.accelerator.autocast(), merged(self.adapters.adapted.values()):
            figures = self.evaluator().measure(wanted, train, others, self.args.eval_num_images, lambda: self.encoder)
        self.model.train(training)
        return figures

    def evaluate_mid_training(self, metrics: list[str]) -> dict[str, float]:
        """Like [`evaluate`], for a callback in the middle of a training: a log or evaluation that is due stays due."""
        due = self.control.should_log, self.control.should_evaluate
        figures = self.evaluate(metrics=metrics)
        self.control.should_log, self.control.should_evaluate = due
        return figures

    def evaluator(self) -> Evaluator:
        """The engine that measures the present model, with the settings of the training arguments."""
        args = self.args
        return Evaluator(
            family=self.family,
            denoiser=self.model,
            resolution=args.resolution,
            seed=args.seed,
            batch_size=args.per_device_eval_batch_size,
            num_timesteps=args.eval_num_timesteps,
            inference_steps=args.eval_inference_steps,
            guidance_scale=args.eval_guidance_scale,
            null=self._null(),
            encode_captions=self.adapters.tunes_text,
            mitigations=self._mitigations.values(),
            training_images=self.train_dataset,
            rank=args.process_index,
            world_size=args.world_size,
        )

    @property
    def encoder(self) -> Encoder:
        """The image encoder, loaded when it is first needed."""
        if not isinstance(self._encoder, Encoder):
            named = named_encoder(self._encoder, *_images_of(self._full_train_dataset, self.eval_dataset))
            self._encoder = load_encoder(named, self.args.device)
        return self._encoder

    # ---- screening ----

    def screen(
        self,
        steps: int | None = None,
        every: int = 4,
        learning_rate: float | None = None,
        seeds: int = 1,
        singular_values: bool = False,
    ) -> Screening:
        """Train all blocks together, and read off what each block learns and what it memorizes.

        The run is a training as every other one, with the trainer's optimizer, schedule and mitigations, on
        `train_dataset`; no callback is called, so that early stopping does not end it. Each `every` steps, gradients
        of the loss on training and on validation images say how much each block's update lowers them; see
        [`~memcontrol_hf.screening.probes.BlockProbes`]. Nothing is saved: by count of passes a screening costs half as
        much again as its training, and is cheap enough to repeat. The trainer is afterwards as before.

        Args:
            steps (`int`, *optional*):
                Number of steps of each run; `search_max_steps` or else `max_steps` of the arguments by default.
            every (`int`):
                Number of steps for each probe.
            learning_rate (`float`, *optional*):
                Learning rate of the runs; that of the arguments by default.
            seeds (`int`):
                Number of runs, each with a random seed of its own, over which the figures are averaged.
            singular_values (`bool`):
                SV-DIFF only: tell the figures of each single singular value, too, at the same price; see
                [`Screening.cheapest_singular_values`].

        Returns:
            [`~memcontrol_hf.screening.Screening`]: the figures of each block.

        Raises:
            ValueError: before any work, for settings out of range, a search space of fewer than two blocks, a trainer
                without validation images, `singular_values` of another method, and `dp_sgd`, whose guarantee would not
                cover the screening; and in the run, when a loss is not finite.
        """
        settings = self._screening_settings(steps, every, learning_rate, seeds)
        self._check_screening(singular_values)
        return run_screening(self, settings, singular_values)

    def obstacle_to_screening(self, steps: int | None = None, singular_values: bool = False) -> str | None:
        """Why [`screen`] would refuse so many steps, with what to do; `None` when it would not."""
        try:
            self._screening_settings(steps)
            self._check_screening(singular_values)
        except ValueError as error:
            return str(error)
        return None

    def _screening_settings(
        self, steps: int | None, every: int = 4, learning_rate: float | None = None, seeds: int = 1
    ) -> ScreeningSettings:
        args = self.args
        return ScreeningSettings(
            steps=(args.search_max_steps or args.max_steps) if steps is None else steps,
            every=every,
            learning_rate=args.learning_rate if learning_rate is None else learning_rate,
            seeds=seeds,
            seed=args.seed,
        )

    def _check_screening(self, singular_values: bool = False) -> None:
        """Raise `ValueError` for what a screening does not go with."""
        check_screening(self, singular_values)
        for name, mitigation in self._mitigations.items():
            if overrides(mitigation, "private_training"):
                raise ValueError(
                    f"a screening looks at training images outside of the account of {name}, whose guarantee would "
                    "not hold: screen without it, on images that need no guarantee, or leave the screening out"
                )

    # ---- the search ----

    def hyperparameter_search(
        self,
        hp_space: "Callable[[optuna.Trial], dict[str, Any]] | None" = None,
        compute_objective: Callable[[dict[str, float]], list[float]] | None = None,
        n_trials: int = 20,
        direction: str | list[str] | None = None,
        backend: str = "optuna",
        hp_name: "Callable[[optuna.Trial], str] | None" = None,
        **kwargs: Any,
    ) -> BestRun | list[BestRun]:
        """Search the mask and the learning rate.

        Args:
            hp_space (`Callable`, *optional*):
                Function from a trial to a dictionary of hyperparameters: `mask`, and fields of the training arguments.
                By default the mask over all blocks, and `learning_rate` within `learning_rate_range`.
            compute_objective (`Callable`, *optional*):
                Function from the figures of [`evaluate`] to the objectives; `args.objectives` by default.
            n_trials (`int`):
                Number of finished trials in the study when the search ends; an interrupted search goes on. A trial
                that repeats another or was killed does not count.
            direction (`str` or list of `str`, *optional*):
                `"minimize"` or `"maximize"` for each objective; by default the better direction of each metric.
            backend (`str`):
                `"optuna"`: this process runs the trials. `"ray"`: `num_workers` processes on a Ray cluster run them,
                with the `resources_per_trial` of transformers; see [`~memcontrol_hf.search.ray.run_search_on_ray`].
                The study and the result are the same.
            hp_name (`Callable`, *optional*):
                Function from a trial to the name of its run in trackers.
            **kwargs:
                Further settings, such as `storage` and `prune_at`: see [`~memcontrol_hf.search.SearchSettings`].

        Returns:
            [`~transformers.trainer_utils.BestRun`] or a list of them: the best run, or with several objectives the
            runs of the Pareto front. `run_summary` holds the Optuna study. [`apply_hyperparameters`] applies a run.
        """
        check_backend(backend)
        check_options(kwargs)
        if self.eval_dataset is None:
            raise ValueError("a search measures each trial with validation images: give the trainer an eval_dataset")
        if direction is None:
            direction = [METRICS[name] for name in self.args.objectives]
        self._reset_arguments()  # of a final fine-tune, whose seed is another one
        search = run_search_on_ray if backend == "ray" else run_search
        return search(self, hp_space, compute_objective, n_trials, direction, hp_name, **kwargs)

    def recipe(self) -> dict[str, Any]:
        """The arguments that build this trainer again in another process; all of them can be pickled.

        A call removes the adapters from the pipeline. Callbacks that the Trainer adds itself are left out.
        """
        mask = dict(self.mask)
        self.set_mask(self.search_space.mask(False))
        args = {f.name: getattr(self.args, f.name) for f in fields(self.args) if f.init}
        args |= {"output_dir": str(Path(self.args.output_dir).resolve()), "disable_tqdm": True}
        return {
            "pipeline": self.pipeline,
            "peft_config": self.peft_config,
            "args": (type(self.args), args),  # made in the other process, since they hold its device
            "train_dataset": self._full_train_dataset,
            "eval_dataset": self.encode(self.eval_dataset),
            "search_space": self.search_space,
            "mask": mask,
            "encoder": self._encoder,
            "optimizer_cls_and_kwargs": self._given_optimizer,
            "callbacks": [c for c in self.callback_handler.callbacks if c not in self._own_callbacks],
        }

    def train_and_evaluate(self) -> dict[str, float]:
        """Run one trial: train with the current mask and arguments, and measure with the validation images."""
        full, args = self._full_train_dataset, self.args
        saved = {name: getattr(args, name) for name in ("max_steps", "save_strategy", "eval_strategy")}
        self.train_dataset = self._rows_of_a_trial()
        args.max_steps = args.search_max_steps or args.max_steps
        args.save_strategy = args.eval_strategy = "no"
        try:
            if any(self.mask.values()):
                self.train()
            return self.evaluate()
        finally:
            self.train_dataset = full
            for name, value in saved.items():
                setattr(args, name, value)

    def _rows_of_a_trial(self) -> EncodedImages:
        """The training rows of a trial: a share of all rows, drawn by the seed."""
        full, key = self._full_train_dataset, (self.args.seed, self.args.search_fraction)
        count = max(1, math.ceil(self.args.search_fraction * len(full)))
        if count == len(full):
            return full
        if key not in self._trial_rows:  # so that all trials share what is computed once for the rows
            rows = torch.randperm(len(full), generator=seeded_generator(self.args.seed, Purpose.TRIAL_ROWS))[:count]
            self._trial_rows[key] = full.select(sorted(rows.tolist()))
        return self._trial_rows[key]

    def apply_hyperparameters(
        self, hyperparameters: Mapping[str, Any], final_model: bool = False, seed: int | None = None
    ) -> None:
        """Set the mask and the arguments of a run. Arguments that only an earlier call has set are reset.

        Args:
            hyperparameters (`dict[str, Any]`): `mask`, and fields of the training arguments.
            final_model (`bool`): whether the next `train()` is the final fine-tune, on all training rows.
            seed (`int`, *optional*): random seed of the run; that of the arguments by default.

        Raises:
            ValueError: for a name that is neither `mask` nor an argument that a run can change, and for a value that
                the argument cannot have; see [`MemControlTrainingArguments.replaced`].
        """
        self._reset_arguments()
        given = {name: value for name, value in hyperparameters.items() if name != "mask"}
        new = self.args.replaced(given)
        _check_fits(self.family, new, self.peft_config)
        values = {name: getattr(new, name) for name in given} | ({} if seed is None else {"seed": seed})
        self._replaced = {name: getattr(self.args, name) for name in values}
        for name, value in values.items():
            setattr(self.args, name, value)
        if final_model:
            self.train_dataset = self._full_train_dataset
        self.set_mask(hyperparameters.get("mask", self.mask))

    def _reset_arguments(self) -> None:
        """Give the arguments that the last run has set the values that they had before."""
        for name, value in self._replaced.items():
            setattr(self.args, name, value)
        self._replaced = {}


def _check_fits(family: Family, args: MemControlTrainingArguments, peft_config: PeftConfig) -> None:
    """Raise `ValueError` for arguments and a PEFT method that do not go with a model."""
    family.check_resolution(args.resolution)
    family.noise.check_snr_gamma(args.snr_gamma)
    family.noise.check_inference_steps(args.eval_inference_steps)
    for name in args.objectives:
        if name in family.not_applicable:
            raise ValueError(f"the objective {name} is not applicable: {family.not_applicable[name]}")
    name = getattr(peft_config, "method", peft_config.peft_type.value)
    by_torchao = name in ("svdiff", "weights") and any(map(quantized_type, family.denoiser.modules()))
    if by_torchao or (getattr(family.denoiser, "hf_quantizer", None) and peft_config.peft_type != PeftType.LORA):
        raise ValueError(f"{name} cannot be trained on a quantized base: use LoRA (--method lora), or no quantization")
    for weight in family.denoiser.parameters():
        if weight.is_floating_point() and weight.dtype.itemsize == 1:
            raise ValueError(
                f"the denoiser's weights are kept as {weight.dtype}, as by enable_layerwise_casting(), and PyTorch "
                "has no gradients through them: train without it, and use it to sample. "
                "load_pipeline(quantization=...) makes a base smaller that LoRA is trained on"
            )


def _check_one_dataset(*datasets: Any) -> None:
    """Raise `ValueError` for what is neither a `Dataset` nor left out, such as the dictionaries of transformers."""
    for dataset in datasets:
        if isinstance(dataset, (Dataset, EncodedImages, type(None))):
            continue
        if isinstance(dataset, dict):
            names = ", ".join(map(repr, dataset))
            way = f"give one of {names}, as in train_dataset=data['train'], and measure further images with "
            way += "evaluate(dataset, metric_key_prefix=...)"
        elif isinstance(dataset, (IterableDataset, torch.utils.data.IterableDataset)):
            way = "images are encoded once and read by their numbers, so load them without streaming=True"
        else:
            way = "make one with datasets.Dataset.from_list([{'image': ..., 'text': ...}, ...])"
        raise ValueError(
            f"training and validation images must each be one Dataset, but got a {type(dataset).__name__}: {way}"
        )


def _images_of(*datasets: Dataset | EncodedImages | None) -> list[Dataset]:
    """The images of those that are given."""
    given = [dataset for dataset in datasets if dataset is not None]
    return [dataset.images if isinstance(dataset, EncodedImages) else dataset for dataset in given]


def _published_name(pipeline: "DiffusionPipeline") -> str:
    """A pipeline's name; a path on this machine is shortened to its last part."""
    name = str(getattr(pipeline, "name_or_path", None) or "")
    if Path(name) == DEMO_PIPELINE:
        return "demo"
    return Path(name).name if is_place(name) else name


def _collate(examples: list[dict[str, torch.Tensor]], names: Sequence[str]) -> dict[str, Any]:
    if not examples:
        return {}  # no row was drawn
    batch: dict[str, Any] = {name: torch.stack([example[name] for example in examples]) for name in names}
    return batch | {"row": batch["row"].tolist()}  # read on the CPU, where a GPU need not be waited for
