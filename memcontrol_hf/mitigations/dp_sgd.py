"""DP-SGD, differentially private training: the only mitigation with a formal guarantee."""

import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, grad_and_value, vmap
from torch.utils._pytree import tree_map

from ..tuners import MemControlLayer
from .base import Mitigation

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainingArguments

    from ..families import Family

EPSILON_LIMIT = 10.0
"""Largest epsilon of a reasonable guarantee: tier 2 of https://huggingface.co/papers/2303.00654, section 5.2.1."""
STATE_NAME = "dp_sgd.json"
"""File in each checkpoint with the secret key and the accountant's history. It must stay as private as the images."""

_ROWS, _NOISE = range(2)


@dataclass
class DPSGD(Mitigation):
    """DP-SGD of Abadi et al. (https://huggingface.co/papers/1607.00133) on the adapter's parameters, with Opacus.

    `g = (Σ_i clip(∇_θ L_i, C) + σ C · n) / B`, `n ~ N(0, 1)`: the gradient of each row is clipped to the norm `C`, and
    noise is added to the sum over the rows of a step. A step draws each row with the probability `B / N` (Poisson
    sampling), as the accountant assumes; `B` is the batch size times the number of accumulated batches.

    The guarantee is `(ε, δ)` by Opacus' RDP accountant. It compares the training with a training that lacks one *row*.
    An image in four rows, or a patient with four images, is protected less: as with four times the ε and a larger δ.
    The guarantee covers the adapter's weights. It covers neither the search of a mask and a learning rate on the
    training images, nor the figures of the report that are measured on them.

    - Cost: no further forward pass, but one gradient for each row of a batch, each as large as the adapter.
    - Against: every attack on the weights, up to ε, while the key of the noise is secret (see `STATE_NAME`).
    - Not against: what the base model knows, and several rows of one person. An ε above `EPSILON_LIMIT` guarantees
      practically nothing.

    Args:
        epsilon (`float`, *optional*):
            Budget ε of the whole training; the noise is computed from it. 8 when `noise_multiplier` is not given.
        delta (`float`):
            Probability δ of the guarantee, below 1 over the number of rows.
        max_grad_norm (`float`):
            Clipping norm `C`. A usual value is the median norm of a row's gradient, which depends on what is tuned.
        noise_multiplier (`float`, *optional*):
            Noise `σ`, given instead of `epsilon`, which is then computed from it.
    """

    usage = (
        "dp_sgd[:epsilon=8,delta=1e-5,max_grad_norm=0.1], or noise_multiplier=1, at least 0.01, instead of epsilon; "
        "numbers above 0, delta below 1"
    )
    epsilon: float | None = None
    delta: float = 1e-5
    max_grad_norm: float = 0.1
    noise_multiplier: float | None = None

    def __post_init__(self) -> None:
        if self.epsilon is not None and self.noise_multiplier is not None:
            raise ValueError(f"epsilon is {self.epsilon} and noise_multiplier is {self.noise_multiplier}")
        if self.epsilon is None and self.noise_multiplier is None:
            self.epsilon = 8.0
        for name, value in vars(self).items():
            if value is not None and not 0 < value < (1 if name == "delta" else math.inf):
                raise ValueError(f"{name} is {value}")
        if self.noise_multiplier is not None and self.noise_multiplier < 0.01:
            raise ValueError(f"noise_multiplier is {self.noise_multiplier}, which is no noise")

    def check_arguments(self, args: "TrainingArguments", others: Mapping[str, Mitigation]) -> None:
        """Raise `ValueError` when Opacus is missing, or when the guarantee would not hold with these arguments."""
        if find_spec("opacus") is None:
            raise ValueError("dp_sgd needs Opacus, which is not installed: pip install 'memcontrol_hf[dp]'")
        wrong = {
            "the mitigation threshold, with which rows influence each other": "threshold" in others,
            "the mitigation skip_low_loss, with which rows influence each other": "skip_low_loss" in others,
            "the mitigation early_stop, which measures the training images": "early_stop" in others,
            "ignore_data_skip, with which a resumed training draws the same rows again": args.ignore_data_skip,
            "load_best_model_at_end, which may choose by the training images": args.load_best_model_at_end,
            "a schedule that goes by evaluations": args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"),
            "num_train_epochs in the place of max_steps": args.max_steps < 1,
            "several processes": args.world_size > 1,
            "mixed precision": args.fp16 or args.bf16 or os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no",
            "gradient checkpointing": args.gradient_checkpointing or args.activation_checkpointing,
            "torch_compile": args.torch_compile,
            "the Trainer's own push_to_hub, whose checkpoints hold the key of the noise": args.push_to_hub,
            "auto_find_batch_size, since epsilon depends on the batch size": args.auto_find_batch_size,
        }
        found = [name for name, is_so in wrong.items() if is_so]
        if found:
            raise ValueError(
                f"dp_sgd cannot be combined with {' and '.join(found)}: train on one device in float32, with "
                "smaller batches and gradient_accumulation_steps where memory is short"
            )
        args.max_grad_norm = 0.0  # DP-SGD clips the gradients before it adds the noise

    def check(self, family: "Family", images: "Dataset", args: "TrainingArguments", tunes_text: bool) -> None:
        if tunes_text:
            raise ValueError("text encoder blocks cannot be trained with dp_sgd: leave them out")

    def private_training(self, rows: int, batch_size: int, parts: int, steps: int) -> "PrivateGradients":
        return PrivateGradients(self, rows, batch_size, parts, steps)


class PrivateGradients:
    """The row draws, the noise and the privacy accounting of one training. As a batch sampler, it yields row numbers.

    The draws depend on a secret key from the operating system instead of the seed. The seed is published, and whoever
    can compute the noise can subtract it. Draws depend only on the key and the step, so that a resumed training is
    exactly the same.

    Args:
        dp_sgd ([`DPSGD`]): arguments of the mitigation.
        rows (`int`): number of training rows.
        batch_size (`int`): number of rows that a step draws on average.
        parts (`int`): number of batches in which the rows of a step are read: `gradient_accumulation_steps`.
        steps (`int`): number of steps in the whole training.

    Raises:
        ValueError: for batches larger than the data, and a delta that would allow a whole row to be published.
    """

    def __init__(self, dp_sgd: DPSGD, rows: int, batch_size: int, parts: int, steps: int):
        from opacus.accountants import RDPAccountant

        if batch_size > rows:
            raise ValueError(f"dp_sgd draws {batch_size} of {rows} rows a step: use a batch size of at most {rows}")
        if dp_sgd.delta * rows >= 1:
            raise ValueError(f"dp_sgd: delta is {dp_sgd.delta:g}, but must be below 1 / {rows}, the number of rows")
        self.rows, self.batch_size, self.parts, self.steps = rows, batch_size, parts, steps
        self.delta, self.max_grad_norm = dp_sgd.delta, dp_sgd.max_grad_norm
        self.sample_rate = batch_size / rows
        self.noise_multiplier = dp_sgd.noise_multiplier or _noise_multiplier(
            dp_sgd.epsilon, dp_sgd.delta, self.sample_rate, steps
        )
        self.key = secrets.randbits(128)
        self.accountant = RDPAccountant()
        self.optimizer = None

    def __len__(self) -> int:
        return self.steps * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.steps):
            drawn = np.flatnonzero(self._draws(_ROWS, step).random(self.rows) < self.sample_rate)
            yield from (part.tolist() for part in np.array_split(drawn, self.parts))

    def _draws(self, purpose: int, step: int) -> np.random.Generator:
        """The generator of the rows or of the noise of a step. It depends on all 128 bits of the key.

        A generator of PyTorch on the CPU is seeded with 32 bits, so that its noise could be found by trying all seeds.
        """
        return np.random.Generator(np.random.Philox(key=self.key, counter=[0, 0, step, purpose]))

    # ---- the gradients ----

    def start(self, model: nn.Module) -> None:
        """Set up Opacus for a model, and keep a copy of its trainable parameters before the first step."""
        from opacus.optimizers import DPOptimizer

        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.before = {name: p.detach().clone() for name, p in self.parameters.items()}
        # Only the clipping and accounting of Opacus are used: its noise has the generators of PyTorch, see `_draws`,
        # and the Trainer's own optimizer makes the step.
        self.optimizer = DPOptimizer(
            torch.optim.SGD(self.parameters.values(), lr=1.0),
            noise_multiplier=0.0,
            max_grad_norm=self.max_grad_norm,
            expected_batch_size=self.batch_size,
        )

    def backward(
        self, model: nn.Module, loss_function: Callable, batch: dict[str, Any], step: int, last: bool
    ) -> torch.Tensor:
        """Add the clipped gradients of a batch to those of its step; after the last batch, set the parameters' `grad`.

        Args:
            model (`nn.Module`): model with the adapter.
            loss_function (`Callable`): function from a denoiser and a batch to losses `[N]`; see
                [`~memcontrol_hf.families.Family.losses`].
            batch (`dict`): arguments of `loss_function` beside the denoiser, tensors `[N, ...]`; empty when no row was
                drawn.
            step (`int`): number of the step, from 0.
            last (`bool`): whether the batch is the last one of the step.

        Returns:
            `torch.Tensor`: sum of the losses divided by the batch size, for the log.
        """
        if self.optimizer is None:
            self.start(model)
        self.optimizer.zero_grad(set_to_none=True)
        if batch:
            gradients, losses = per_sample_gradients(model, self.parameters, loss_function, batch)
        else:
            gradients = {name: p.new_zeros(0, *p.shape) for name, p in self.parameters.items()}
            losses = next(iter(self.parameters.values())).new_zeros(0)
        for name, parameter in self.parameters.items():
            parameter.grad_sample = gradients[name]
        self.optimizer.signal_skip_step(not last)
        if self.optimizer.pre_step():  # False while further batches of this step follow
            draws, deviation = self._draws(_NOISE, step), self.noise_multiplier * self.max_grad_norm / self.batch_size
            for parameter in self.parameters.values():
                noise = draws.standard_normal(parameter.shape, dtype=np.float32)
                parameter.grad += deviation * torch.from_numpy(noise).to(parameter.grad)
            self.accountant.step(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate)
        for parameter in self.parameters.values():
            parameter.grad_sample = None  # frees memory: one gradient for each row
        return losses.sum() / self.batch_size

    def check_layers(self, model: nn.Module, loss_function: Callable, batch: dict[str, Any]) -> None:
        """Raise `ValueError` for parameters of low precision, and for layers without gradients of each row."""
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if rounded := sorted({str(p.dtype) for p in parameters.values() if p.dtype != torch.float32}):
            raise ValueError(
                f"dp_sgd trains parameters of {', '.join(rounded)} here, whose clipped sum is rounded before the "
                "noise is added, so that a row can count for more than max_grad_norm: load the base in float32, or "
                "use a method whose parameters are in float32"
            )
        try:
            per_sample_gradients(model, parameters, loss_function, batch)
        except RuntimeError as error:
            raise ValueError(
                "dp_sgd cannot compute the gradient of each row for this method, whose layers torch.func cannot "
                "transform: use svdiff, difffit, attention, weights, norm, bias or lora"
            ) from error

    def check_moved(self) -> None:
        """Raise `RuntimeError` when the steps left every weight as it was."""
        if self.optimizer is not None and all(torch.equal(self.before[n], p) for n, p in self.parameters.items()):
            raise RuntimeError(
                "dp_sgd: the training left the adapter's weights as they were, so its epsilon would say nothing: "
                "see that the learning rate is above 0"
            )

    # ---- privacy accounting ----

    def report(self) -> dict[str, Any]:
        """The epsilon that the steps so far have spent, and what it was computed from."""
        epsilon = self.accountant.get_epsilon(self.delta)
        return {
            "epsilon": epsilon,
            "delta": self.delta,
            "says_something": epsilon <= EPSILON_LIMIT,
            "epsilon_limit": EPSILON_LIMIT,
            "accountant": "Opacus, RDP",
            "unit": "one row of the training data",
            "noise_multiplier": self.noise_multiplier,
            "max_grad_norm": self.max_grad_norm,
            "sample_rate": self.sample_rate,
            "steps": sum(steps for _, _, steps in self.accountant.history),
        }

    def save(self, checkpoint: str | Path) -> None:
        """Write the key and the accountant's history into a checkpoint's folder, readable for the owner only."""
        file = Path(checkpoint) / STATE_NAME
        file.touch(mode=0o600)
        file.write_text(json.dumps({"key": self.key, "history": self.accountant.history}), encoding="utf-8")

    def load(self, checkpoint: str | Path) -> None:
        """Go on with the key and the accountant's history of a checkpoint.

        Raises:
            ValueError: when the checkpoint was written without DP-SGD, or with other noise: the noise for a budget ε
                depends on the number of steps, so the budget would not hold with more of them. And since the key is
                the same, so are the draws: the difference of two models that were trained further with different
                noise would give away what the noise hides.
        """
        file = Path(checkpoint) / STATE_NAME
        if not file.exists():
            raise ValueError(
                f"the checkpoint {checkpoint} was not trained with dp_sgd, so epsilon cannot cover its steps: start "
                "anew, or resume without dp_sgd"
            )
        state = json.loads(file.read_text(encoding="utf-8"))
        for noise, rate, steps in state["history"]:
            if (noise, rate) != (self.noise_multiplier, self.sample_rate):
                raise ValueError(
                    f"the checkpoint {checkpoint} has made {steps} steps of dp_sgd with the noise multiplier "
                    f"{noise:g} and the sample rate {rate:g}, but these settings need {self.noise_multiplier:g} and "
                    f"{self.sample_rate:g}: resume with the number of steps and the budget that the training began "
                    "with, or start anew"
                )
        self.key = state["key"]
        self.accountant.history = [tuple(entry) for entry in state["history"]]


@cache  # Opacus searches the value for seconds
def _noise_multiplier(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    from opacus.accountants.utils import get_noise_multiplier

    try:
        return get_noise_multiplier(target_epsilon=epsilon, target_delta=delta, sample_rate=sample_rate, steps=steps)
    except ValueError:
        raise ValueError(f"dp_sgd: no noise gives epsilon {epsilon:g} in {steps} steps: use a larger one") from None


def per_sample_gradients(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], loss_function: Callable, batch: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The gradient of each row's loss with respect to `parameters`, `[N, ...]` for each of them, and the losses `[N]`.

    Each row passes through the model as a batch of one, so that no row can influence the gradient of another.

    Raises:
        RuntimeError: when torch.func cannot transform the model's layers.
    """
    for module in model.modules():
        if isinstance(module, MemControlLayer):
            module.cache_factors()

    def loss_of(values: dict[str, torch.Tensor], row: dict[str, Any]) -> torch.Tensor:
        def denoiser(*args: Any, **kwargs: Any) -> Any:
            return functional_call(model, values, args, kwargs)

        return loss_function(denoiser, **tree_map(lambda tensor: tensor[None], row))[0]

    values = {name: parameter.detach() for name, parameter in parameters.items()}
    batch = {name: tensors for name, tensors in batch.items() if tensors is not None}
    return vmap(grad_and_value(loss_of), in_dims=(None, 0), randomness="different")(values, batch)
