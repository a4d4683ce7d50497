"""The probes of a screening: how much each block's update in one step lowers the loss on two sets of images."""

from collections.abc import Callable, Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback

from ..data import EncodedImages
from ..families import Family
from ..randomness import Purpose, seeded_generator
from ..search_space import SearchSpace
from ..training_loss import TrainingLoss


class ProbeImages:
    """One set of images that probes draw from.

    The loss of a probe is the plain denoising loss: without what the training arguments change (dropped captions,
    min-SNR weights) and without mitigations, since the attacks and the evaluation measure the plain loss, too. The
    timesteps of a probe have the distribution of training, but are stratified: the schedule is cut into as many equal
    parts as there are rows, and each row has the timestep at the same random place of another part. Most of the
    variance of a probe comes from the timesteps, and less of it is left so (docs/screening.md has the figures).

    Args:
        data ([`~memcontrol_hf.data.EncodedImages`]): images with their latents and conditions.
        purpose ([`~memcontrol_hf.randomness.Purpose`]): purpose of the draws; each set has its own.
        family ([`~memcontrol_hf.families.Family`]): family of the pipeline.
        seed (`int`): random seed of the draws.
        device (`torch.device`): device of the denoiser.
        encode_captions (`bool`): encode the captions anew, because text encoders are tuned.
        count (`int`): number of images that a probe draws; all of them where the set has fewer.
    """

    def __init__(
        self,
        data: EncodedImages,
        purpose: Purpose,
        family: Family,
        seed: int,
        device: torch.device,
        encode_captions: bool,
        count: int,
    ):
        self._data, self._purpose, self._seed, self._count = data, purpose, seed, count
        self._family = family
        self._device, self._encode_captions = device, encode_captions
        self._columns = ("latents", *family.conditions)
        self._loss = TrainingLoss(family, [], data.images, data.numbers)

    def rows(self, step: int) -> list[int]:
        """The distinct images that the probe of a step draws, without repeats."""
        distinct = self._data.distinct
        order = torch.randperm(len(distinct), generator=seeded_generator(self._seed, self._purpose, step))
        return [distinct[i] for i in order[: self._count].tolist()]

    def timesteps(self, step: int) -> dict[int, torch.Tensor]:
        """The timestep `[]` of each row that the probe of a step draws."""
        rows = self.rows(step)
        place = torch.rand((), generator=seeded_generator(self._seed, self._purpose, step)).item()
        return {row: self._family.noise.timestep_at((part + place) / len(rows)) for part, row in enumerate(rows)}

    def losses(self, model: nn.Module, rows: Sequence[int], step: int) -> torch.Tensor:
        """The losses of some rows by the draws of a step, which depend on nothing but the step and the row: `[N]`."""
        columns, timesteps = self._data.batch(rows), self.timesteps(step)
        batch = self._loss.draw(
            {name: columns[name].to(self._device) for name in self._columns} | {"row": columns["row"].tolist()},
            self._seed,
            step,
            _no_null,
            encode_captions=self._encode_captions,
            purpose=self._purpose,
            timesteps=[timesteps[row] for row in rows],
        )
        return self._loss(model, batch, _no_null)


def _no_null() -> None:
    """The null condition, which no probe reads, since no caption is dropped."""


def parameters_by_block(family: Family, space: SearchSpace) -> list[tuple[nn.Parameter, int]]:
    """The parameters that the adapters train, each with the number of its block in the search space.

    A parameter belongs to the block that names the module around it; where several modules around it are named, to
    the innermost. A parameter that stands in several blocks, because the PEFT method shares it among them, belongs to
    no block and is left out, as is one outside of all blocks.

    Args:
        family ([`~memcontrol_hf.families.Family`]): family of the pipeline, with adapters in its parts.
        space ([`~memcontrol_hf.search_space.SearchSpace`]): the blocks.
    """
    block_of_module = {module: i for i, modules in enumerate(space.blocks.values()) for module in modules}
    found: dict[nn.Parameter, set[int | None]] = {}
    for part in ("", *space.text_encoders):
        for name, parameter in family.parts[part].named_parameters(prefix=part, remove_duplicate=False):
            if parameter.requires_grad:
                while name and name not in block_of_module:
                    name = name.rpartition(".")[0]
                found.setdefault(parameter, set()).add(block_of_module.get(name))
    return [(parameter, *blocks) for parameter, blocks in found.items() if len(blocks) == 1 and None not in blocks]


class BlockProbes(TrainerCallback):
    """Allocates the fall of two losses in a training to the blocks that are trained.

    In a probed step the update of each parameter (what the optimizer step really moved it by, whatever the optimizer,
    the schedule and the gradient scaler are) is multiplied with the gradient of the mean loss of a batch of images,
    taken in the middle of the update: minus the sum over a block is the part of the loss's fall that the block owes
    ("loss change allocation", Lan et al., NeurIPS 2019, https://huggingface.co/papers/1909.01440). Each probed step
    stands for its neighbours. The training itself goes on as if there were no probes.

    Memory: one copy of the trained parameters while a probed step is made, and one backward pass at a time.

    Args:
        sets (list of [`ProbeImages`]): sets of images whose losses are allocated.
        family, space: family of the pipeline, and its blocks.
        stretches (`dict[int, int]`): probed steps, counted from 0, and how many steps each of them stands for.
        batch_size (`int`): number of rows of one backward pass. Only the speed and the memory depend on it.
        accelerator (`Accelerator`): processes that share the rows of a probe, and the gradient scaler.
        measure (`Callable`): gives figures of the model as it is, before the first and after the last step.

    Attributes:
        allocated (list of `torch.Tensor`):
            For each probe `[len(sets), blocks]` in float64 on the CPU: the fall of each set's loss, by block, over the
            steps that the probe stands for.
        sizes (list of `int`): number of trained parameters of each block.
        before, after (`dict[str, float]`): figures before the first and after the last step.

    Raises:
        ValueError: in training, when a product is not finite.
    """

    def __init__(
        self,
        sets: Sequence[ProbeImages],
        family: Family,
        space: SearchSpace,
        stretches: Mapping[int, int],
        batch_size: int,
        accelerator: Accelerator,
        measure: Callable[[], dict[str, float]],
    ):
        self._sets, self._family, self._space, self._stretches = sets, family, space, stretches
        self._batch_size, self._accelerator, self._measure = batch_size, accelerator, measure
        self._kept: list[torch.Tensor] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        # The Trainer begins anew with smaller batches when `auto_find_batch_size` ran out of memory.
        owned = parameters_by_block(self._family, self._space)
        self._parameters = [parameter for parameter, _ in owned]
        owners = [block for _, block in owned]
        self._owners = torch.tensor(owners, dtype=torch.int64, device=self._accelerator.device)
        self.sizes = [0] * len(self._space.blocks)
        for parameter, block in owned:
            self.sizes[block] += parameter.numel()
        self.allocated, self._kept = [], None
        self.before = self._measure()

    def on_step_begin(self, args, state, control, **kwargs):
        # Not only before the optimizer's step: some optimizers move the parameters in the backward pass.
        if state.global_step in self._stretches:
            self._kept = [parameter.detach().clone() for parameter in self._parameters]

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self._kept is None:
            return
        step, ends = state.global_step, self._kept
        for parameter in self._parameters:
            parameter.grad = None  # the optimizer has used them, and the Trainer would clear them next
        with torch.no_grad():
            for parameter, end in zip(self._parameters, ends):
                middle = torch.lerp(end, parameter, 0.5)
                end.copy_(parameter)
                parameter.copy_(middle)
        model.eval()  # dropout would draw from the global random state
        products = torch.stack([self._products(images, model, step, ends) for images in self._sets])
        model.train()
        with torch.no_grad():
            for parameter, end in zip(self._parameters, ends):
                parameter.copy_(end)
        self._kept = None
        products = self._accelerator.reduce(products, "sum")
        if not products.isfinite().all():
            raise ValueError(f"the losses are not finite in step {step} of the screening: use a lower learning rate")
        self._keep(-self._stretches[step] * products.double().cpu())

    def on_train_end(self, args, state, control, **kwargs):
        self.after = self._measure()

    def _products(
        self, images: ProbeImages, model: nn.Module, step: int, ends: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """This process's part of the sum over rows of gradient times update: as many numbers as `_count`."""
        rows, state = images.rows(step), self._accelerator
        own_rows = rows[state.process_index :: state.num_processes]
        total = torch.zeros(self._count(), device=state.device)
        for start in range(0, len(own_rows), self._batch_size):
            batch = own_rows[start : start + self._batch_size]
            gradients = self._gradients(lambda batch=batch: images.losses(model, batch, step).sum() / len(rows))
            with torch.no_grad():
                self._add(total, gradients, ends)
            del gradients  # the next backward pass has its own
        return total

    def _keep(self, falls: torch.Tensor) -> None:
        """Keep what a probe has found: `[len(sets), _count]`."""
        self.allocated.append(falls)

    def _count(self) -> int:
        """The number of figures that a fall is allocated to: the blocks."""
        return len(self.sizes)

    def _add(
        self, total: torch.Tensor, gradients: Sequence[torch.Tensor | None], ends: Sequence[torch.Tensor]
    ) -> None:
        """Add gradient times update to the totals of the blocks, for each parameter in the middle of its update."""
        values = [
            total.new_zeros(()) if gradient is None else 2 * (gradient * (end - parameter)).sum()
            for gradient, end, parameter in zip(gradients, ends, self._parameters)
        ]
        total.index_add_(0, self._owners, torch.stack(values).to(total))

    def _gradients(self, loss: Callable[[], torch.Tensor]) -> list[torch.Tensor | None]:
        """The gradient of a loss by each parameter; `None` where the loss does not depend on the parameter.

        In float16 the loss is scaled as in training, and less so when the gradients overflow.
        """
        scaler = self._accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        while True:
            gradients = torch.autograd.grad(loss() * scale, self._parameters, allow_unused=True)
            if scale <= 1 or all(g is None or bool(g.isfinite().all()) for g in gradients):
                return [g if g is None or scale == 1 else g / scale for g in gradients]
            scale /= 4


class SingularValueProbes(BlockProbes):
    """Allocates the falls to each single singular value that SV-DIFF shifts, and their sums to the blocks.

    Attributes:
        by_singular_value (`torch.Tensor`):
            `[len(sets), singular values]`, the sums over the probes, in the order of `modules`.
        modules (`dict[str, int]`): full name of each tuned module, and the number of its singular values.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        parts = ("", *self._space.text_encoders)
        named = (pair for part in parts for pair in self._family.parts[part].named_parameters(prefix=part))
        names = {parameter: name.partition(".memcontrol_delta.")[0] for name, parameter in named}
        self.modules = {names[parameter]: parameter.numel() for parameter in self._parameters}
        self.by_singular_value = torch.zeros(len(self._sets), self._count(), dtype=torch.float64)

    def _keep(self, falls: torch.Tensor) -> None:
        self.by_singular_value += falls
        owners = self._owners.cpu().repeat_interleave(torch.tensor([*self.modules.values()]))
        super()._keep(falls.new_zeros(len(falls), len(self.sizes)).index_add_(1, owners, falls))

    def _count(self) -> int:
        return sum(parameter.numel() for parameter in self._parameters)

    def _add(
        self, total: torch.Tensor, gradients: Sequence[torch.Tensor | None], ends: Sequence[torch.Tensor]
    ) -> None:
        products = [
            torch.zeros_like(end) if gradient is None else 2 * gradient * (end - parameter)
            for gradient, end, parameter in zip(gradients, ends, self._parameters)
        ]
        total += torch.cat([product.flatten() for product in products]).to(total)
