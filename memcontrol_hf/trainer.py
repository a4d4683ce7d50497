"""The inner level: a `transformers.Trainer` that fine-tunes the selected blocks of a denoiser and measures the result.

The loop, checkpoints, resuming, mixed precision, distribution, schedulers and trackers are the Trainer's own. This is
one file of some length because the Trainer is extended by overriding its methods, in one class.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftType
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, BestRun, TrainOutput, get_last_checkpoint

from .adapter_folder import REPORT
from .adapters import MaskedAdapters, merged
from .data import EncodedImages, weights_digest
from .demo import DEMO_PIPELINE
from .encoders import Encoder, load_encoder
from .evaluation import METRICS, Evaluator, check_objectives
from .families import Condition, family_of
from .mitigations import PrivateTraining, parse_mitigations
from .mitigations.base import overrides
from .publish.hub import push
from .randomness import Purpose, seeded_generator
from .report import MemorizationReport
from .screening import Screening
from .screening.aside import training_aside
from .screening.estimates import estimate
from .screening.probes import BlockProbes, ProbeImages
from .screening.settings import ScreeningSettings
from .search import run_search
from .search.ray import run_search_on_ray
from .search_space import SearchSpace
from .tracking import adjust_trackers
from .training_arguments import MemControlTrainingArguments, is_place
from .training_loss import TrainingLoss
from .tuners import MemControlConfig

if TYPE_CHECKING:
    import optuna
    from diffusers import DiffusionPipeline


def check_backend(backend: str) -> None:
    """Raise `ValueError` for a backend of a search that is neither `optuna` nor `ray`."""
    if backend not in ("optuna", "ray"):
        raise ValueError(f"backend {backend!r} is not supported: use 'optuna' or 'ray'")


class MemControlTrainer(Trainer):
    """Fine-tunes the blocks of a pipeline that a mask selects, and searches that mask.

    Args:
        pipeline (`DiffusionPipeline`):
            Pipeline to tune. Its weights stay as they are; the denoiser gets an adapter, and so does each text encoder
            with a block on.
        peft_config (`PeftConfig`):
            PEFT method: any with `target_modules`; the mask restricts it.
        args ([`MemControlTrainingArguments`]):
            Arguments of transformers and of this package.
        train_dataset (`Dataset`):
            Training images: columns `image`, `text`.
        eval_dataset (`Dataset`):
            Validation images, which the search's rewards may use: columns `image`, `text`.
        search_space ([`SearchSpace`], *optional*):
            Blocks that a mask switches: the denoiser's attention blocks by default. [`Family.search_space`] also names
            those of text encoders.
        mask (`dict[str, bool]`, *optional*):
            Mask of the first fine-tune; every block is on by default.
        encoder (`str` or `nn.Module`):
            Image encoder of `fid` and `amd`; see [`~memcontrol_hf.encoders.load_encoder`].
        callbacks (list of `TrainerCallback`, *optional*):
            Callbacks, as in transformers.

    Raises:
        ValueError: for what does not go together, before anything is trained: the resolution, the objectives, the
            mitigations, the mask or the PEFT method with the model or the images.
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
        encoder: str | nn.Module = "demo",
        callbacks: list[TrainerCallback] | None = None,
    ):
        self.family = family_of(pipeline)
        self.family.check_resolution(args.resolution)
        self.family.check_snr_gamma(args.snr_gamma)
        for name in args.objectives:
            if name in self.family.not_applicable:
                raise ValueError(f"the objective {name} is not applicable: {self.family.not_applicable[name]}")
        self._mitigations = parse_mitigations(args.mitigations)
        if getattr(self.family.denoiser, "hf_quantizer", None) is not None and peft_config.peft_type != PeftType.LORA:
            name = getattr(peft_config, "method", peft_config.peft_type.value)
            raise ValueError(
                f"{name} cannot be trained on a quantized base: use LoRA (--method lora), or no quantization"
            )
        self.pipeline = pipeline
        self.base_model = _published_name(pipeline)
        self.denoiser: nn.Module = self.family.denoiser.requires_grad_(False)
        self.denoiser.register_to_config(_name_or_path=self.base_model)  # trackers get the denoiser's config
        self.peft_config = peft_config
        self.search_space = search_space or self.family.search_space()
        images = train_dataset.images if isinstance(train_dataset, EncodedImages) else train_dataset
        for mitigation in self._mitigations.values():
            mitigation.check(self.family, images, args, tunes_text=bool(self.search_space.text_encoders))
        self._adapters = MaskedAdapters(self.family, self.search_space, peft_config)
        self.mask = self.search_space.check(self.search_space.mask(True) if mask is None else mask)
        self._encoder: str | nn.Module | Encoder = encoder
        self._replaced: dict[str, Any] = {}  # what the arguments held before the present hyperparameters
        self._encoded: dict[str, EncodedImages] = {}  # by the fingerprint of the images
        self._trial_rows: dict[tuple[int, float], EncodedImages] = {}  # by the seed and the share
        if args.gradient_checkpointing or args.activation_checkpointing:
            self.denoiser.enable_gradient_checkpointing()  # diffusers' own switch, which the Trainer does not know
            args.gradient_checkpointing = args.activation_checkpointing = False
        for part in self.family.encoder_modules:
            part.requires_grad_(False).to(args.device)
        self._digests = [weights_digest(part) for part in self.family.encoder_modules]
        self._base_null = self.family.null_condition()
        self._resolution = args.resolution  # `encode` is called before there are `self.args`
        train_dataset = self._full_train_dataset = self.encode(train_dataset)
        super().__init__(
            args=args,
            model_init=self._init_model,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=partial(_collate, names=("latents", *self.family.conditions, "row")),
            callbacks=callbacks,
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
        if self._adapters.adapted and (private := self._private_training()):
            inputs = self._prepare_inputs(self.data_collator(self.train_dataset.__getitems__([0])))
            private.check_layers(self.model, self.family.losses, self._draws(inputs))
        for mitigation in self._mitigations.values():
            if callback := mitigation.callback(self.evaluate_mid_training):
                self.add_callback(callback)
        given = callbacks or []
        self._own_callbacks = [c for c in self.callback_handler.callbacks if c not in given and type(c) not in given]

    # ---- the model ----

    def _init_model(self) -> nn.Module:
        """The model with new adapters for the current mask; the bare, frozen denoiser for the all-off mask."""
        return self._adapters.put_on(self.mask)

    def _null(self) -> Condition | None:
        """The null condition, by the text encoders as they are now."""
        return self.family.null_condition() if self._adapters.tunes_text else self._base_null

    def set_mask(self, mask: Mapping[str, bool]) -> None:
        """Start again from the base with a new adapter in the blocks that `mask` selects."""
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
        """How many parameters the current mask trains."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def trainable_percent(self) -> float:
        """How many parameters the mask trains, in percent of those of the denoiser and of tuned text encoders."""
        return 100 * self.trainable_parameters / self._adapters.base_size

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """As in transformers. The all-off mask has nothing to train.

        Raises:
            ValueError: for the all-off mask, and for a checkpoint of another run.
        """
        if not any(self.mask.values()):
            raise ValueError("the mask selects no block: the frozen base can be evaluated, but not trained")
        latest = resume_from_checkpoint is True
        checkpoint = get_last_checkpoint(self.args.output_dir) if latest else resume_from_checkpoint
        if checkpoint:
            self.check_resumes(checkpoint)
        for mitigation in self._mitigations.values():
            mitigation.counts()  # what an earlier training has counted
        self._private = self._private_training()
        if self._private is not None and checkpoint:
            self._private.load(checkpoint)
        if checkpoint and (state := self._finished(checkpoint)):
            self._load_from_checkpoint(checkpoint)  # the Trainer would go on
            self.state = state
            return TrainOutput(state.global_step, 0.0, {})
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self._private is not None:
            self._private.check_moved()
        return output

    def check_resumes(self, checkpoint: str) -> None:
        """See that a checkpoint is of the current mask, method and learning rate, as far as it tells them.

        Raises:
            ValueError: names what differs.
        """
        differing = self._adapters.differences(Path(checkpoint))
        file = Path(checkpoint) / SCHEDULER_NAME
        rates = torch.load(file, map_location="cpu", weights_only=True).get("base_lrs", []) if file.exists() else []
        if rates and not math.isclose(rates[0], self.args.learning_rate):
            differing.append(f"the learning rate was {rates[0]:g} and is {self.args.learning_rate:g}")
        if differing:
            raise ValueError(
                f"the checkpoint {checkpoint} is of another run: {'; '.join(sorted(differing))}. Use the same "
                "settings to go on with it, delete it, or give another output_dir (--output_dir)"
            )

    def _finished(self, checkpoint: str) -> TrainerState | None:
        """The state in a checkpoint of a run that has made all its steps, or was stopped early; else `None`."""
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
        """What this step draws for the rows of a batch: the arguments of [`Family.losses`]."""
        # An epoch of DP-SGD is the whole training, in which a row comes up again and again.
        turn = int(self.state.epoch or 0) if self._private is None else self.state.global_step
        return self._loss.draw(
            inputs,
            self.args.seed,
            turn,
            self._null,
            self.args.caption_dropout,
            self.args.snr_gamma,
            encode_captions=self._adapters.tunes_text,
        )

    # ---- differentially private training ----

    @property
    def privacy(self) -> dict[str, Any] | None:
        """What the last training with `dp_sgd` has spent; `None` without it. See [`PrivateGradients.report`]."""
        return None if self._private is None else self._private.report()

    def _private_training(self) -> PrivateTraining | None:
        """What a mitigation puts in the place of the batches and gradients of this training."""
        args, rows = self.args, len(self.train_dataset)
        size = args.train_batch_size * args.gradient_accumulation_steps
        sizes = (rows, size, args.gradient_accumulation_steps, args.max_steps)
        candidates = (mitigation.private_training(*sizes) for mitigation in self._mitigations.values())
        return next((private for private in candidates if private is not None), None)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """As in transformers; with the mitigation `dp_sgd` one epoch of all steps, each of which draws its rows."""
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
        """As in transformers; with the mitigation `dp_sgd` by the gradients of single rows."""
        if self._private is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        batch = self._draws(self._prepare_inputs(inputs)) if inputs else {}
        with self.compute_loss_context_manager():
            return self._private.backward(
                model, self.family.losses, batch, self.state.global_step, last=self.accelerator.sync_gradients
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._private is not None and self.args.should_save:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self._private.save(Path(self._get_output_dir(trial)) / folder)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in transformers; with what mitigations have counted since the log before, such as `dropped_samples`."""
        if "loss" in logs or "train_loss" in logs:
            for mitigation in self._mitigations.values():
                for name, count in mitigation.counts().items():
                    logs[name] = int(self.accelerator.reduce(torch.as_tensor(count, device=self.args.device), "sum"))
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:  # no pickled arguments
            self._adapters.save(Path(output_dir or self.args.output_dir), state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._adapters.tunes_text:
            self._adapters.load(Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._adapters.tunes_text:
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

        Without a report there, the card says that nothing was measured.

        Args:
            commit_message, blocking, token, revision, private:
                As in transformers, but private by default, always blocking, and with the Hub login's own token.
            allow_failed_gate (`bool`): push although the release gate failed; the card says so first.

        Returns:
            `str`: the address of the commit; `None` on other processes than the first.

        Raises:
            ValueError: for a token, and for a report of another mask than the trainer's.
        """
        if token is not None or self.args.hub_token is not None:
            raise ValueError("give no token: log in with `hf auth login`, or set HF_TOKEN")
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        file = Path(self.args.output_dir) / REPORT
        if not file.exists():
            card = {"denoiser": self.family.denoiser_name}
            MemorizationReport(self.base_model, self.method, mask=self.mask, card=card).to_json(file)
        elif MemorizationReport.from_json(file).mask != self.mask:
            raise ValueError(f"{file} is the report of another mask: measure this model, or use another output_dir")
        return push(
            self.args.output_dir,
            self.args.hub_model_id,
            revision=revision or self.args.hub_revision,
            public=private is False or (private is None and self.args.hub_private_repo is False),
            allow_failed_gate=allow_failed_gate,
            **({"commit_message": commit_message} if commit_message else {}),
        )

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Nothing: the repository is made by the push itself, so that a private one comes first."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: what is not measured yet is not pushed, and a checkpoint holds more than what may be published."""

    # ---- measuring ----

    def encode(self, images: Dataset | EncodedImages) -> EncodedImages:
        """A dataset beside its latents and conditions by the base's encoders, which are computed once."""
        if isinstance(images, EncodedImages):
            return images
        key = images._fingerprint
        if key not in self._encoded:
            with self._adapters.text_encoders_disabled():
                self._encoded[key] = EncodedImages(images, self._resolution).encoded_by(self.family, self._digests)
        return self._encoded[key]

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        metrics: list[str] | None = None,
    ) -> dict[str, float]:
        """Measure the model as it is.

        Args:
            eval_dataset (`Dataset`, *optional*):
                Columns `image`, `text`: the images that the training images are compared with. The validation images
                by default; give the held-out ones for final figures.
            metric_key_prefix (`str`):
                Of the names of the figures.
            metrics (list of `str`, *optional*):
                Out of `METRICS`; the objectives by default.

        Returns:
            `dict[str, float]`: the figures, and for some their companions:

            - `loss` (on `eval_dataset`), `loss_train` (on the training images, each once)
            - `membership_auc`, `membership_auc_low`, `membership_auc_high` (95 %)
            - `noise_norm` (of the training images), `noise_norm_held_out` (of `eval_dataset`); left out where it is
              not applicable
            - `fid`: images generated from the captions of `eval_dataset`, against its images
            - `amd`: images generated from training captions, against training images; `amd_held_out`: the same
              images, against those of `eval_dataset`
        """
        wanted = self.args.objectives if metrics is None else metrics
        check_objectives(wanted)
        others = self.encode(self.eval_dataset if eval_dataset is None else eval_dataset)
        measured = self._measure(wanted, self.train_dataset, others)
        figures = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.log(dict(figures))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    def _measure(self, wanted: Sequence[str], train: EncodedImages, others: EncodedImages) -> dict[str, float]:
        """Figures of the model as it is on some training images and others: [`Evaluator.measure`]."""
        training, _ = self.model.training, self.model.eval()
        with torch.no_grad(), self.accelerator.autocast(), merged(self._adapters.adapted.values()):
            figures = self.evaluator().measure(wanted, train, others, self.args.eval_num_images, lambda: self.encoder)
        self.model.train(training)
        return figures

    def evaluate_mid_training(self, metrics: list[str]) -> dict[str, float]:
        """[`evaluate`] for a callback in the middle of a training.

        The Trainer would take a log or an evaluation that is due as done.
        """
        due = self.control.should_log, self.control.should_evaluate
        figures = self.evaluate(metrics=metrics)
        self.control.should_log, self.control.should_evaluate = due
        return figures

    def evaluator(self) -> Evaluator:
        """The engine that measures the model as it is, with the settings of the arguments."""
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
            encode_captions=self._adapters.tunes_text,
            mitigations=self._mitigations.values(),
            training_images=self.train_dataset,
            rank=args.process_index,
            world_size=args.world_size,
        )

    @property
    def encoder(self) -> Encoder:
        """The image encoder, loaded when it is first needed."""
        if not isinstance(self._encoder, Encoder):
            self._encoder = load_encoder(self._encoder, self.args.device)
        return self._encoder

    # ---- the outer level ----

    def screen(
        self, steps: int | None = None, every: int = 4, learning_rate: float | None = None, seeds: int = 1
    ) -> Screening:
        """Train all blocks together, and read off what each block learns and what it memorizes.

        The run is a training as every other one, with the trainer's optimizer, schedule and mitigations, on
        `train_dataset`; no callback is called, so that early stopping does not end it. Each `every` steps, gradients
        of the loss on training and on validation images say how much each block's update lowers them; see
        [`~memcontrol_hf.screening.probes.BlockProbes`]. Nothing is saved: a screening costs about as much as one or
        two trials, and is cheap enough to repeat. The trainer is afterwards as before.

        Args:
            steps (`int`, *optional*):
                Number of steps of each run; `search_max_steps` or else `max_steps` of the arguments by default.
            every (`int`):
                Number of steps for each probe.
            learning_rate (`float`, *optional*):
                Learning rate of the runs; that of the arguments by default.
            seeds (`int`):
                Number of runs, each with a random seed of its own, over which the figures are averaged.

        Returns:
            [`~memcontrol_hf.screening.Screening`]: the figures of each block.

        Raises:
            ValueError: before any work, for settings out of range, a search space of fewer than two blocks, a trainer
                without validation images, and `dp_sgd`, whose guarantee would not cover the screening; and in the run,
                when a loss is not finite.
        """
        args = self.args
        settings = ScreeningSettings(
            steps=(args.search_max_steps or args.max_steps) if steps is None else steps,
            every=every,
            learning_rate=args.learning_rate if learning_rate is None else learning_rate,
            seeds=seeds,
            seed=args.seed,
        )
        self._check_screening()
        train, validation = self.train_dataset, self.encode(self.eval_dataset)
        runs = []
        with training_aside(self, settings.arguments), self._adapters.set_aside():
            self.mask = self.search_space.mask(True)
            for seed in settings.run_seeds:
                self.args.seed = seed
                runs.append(self._probes(settings, train, validation))
                self.add_callback(runs[-1])
                self.train()
                self.remove_callback(runs[-1])
        images = {"train_images": len(train.distinct), "validation_images": len(validation.distinct)}
        return estimate(list(self.search_space.blocks), runs, settings, images)

    def _probes(self, settings: ScreeningSettings, train: EncodedImages, validation: EncodedImages) -> BlockProbes:
        """The probes of one run of a screening, by the seed of the arguments."""
        args, text = self.args, bool(self.search_space.text_encoders)
        sets = [
            ProbeImages(data, purpose, self.family, args.seed, args.device, text)
            for data, purpose in ((train, Purpose.SCREENING_TRAIN), (validation, Purpose.SCREENING_VALIDATION))
        ]
        # Few images, and the same ones before and after: what this costs shall not grow with the data.
        measured = [data.select(images.rows(settings.steps)) for data, images in zip((train, validation), sets)]
        return BlockProbes(
            sets,
            self.family,
            self.search_space,
            settings.stretches,
            args.per_device_train_batch_size,
            self.accelerator,
            measure=partial(self._measure, ["loss"], *measured),
        )

    def _check_screening(self) -> None:
        """Raise `ValueError` where blocks cannot be screened."""
        if len(self.search_space.blocks) < 2:
            raise ValueError("a screening compares blocks, but the search space has only one: use a finer granularity")
        if self.eval_dataset is None or not len(self.eval_dataset):
            raise ValueError("a screening compares with validation images, but there are none: give an eval_dataset")
        for name, mitigation in self._mitigations.items():
            if overrides(mitigation, "private_training"):
                raise ValueError(
                    f"a screening looks at training images outside of the account of {name}, whose guarantee would "
                    "not hold: screen without it, on images that need no guarantee, or leave the screening out"
                )

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
                From a trial to a dictionary of hyperparameters: `mask`, and any field of the arguments. By default the
                mask over all blocks, and `learning_rate` within `learning_rate_range`.
            compute_objective (`Callable`, *optional*):
                From the figures of [`~MemControlTrainer.evaluate`] to the objectives; `args.objectives` by default.
            n_trials (`int`):
                Finished trials that the study shall hold in the end: a search that was interrupted goes on. A trial
                that repeats another does not count, nor does one that a kill ended.
            direction (`str` or list of `str`, *optional*):
                `"minimize"` or `"maximize"` for each objective; by default as each metric is better.
            backend (`str`):
                `"optuna"`: the trials are run here. `"ray"`: by `num_workers` processes that Ray places on its
                cluster, with the `resources_per_trial` of transformers; see
                [`~memcontrol_hf.search.ray.run_search_on_ray`]. The study and the result are the same.
            hp_name (`Callable`, *optional*):
                From a trial to the name of its run in trackers.
            **kwargs:
                `learning_rate_range`, `sampler`, `storage`, `study_name`, `settings`, `enqueue`,
                `memorization_budget`, `max_trainable_percent`, `trial_timeout`, `prune_at`: see
                [`~memcontrol_hf.search.SearchSettings`].

        Returns:
            [`~transformers.trainer_utils.BestRun`] or a list of them: the best run, or with several objectives those
            of the Pareto front. `run_summary` holds the Optuna study. Go on with
            [`~MemControlTrainer.apply_hyperparameters`].
        """
        check_backend(backend)
        if direction is None:
            direction = [METRICS[name] for name in self.args.objectives]
        search = run_search_on_ray if backend == "ray" else run_search
        return search(self, hp_space, compute_objective, n_trials, direction, hp_name, **kwargs)

    def recipe(self) -> dict[str, Any]:
        """The arguments that build this trainer again in another process; all of them can be pickled.

        The pipeline is bare, its adapters gone. Progress bars and what else the Trainer adds itself is left out.
        """
        self.set_mask(self.search_space.mask(False))
        args = {f.name: getattr(self.args, f.name) for f in fields(self.args) if f.init}
        args |= {"output_dir": str(Path(self.args.output_dir).resolve()), "disable_tqdm": True}
        return {
            "pipeline": self.pipeline,
            "peft_config": self.peft_config,
            "args": (type(self.args), args),  # made there, since they find the process's device
            "train_dataset": self._full_train_dataset,
            "eval_dataset": self.encode(self.eval_dataset),
            "search_space": self.search_space,
            "mask": self.mask,
            "encoder": self._encoder,
            "callbacks": [c for c in self.callback_handler.callbacks if c not in self._own_callbacks],
        }

    def train_and_evaluate(self) -> dict[str, float]:
        """One trial: the current mask and arguments, on the search's share of the data, measured on validation."""
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
        """The share of the training rows that a trial is trained on, drawn by the seed."""
        full, key = self._full_train_dataset, (self.args.seed, self.args.search_fraction)
        count = max(1, math.ceil(self.args.search_fraction * len(full)))
        if count == len(full):
            return full
        if key not in self._trial_rows:  # what is computed of the rows is the same for all trials
            rows = torch.randperm(len(full), generator=seeded_generator(self.args.seed, Purpose.TRIAL_ROWS))[:count]
            self._trial_rows[key] = full.select(sorted(rows.tolist()))
        return self._trial_rows[key]

    def apply_hyperparameters(self, hyperparameters: Mapping[str, Any], final_model: bool = False) -> None:
        """Set the mask and the arguments of a run; what an earlier call set and this one does not name is undone.

        Args:
            hyperparameters (`dict[str, Any]`):
                `mask`, and fields of the arguments.
            final_model (`bool`):
                Ready the model for the final fine-tune on all of the data: the next `train()` starts from the base.

        Raises:
            ValueError: for a name that is neither `mask` nor a field of the arguments, and for `mitigations`, which
                are the same for all runs of a trainer.
        """
        known = {f.name for f in fields(self.args)}
        new = {name: value for name, value in hyperparameters.items() if name != "mask"}
        for name in new:
            if name not in known:
                raise ValueError(f"unknown hyperparameter {name!r}: use 'mask' or a field of the training arguments")
            if name == "mitigations":
                raise ValueError("mitigations are no hyperparameter: give them to MemControlTrainingArguments")
        for name, value in self._replaced.items():  # by another run's hyperparameters
            setattr(self.args, name, value)
        self._replaced = {name: getattr(self.args, name) for name in new}
        for name, value in new.items():
            setattr(self.args, name, value)
        if final_model:
            self.train_dataset = self._full_train_dataset
        self.set_mask(hyperparameters.get("mask", self.mask))


def _published_name(pipeline: "DiffusionPipeline") -> str:
    """A pipeline's name without the place where it lies on this machine."""
    name = str(getattr(pipeline, "name_or_path", None) or "")
    if Path(name) == DEMO_PIPELINE:
        return "demo"
    return Path(name).name if is_place(name) else name


def _collate(examples: list[dict[str, torch.Tensor]], names: Sequence[str]) -> dict[str, torch.Tensor]:
    if not examples:
        return {}  # no row was drawn
    return {name: torch.stack([example[name] for example in examples]) for name in names}
