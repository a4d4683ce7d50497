"""Whether a mask of single singular values leaks less than one of whole modules, at as many parameters of SV-DIFF.

    python training_scripts/studies/screening_singular.py              # twenty minutes on one core
    python training_scripts/studies/screening_singular.py --collect    # run nothing: judge what is finished

With each seed one training of the demo with SV-DIFF in all modules is probed as in a screening, but the fall of the
losses is allocated to each singular value's shift instead of to each block. The sums over a module are the screening
by module, from the same probes, so that both kinds of masks know the same.

Two masks of modules are taken from the front. Beside each stand as many single singular values: those with the lowest
price, which is what a shift memorizes for each unit that it learns (the rule of `Screening.masks`), and those that
learn most. All are fine-tuned with the same rate, steps and seed, and measured on the held-out images.

Each finished piece is a file in `--output_dir`, so the same command goes on where it stopped. Writes
docs/results/screening_singular.json and .md.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback
from transformers import logging as transformers_logging

from common.intervals import paired_difference
from common.pages import publish_results, read_results, table
from common.pieces import Job, Pieces, add_piece_flags, exit_if_missing, open_pieces
from common.trainers import demo_trainer
from memcontrol_hf import MemControlTrainer, demo_dataset
from memcontrol_hf.flags import ScriptArguments
from memcontrol_hf.from_flags import training_arguments
from memcontrol_hf.screening.probes import BlockProbes
from memcontrol_hf.screening.result import Screening
from memcontrol_hf.screening.run import all_blocks_aside, train_and_probe
from memcontrol_hf.screening.settings import ScreeningSettings
from screened.fine_tunes import fine_tune, measure

COMMAND = "python training_scripts/studies/screening_singular.py"
METHOD, RATE, STEPS, EVERY = "svdiff", 3e-2, 80, 4
SCREENING_SEED = 3000  # of the first screening: no fine-tune has it
MASKS = {"larger": 2, "smaller": 4}
"""Masks of modules that are compared: their places among six along the front, the largest first."""
KINDS = {
    "modules": "whole modules",
    "price": "single singular values, of the lowest price",
    "learns": "single singular values, which learn most",
}
ALL = "all"
FIGURES = ("loss", "auc_loss", "auc_clid", "auc_pia")

Figures = dict[str, Any]


class SingularValueProbes(BlockProbes):
    """Allocates the fall of both losses to each number that is trained, not to blocks."""

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


def shifts(trainer: MemControlTrainer) -> dict[str, nn.Parameter]:
    """The trained shifts of each adapted module, by the module's name."""
    named = trainer.family.parts[""].named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def screen(trainer: MemControlTrainer, seed: int) -> Figures:
    """What each singular value learns and memorizes: lists by the names of the shifts."""
    settings = ScreeningSettings(steps=STEPS, every=EVERY, learning_rate=RATE, seeds=1, seed=SCREENING_SEED + seed)
    images = trainer.train_dataset, trainer.encode(trainer.eval_dataset)
    with all_blocks_aside(trainer, settings):
        probes = train_and_probe(trainer, settings, settings.seed, *images, probes_of=SingularValueProbes)
        sizes = {name: parameter.numel() for name, parameter in shifts(trainer).items()}
    train, unseen = torch.stack(probes.allocated).sum(0)
    ends = np.cumsum(list(sizes.values()))[:-1].tolist()

    def by_shift(values: torch.Tensor) -> dict[str, list[float]]:
        parts = np.split(values.numpy(), ends)
        return {name: [float(f"{value:.4g}") for value in part] for name, part in zip(sizes, parts)}

    return {"learns": by_shift(unseen), "memorizes": by_shift(train - unseen)}


def module_masks(screening: Figures) -> dict[str, dict[str, bool]]:
    """The two masks of whole modules, over the names of their shifts."""
    learns, memorizes = (
        {name: sum(values) for name, values in screening[kind].items()} for kind in ("learns", "memorizes")
    )
    unknown = dict.fromkeys(learns, float("nan"))
    sizes = {name: len(values) for name, values in screening["learns"].items()}
    masks = Screening(learns, memorizes, unknown, unknown, sizes).masks(6)
    return {name: masks[place] for name, place in MASKS.items()}


def chosen(screening: Figures, kind: str, size: str) -> dict[str, torch.Tensor]:
    """Which singular values are tuned: bool `[k]` by the name of the shift."""
    lengths = {name: len(values) for name, values in screening["learns"].items()}
    if kind == ALL:
        return {name: torch.ones(length, dtype=torch.bool) for name, length in lengths.items()}
    mask = module_masks(screening)[size]
    if kind == "modules":
        return {name: torch.full((lengths[name],), on) for name, on in mask.items()}
    number = sum(lengths[name] for name, on in mask.items() if on)
    learns = np.concatenate(list(screening["learns"].values()))
    memorizes = np.concatenate(list(screening["memorizes"].values())).clip(min=0)
    price = np.divide(memorizes, learns, out=np.full_like(learns, np.inf), where=learns > 0)
    order = np.lexsort((-learns, price)) if kind == "price" else np.argsort(-learns, kind="stable")
    on = torch.zeros(len(learns), dtype=torch.bool)
    on[order[:number].copy()] = True
    return dict(zip(lengths, on.split(list(lengths.values()))))


class Only(TrainerCallback):
    """Trains some of the singular values alone: the others have a gradient of 0, and stay where they began, at 0.

    Args:
        trainer: The trainer.
        on: The singular values that are tuned: bool `[k]` by the name of the shift.

    Attributes:
        count: Number of singular values that are tuned.

    Raises:
        RuntimeError: After the training, when another singular value was tuned.
    """

    def __init__(self, trainer: MemControlTrainer, on: Mapping[str, torch.Tensor]) -> None:
        self._trainer, self._on = trainer, on
        self.count = sum(int(values.sum()) for values in on.values())

    def on_train_begin(self, args, state, control, **kwargs):
        self._hooks = [
            parameter.register_hook(partial(torch.mul, self._on[name].to(parameter)))
            for name, parameter in shifts(self._trainer).items()
        ]

    def on_train_end(self, args, state, control, **kwargs):
        for hook in self._hooks:
            hook.remove()
        if any(bool(shift[~self._on[name].to(shift.device)].any()) for name, shift in shifts(self._trainer).items()):
            raise RuntimeError("a singular value was tuned that is not in the mask")


def jobs(pieces: Pieces, seeds: Sequence[int]) -> list[Job]:
    """The screening, all singular values, and each kind and size, seed by seed."""
    data = demo_dataset()
    script = ScriptArguments(output_dir=str(pieces.folder / "runs"), method=METHOD, max_train_steps=STEPS)
    trainer = demo_trainer(data, METHOD, training_arguments(script), "module")

    def run(kind: str, size: str, seed: int) -> Figures:
        only = Only(trainer, chosen(pieces.read(f"screening/{seed}"), kind, size))
        trainer.add_callback(only)
        fine_tune(trainer, trainer.search_space.mask(True), RATE, seed)
        trainer.remove_callback(only)
        figures = measure(trainer, data, seed)
        return {"parameters": only.count, **{name: figures[name] for name in FIGURES}}

    found = []
    for seed in seeds:
        screening = Job(f"screening/{seed}", f"screening, seed {seed}", partial(screen, trainer, seed))
        runs = [(f"{ALL}/{seed}", ALL, "")]
        runs += [(f"{size}-{kind}/{seed}", kind, size) for size in MASKS for kind in KINDS]
        missing = [
            Job(piece, piece, partial(run, kind, size, seed), (screening.piece,))
            for piece, kind, size in runs
            if piece not in pieces
        ]
        found += [screening, *missing] if missing else []
    return found


def runs_of(content: Figures, name: str) -> dict[int, Figures]:
    """The finished fine-tunes of one mask by their seed."""
    found = content["pieces"].items()
    return {int(piece.rpartition("/")[2]): run for piece, run in found if piece.partition("/")[0] == name}


def render(content: Figures) -> str:
    """The page."""
    lines = [
        "# Masks of single singular values",
        "",
        f"`{content['command']}`",
        "",
        f"SV-DIFF on the demo, {STEPS} steps at the rate {RATE:g}, measured on 256 held-out images, which nothing saw."
        " With each seed one training with all singular values tuned says what each of them learns and memorizes; the "
        "sums over modules give the masks of modules. Beside each of these stand as many single singular values. The "
        "lowest price is the least `memorizes` for each unit of `learns`.",
        "",
        "Means over seeds. AUCs are of attacks that tell training images from held-out images; .5 is guessing.",
        "",
    ]
    head = ["mask", "seeds", "parameters", "held-out loss", "membership AUC", "CLiD", "PIA"]
    titles = {ALL: "all singular values"} | {
        f"{size}-{kind}": f"{size}: {title}" for size in MASKS for kind, title in KINDS.items()
    }
    rows = []
    for name, title in titles.items():
        if found := list(runs_of(content, name).values()):
            means = {figure: np.mean([run[figure] for run in found]) for figure in ("parameters", *FIGURES)}
            cells = [f"{means['loss']:.4f}", *(f"{means[figure]:.3f}" for figure in FIGURES[1:])]
            rows.append([title, str(len(found)), f"{means['parameters']:,.0f}", *cells])
    lines += table(head, rows, numbers=True)
    rows = []
    for size in MASKS:
        for kind in ("price", "learns"):
            pair = [runs_of(content, f"{size}-{of}") for of in (kind, "modules")]
            cells = [_difference(*pair, figure) for figure in FIGURES]
            if all(cells):
                rows.append([f"{size}: {KINDS[kind]}", *cells])
    if rows:
        lines += ["Differences from the whole modules of the same size, paired by seed, with 95 % t intervals:", ""]
        lines += table(["mask", *head[3:]], rows, numbers=True)
    return "\n".join(lines).rstrip() + "\n"


def _difference(ones: Mapping[int, Figures], others: Mapping[int, Figures], figure: str) -> str:
    values = ({seed: run[figure] for seed, run in runs.items()} for runs in (ones, others))
    found = paired_difference(*values)
    return f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})" if found else ""


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    add_piece_flags(parser, "screening_singular")
    args = parser.parse_args(argv)
    file, failed = args.docs_dir / "screening_singular.json", []
    pieces = open_pieces(parser, args.output_dir, {"method": METHOD, "learning_rate": RATE, "steps": STEPS})
    pieces.restore(read_results(file).get("pieces", {}))
    if not args.collect:
        transformers_logging.set_verbosity_error()
        failed = pieces.work(jobs(pieces, args.seed))
    names = [ALL, *(f"{size}-{kind}" for size in MASKS for kind in KINDS)]
    finished = {piece: pieces.read(piece) for name in names for piece in pieces.names(name)}
    content = {"command": COMMAND, "pieces": finished}
    publish_results(file, content, render)
    exit_if_missing(failed)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
