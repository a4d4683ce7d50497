"""What a trial's losses cost beside the bare forward passes, and what a larger batch would save."""

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch

from memcontrol_hf import demo_dataset, demo_pipeline
from memcontrol_hf.families import family_of

from .timing import alternate, clock, compared
from .training_step import demo_trainer

LARGER = 128
"""Batch size beside that of the evaluation, which is 32."""


def bare_forwards(images: int, timesteps: int, batch_size: int, device: torch.device) -> Callable[[], None]:
    """Nothing but the forward passes for as many images and timesteps, of the denoiser without an adapter."""
    family = family_of(demo_pipeline().to(device))
    denoiser, config = family.denoiser.eval(), family.denoiser.config
    latents = torch.randn(images, config.in_channels, config.sample_size, config.sample_size, device=device)
    condition = family.encode_prompts([""] * images)
    steps = torch.zeros(images, dtype=torch.long, device=device)

    @torch.no_grad()
    def forwards() -> None:
        for _ in range(timesteps):
            for start in range(0, images, batch_size):
                part = slice(start, start + batch_size)
                family.denoise(denoiser, latents[part], steps[part], {n: t[part] for n, t in condition.items()})

    return forwards


def rows(pairs: int) -> Iterator[dict[str, Any]]:
    """The rows of the page.

    Args:
        pairs: At most so many turns of each side; each takes seconds on a CPU, so ten do there.
    """
    data = demo_dataset()
    with tempfile.TemporaryDirectory() as folder:
        trainer = demo_trainer("svdiff", folder, data["train"], data["validation"])
        device = trainer.args.device
        pairs = pairs if device.type == "cuda" else min(pairs, 10)
        train, others = trainer.train_dataset, trainer.encode(trainer.eval_dataset)
        work = (len(train.distinct) + len(others.distinct), trainer.args.eval_num_timesteps)
        sides = {
            "losses and AUC": lambda: trainer.measure(["loss", "membership_auc"], train, others),
            "bare forwards": bare_forwards(*work, trainer.args.per_device_eval_batch_size, device),
        }
        yield compared("losses and AUC of a trial, the demo", 1.1, alternate(sides, pairs, clock(device)))

        def figures(batch_size: int) -> None:
            trainer.args.per_device_eval_batch_size = batch_size
            trainer.measure(["loss", "membership_auc", "fid"], train, others)

        sides = {"batches of 32": lambda: figures(32), f"of {LARGER}": lambda: figures(LARGER)}
        seconds = alternate(sides, min(pairs, 5), clock(device))
        yield compared(f"all figures of a trial in batches of 32, not {LARGER}", 1.1, seconds)
    sides = {"batches of 32": bare_forwards(256, 1, 32, device), f"of {LARGER}": bare_forwards(256, 1, LARGER, device)}
    seconds = alternate(sides, pairs, clock(device))
    yield compared(f"bare forward passes in batches of 32, not {LARGER}", 1.1, seconds)
