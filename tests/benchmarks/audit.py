"""An audit beside the bare forward passes of its networks."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from memcontrol_hf import audit_memorization, demo_dataset, demo_pipeline
from memcontrol_hf.audit import AuditSettings
from memcontrol_hf.encoders import load_encoder

from .timing import alternate, clock, compared
from .training_step import demo_trainer

SETTINGS = AuditSettings(
    resolution=64, num_prompts=16, images_per_prompt=4, num_quality_images=32, inference_steps=10, guidance_scale=3.0
)
"""Fewer captions than by default, so that a turn takes a minute on a CPU."""

Calls = list[Callable[[], Any]]


@contextmanager
def recorded(*networks: nn.Module) -> Iterator[Calls]:
    """The calls of some networks, to be made again: each with inputs of the same shapes."""
    calls: Calls = []
    inputs: dict[Any, tuple[tuple, dict[str, Any]]] = {}

    def shape(value: Any) -> Any:
        return tuple(value.shape) if isinstance(value, torch.Tensor) else repr(value)

    def record(network: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        key = (id(network), *map(shape, args), *((name, shape(value)) for name, value in kwargs.items()))
        positional, named = inputs.setdefault(key, (args, kwargs))
        calls.append(lambda: network(*positional, **named))

    with ExitStack() as stack:
        for network in networks:
            stack.enter_context(network.register_forward_pre_hook(record, with_kwargs=True))
        yield calls


def rows(pairs: int) -> Iterator[dict[str, Any]]:
    """The row of the page: an audit of an adapter of the demo with both controls.

    Args:
        pairs: At most so many turns of each side; each takes a minute on a CPU, so three do there.
    """
    data = demo_dataset()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = demo_pipeline().to(device)
    pipeline.set_progress_bar_config(disable=True)
    encoder = load_encoder("demo", device)
    networks = [pipeline.unet, pipeline.text_encoder, pipeline.vae.encoder, pipeline.vae.decoder, encoder.model]
    with tempfile.TemporaryDirectory() as folder:
        trainer = demo_trainer("attention", folder)
        trainer.train()
        trainer.save_model()

        def audit() -> None:
            audit_memorization(data["train"], data["held_out"], pipeline, folder, encoder=encoder, settings=SETTINGS)

        with recorded(*networks) as calls:
            audit()

        @torch.no_grad()
        def forwards() -> None:
            for call in calls:
                call()

        sides = {"audit": audit, "bare forwards": forwards}
        pairs = pairs if device.type == "cuda" else min(pairs, 3)
        yield compared("an audit with its controls, the demo", 1.2, alternate(sides, pairs, clock(device)))
