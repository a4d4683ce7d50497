"""Which quality reward: the loss on validation images, or fid of as many images as a trial generates?

    python training_scripts/studies/quality_rewards.py              # an hour on one core
    python training_scripts/studies/quality_rewards.py --collect    # run nothing: judge what is finished

Random masks of the demo's attention blocks, and the frozen base, are fine-tuned with two seeds. A reward is reliable
when it differs more between masks than between the seeds of a mask. It is valid when it ranks the masks as a fid of
2,048 images does, which no trial can pay for; that one compares with the held-out images, which no reward saw.

Each finished piece is a file in `--output_dir`, so the same command goes on where it stopped. Writes
docs/results/quality_rewards.json and .md.
"""

import argparse
import random
import statistics
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import logging as transformers_logging

from common.intervals import rank_correlation
from common.pages import publish_results, read_results, table
from common.pieces import Job, Pieces, add_piece_flags, exit_if_missing, open_pieces
from common.trainers import demo_trainer
from memcontrol_hf import demo_dataset
from memcontrol_hf.flags import ScriptArguments
from memcontrol_hf.from_flags import training_arguments
from screened.choice import Mask
from screened.fine_tunes import fid, fine_tune

COMMAND = "python training_scripts/studies/quality_rewards.py"
METHOD, RATE, STEPS = "attention", 3e-4, 80  # as in the trial table
MASKS, SEEDS, IMAGES = 10, (0, 1), 2048
REWARDS = {"loss": "loss on validation images", "fid": "fid of a trial's images"}
REFERENCES = {"fid_large": f"fid of {IMAGES:,} images", "loss_held_out": "loss on held-out images"}

Figures = dict[str, Any]


def masks(blocks: list[str]) -> list[Mask]:
    """The frozen base, all blocks, and random masks with from one block to all but one."""
    drawn = random.Random(0)
    sizes = np.linspace(1, len(blocks) - 1, MASKS - 2).round().astype(int)
    chosen = [set(), set(blocks), *(set(drawn.sample(blocks, int(size))) for size in sizes)]
    return [{block: block in on for block in blocks} for on in chosen]


def jobs(pieces: Pieces) -> list[Job]:
    """The fine-tunes with their rewards, then the references."""
    data = demo_dataset()
    script = ScriptArguments(output_dir=str(pieces.folder / "runs"), method=METHOD, max_train_steps=STEPS)
    trainer = demo_trainer(data, METHOD, training_arguments(script))

    def run(number: int, seed: int) -> Figures:
        mask = masks(list(trainer.search_space.mask(True)))[number]
        fine_tune(trainer, mask, RATE, seed)
        rewards = trainer.evaluate(metrics=list(REWARDS))
        held_out = trainer.evaluate(data["held_out"], metrics=["loss"])["eval_loss"]
        figures = {"blocks": sum(mask.values()), "loss_held_out": held_out}
        figures |= {name: rewards[f"eval_{name}"] for name in REWARDS}
        if seed == SEEDS[0]:
            figures["fid_large"] = fid(trainer, data, IMAGES)["fid"]
        return figures

    return [
        Job(piece, piece, partial(run, number, seed))
        for seed in SEEDS
        for number in range(MASKS)
        for piece in (f"runs/{number}-{seed}",)
    ]


def reliability(runs: dict[tuple[int, int], Figures], name: str) -> float:
    """Variance between masks over variance between the seeds of a mask; the noise of the mean is taken off the first.

    Args:
        runs: Figures by number of the mask and seed.
        name: Name of the figure.
    """
    of_mask = [[runs[number, seed][name] for seed in SEEDS] for number in range(MASKS)]
    within = statistics.fmean(statistics.variance(values) for values in of_mask)
    between = statistics.variance(statistics.fmean(values) for values in of_mask) - within / len(SEEDS)
    return max(0.0, between) / within


def validity(runs: dict[tuple[int, int], Figures], reward: str, reference: str) -> dict[str, float] | None:
    """Spearman's rank correlation of a reward with a reference over masks, with its 95 % bootstrap interval."""
    return rank_correlation(
        *(np.array([runs[number, SEEDS[0]][name] for number in range(MASKS)]) for name in (reward, reference))
    )


def verdicts(pieces: dict[str, Figures]) -> Figures:
    """Reliability and validity of the rewards, when all fine-tunes are finished."""
    runs = {tuple(map(int, name.split("/")[1].split("-"))): figures for name, figures in pieces.items()}
    if len(runs) < MASKS * len(SEEDS):
        return {}
    return {
        name: {
            "reliability": reliability(runs, name),
            **{reference: validity(runs, name, reference) for reference in REFERENCES},
        }
        for name in REWARDS
    }


def render(content: Figures) -> str:
    """The page."""
    lines = [
        "# Which quality reward",
        "",
        f"`{content['command']}`",
        "",
        f"{MASKS} masks of the demo's attention blocks, the frozen base among them, with {len(SEEDS)} seeds each, "
        f"learning rate {RATE:g}, {STEPS} steps. Reliability is the variance between masks over the variance between "
        "the seeds of a mask: at 1, masks differ no more than the seeds of one mask. Validity is Spearman's rank "
        "correlation over masks, with its 95 % bootstrap interval.",
        "",
    ]
    if content["verdicts"]:
        rows = [
            [
                REWARDS[name],
                f"{found['reliability']:.3g}",
                *(
                    "{rho:.2f} ({low:.2f} to {high:.2f})".format(**ranked) if (ranked := found[reference]) else "–"
                    for reference in REFERENCES
                ),
            ]
            for name, found in content["verdicts"].items()
        ]
        lines += table(["reward", "reliability", *(f"ranks as {text}" for text in REFERENCES.values())], rows, True)
    names = ["blocks", *REWARDS, *REFERENCES]
    rows = [
        [piece.removeprefix("runs/"), *(f"{figures[name]:.4g}" if name in figures else "" for name in names)]
        for piece, figures in content["pieces"].items()
    ]
    lines += table(["mask and seed", "blocks", *REWARDS.values(), *REFERENCES.values()], rows, True)
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_piece_flags(parser, "quality_rewards")
    args = parser.parse_args(argv)
    file, failed = args.docs_dir / "quality_rewards.json", []
    pieces = open_pieces(parser, args.output_dir, {"method": METHOD, "learning_rate": RATE, "steps": STEPS})
    pieces.restore(read_results(file).get("pieces", {}))
    if not args.collect:
        transformers_logging.set_verbosity_error()
        failed = pieces.work(jobs(pieces))
    finished = {name: pieces.read(name) for name in pieces.names("runs")}
    content = {"command": COMMAND, "verdicts": verdicts(finished), "pieces": finished}
    publish_results(file, content, render)
    exit_if_missing(failed)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
