"""How often do intervals hold the true figure where persons have several images: intervals of images, or of persons?

    python training_scripts/studies/person_intervals.py    # a minute on one core

Simulated scores of a membership attack: 60 training and 60 held-out persons with 5 images each. The score of an image
is the sum of a normal draw for its person and a normal draw of its own; training persons have a larger mean. Images of
one person are alike by the share of the variance that is the person's. Each repetition draws all persons anew and asks
whether the interval of the AUC at 95 % holds the true AUC. The same is asked of a rate: the share of images that are
copied, where persons differ in how many of their images are. Writes docs/results/person_intervals.json and .md.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import norm

from common.pages import publish_results, table
from memcontrol_hf.metrics import clopper_pearson, mean_of_persons, membership

COMMAND = "python training_scripts/studies/person_intervals.py"
PERSONS, IMAGES = 60, 5
SHARES = (0.0, 0.25, 0.5, 0.75)
AUC = 0.6
"""True AUC of single images."""
RATE = 0.1


def covers(interval: tuple[float, float], truth: float) -> bool:
    """Whether an interval holds the true figure."""
    return interval[0] <= truth <= interval[1]


def coverage_of_auc(share: float, repetitions: int, rng: np.random.Generator) -> dict[str, float]:
    """Share of the repetitions in which each interval of the AUC holds the true AUC.

    Args:
        share: Share of the variance of a score that is the person's, in [0, 1].
        repetitions: Number of repetitions.
        rng: Random draws.
    """
    shift = math.sqrt(2) * norm.ppf(AUC)  # of scores with variance 1
    of_persons = norm.cdf(shift / math.sqrt(2 * (share + (1 - share) / IMAGES)))  # true AUC of persons' mean scores
    persons = np.repeat(np.arange(PERSONS), IMAGES)
    by_images = by_persons = 0
    for _ in range(repetitions):
        scores = []
        for mean in (shift, 0.0):
            own = rng.normal(mean, math.sqrt(share), PERSONS)[persons]
            scores.append(torch.from_numpy(own + rng.normal(0, math.sqrt(1 - share), PERSONS * IMAGES)))
        by_images += covers(membership(*scores).interval, AUC)
        of_each = (mean_of_persons(of, persons.tolist()) for of in scores)
        by_persons += covers(membership(*of_each).interval, of_persons)
    return {"images": by_images / repetitions, "persons": by_persons / repetitions}


def coverage_of_rate(share: float, repetitions: int, rng: np.random.Generator) -> dict[str, float]:
    """The same of a rate: each person has a probability of its own, drawn from a beta distribution.

    Args:
        share: Correlation of two images of a person, which is `1 / (a + b + 1)` of the beta distribution.
        repetitions: Number of repetitions.
        rng: Random draws.
    """
    by_images = by_persons = 0
    for _ in range(repetitions):
        total = 1 / share - 1 if share else math.inf
        chances = rng.beta(RATE * total, (1 - RATE) * total, PERSONS) if share else np.full(PERSONS, RATE)
        found = rng.binomial(IMAGES, chances) / IMAGES
        by_images += covers(clopper_pearson(found.sum() * IMAGES, PERSONS * IMAGES), RATE)
        by_persons += covers(clopper_pearson(found.sum(), PERSONS), RATE)
    return {"images": by_images / repetitions, "persons": by_persons / repetitions}


def render(content: dict[str, Any]) -> str:
    """The page."""
    repetitions = content["repetitions"]
    error = 1.96 * math.sqrt(0.95 * 0.05 / repetitions)
    lines = [
        "# Intervals of images, intervals of persons",
        "",
        f"`{content['command']}`",
        "",
        f"{PERSONS} training and {PERSONS} held-out persons with {IMAGES} images each are simulated {repetitions} "
        "times. The table says how often the 95 % interval holds the true figure: .95 is wanted, and a simulation of "
        f"this length is within {error:.3f} of that in 95 of 100 cases. *Images*: every image counts as a draw, as if "
        "there were no persons. *Persons*: one score a person, or one share a person, as the audit does with a column "
        f"of groups. AUC: Newcombe's score interval (true AUC of single images {AUC}). Rate: Clopper and Pearson's "
        f"interval, which holds the truth more often than it says by construction (true rate {RATE}).",
        "",
        *table(
            ["likeness of a person's images", "AUC, images", "AUC, persons", "rate, images", "rate, persons"],
            [
                [
                    share,
                    *(f"{of[kind][unit]:.3f}" for kind in ("auc", "rate") for unit in ("images", "persons")),
                ]
                for share, of in content["coverage"].items()
            ],
            numbers=True,
        ),
        "The likeness is the share of the variance that is the person's (for the rate: the correlation of two "
        "images). Where the images of a person are not alike at all, both are right. Where they are, intervals of "
        "images are too narrow.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Simulate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000, help="simulated sets for each row (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--docs_dir", type=Path, default=Path("docs/results"), help="folder of the results")
    args = parser.parse_args(argv)
    coverage = {}
    for number, share in enumerate(SHARES):
        rng = np.random.default_rng((args.seed, number))
        coverage[f"{share:g}"] = {
            "auc": coverage_of_auc(share, args.repetitions, rng),
            "rate": coverage_of_rate(share, args.repetitions, rng),
        }
    content: dict[str, Any] = {
        "command": COMMAND,
        "repetitions": args.repetitions,
        "seed": args.seed,
        "coverage": coverage,
    }
    publish_results(args.docs_dir / "person_intervals.json", content, render)


if __name__ == "__main__":
    main()
