"""Peak memory beside a bare loop, each side in a process of its own."""

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from peft import get_peft_model

from common.memory import peak_memory
from memcontrol_hf import SearchSpace, demo_dataset, demo_pipeline
from memcontrol_hf.from_flags import METHODS

from .evaluation import bare_forwards
from .timing import compared
from .training_step import METHOD_NAMES, demo_trainer, sd15_like, sd15_trainer

MIB = 2**20
STEPS = 3
SHAPES = {"the demo": demo_trainer, "Stable Diffusion 1.5's layout": sd15_trainer}


def peak(work: Callable[[], None]) -> float:
    """Peak memory of some work in MiB, beyond what a process holds before it; on a GPU, the GPU's."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / MIB
    torch.set_num_threads(1)
    before, most = peak_memory(work)
    return most - before


def bare_loop(shape: str, method: str) -> None:
    """Some steps of forward, backward and AdamW on random tensors, with the adapter in all blocks."""
    on_gpu = torch.cuda.is_available()
    demo = shape == "the demo"
    pipeline = demo_pipeline() if demo else sd15_like(320 if on_gpu else 64)
    batch, config = 32 if demo else 8 if on_gpu else 1, pipeline.unet.config
    device = torch.device("cuda" if on_gpu else "cpu")
    space = SearchSpace.from_model(pipeline.unet)
    adapter = space.apply(METHODS[method][0], space.mask(True))
    model = get_peft_model(pipeline.unet, adapter).to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    latents = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size, device=device)
    states = torch.randn(batch, pipeline.tokenizer.model_max_length, config.cross_attention_dim, device=device)
    times = torch.zeros(batch, dtype=torch.long, device=device)
    for _ in range(STEPS):
        loss = (model(latents, times, encoder_hidden_states=states).sample - latents).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def training(shape: str, method: str) -> None:
    """The same steps by the trainer, images and captions encoded before."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = SHAPES[shape](method, folder)
        trainer.args.max_steps = STEPS
        trainer.train()


def screening(shape: str, method: str) -> None:
    """A screening with probes in two steps."""
    with tempfile.TemporaryDirectory() as folder:
        SHAPES[shape](method, folder).screen(4, every=2)


def search(shape: str, method: str) -> None:
    """A search of six trials, after a screening, by loss and membership AUC."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = SHAPES[shape](method, folder)
        trainer.args.max_steps, trainer.args.objectives = STEPS, ["loss", "membership_auc"]
        trainer.hyperparameter_search(
            n_trials=6, direction=["minimize", "minimize"], learning_rate_range=(1e-4, 1e-3), screen_steps=4
        )


def evaluation() -> None:
    """The losses and the AUC of a trial of the demo."""
    data = demo_dataset()
    with tempfile.TemporaryDirectory() as folder:
        trainer = demo_trainer("attention", folder, data["train"], data["validation"])
        trainer.measure(["loss", "membership_auc"], trainer.train_dataset, trainer.encode(trainer.eval_dataset))


def bare_evaluation() -> None:
    """The bare forward passes of one batch after another."""
    bare_forwards(128, 1, 32, torch.device("cuda" if torch.cuda.is_available() else "cpu"))()


def in_processes(sides: dict[str, Callable[[], None]], pairs: int) -> dict[str, list[float]]:
    """Peaks of each side in MiB, `pairs` times in turn, each in a fresh process.

    One turn before them is not counted: it may find no latents and conditions of its images in the cache.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(pairs + 1):
        for name, work in sides.items():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                most = pool.apply(peak, (work,))
            if turn:
                found[name].append(most)
    return found


def rows(pairs: int) -> Iterator[dict[str, Any]]:
    """The rows of the page.

    Args:
        pairs: At most so many processes of each side; two do, since they differ little.
    """
    pairs = min(pairs, 2)

    def row(name: str, sides: dict[str, Callable[[], None]]) -> dict[str, Any]:
        return compared(f"peak memory, {name}", 1.1, in_processes(sides, pairs), unit="MiB")

    for shape in SHAPES:
        for method in METHOD_NAMES:
            bare = partial(bare_loop, shape, method)
            yield row(f"training, {shape}, {method}", {"trainer": partial(training, shape, method), "bare loop": bare})
    for work, shape in ((screening, "the demo"), (screening, "Stable Diffusion 1.5's layout"), (search, "the demo")):
        sides = {work.__name__: partial(work, shape, "attention"), "bare loop": partial(bare_loop, shape, "attention")}
        yield row(f"{work.__name__}, {shape}, attention", sides)
    yield row("losses of a trial, the demo", {"evaluation": evaluation, "bare forwards": bare_evaluation})
