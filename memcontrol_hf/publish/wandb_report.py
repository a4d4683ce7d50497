"""The report, the plot and sample images in the current run of Weights & Biases."""

import os
from pathlib import Path
from typing import Any

import torch

from ..adapter_folder import PLOT, PUBLIC_FILES, REPORT
from ..masks import block_map
from ..metrics import nearest_distances
from ..report import MemorizationReport
from ..tracking import current_run, tolerated


@tolerated("the report cannot be put into the tracker's run")
def log_report(report: MemorizationReport, folder: str | Path) -> None:
    """Put a report into the current run, if there is one.

    The run gets the trials of the search with the front, the effects of the blocks, the screening and the block map as
    tables, the plot as an image, and the report as an artifact. With `WANDB_LOG_MODEL` set, as the Trainer's own
    callback reads this variable, the files that may be published are an artifact too, if the release gate passed.

    Args:
        report ([`MemorizationReport`]): Report of the adapter.
        folder (`str`): Folder that the report was written to.
    """
    folder, run = Path(folder), current_run()
    if run is None:
        return
    import wandb

    logged: dict[str, Any] = {
        "block_map": wandb.Table(["part", "blocks"], data=[list(row) for row in block_map(report.mask)])
    }
    if report.search:
        objectives = report.search["objectives"]
        columns = ["trial", *objectives, "learning_rate", "blocks", "trainable_percent", "on_front"]
        rows = [
            [trial["number"], *trial["values"], *(trial[name] for name in columns[1 + len(objectives) :])]
            for trial in report.search["trials"]
        ]
        logged["front"] = wandb.Table(columns, data=rows)
        effects = [[block, report.mask[block], *values] for block, values in report.search["block_effects"].items()]
        logged["block_effects"] = wandb.Table(["block", "selected", *objectives], data=effects)
    if report.screening:
        sides = ("learns", "learns_error", "memorizes", "memorizes_error")
        rows = [
            [block, report.mask.get(block, False), *(report.screening[side][block] for side in sides)]
            for block in report.screening["learns"]
        ]
        logged["screening"] = wandb.Table(["block", "selected", *sides], data=rows)
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


@tolerated("images cannot be put into the tracker's run")
def log_images(
    images: torch.Tensor,
    prompt: str,
    features: torch.Tensor,
    train_features: torch.Tensor,
    held_out_features: torch.Tensor,
) -> None:
    """Show generated images in the current run, if there is one, without those that may be copies.

    An image is withheld unless [`clear_of_copies`] clears it; the run's summary says how many were withheld.

    Args:
        images (`torch.Tensor`): Images `[M, 3, H, W]` in [0, 1] that the tuned model made of the prompt.
        prompt (`str`): Prompt that may be published.
        features, train_features, held_out_features (`torch.Tensor`): Features of these images `[M, D]`, of the
            training images `[N, D]`, and of real images that nothing was trained on `[K, D]`.
    """
    run = current_run()
    if run is None:
        return
    import wandb

    cleared = images[clear_of_copies(features, train_features, held_out_features)]
    pixels = (cleared * 255).round().byte().permute(0, 2, 3, 1)
    if len(cleared):
        run.log({"generated": [wandb.Image(image.numpy(), caption=prompt) for image in pixels]})
    run.summary["generated_withheld"] = len(images) - len(cleared)


def clear_of_copies(
    features: torch.Tensor, train_features: torch.Tensor, held_out_features: torch.Tensor
) -> torch.Tensor:
    """Which generated images are no nearer to a training image than 99 % of other real images are.

    Args:
        features, train_features, held_out_features (`torch.Tensor`): Features of the generated images `[M, D]`, of
            the training images `[N, D]`, and of real images that nothing was trained on `[K, D]`.

    Returns:
        `torch.Tensor`: bool `[M]`.
    """
    limit = torch.quantile(nearest_distances(held_out_features, train_features), 0.01)
    return nearest_distances(features, train_features) > limit
