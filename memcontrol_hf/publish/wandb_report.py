"""The report, the plot and sample images in a run of Weights & Biases."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..adapter_folder import PLOT, PUBLIC_FILES, REPORT
from ..masks import block_map
from ..metrics import nearest_distances
from ..sampling import denoiser_in_place, generate
from ..tracking import current_run

if TYPE_CHECKING:
    from datasets import Dataset

    from ..report import MemorizationReport
    from ..trainer import MemControlTrainer


_SHOWN = 200  # the purpose of these images' seeds; the trainer's own are below 100, the audit's below 200


def log_report(report: "MemorizationReport", folder: str | Path) -> None:
    """Put the report into the current run, if there is one.

    The front and what each block does are tables and a plot there, the block map a table, and the report an artifact.
    With `WANDB_LOG_MODEL` set, as the Trainer's own callback reads it, the files that may be published are an artifact
    too.

    Args:
        folder (`str`): that the report was written to.
    """
    folder, run = Path(folder), current_run()
    if run is None:
        return
    import wandb

    logged: dict[str, Any] = {
        "block_map": wandb.Table(["part", "blocks"], data=[list(r) for r in block_map(report.mask)])
    }
    if report.search:
        objectives = report.search["objectives"]
        columns = ["trial", *objectives, "learning_rate", "blocks", "trainable_percent", "on_front"]
        rows = [
            [t["number"], *t["values"], *(t[name] for name in columns[1 + len(objectives) :])]
            for t in report.search["trials"]
        ]
        logged["front"] = wandb.Table(columns, data=rows)
        effects = [[block, report.mask[block], *values] for block, values in report.search["block_effects"].items()]
        logged["block_effects"] = wandb.Table(["block", "selected", *objectives], data=effects)
    if (folder / PLOT).is_file():
        logged["front_plot"] = wandb.Image(str(folder / PLOT))
    run.log(logged)
    artifact = wandb.Artifact("memorization-report", type="report")
    artifact.add_file(str(folder / REPORT))
    run.log_artifact(artifact)
    passed = report.gate is not None and report.gate["passed"]
    if passed and os.getenv("WANDB_LOG_MODEL", "false").lower() not in ("false", "0"):
        artifact = wandb.Artifact("adapter", type="model")
        for name in PUBLIC_FILES:
            if (folder / name).is_file():
                artifact.add_file(str(folder / name), name=name)
        run.log_artifact(artifact)


def log_images(trainer: "MemControlTrainer", held_out: "Dataset", prompt: str, count: int) -> None:
    """Show what the model makes of a prompt in the current run, if there is one, without what may be a copy.

    An image is withheld unless [`clear_of_copies`] clears it.

    Args:
        held_out (`Dataset`): real images of the domain that nothing was trained on.
        prompt (`str`): one that may be published.
        count (`int`): images to generate.
    """
    run = current_run()
    if run is None or not count:
        return
    import wandb

    args = trainer.args
    with denoiser_in_place(trainer.pipeline, trainer.model):
        images = generate(
            trainer.pipeline,
            [prompt] * count,
            [(args.seed, _SHOWN, i) for i in range(count)],
            args.resolution,
            args.eval_inference_steps,
            args.eval_guidance_scale,
            args.per_device_eval_batch_size,
        )
    train, others = (trainer.real_features(data) for data in (trainer.train_dataset, trainer.encode(held_out)))
    cleared = images[clear_of_copies(trainer.encoder(images), train, others)]
    pixels = (cleared * 255).round().byte().permute(0, 2, 3, 1)
    if len(cleared):
        run.log({"generated": [wandb.Image(image.numpy(), caption=prompt) for image in pixels]})
    run.summary["generated_withheld"] = count - len(cleared)


def clear_of_copies(generated: torch.Tensor, train: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Which generated images are no nearer to a training image than 99 % of other real images are.

    Args:
        generated, train, others (`torch.Tensor`): features `[M, D]`, `[N, D]`, `[K, D]`.

    Returns:
        `torch.Tensor`: bool `[M]`.
    """
    return nearest_distances(generated, train) > torch.quantile(nearest_distances(others, train), 0.01)
