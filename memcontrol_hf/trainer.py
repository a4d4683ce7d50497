"""The inner level: a `transformers.Trainer` that fine-tunes the selected blocks of a denoiser and measures the result.

The loop, checkpoints, resuming, mixed precision, distribution, schedulers and trackers are the Trainer's own.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerState
from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback, WandbLogModel
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, BestRun, TrainOutput, get_last_checkpoint

from . import metrics as measures
from .data import EncodedImages, encode, weights_digest
from .demo import DEMO_PIPELINE
from .encoders import Encoder, features_of, load_encoder
from .evaluation import METRICS, check_objectives
from .families import Condition, family_of, null_like
from .mitigations import Conditions, EarlyStopCallback, PrivateGradients, parse_mitigations, per_sample_gradients
from .randomness import seeded_generator
from .sampling import denoiser_in_place, generate
from .search import run_search
from .search.ray import run_search_on_ray
from .search_space import SearchSpace
from .training_arguments import MemControlTrainingArguments, is_place
from .tuners import MemControlConfig

if TYPE_CHECKING:
    import optuna
    from diffusers import DiffusionPipeline


# The purposes that random draws are seeded for; part of every key, so that no two purposes share noise.
_TRAINING, _SUBSET, _MEMBERS, _NONMEMBERS, _EVAL_IMAGES, _TRAIN_IMAGES, _MITIGATIONS = range(7)

# The initialisations of PEFT's LoRA that leave the base's weights as they are, beside `True` and `False`.
_INITS = ("gaussian", "eva", "orthogonal", "mica")
# What PEFT writes into an adapter's configuration when it saves it, or changes while it trains.
_NOT_OF_A_RUN = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "rank_pattern",
                 "search"}  # fmt: skip


def check_backend(backend: str) -> None:
    """Raise `ValueError` for a backend of a search that is neither `optuna` nor `ray`."""
    if backend not in ("optuna", "ray"):
        raise ValueError(f"backend {backend!r} is not supported: use 'optuna' or 'ray'")


class _LossProgressCallback(ProgressCallback):
    """The Trainer's progress bar with the loss in it, instead of a printed line for each log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=logs["loss"])


class _TensorBoardCallback(TensorBoardCallback):
    """The Trainer's own, without the model's config, which it can read of a transformers model alone."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control)


class DenoiserAndTextEncoders(nn.Module):
    """One model for the Trainer when text encoders are tuned: it is called, and otherwise looks, like the denoiser.

    The text encoders make the denoiser's conditions before it is called. They stay in evaluation mode: T5's dropout
    would draw from the global random state.
    """

    def __init__(self, denoiser: nn.Module, text_encoders: Mapping[str, nn.Module]):
        super().__init__()
        self.denoiser = denoiser
        self.text_encoders = nn.ModuleDict(text_encoders)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.denoiser(*args, **kwargs)

    def train(self, mode: bool = True) -> "DenoiserAndTextEncoders":
        super().train(mode)
        self.text_encoders.eval()
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "denoiser":
                raise
            return getattr(self.denoiser, name)


class MemControlTrainer(Trainer):
    """Fine-tunes the blocks of a pipeline that a mask selects, and searches that mask.

    Args:
        pipeline (`DiffusionPipeline`):
            Its weights stay as they are; the denoiser gets an adapter, and so does each text encoder with a block on.
        peft_config (`PeftConfig`):
            Any method with `target_modules`; the mask restricts it.
        args ([`MemControlTrainingArguments`]):
            As of transformers, and those of this package.
        train_dataset (`Dataset`):
            Columns `image`, `text`.
        eval_dataset (`Dataset`):
            Likewise: the validation images that the search's rewards may use.
        search_space ([`SearchSpace`], *optional*):
            The denoiser's attention blocks by default; [`Family.search_space`] names those of text encoders, too.
        mask (`dict[str, bool]`, *optional*):
            Of the first fine-tune; every block by default.
        encoder (`str` or `nn.Module`):
            For `fid` and `amd`; see [`~memcontrol_hf.encoders.load_encoder`].
        callbacks (list of `TrainerCallback`, *optional*):
            As of transformers.
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
        early_stop = self._mitigations.get("early_stop")
        if early_stop and 0 < args.max_steps < early_stop.every:
            raise ValueError(
                f"early_stop looks every {early_stop.every} steps, but there are {args.max_steps}: give another every="
            )
        if getattr(self.family.denoiser, "hf_quantizer", None) is not None and peft_config.peft_type != PeftType.LORA:
            name = getattr(peft_config, "method", peft_config.peft_type.value)
            raise ValueError(
                f"{name} cannot be trained on a quantized base: use LoRA (--method lora), or no quantization"
            )
        _check_leaves_base(peft_config)
        self.pipeline = pipeline
        self._base_model = _published_name(pipeline)
        self.denoiser: nn.Module = self.family.denoiser.requires_grad_(False)
        self.denoiser.register_to_config(_name_or_path=self._base_model)  # trackers get the denoiser's config
        self.peft_config = peft_config
        self.search_space = search_space or self.family.search_space()
        self._parts = {name: self.family.parts[name] for name in ("", *self.search_space.text_encoders)}
        if self.search_space.text_encoders:
            self._check_text_encoders()
        for name in self.search_space.text_encoders:
            self._parts[name].name_or_path = None  # PEFT would write down the folder that it was loaded from
        self.mask = self.search_space.check(self.search_space.mask(True) if mask is None else mask)
        self._encoder: str | nn.Module | Encoder = encoder
        self._adapted: dict[str, PeftModel] = {}  # name of a part, "" for the denoiser -> it with its adapter
        self._replaced: dict[str, Any] = {}  # what the arguments held before the present hyperparameters
        self._features: dict[str, torch.Tensor] = {}
        self._encoded: dict[str, EncodedImages] = {}
        self._size = sum(_count(p) for part in self._parts.values() for p in part.parameters())
        if args.gradient_checkpointing or args.activation_checkpointing:
            self.denoiser.enable_gradient_checkpointing()  # diffusers' own switch, which the Trainer does not know
            args.gradient_checkpointing = args.activation_checkpointing = False
        for part in self.family.encoder_modules:
            part.requires_grad_(False).to(args.device)
        self._digests = [weights_digest(part) for part in self.family.encoder_modules]
        self._base_null = self.family.null_condition()
        train_dataset = self._full_train_dataset = self._encode(train_dataset, args.resolution)
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
        for callback in self.callback_handler.callbacks:
            # With WANDB_LOG_MODEL it would upload the arguments too, and it cannot read a denoiser's config.
            if isinstance(callback, WandbCallback):
                callback._log_model = WandbLogModel.FALSE
        if (tensorboard := self.pop_callback(TensorBoardCallback)) is not None:
            self.add_callback(_TensorBoardCallback(tensorboard.tb_writer))
        self.loss_is_scaled_for_ga = False
        numbers = train_dataset.encoded["row"][:].tolist()
        self._conditions = Conditions(self._mitigations, self.family, train_dataset.images, numbers)
        self._private: PrivateGradients | None = None
        if "dp_sgd" in self._mitigations and self._adapted:
            self._check_private()
        if "early_stop" in self._mitigations:
            self.add_callback(EarlyStopCallback(self._mitigations["early_stop"], self))
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(_LossProgressCallback)
        given = callbacks or []
        self._own_callbacks = [c for c in self.callback_handler.callbacks if c not in given and type(c) not in given]

    # ---- the model ----

    def _check_text_encoders(self) -> None:
        """Raise `ValueError` for what only the denoiser can be trained with."""
        if "dp_sgd" in self._mitigations:
            raise ValueError("text encoder blocks cannot be trained with dp_sgd: leave them out")

    def _init_model(self) -> nn.Module:
        """The denoiser with a new adapter for the current mask; the bare, frozen denoiser for the all-off mask.

        Where the mask selects blocks of text encoders, they come with the denoiser: [`DenoiserAndTextEncoders`].
        """
        for adapted in self._adapted.values():
            adapted.unload()
        self._adapted = {}
        for part, module in self._parts.items():
            config = self.search_space.apply(self.peft_config, self.mask, part)
            if config.target_modules:
                # PEFT warns of a name that the module itself does not have.
                name, config.base_model_name_or_path = config.base_model_name_or_path, None
                self._adapted[part] = get_peft_model(module, config)
                config.base_model_name_or_path = name
        text_encoders = {part: adapted for part, adapted in self._adapted.items() if part}
        denoiser = self._adapted.get("", self.denoiser)
        return DenoiserAndTextEncoders(denoiser, text_encoders) if text_encoders else denoiser

    @property
    def _tunes_text(self) -> bool:
        """Whether a text encoder has an adapter now, so that captions have to be encoded anew."""
        return any(part for part in self._adapted)

    @property
    def _null(self) -> Condition | None:
        """The null condition, by the text encoders as they are now."""
        return self.family.null_condition() if self._tunes_text else self._base_null

    def set_mask(self, mask: Mapping[str, bool]) -> None:
        """Start again from the base with a new adapter in the blocks that `mask` selects."""
        self.mask = self.search_space.check(mask)
        self.model = self.model_wrapped = self._init_model()
        self._move_model_to_device(self.model, self.args.device)

    @property
    def trainable_parameters(self) -> int:
        """How many parameters the current mask trains."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def trainable_percent(self) -> float:
        """The same in percent of the own parameters of the denoiser, and of text encoders in the search space."""
        return 100 * self.trainable_parameters / self._size

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """As of transformers. The all-off mask has nothing to train.

        Raises:
            ValueError: for the all-off mask, and for a checkpoint of another run.
        """
        if not any(self.mask.values()):
            raise ValueError("the mask selects no block: the frozen base can be evaluated, but not trained")
        latest = resume_from_checkpoint is True
        checkpoint = get_last_checkpoint(self.args.output_dir) if latest else resume_from_checkpoint
        if checkpoint:
            self.check_resumes(checkpoint)
        if "threshold" in self._mitigations:
            self._mitigations["threshold"].dropped = 0
        if "dp_sgd" in self._mitigations:
            self._private = self._private_gradients()
            if checkpoint:
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
        stored = {part: _read_config(Path(checkpoint) / part) for part in self.family.parts}
        current = {part: _plain(adapted.peft_config["default"].to_dict()) for part, adapted in self._adapted.items()}
        differing = []
        for part, config in stored.items() if any(stored.values()) else ():  # transformers names what is no checkpoint
            if bool(config) != (part in current):
                differing.append(f"blocks of the {part or 'denoiser'} were {'on' if config else 'off'}")
            for name in (config.keys() & current.get(part, {}).keys()) - _NOT_OF_A_RUN:
                were, are = config[name], current[part][name]
                if were != are and name == "mask" and were and are:
                    were, are = ([block for block, on in mask.items() if on] for mask in (were, are))
                if were != are:
                    differing.append(f"{name} was {shorten(str(were), 300)} and is {shorten(str(are), 300)}")
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
        state, early_stop = TrainerState.load_from_json(str(file)), self._mitigations.get("early_stop")
        done = 0 < self.args.max_steps <= state.global_step or (early_stop and early_stop.stopped(state))
        return state if done else None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The mean denoising loss of a batch.

        Timestep, noise, caption dropout and the mitigations' draws of a row depend on the seed, the epoch and the row
        alone: the same rows give the same loss at any batch size, on any number of processes, and after resuming.
        """
        batch = self._draws(inputs)
        threshold = self._mitigations.get("threshold")
        if threshold is None:
            return self.family.losses(model, **batch).mean()
        return threshold.losses(self.family, model, self._null, **batch).mean()

    def _draws(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        """The arguments of [`Family.losses`] for the rows of a batch."""
        latents, rows = inputs["latents"], inputs["row"].tolist()
        condition = {name: inputs[name] for name in self.family.conditions}
        # An epoch of DP-SGD is the whole training, in which a row comes up again and again.
        turn = int(self.state.epoch or 0) if self._private is None else self.state.global_step
        noise, timesteps, dropped = [], [], []
        for row in rows:
            generator = seeded_generator(self.args.seed, _TRAINING, turn, row)
            timesteps.append(self.family.sample_timestep(generator))
            dropped.append(torch.rand((), generator=generator) < self.args.caption_dropout)
            noise.append(torch.randn(latents.shape[1:], generator=generator))
        condition = self._conditions(condition, rows, (self.args.seed, _MITIGATIONS, turn), self._tunes_text)
        if any(dropped) and (null := self._null) is not None:
            null, drop = null_like(null, condition), torch.stack(dropped).to(latents.device)
            condition = {
                name: torch.where(drop.view(-1, *[1] * (tensor.dim() - 1)), null[name], tensor)
                for name, tensor in condition.items()
            }
        timesteps = torch.stack(timesteps).to(latents.device)
        return {
            "latents": latents,
            "condition": condition,
            "timesteps": timesteps,
            "noise": torch.stack(noise).to(latents.device),
            "weights": self.family.loss_weights(timesteps, self.args.snr_gamma),
        }

    # ---- differentially private training ----

    @property
    def privacy(self) -> dict[str, Any] | None:
        """What the last training with `dp_sgd` has spent; `None` without it. See [`PrivateGradients.report`]."""
        return None if self._private is None else self._private.report()

    def _private_gradients(self) -> PrivateGradients:
        args, rows = self.args, len(self.train_dataset)
        size = args.train_batch_size * args.gradient_accumulation_steps
        dp_sgd, parts = self._mitigations["dp_sgd"], args.gradient_accumulation_steps
        return PrivateGradients(dp_sgd, rows, size, parts, args.max_steps)

    def _check_private(self) -> None:
        """Raise `ValueError` when the adapter's layers or the number of rows do not allow for DP-SGD."""
        self._private_gradients()
        inputs = self._prepare_inputs(self.data_collator(self.train_dataset.__getitems__([0])))
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        try:
            per_sample_gradients(self.model, parameters, self.family.losses, self._draws(inputs))
        except RuntimeError as error:
            raise ValueError(
                "dp_sgd cannot compute the gradient of each row for this method, whose layers torch.func cannot "
                "transform: use svdiff, difffit, attention, weights, norm, bias or lora"
            ) from error

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """As of transformers; with the mitigation `dp_sgd` one epoch of all steps, each of which draws its rows."""
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
        """As of transformers; with the mitigation `dp_sgd` by the gradients of single rows."""
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
        """As of transformers; with the mitigation `threshold` also `dropped_samples`, those since the log before."""
        threshold = self._mitigations.get("threshold")
        if threshold and ("loss" in logs or "train_loss" in logs):
            dropped = torch.as_tensor(threshold.dropped, device=self.args.device)
            logs["dropped_samples"] = int(self.accelerator.reduce(dropped, "sum"))
            threshold.dropped = 0
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # The adapters alone, a text encoder's in a folder of its name: no pickled arguments, nothing of the base.
        if not self.args.should_save:
            return
        output_dir = Path(output_dir or self.args.output_dir)
        for part in self.family.parts.keys() - self._adapted.keys():  # what an earlier mask has left
            for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME):
                (output_dir / part / name).unlink(missing_ok=True)
        for part, adapted in self._adapted.items():
            folder = output_dir / part
            # The vocabulary is not tuned; PEFT would ask the Hub about it by the base model's name.
            adapted.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
            if part:
                (folder / "README.md").unlink()  # the card is that of the whole

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._tunes_text:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        for part, adapted in self._adapted.items():
            adapted.load_adapter(str(Path(resume_from_checkpoint) / part), adapted.active_adapter, is_trainable=True)

    def _load_best_model(self) -> None:
        if self._tunes_text:
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
                As of transformers, but private by default, always blocking, and with the Hub login's own token.
            allow_failed_gate (`bool`): push although the release gate failed; the card says so first.

        Returns:
            `str`: the address of the commit; `None` on other processes than the first.

        Raises:
            ValueError: for a token, and for a report of another mask than the trainer's.
        """
        from .adapter_folder import REPORT
        from .publish.hub import push
        from .report import MemorizationReport

        if token is not None or self.args.hub_token is not None:
            raise ValueError("give no token: log in with `hf auth login`, or set HF_TOKEN")
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        file, config = Path(self.args.output_dir) / REPORT, self.peft_config
        if not file.exists():
            method = config.method if isinstance(config, MemControlConfig) else config.peft_type.value.lower()
            card = {"denoiser": self.family.denoiser_name}
            MemorizationReport(self._base_model, method, mask=self.mask, card=card).to_json(file)
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

    def encode(self, images: "Dataset | EncodedImages") -> "EncodedImages":
        """A dataset beside its latents and text embeddings by the base's encoders, which are computed once."""
        return self._encode(images, self.args.resolution)

    def _encode(self, images: "Dataset | EncodedImages", resolution: int) -> "EncodedImages":
        if isinstance(images, EncodedImages):
            return images
        key = images._fingerprint
        if key not in self._encoded:
            with ExitStack() as stack:
                for part, adapted in self._adapted.items():
                    if part:
                        stack.enter_context(adapted.disable_adapter())
                encoded = encode(images, self.family, resolution, digests=self._digests)
            self._encoded[key] = EncodedImages(images, encoded)
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
        train = self.train_dataset
        training, _ = self.model.training, self.model.eval()
        with torch.no_grad(), self.accelerator.autocast(), self._merged():
            figures = self._measure(set(wanted), train, others)
        self.model.train(training)
        figures = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(dict(figures))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    def evaluate_mid_training(self, metrics: list[str]) -> dict[str, float]:
        """[`evaluate`] for a callback in the middle of a training.

        The Trainer would take a log or an evaluation that is due as done.
        """
        due = self.control.should_log, self.control.should_evaluate
        figures = self.evaluate(metrics=metrics)
        self.control.should_log, self.control.should_evaluate = due
        return figures

    @contextmanager
    def _merged(self) -> Iterator[None]:
        """Our own adapters, which unmerge exactly, are merged while nothing is trained: sampling is faster so."""
        merged = self._adapted.values() if isinstance(self.peft_config, MemControlConfig) else ()
        for adapted in merged:
            adapted.merge_adapter()
        try:
            yield
        finally:
            for adapted in merged:
                adapted.unmerge_adapter()

    def _measure(self, wanted: set[str], train: "EncodedImages", others: "EncodedImages") -> dict[str, float]:
        figures: dict[str, float] = {}
        if {"loss", "membership_auc"} & wanted:
            member_losses = self._losses(train, _MEMBERS)
            other_losses = self._losses(others, _NONMEMBERS)
            figures["loss"], figures["loss_train"] = other_losses.mean().item(), member_losses.mean().item()
            if "membership_auc" in wanted:
                result = measures.membership(-member_losses, -other_losses)
                figures["membership_auc"] = result.auc
                figures["membership_auc_low"], figures["membership_auc_high"] = result.interval
        if "noise_norm" in wanted - self.family.not_applicable.keys():
            figures["noise_norm"] = self._noise_norms(train, _MEMBERS).mean().item()
            figures["noise_norm_held_out"] = self._noise_norms(others, _NONMEMBERS).mean().item()
        if "fid" in wanted:
            generated = self._generated_features(others, _EVAL_IMAGES)
            figures["fid"] = measures.fid(generated, self.real_features(others))
        if "amd" in wanted:
            generated = self._generated_features(train, _TRAIN_IMAGES)
            figures.update(self._amd(generated, train, others))
        return figures

    def _amd(self, generated: torch.Tensor, train: "EncodedImages", others: "EncodedImages") -> dict[str, float]:
        """Against as many held-out images as training images, since a larger set has nearer neighbours."""
        to_train, to_held_out = measures.distances_to_both(
            generated,
            self.real_features(train),
            self.real_features(others),
            (self.args.seed, _SUBSET),
            own=self._drawn(train, _TRAIN_IMAGES),
        )
        return {"amd": to_train.mean().item(), "amd_held_out": to_held_out.mean().item()}

    def _drawn(self, data: "EncodedImages", purpose: int) -> list[int]:
        """Which of the distinct images have their captions sampled, at most `eval_num_images`."""
        order = torch.randperm(len(data.unique), generator=seeded_generator(self.args.seed, purpose)).tolist()
        return order[: self.args.eval_num_images]

    def _losses(self, data: "EncodedImages", purpose: int) -> torch.Tensor:
        """Mean denoising loss of each distinct image at the fixed timesteps: `[N]`."""
        return self._of_images(partial(measures.denoising_losses, self.family, self.model), data, purpose)

    def _noise_norms(self, data: "EncodedImages", purpose: int) -> torch.Tensor:
        """Mean noise norm of each distinct image at the fixed timesteps: `[N]`."""
        null = self._null

        def norms(latents: torch.Tensor, condition: Condition, *rest: Any) -> torch.Tensor:
            return measures.noise_norm(self.model, latents, condition, null, self.family, *rest)

        return self._of_images(norms, data, purpose)

    def _of_images(self, measure: Callable[..., torch.Tensor], data: "EncodedImages", purpose: int) -> torch.Tensor:
        """Mean over fixed timesteps of `measure(latents, condition, timesteps, seeds)`, `[n, T]`, read in batches."""
        timesteps, size = self.family.timesteps(self.args.eval_num_timesteps), self.args.per_device_eval_batch_size

        def of(rows: list[int]) -> torch.Tensor:
            values = []
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                batch, condition = data.encoded[part], self._condition(data, part)
                seeds = [(self.args.seed, purpose, row) for row in batch["row"].tolist()]
                values.append(measure(batch["latents"], condition, timesteps, seeds, size).mean(1))
            return torch.cat(values)

        return self._over_processes(of, data.unique)

    def _condition(self, data: "EncodedImages", rows: list[int]) -> Condition:
        """The conditions of some rows: those that are cached, unless the text encoders are tuned."""
        if self._tunes_text:
            return self.family.encode_prompts(data.images["text"][rows])
        return {name: data.encoded[name][rows] for name in self.family.conditions}

    def _generated_features(self, data: "EncodedImages", purpose: int) -> torch.Tensor:
        """Features of images generated from the captions of distinct images, at most `eval_num_images`: `[N, D]`."""
        rows = [data.unique[i] for i in self._drawn(data, purpose)]

        def of(rows: list[int]) -> torch.Tensor:
            with denoiser_in_place(self.pipeline, self.model), self._guided():
                images = generate(
                    self.pipeline,
                    data.images[rows]["text"],
                    [(self.args.seed, purpose, row) for row in data.encoded[rows]["row"].tolist()],
                    self.args.resolution,
                    self.args.eval_inference_steps,
                    self.args.eval_guidance_scale,
                    self.args.per_device_eval_batch_size,
                    self._mitigations.get("prompt_embedding"),
                )
            return self.encoder(images)

        return self._over_processes(of, rows)

    def _guided(self) -> AbstractContextManager[None]:
        """With the mitigation `anti_memorization_guidance`, sampling keeps away from the training images."""
        guidance = self._mitigations.get("anti_memorization_guidance")
        if guidance is None:
            return nullcontext()
        data = self.train_dataset
        latents = data.encoded["latents"][:]
        embeds = self._condition(data, list(range(len(data))))["prompt_embeds"]
        return guidance.on(self.family, self.model, latents, embeds, self.args.eval_guidance_scale)

    def real_features(self, data: "EncodedImages") -> torch.Tensor:
        """Features of the distinct images themselves, computed once: `[N, D]`."""
        key = data.encoded._fingerprint
        if key not in self._features:
            self._features[key] = features_of(self.encoder, data.images, data.unique, self.args.resolution)
        return self._features[key]

    @property
    def encoder(self) -> Encoder:
        """The image encoder, loaded when it is first needed."""
        if not isinstance(self._encoder, Encoder):
            self._encoder = load_encoder(self._encoder, self.args.device)
        return self._encoder

    def _over_processes(self, of: Callable[[list[int]], torch.Tensor], rows: list[int]) -> torch.Tensor:
        """Share rows among the processes; the results, in the order of `rows`, on each of them."""
        world, rank = self.args.world_size, self.args.process_index
        if world == 1:
            return of(rows)
        mine = rows[rank::world]
        parts = gather_object([of(mine) if mine else None])
        result: list[Any] = [None] * len(rows)
        for first, part in enumerate(parts):
            for i, value in enumerate(part if part is not None else []):
                result[first + i * world] = value
        return torch.stack(result)

    # ---- the outer level ----

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
        count = max(1, math.ceil(args.search_fraction * len(full)))
        rows = torch.randperm(len(full), generator=seeded_generator(args.seed, _SUBSET))[:count]
        self.train_dataset = full if count == len(full) else full.select(sorted(rows.tolist()))
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


def _check_leaves_base(config: PeftConfig) -> None:
    """Raise `ValueError` for a PEFT config that changes the base itself, from which the next run starts."""
    reason = None
    if (bias := getattr(config, "bias", "none")) != "none":
        reason = f"bias={bias!r} trains the base's own biases: use bias='none'"
    if modules := getattr(config, "modules_to_save", None):
        reason = f"modules_to_save={modules!r} trains modules outside the mask: use modules_to_save=None"
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.lower() not in _INITS:
        names = ", ".join(map(repr, _INITS))
        reason = f"init_lora_weights={init!r} changes the base's weights: use True, False, {names}"
    if reason:
        raise ValueError(f"the base has to stay as it is, since every run starts from it, but {reason}")


def _count(parameter: nn.Parameter) -> int:
    """How many parameters one is: 4-bit ones of bitsandbytes hold two in a byte. As PEFT counts them."""
    if type(parameter).__name__ == "Params4bit":
        return 2 * parameter.numel() * parameter.element_size()
    return parameter.numel()


def _read_config(folder: Path) -> dict[str, Any]:
    """An adapter's stored configuration; empty where there is none."""
    file = folder / CONFIG_NAME
    return _plain(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as JSON gives it back, with lists of names in one order."""
    lists = (list, tuple, set)
    return json.loads(json.dumps({k: sorted(v, key=str) if isinstance(v, lists) else v for k, v in config.items()}))


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
