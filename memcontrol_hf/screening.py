"""Screening: one training run with every block on says what each block learns and what it memorizes.

Loss change allocation (Lan et al., NeurIPS 2019, https://huggingface.co/papers/1909.01440) attributes the change of a
loss along a training to the parameters that moved. Each step changes the loss by about `g · Δθ`, the gradient times
the update, and that product is a sum over parameters. Here the products are summed over the parameters of each block,
once for a loss on images that the training does not see, and once for a loss on the training images:

    learns_b    = -Σ_t g_validation(θ_t) · Δθ_{b,t}
    memorizes_b = -Σ_t g_train(θ_t) · Δθ_{b,t} - learns_b

`θ_t` lies in the middle of step `t`. Only every few steps are probed, and each probe stands for as many steps. What
this assumes, and where it failed: docs/screening.md.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, groupby
from operator import add
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from .data import EncodedImages
from .families import Family
from .randomness import Purpose, seeded_generator

VERSION = 1
"""Version of the JSON file of a screening."""
LEAST_SHARE = 0.01
"""Blocks that learn less than this share of what the best block learns are in no mask."""
PROBE_SHARE = 0.25
"""Rows of each of the two probes, as a share of the rows that the training reads from one probe to the next."""


@dataclass
class Screening:
    """What each block learns and memorizes, in units of the denoising loss.

    Args:
        learns (`dict[str, float]`): block name -> how far the block lowers the loss of images that are not trained on.
        memorizes (`dict[str, float]`): block name -> how much further it lowers the loss of the training images.
        learns_error, memorizes_error (`dict[str, float]`): standard errors, over seeds where there are several, else
            over the probes of the one training.
        parameters (`dict[str, int]`): block name -> how many parameters are trained in it.
        settings (`dict`): how it was measured: steps, `every`, learning rate, seeds, rows of a probe.
    """

    learns: dict[str, float]
    memorizes: dict[str, float]
    learns_error: dict[str, float]
    memorizes_error: dict[str, float]
    parameters: dict[str, int]
    settings: dict[str, Any] = field(default_factory=dict)

    def masks(self, n: int) -> list[dict[str, bool]]:
        """At most `n` masks along the trade-off of the additive model, the one that learns most first.

        The model predicts that a mask learns the sum of what its blocks learn, and memorizes the sum of what they
        memorize, where a negative figure counts as 0. A mask is on the front when it has the largest
        `learns - λ · memorizes` for some `λ` from 0 to infinity: a block is on when its ratio of the two is above `λ`,
        so that each block of the front is added at one `λ`, and the masks are nested. Of these masks `n` are taken
        evenly, both ends included. None is empty.

        Raises:
            ValueError: for less than one mask.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, but is {n}")
        least = LEAST_SHARE * max(self.learns.values())
        worth = {block: learnt for block, learnt in self.learns.items() if learnt > max(least, 0.0)}
        if not worth:  # no block lowers the loss: the least harmful one
            worth = {max(self.learns, key=self.learns.get): 0.0}
        free = [block for block in worth if self.memorizes[block] <= 0]
        ratios = {block: learnt / self.memorizes[block] for block, learnt in worth.items() if block not in free}
        paid = groupby(sorted(ratios, key=ratios.get, reverse=True), key=ratios.get)
        front = [*accumulate([free, *([*group] for _, group in paid)], add)]
        front = [{block: block in on for block in self.learns} for on in reversed(front) if on]
        if len(front) <= n:
            return front
        return [front[round(i * (len(front) - 1) / max(1, n - 1))] for i in range(n)]

    def predict(self, mask: Mapping[str, bool]) -> tuple[float, float]:
        """What the additive model says that a mask learns and memorizes."""
        on = [block for block, selected in mask.items() if selected]
        return sum(self.learns[b] for b in on), sum(max(self.memorizes[b], 0.0) for b in on)

    def table(self) -> list[list[str]]:
        """The blocks as rows of text, the head first; `±` is one standard error."""
        rows = [["block", "parameters", "learns", "memorizes"]]
        for block in self.learns:
            learns = f"{self.learns[block]:+.4f} ± {self.learns_error[block]:.4f}"
            memorizes = f"{self.memorizes[block]:+.4f} ± {self.memorizes_error[block]:.4f}"
            rows.append([block, f"{self.parameters[block]:,}", learns, memorizes])
        return rows

    def to_json(self, path: str | Path) -> None:
        """Write the screening."""
        text = json.dumps({"version": VERSION, **asdict(self)}, indent=2, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> "Screening":
        """Read a screening.

        Raises:
            ValueError: when the file holds none, or one of another version.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            version = content.pop("version", None)
            if version != VERSION:
                raise ValueError(f"its version is {version!r}, but this package reads {VERSION}")
            return cls(**content)
        except (OSError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is no screening: {error}") from None


@dataclass
class Probe:
    """Fresh losses of one set of images, for one step of a training after the other.

    The draws of a row depend on the seed, the purpose, the step and the row's number alone, so that a probe does not
    depend on the batch size of its execution, nor on how many processes share its rows.

    Args:
        family ([`~memcontrol_hf.families.Family`]): family of the pipeline.
        data ([`~memcontrol_hf.data.EncodedImages`]): the images; exact copies count once.
        purpose (`Purpose`): keeps the draws of the two sets apart.
        rows (`int`): number of rows of a probe, at most all distinct images.
        batch_size (`int`): number of rows at once; only memory and speed depend on it.
        seed (`int`): random seed.
        rank, world_size (`int`): this process, and how many processes share the rows.
    """

    family: Family
    data: EncodedImages
    purpose: Purpose
    rows: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1

    @property
    def count(self) -> int:
        """Number of rows of a probe."""
        return min(self.rows, len(self.data.distinct))

    def losses(self, denoiser: nn.Module, step: int, encode_captions: bool = False) -> Iterator[torch.Tensor]:
        """The terms of this process in the mean loss of the probe at a step, one for each batch; their sum is it."""
        generator = seeded_generator(self.seed, self.purpose, step)
        order = torch.randperm(len(self.data.distinct), generator=generator).tolist()
        rows = [self.data.distinct[place] for place in order[: self.count]]
        mine, device = rows[self.rank :: self.world_size], next(denoiser.parameters()).device
        for start in range(0, len(mine), self.batch_size):
            batch = mine[start : start + self.batch_size]
            latents = self.data.encoded["latents"][batch].to(device)
            timesteps, noise = [], []
            for row in batch:
                own = seeded_generator(self.seed, self.purpose, step, self.data.numbers[row])
                timesteps.append(self.family.noise.sample_timestep(own))
                noise.append(torch.randn(latents.shape[1:], generator=own))
            if encode_captions:
                condition = self.family.encode_prompts(self.data.captions(batch))
            else:
                condition = self.data.condition(self.family.conditions, batch)
            condition = {name: tensor.to(device) for name, tensor in condition.items()}
            steps, noise = torch.stack(timesteps).to(device), torch.stack(noise).to(device)
            yield self.family.losses(denoiser, latents, condition, steps, noise).sum() / len(rows)


class LossAllocation(TrainerCallback):
    """Multiplies the update of every few steps with the gradients of two losses, block by block.

    Between two probes nothing is added to the training. A probe holds one copy of the trained parameters and takes one
    backward pass at a time. It moves the parameters to the middle of the step, and back.

    Args:
        trained (`Callable`): gives the trained parameters by the name of their block.
        denoiser (`Callable`): gives the model, not wrapped for distribution.
        probes (dict of [`Probe`]): `train` and `validation`.
        every (`int`): steps from one probe to the next.
        encode_captions (`Callable`): says whether captions are encoded anew, because text encoders are tuned.
        reduce (`Callable`): sums a tensor over all processes.
        autocast (`Callable`): context in which the training computes its losses.
        scale (`Callable`): factor by which the training scales its loss against underflow.

    Attributes:
        falls (dict of list of `torch.Tensor`): for each probe, and each step that was probed, the fall of its loss
            that is owed to each block in the `every` steps, `[blocks]`.
        parameters (dict of `int`): number of trained parameters of each block.
    """

    def __init__(
        self,
        trained: Callable[[], dict[str, list[nn.Parameter]]],
        denoiser: Callable[[], nn.Module],
        probes: Mapping[str, Probe],
        every: int,
        encode_captions: Callable[[], bool],
        reduce: Callable[[torch.Tensor], torch.Tensor],
        autocast: Callable[[], Any],
        scale: Callable[[], float],
    ):
        self._trained, self._denoiser, self._probes, self._every = trained, denoiser, probes, every
        self._encode_captions, self._reduce, self._autocast, self._scale = encode_captions, reduce, autocast, scale
        self._copy: list[torch.Tensor] | None = None
        self.falls: dict[str, list[torch.Tensor]] = {name: [] for name in probes}
        self.parameters: dict[str, int] = {}
        self.probe_rows = min(probe.count for probe in probes.values())

    def on_train_begin(self, args, state, control, **kwargs):
        blocks = self._trained()
        self.parameters = {block: sum(p.numel() for p in parameters) for block, parameters in blocks.items()}
        self._flat = [parameter for parameters in blocks.values() for parameter in parameters]
        owners = [number for number, parameters in enumerate(blocks.values()) for _ in parameters]
        self._owners = torch.tensor(owners)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step % self._every == 0:
            self._copy = [parameter.detach().clone() for parameter in self._flat]

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        if self._copy is None:
            return
        updates, self._copy = self._copy, None
        for parameter, copy in zip(self._flat, updates):
            copy.neg_().add_(parameter)  # it is the update from here on
            parameter.sub_(copy, alpha=0.5)
        for name, probe in self._probes.items():
            self.falls[name].append(self._fall(probe, updates, state.global_step))
        for parameter, update in zip(self._flat, updates):
            parameter.add_(update, alpha=0.5)

    def _fall(self, probe: Probe, updates: Sequence[torch.Tensor], step: int) -> torch.Tensor:
        """The fall of a probe's loss that is owed to each block: `[blocks]`, in float64 on the CPU."""
        fall, scale = torch.zeros(len(self.parameters), dtype=torch.float64), self._scale()
        model, encode = self._denoiser(), self._encode_captions()
        with torch.enable_grad():
            with self._autocast():
                losses = probe.losses(model, step, encode)
                loss = next(losses, None)
            while loss is not None:
                gradients = torch.autograd.grad(loss * scale, self._flat, allow_unused=True)
                products = [
                    update.new_zeros((), dtype=torch.float32)
                    if gradient is None
                    else (gradient.float() * update.float()).sum()
                    for gradient, update in zip(gradients, updates)
                ]
                fall.index_add_(0, self._owners, torch.stack(products).double().cpu())
                with self._autocast():
                    loss = next(losses, None)
        return -self._every / scale * self._reduce(fall)


def check_screening(steps: int, every: int, seeds: int, blocks: Sequence[str]) -> None:
    """Raise `ValueError` for numbers that are too small, and for a search space without a choice."""
    if every < 1 or seeds < 1:
        raise ValueError(f"every and seeds must be at least 1, but are {every} and {seeds}")
    if steps < 2 * every:
        raise ValueError(f"a screening of {steps} steps has less than two probes: give {2 * every} steps or more")
    if len(blocks) < 2:
        raise ValueError(f"a screening compares blocks, but there is one only: {', '.join(blocks)}")


def combine(runs: Sequence[LossAllocation]) -> Screening:
    """The screening of one or several trainings, which differ in their seed.

    The standard error is taken over seeds where there are several. For one training it is taken over its probes, by
    their successive differences, since a probe differs from the next more by its own noise than by the steps between.
    """
    falls = [{name: torch.stack(steps) for name, steps in run.falls.items()} for run in runs]
    series = {
        "learns": [fall["validation"] for fall in falls],
        "memorizes": [fall["train"] - fall["validation"] for fall in falls],
    }
    figures: dict[str, dict[str, float]] = {}
    for name, trainings in series.items():
        totals = torch.stack([steps.sum(0) for steps in trainings])
        if len(runs) > 1:
            error = totals.std(0) / len(runs) ** 0.5
        else:
            count = len(trainings[0])
            error = (trainings[0].diff(dim=0).square().sum(0) / 2 * count / (count - 1)).sqrt()
        figures[name] = dict(zip(runs[0].parameters, totals.mean(0).tolist()))
        figures[f"{name}_error"] = dict(zip(runs[0].parameters, error.tolist()))
    return Screening(**figures, parameters=runs[0].parameters)
