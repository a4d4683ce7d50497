"""The smallest subset of parameters that learns as much as all blocks, along the masks of a screening by module.

    python training_scripts/studies/screening_smallest.py                    # a quarter of an hour on one core
    python training_scripts/studies/screening_smallest.py --method svdiff    # the paper's method
    python training_scripts/studies/screening_smallest.py --collect          # run nothing: judge what is finished

With each seed, one screening of the demo with the granularity `module`, where each linear layer is a block of its own,
gives masks along the trade-off (`Screening.masks`). They are fine-tuned with the same learning rate, number of steps
and seed as all modules, and measured on the held-out images. The mask that is looked for is the smallest whose
held-out loss is at most 2 % above that of all modules.

Each finished piece is a file in `--output_dir`, so the same command goes on where it stopped. Writes
docs/results/screening_smallest.json and .md, to which each method adds its part.
"""

import argparse
from functools import partial
from statistics import fmean
from typing import Any

import torch
from transformers import logging as transformers_logging

from common.pages import publish_results, read_results, table
from common.pieces import Job, Pieces, add_piece_flags, exit_if_missing, open_pieces
from common.trainers import demo_trainer
from memcontrol_hf import demo_dataset
from memcontrol_hf.flags import ScriptArguments
from memcontrol_hf.from_flags import training_arguments
from memcontrol_hf.screening import Screening
from screened.fine_tunes import fine_tune, measure

COMMAND = "python training_scripts/studies/screening_smallest.py"
RATES = {"attention": 3e-4, "svdiff": 3e-2}
TITLES = {"attention": "Attention weights", "svdiff": "SV-DIFF"}
STEPS, MASKS = 80, 6
SCREENING_SEED = 2000  # of the first screening: no fine-tune has it
ALL = "all"
TOLERANCE = 0.02
"""How far the held-out loss may be above that of all modules, as a share of it."""
PAPER_PERCENT = 0.019
"""Parameters of the smallest subset of the paper, in percent of its denoiser (https://huggingface.co/papers/2405.19458)."""

Figures = dict[str, Any]


def jobs(pieces: Pieces, method: str, seeds: list[int]) -> list[Job]:
    """The screening, the fine-tune of all modules and those of the masks, seed by seed."""
    data = demo_dataset()
    script = ScriptArguments(output_dir=str(pieces.folder / "runs"), method=method, max_train_steps=STEPS)
    trainer = demo_trainer(data, method, training_arguments(script), "module")

    def screen(seed: int) -> Figures:
        trainer.args.seed = SCREENING_SEED + seed
        return trainer.screen(STEPS, learning_rate=RATES[method]).to_dict()

    def run(name: str, seed: int) -> Figures:
        masks = Screening.from_dict(pieces.read(f"{method}/screening-{seed}")).masks(MASKS)
        mask = trainer.search_space.mask(True) if name == ALL else masks[int(name) - 1]
        fine_tune(trainer, mask, RATES[method], seed)
        validation = trainer.evaluate(metrics=["loss"])["eval_loss"]
        return {**measure(trainer, data, seed), "loss_validation": validation}

    found = []
    for seed in seeds:
        screening = f"{method}/screening-{seed}"
        found.append(Job(screening, screening, partial(screen, seed)))
        for name in (ALL, *map(str, range(1, MASKS + 1))):
            piece = f"{method}/{name}-{seed}"
            found.append(Job(piece, piece, partial(run, name, seed), (screening,)))
    return found


def seeds_of(pieces: dict[str, Figures], method: str) -> list[int]:
    """The seeds with which all fine-tunes of a method are finished."""
    seeds = sorted(int(name.rsplit("-", 1)[1]) for name in pieces if name.startswith(f"{method}/{ALL}-"))
    return [seed for seed in seeds if all(f"{method}/{k}-{seed}" in pieces for k in range(1, MASKS + 1))]


def smallest(pieces: dict[str, Figures], method: str, seed: int, loss: str = "loss") -> Figures:
    """The fine-tune of the smallest mask whose loss is at most `TOLERANCE` above that of all modules, or of these.

    Args:
        pieces: The finished fine-tunes.
        method: Method of the fine-tunes.
        seed: Seed of the fine-tunes.
        loss: `"loss"` on held-out images, or `"loss_validation"`.
    """
    of_all = pieces[f"{method}/{ALL}-{seed}"]
    masks = [pieces[f"{method}/{number}-{seed}"] for number in range(1, MASKS + 1)]
    reaching = [mask for mask in masks if mask[loss] <= (1 + TOLERANCE) * of_all[loss]]
    return min([*reaching, of_all], key=lambda run: run["parameters"])


def render(content: dict[str, Any]) -> str:
    """The page."""
    pieces = content["pieces"]
    lines = [
        "# The smallest subset that learns as much as all modules",
        "",
        f"`{content['command']}`",
        "",
        f"With each seed one screening of the demo, each linear layer a block of its own, gives {MASKS} masks, from "
        f"the largest of its front to the smallest. Each is fine-tuned for {STEPS} steps with the seed of all "
        "modules, and measured on 256 held-out images, which nothing saw. Parameters are in percent of the denoiser, "
        f"the loss is in percent of that of all modules. The paper's smallest subset has {PAPER_PERCENT:g} % of the "
        "859.5 million parameters of its denoiser ([2405.19458](https://huggingface.co/papers/2405.19458)); the "
        "demo's denoiser has 3.3 million.",
        "",
    ]
    for method, title in TITLES.items():
        if not (seeds := seeds_of(pieces, method)):
            continue
        lines += [f"## {title}, learning rate {RATES[method]:g}", ""]
        rows = [
            _row(f"{len(seeds)} seed(s)" if name == ALL else "", name, pieces, method, seeds)
            for name in (ALL, *map(str, range(1, MASKS + 1)))
        ]
        head = ["means over", "mask", "modules", "parameters, %", "held-out loss, %", "membership AUC", "CLiD", "PIA"]
        lines += table(head, rows, numbers=True)
        lines += [
            f"The smallest mask within {100 * TOLERANCE:g} % of the held-out loss of all modules, seed by seed, and "
            "the one that the loss on validation images would have chosen by the same rule:",
            "",
        ]
        rows = []
        for seed in seeds:
            of_all = pieces[f"{method}/{ALL}-{seed}"]
            for by, loss in (("held-out loss", "loss"), ("validation loss", "loss_validation")):
                found = smallest(pieces, method, seed, loss)
                rows.append([str(seed), by, *_cells([found], [of_all])])
        lines += table(["seed", "chosen by", *head[2:]], rows, numbers=True)
    return "\n".join(lines).rstrip() + "\n"


def _row(first: str, name: str, pieces: dict[str, Figures], method: str, seeds: list[int]) -> list[str]:
    runs, all_modules = ([pieces[f"{method}/{which}-{seed}"] for seed in seeds] for which in (name, ALL))
    return [first, name, *_cells(runs, all_modules)]


def _cells(runs: list[Figures], all_modules: list[Figures]) -> list[str]:
    relative = [run["loss"] / other["loss"] for run, other in zip(runs, all_modules)]
    return [
        f"{fmean(run['blocks'] for run in runs):.0f}",
        f"{fmean(run['percent'] for run in runs):.3g}",
        f"{100 * fmean(relative):.1f}",
        *(f"{fmean(run[f'auc_{attack}'] for run in runs):.3f}" for attack in ("loss", "clid", "pia")),
    ]


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=list(RATES), default="attention", help="PEFT method (default: attention)")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    add_piece_flags(parser, "screening_smallest")
    args = parser.parse_args(argv)
    file, failed = args.docs_dir / "screening_smallest.json", []
    pieces = open_pieces(parser, args.output_dir, {"rates": RATES, "steps": STEPS, "masks": MASKS})
    pieces.restore(read_results(file).get("pieces", {}))
    if not args.collect:
        transformers_logging.set_verbosity_error()
        failed = pieces.work(jobs(pieces, args.method, args.seed))
    finished = {name: pieces.read(name) for method in RATES for name in pieces.names(method)}
    content = {"command": COMMAND, "pieces": finished}
    publish_results(file, content, render)
    exit_if_missing(failed)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
