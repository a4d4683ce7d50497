"""The epsilon that is measured from canaries, beside the epsilon that DP-SGD guarantees, at three noise levels.

    python training_scripts/studies/measured_epsilon.py    # about 20 minutes on one core

Forty images of the demo are canaries: a coin decides whether each of them is trained on. All weights of the denoiser
are trained with DP-SGD at three noise levels, and without noise for comparison, each with several seeds. The losses of
the model and of the frozen base give the guesses at the coins, and these a lower bound of epsilon with 95 %
confidence.

Each finished run is a file in `--output_dir`, so the same command goes on where it stopped. Writes
docs/results/measured_epsilon.json and .md. On a new machine the command takes up the finished runs from there.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from transformers import logging as transformers_logging

from common.audits import canary_epsilon
from common.pages import publish_results, read_results, table
from common.pieces import Job, exit_if_missing, open_pieces
from common.trainers import demo_trainer
from memcontrol_hf import MemControlTrainingArguments, demo_dataset, demo_pipeline
from memcontrol_hf.data import first_rows, flip_canaries
from memcontrol_hf.images import pixel_digest
from memcontrol_hf.metrics import epsilon_of_mu, measured_epsilon, refuted_mu
from memcontrol_hf.metrics.measured_epsilon import GUESSED_SHARES

COMMAND = "python training_scripts/studies/measured_epsilon.py"
DELTA = 1e-4
CANARIES = 40
NOISE = {"4": 4.0, "1": 1.0, "0.5": 0.5, "none": None}
"""Noise multipliers of DP-SGD; without noise the training is not private."""


def measure(noise: float | None, seed: int, steps: int, learning_rate: float, folder: Path) -> dict[str, Any]:
    """Train with one noise level and one seed, and measure epsilon from the coins.

    Returns:
        The measured epsilon, with `upper`: epsilon by DP-SGD's accountant, `None` without noise.
    """
    data = demo_dataset()
    once = data["train"].select(first_rows(pixel_digest(image) for image in data["train"]["image"]))
    train, canaries = flip_canaries(once.select(range(CANARIES)), CANARIES, 1, seed)
    dp_sgd = [] if noise is None else [f"dp_sgd:noise_multiplier={noise},delta={DELTA},max_grad_norm=1"]
    arguments = MemControlTrainingArguments(
        output_dir=str(folder),
        resolution=64,
        per_device_train_batch_size=8,
        max_steps=steps,
        learning_rate=learning_rate,
        mitigations=dp_sgd,
        save_strategy="no",
        report_to="none",
        seed=seed,
    )
    trainer = demo_trainer({**data, "train": train}, "weights", arguments, [".*"])
    trainer.train()
    upper = trainer.privacy["epsilon"] if trainer.privacy else None
    return {**canary_epsilon(trainer, demo_pipeline(), canaries, DELTA, seed), "upper": upper}


def render(content: dict[str, Any]) -> str:
    """The page."""
    settings, rows = content["settings"], []
    for name, runs in content["runs"].items():
        of = list(runs.values())
        noisy = of[0]["upper"] is not None
        lower = [run["lower"] for run in of]
        mu = [mu_of(run) for run in of]
        of_mu = [epsilon_of_mu(value, DELTA) for value in mu]
        upper = [run["upper"] for run in of]
        rows.append(
            [
                name,
                f"{max(upper):.2f}" if noisy else "none",
                f"{statistics.fmean(lower):.2f}",
                f"{max(lower):.2f}",
                f"{100 * statistics.fmean(run['correct'] / run['guesses'] for run in of):.0f} %",
                f"{statistics.fmean(mu):.2f}",
                f"{max(of_mu):.2f}",
                f"{sum(max(low) > high for *low, high in zip(lower, of_mu, upper))} of {len(of)}" if noisy else "",
            ]
        )
    seeds = len(next(iter(content["runs"].values())))
    lines = [
        "# Epsilon, measured and guaranteed",
        "",
        f"`{settings['command']}`",
        "",
        f"A coin was flipped for each of {CANARIES} images of the demo, and all weights of the denoiser were trained "
        f"on the images that it chose: {settings['max_train_steps']} steps of batch size 8 at learning rate "
        f"{settings['learning_rate']:g}, with {seeds} seeds for each noise level. *Upper* is epsilon by DP-SGD's "
        f"accountant at delta {DELTA:g}, the largest of the seeds. *Lower* is what the guesses at the coins prove of "
        f"the same training with 95 % confidence at the same delta. {CANARIES} canaries cannot prove more than "
        f"{content['most']:.2f}, however much was memorized.",
        "",
        *table(
            [
                *("noise multiplier", "upper", "lower, mean", "lower, largest", "right guesses, mean", "µ, mean"),
                *("lower by µ, largest", "a lower one above upper"),
            ],
            rows,
            numbers=True,
        ),
        "*µ* is what the same guesses prove of µ of Gaussian differential privacy, with the same confidence, and "
        "*lower by µ* is its epsilon: a lower bound only as far as the training is Gaussian, as DP-SGD nearly is. "
        "Both are computed from the number of guesses that gave *lower*, and how many of them were right.",
        "",
        "*Upper* differs between seeds by the number of images that the coins choose. An upper bound holds for the "
        "worst image and for an attacker who sees every step; the guesses are made from the final weights, and from "
        "few canaries. A lower bound of 0 does not say that nothing was memorized.",
    ]
    return "\n".join(lines) + "\n"


def mu_of(run: dict[str, Any]) -> float:
    """The lower bound of µ by the guesses of a run. One of three numbers of guesses gave them (Bonferroni)."""
    return refuted_mu(CANARIES, run["guesses"], run["correct"], (1 - run["confidence"]) / len(GUESSED_SHARES))


def main(argv: list[str] | None = None) -> None:
    """Do what is missing, then render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_train_steps", type=int, default=100, help="steps of a training (default: 100)")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="learning rate (default: 0.001)")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default: 5)")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs/measured_epsilon"), help="folder of the finished runs"
    )
    parser.add_argument("--docs_dir", type=Path, default=Path("docs/results"), help="folder of the results")
    args = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    results = args.docs_dir / "measured_epsilon.json"
    trained = {name: getattr(args, name) for name in ("max_train_steps", "learning_rate")}
    settings = {**trained, "command": COMMAND}
    committed = read_results(results)
    if committed and committed["settings"] != settings:
        parser.error(f"{results} was made with other settings; give another --docs_dir")
    pieces = open_pieces(parser, args.output_dir, trained)
    for name, runs in committed.get("runs", {}).items():
        pieces.restore({f"{name}/{seed}": run for seed, run in runs.items()})
    jobs = []
    for seed in range(args.seeds):
        for name, noise in NOISE.items():
            arguments = (noise, seed, args.max_train_steps, args.learning_rate, args.output_dir / "trainer")
            jobs.append(Job(f"{name}/{seed}", f"noise {name}, seed {seed}", partial(measure, *arguments)))
    exit_if_missing(pieces.work(jobs))
    runs = {name: {Path(p).name: pieces.read(p) for p in pieces.names(name)} for name in NOISE}
    content = {"settings": settings, "most": most_provable(), "runs": runs}
    publish_results(results, content, render)


def most_provable() -> float:
    """The lower bound that the canaries would prove if every guess were right."""
    coins = [row >= CANARIES // 2 for row in range(CANARIES)]
    return measured_epsilon([float(coin) for coin in coins], coins, DELTA).lower


if __name__ == "__main__":
    main()
