"""The work: choose a learning rate, search a mask, or fine-tune a row and attack it."""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict
from PIL import Image as PILImage

from common.audits import audit_trainer, best_attack, canaries_caught
from common.pieces import Job, Pieces
from common.trainers import demo_trainer
from memcontrol_hf import MemControlTrainer, select_run
from memcontrol_hf.data import first_rows
from memcontrol_hf.flags import ScriptArguments
from memcontrol_hf.flags import settings as study_settings
from memcontrol_hf.from_flags import METHODS, audit_settings, training_arguments
from memcontrol_hf.images import to_pixels
from memcontrol_hf.sampling import denoiser_in_place, generate

from .data_sets import images
from .masks import block_sizes, random_mask
from .rows import ROWS, TUNED
from .tasks import FINAL_SEED, PICTURED_SEED, Settings, Task


def jobs(tasks: list[Task], settings: Settings, pieces: Pieces) -> list[Job]:
    """The tasks as jobs whose results are pieces on disk."""

    def job(task: Task) -> Job:
        def make() -> dict[str, Any]:
            started = time.process_time()
            result = WORK[task.kind](task, settings, pieces)
            seconds = time.process_time() - started
            return {"data": task.data, "row": task.name, "seed": task.seed, **result, "seconds": seconds}

        return Job(task.piece, " ".join(map(str, task)), make, tuple(need.piece for need in task.needs()))

    return [job(task) for task in tasks]


def script_arguments(task: Task, settings: Settings, pieces: Pieces, seed: int, **changes: Any) -> ScriptArguments:
    """The flags of train_memcontrol.py that a task stands for.

    Args:
        seed: Random seed of the fine-tune.
        **changes: Flags that differ from those of the other tasks.
    """
    values = {
        "output_dir": str(pieces.folder / task.piece),
        "dataset_name": task.data,
        "objectives": ["fid", "membership_auc"],
        "max_train_steps": settings.max_train_steps,
        "search_max_steps": settings.search_max_steps,
        "eval_num_images": settings.eval_num_images,
        "audit_num_prompts": settings.num_prompts,
        "audit_images_per_prompt": settings.images_per_prompt,
        "seed": seed,
    }
    return ScriptArguments(**(values | changes))


def row_trainer(data: DatasetDict, tuned: str, script: ScriptArguments) -> MemControlTrainer:
    """A trainer of what is tuned, a name out of `TUNED`."""
    return demo_trainer(data, TUNED[tuned].method, training_arguments(script), TUNED[tuned].blocks)


def choose_rate(task: Task, settings: Settings, pieces: Pieces) -> dict[str, Any]:
    """The learning rate of a row with the lowest validation loss, of three."""
    row = ROWS[task.name]
    steps = max(1, settings.max_train_steps // 2)
    mitigation = list(row.mitigation)
    script = script_arguments(task, settings, pieces, task.seed, max_train_steps=steps, mitigation=mitigation)
    trainer = row_trainer(images(task.data, settings.max_images), row.tuned, script)
    losses = {}
    for rate in np.geomspace(*METHODS[TUNED[row.tuned].method][1], 3).tolist():
        trainer.apply_hyperparameters({"mask": trainer.search_space.mask(True), "learning_rate": rate})
        trainer.train()
        losses[rate] = trainer.evaluate(metrics=["loss"])["eval_loss"]
    finite = {rate: loss for rate, loss in losses.items() if np.isfinite(loss)}
    return {"rates": list(losses), "losses": list(losses.values()), "learning_rate": min(finite, key=finite.get)}


def search(task: Task, settings: Settings, pieces: Pieces) -> dict[str, Any]:
    """A mask and its learning rate, found on the validation images."""
    method = TUNED[task.name].method
    script = script_arguments(task, settings, pieces, task.seed, method=method)
    trainer = row_trainer(images(task.data, settings.max_images), task.name, script)
    runs = trainer.hyperparameter_search(
        n_trials=settings.n_trials,
        learning_rate_range=METHODS[method][1],
        sampler=script.sampler,
        settings=study_settings(script),
        screen=False,  # the committed searches were made before searches began with a screening
    )
    chosen = select_run(runs)
    return {
        **chosen.hyperparameters,
        "trial": int(chosen.run_id),
        "values": dict(zip(script.objectives, chosen.objective)),
        "front": len(runs),
    }


def run(task: Task, settings: Settings, pieces: Pieces) -> dict[str, Any]:
    """Fine-tune a row with one seed, measure it on the held-out images, and attack it."""
    row, data, seed = ROWS[task.name], images(task.data, settings.max_images), task.seed + FINAL_SEED
    script = script_arguments(task, settings, pieces, seed, mitigation=list(row.mitigation))
    trainer = row_trainer(data, row.tuned, script)
    found, rate = task.search(), task.rate()
    mask = pieces.read(found.piece)["mask"] if found else trainer.search_space.mask(row.mask == "on")
    if row.mask.startswith("random"):
        mask = random_mask(block_sizes(trainer), mask, seed)
    hyperparameters = {"mask": mask} | ({"learning_rate": pieces.read(rate.piece)["learning_rate"]} if rate else {})
    trainer.apply_hyperparameters(hyperparameters, final_model=True)
    figures: dict[str, Any] = {
        "learning_rate": hyperparameters.get("learning_rate"),
        "blocks": " ".join(block for block, on in mask.items() if on),
        "trainable_parameters": trainer.trainable_parameters,
        "trainable_percent": trainer.trainable_percent,
        "adapter_bytes": 0,
    }
    if any(mask.values()):
        figures |= train(trainer)
    if trainer.privacy:
        figures["epsilon"] = trainer.privacy["epsilon"]
    if task.seed == PICTURED_SEED:
        draw_samples(trainer, script, data, pieces.folder / "samples" / task.data, task.name)
    measured = trainer.evaluate(data["held_out"], metrics=["fid", "amd", "noise_norm"])
    figures |= {name.removeprefix("eval_"): value for name, value in measured.items()}
    return figures | attack(trainer, script, data)


def train(trainer: MemControlTrainer) -> dict[str, float]:
    """Fine-tune, and measure the CPU seconds a step and the bytes of the adapter's safetensors."""
    started = time.process_time()
    trainer.train()
    seconds = (time.process_time() - started) / trainer.state.global_step
    with tempfile.TemporaryDirectory() as folder:
        trainer.save_model(folder)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
    return {"seconds_per_step": seconds, "adapter_bytes": size}


def attack(trainer: MemControlTrainer, script: ScriptArguments, data: DatasetDict) -> dict[str, Any]:
    """The figures of the audit: a column for each measure, and the canaries that each attack caught."""
    settings = dataclasses.replace(audit_settings(script), num_quality_images=min(72, script.eval_num_images))
    audit = audit_trainer(trainer, data["train"], data["held_out"], settings)
    figures: dict[str, Any] = {}
    for name, measure in audit["measures"].items():
        figures[f"audit_{name}"] = measure["model"]["value"]
        if measure["model"]["low"] is not None:
            figures |= {f"audit_{name}_{end}": measure["model"][end] for end in ("low", "high")}
    figures |= canaries_caught(audit)
    figures["canaries_best"] = best_attack(audit) if audit["canaries"]["planted"] else None
    figures["prompts"] = min(script.audit_num_prompts, audit["images"]["train"])
    return figures


def draw_samples(
    trainer: MemControlTrainer, script: ScriptArguments, data: DatasetDict, folder: Path, name: str
) -> None:
    """Write `<name>.png` with generated images, and `real.png` with the images of the same captions.

    Four captions are of images that are repeated in training, four of held-out images.
    """
    pixels = [image.tobytes() for image in data["train"]["image"]]
    repeated = [row for row in first_rows(pixels) if pixels.count(pixels[row]) > 1]
    shown = [*data["train"].select(repeated[:4]), *data["held_out"].select(range(4))]
    with denoiser_in_place(trainer.pipeline, trainer.model):
        generated = generate(
            trainer.pipeline,
            [row["text"] for row in shown],
            [(script.seed, i) for i in range(len(shown))],
            script.resolution,
            script.eval_inference_steps,
            script.eval_guidance_scale,
        )
    real = to_pixels([row["image"] for row in shown], script.resolution)
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensor in ((name, generated), ("real", real)):
        side_by_side = (torch.cat([*tensor], 2) * 255).round().byte().permute(1, 2, 0)
        PILImage.fromarray(side_by_side.numpy()).save(folder / f"{file}.png")


WORK: dict[str, Callable[[Task, Settings, Pieces], dict[str, Any]]] = {
    "rate": choose_rate,
    "search": search,
    "run": run,
}
