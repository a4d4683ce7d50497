"""A stage of the training: its optimizer, its averaged weights, its checkpoint and its messages."""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import nn


class Stage:
    """A stage that goes on from its checkpoint, if there is one.

    Args:
        name: Name of the stage; its checkpoint is `<name>.pt`.
        modules: Modules whose weights stand in the checkpoint, by name.
        parameters: Parameters that are trained.
        ema: Exponential moving average of the parameters.
        steps: Steps of the stage.
        warmup: Steps until the full learning rate, which then falls as a cosine.
        args: The flags of the command: `output_dir`, `checkpointing_steps` and `seed`.
        learning_rate, weight_decay: Settings of AdamW.
    """

    def __init__(
        self,
        name: str,
        modules: dict[str, nn.Module],
        parameters: Sequence[nn.Parameter],
        ema: EMAModel,
        steps: int,
        warmup: int,
        args: argparse.Namespace,
        learning_rate: float,
        weight_decay: float = 1e-4,
    ) -> None:
        self.name, self.parameters, self.ema, self.steps = name, parameters, ema, steps
        self.seed, self.checkpointing_steps = args.seed, args.checkpointing_steps
        self.optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay)
        self.scheduler = get_cosine_schedule_with_warmup(self.optimizer, warmup, steps)
        self._state = {**modules, "ema": ema, "optimizer": self.optimizer, "scheduler": self.scheduler}
        self._file: Path = args.output_dir / f"{name}.pt"
        self._totals: dict[str, float] = {}
        self.first, before = self._resume()
        self._start = time.time() - before

    @property
    def seconds(self) -> float:
        """Seconds spent so far, those before an interruption too."""
        return time.time() - self._start

    def draws(self) -> Iterator[tuple[int, torch.Generator]]:
        """The steps that are left, each with the random generator of the step."""
        for step in range(self.first, self.steps):
            yield step, torch.Generator().manual_seed(self.seed * 1_000_003 + step)

    def update(self, loss: torch.Tensor, processes: int = 1) -> None:
        """One step of the optimizer, with clipped gradients, which are averaged over the processes."""
        self.optimizer.zero_grad()
        loss.backward()
        if processes > 1:
            gradients = torch.cat([parameter.grad.flatten() for parameter in self.parameters])
            torch.distributed.all_reduce(gradients)
            means = (gradients / processes).split([parameter.numel() for parameter in self.parameters])
            for parameter, mean in zip(self.parameters, means):
                parameter.grad.copy_(mean.view(parameter.shape))
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.ema.step(self.parameters)

    def report(self, step: int, every: int, **figures: float) -> None:
        """Print the means of the figures over the last `every` steps."""
        for name, value in figures.items():
            self._totals[name] = self._totals.get(name, 0.0) + value
        if (step + 1) % every == 0:
            means = " ".join(f"{name} {total / every:.4f}" for name, total in self._totals.items())
            print(f"{self.name} {step + 1}/{self.steps} {means} {self.seconds:.0f} s", flush=True)
            self._totals.clear()

    def checkpoint(self, step: int) -> bool:
        """Write the checkpoint when it is due; an interruption leaves the old one. Returns whether it was due."""
        due = (step + 1) % self.checkpointing_steps == 0 or step + 1 == self.steps
        if due:
            content = {name: part.state_dict() for name, part in self._state.items()}
            part = self._file.with_suffix(".tmp")
            torch.save(content | {"step": step + 1, "seconds": self.seconds}, part)
            part.replace(self._file)
        return due

    def _resume(self) -> tuple[int, float]:
        """Load the checkpoint. Returns the next step and the seconds spent so far."""
        if not self._file.is_file():
            return 0, 0.0
        content = torch.load(self._file, weights_only=True)
        for name, part in self._state.items():
            part.load_state_dict(content[name])
        return content["step"], content["seconds"]
