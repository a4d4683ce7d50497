"""A step of the trainer beside a bare loop: forward, backward and AdamW on the same tensors."""

import copy
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import PrinterCallback, TrainerCallback

from memcontrol_hf import MemControlTrainer, demo_dataset, demo_pipeline
from memcontrol_hf.flags import ScriptArguments
from memcontrol_hf.from_flags import METHODS, training_arguments

from .timing import Clock, alternate, clock, compared

METHOD_NAMES = ("lora", "attention", "svdiff")


def sd15_like(width: int) -> DiffusionPipeline:
    """The demo's pipeline with a denoiser of Stable Diffusion 1.5's layout, and random weights.

    Args:
        width: Number of channels of the first level: 320 in Stable Diffusion 1.5, with 768 features for each token of
            a caption, here as many as the demo's text encoder has.
    """
    pipeline = demo_pipeline()
    config = pipeline.unet.config
    torch.manual_seed(0)
    pipeline.unet = UNet2DConditionModel(
        sample_size=32 if width < 320 else 64,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        cross_attention_dim=config.cross_attention_dim,
        attention_head_dim=8,
    )
    return pipeline


def demo_trainer(
    method: str, folder: str, images: Dataset | None = None, others: Dataset | None = None, trainer_args: str = "{}"
) -> MemControlTrainer:
    """A trainer of the demo at the sizes of the quickstart, on its images or others."""
    images = images or demo_dataset()["train"]
    return _trainer(demo_pipeline(), images, method, folder, batch=32, others=others, trainer_args=trainer_args)


def sd15_trainer(method: str, folder: str) -> MemControlTrainer:
    """A trainer of Stable Diffusion 1.5's layout: at its own width on a GPU, at a fifth of the width on a CPU."""
    on_gpu = torch.cuda.is_available()
    pipeline = sd15_like(320 if on_gpu else 64)
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    images = Dataset.from_list([{"image": Image.effect_noise((side, side), 60), "text": str(i)} for i in range(16)])
    return _trainer(pipeline, images, method, folder, batch=8 if on_gpu else 1, resolution=side)


def _trainer(
    pipeline: DiffusionPipeline,
    images: Dataset,
    method: str,
    folder: str,
    batch: int,
    resolution: int = 64,
    others: Dataset | None = None,
    trainer_args: str = "{}",
) -> MemControlTrainer:
    flags = ScriptArguments(
        output_dir=folder,
        method=method,
        max_train_steps=1,
        train_batch_size=batch,
        resolution=resolution,
        trainer_args=trainer_args,
    )
    args = training_arguments(flags)
    args.disable_tqdm, args.save_strategy = True, "no"
    trainer = MemControlTrainer(pipeline, METHODS[method][0], args, images, others or images, encoder="demo")
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Alternation(TrainerCallback):
    """Takes the seconds of each step of the trainer, and makes a bare step after it."""

    def __init__(self, bare_step: Callable[[], Any], now: Clock):
        self.bare_step, self.now, self.started = bare_step, now, None
        self.seconds: dict[str, list[float]] = {"trainer": [], "bare loop": []}

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """A step of the trainer reaches from the end of the bare step before it to here: its data are in it, too."""
        ended = self.now()
        if self.started is not None:
            self.seconds["trainer"].append(ended - self.started)
        self.bare_step()
        bare_ended = self.now()
        if self.started is not None:
            self.seconds["bare loop"].append(bare_ended - ended)
        self.started = bare_ended


def bare_step(trainer: MemControlTrainer) -> Callable[[], None]:
    """A step without the trainer, on a copy of its model and the tensors of its first rows."""
    args = trainer.args
    model = copy.deepcopy(trainer.model).to(args.device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate)
    rows = list(range(args.train_batch_size))
    batch = trainer._draws(trainer._prepare_inputs(trainer.data_collator(trainer.train_dataset.__getitems__(rows))))

    def step() -> None:
        with trainer.accelerator.autocast():
            loss = trainer.family.losses(model, **batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(name: str, trainer: MemControlTrainer, pairs: int, goal: float | None) -> dict[str, Any]:
    """A row of the page for one trainer, whose steps alternate with steps of the bare loop.

    Args:
        name: What is measured.
        trainer: The trainer.
        pairs: Number of steps of each side.
        goal: Largest ratio that is wanted, if any.
    """
    args = trainer.args
    alternation = _Alternation(bare_step(trainer), clock(args.device))
    trainer.add_callback(alternation)
    args.max_steps = pairs + 2  # the first step and what follows it warm up
    trainer.train()
    seconds = {side: values[1:] for side, values in alternation.seconds.items()}
    return compared(name, goal, seconds, parameters=trainer.trainable_parameters)


def rows(pairs: int) -> Iterator[dict[str, Any]]:
    """The rows of the page, one by one.

    Args:
        pairs: Number of steps of each side.
    """
    goal = 1.05 if torch.cuda.is_available() else 1.03
    for shape, make in (("the demo", demo_trainer), ("Stable Diffusion 1.5's layout", sd15_trainer)):
        for method in METHOD_NAMES:
            with tempfile.TemporaryDirectory() as folder:
                yield measure(f"training step, {shape}, {method}", make(method, folder), pairs, goal)
        with tempfile.TemporaryDirectory() as folder:
            trainers = {"SV-DIFF": make("svdiff", folder), "LoRA of rank 4": make("lora", folder)}
            sides = {name: bare_step(trainer) for name, trainer in trainers.items()}
            now = clock(trainers["SV-DIFF"].args.device)
            yield compared(f"bare step with all blocks, {shape}", 1.1, alternate(sides, pairs, now))
