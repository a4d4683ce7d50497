"""The work: choose a learning rate, screen, or fine-tune a row and measure its curve."""

import math
import random
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from scipy.stats import rankdata
from transformers import TrainerCallback

from common.pieces import Job, Pieces
from common.trainers import demo_trainer
from memcontrol_hf import MemControlTrainer, metrics
from memcontrol_hf.checkpoints import Diverged
from memcontrol_hf.data import EncodedImages
from memcontrol_hf.flags import ScriptArguments
from memcontrol_hf.from_flags import METHODS as SEARCHED_RATES
from memcontrol_hf.from_flags import training_arguments
from memcontrol_hf.randomness import Purpose, row_keys, seeded_generator
from memcontrol_hf.screening import Screening
from memcontrol_hf.search import suggested_mask
from paper_table.data_sets import DATA, images
from screened.choice import Mask, masks_of_size, random_masks, worst_mask
from screened.fine_tunes import held_out_scores, losses_and_attacks

from .rows import (
    ALL,
    BASE,
    EQUAL,
    FOUND,
    FULL,
    OWN_RATE,
    RANDOM,
    RANDOMS,
    RATE_SEED,
    ROWS,
    SCREENING_SEED,
    SHARES,
    STEPS,
    TRANSFERRED,
    TUNED,
    WORST,
    piece_of,
)

BATCH = 32
"""Images of a batch in `max_norm`, whose value depends on it."""
MOST_RATES = 8
"""Number of learning rates after which the choice of a rate ends, even if the best one is at an end."""
SETTINGS = {"steps": list(STEPS), "screening_steps": EQUAL, "max_norm_batch": BATCH}

Figures = dict[str, Any]


class Curve(TrainerCallback):
    """Measures a model in the middle of its training.

    Args:
        measure: Function that returns the figures of the model as it is.

    Attributes:
        points: The figures, by the number of steps.
    """

    def __init__(self, measure: Callable[[], Any]) -> None:
        self._measure = measure
        self.points: dict[int, Any] = {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in STEPS:
            self.points[state.global_step] = self._measure()


def train_along(trainer: MemControlTrainer, measure: Callable[[], Any]) -> dict[int, Any]:
    """Fine-tune, and measure after each of `STEPS`."""
    curve = Curve(measure)
    trainer.add_callback(curve)
    try:
        trainer.train()
    finally:
        trainer.remove_callback(curve)  # other runs have the same trainer
    return curve.points


@torch.no_grad()
def max_norm(trainer: MemControlTrainer, validation: EncodedImages, seed: int) -> float:
    """The reward as the authors compute it, with seeds: the largest noise norm in each batch of validation images.

    Each batch has one random timestep; the largest norms are averaged over the batches. So the figure depends on the
    size of the batches, which is why this package has another one, `noise_norm`.
    """
    training, model, family = trainer.model.training, trainer.model.eval(), trainer.family
    steps = family.noise.scheduler.config.num_train_timesteps
    largest = []
    for start in range(0, len(validation.distinct), BATCH):
        rows = validation.distinct[start : start + BATCH]
        timestep = int(torch.randint(steps, (), generator=seeded_generator(seed, Purpose.NONMEMBERS, start)))
        norms = metrics.noise_norm(
            model,
            validation.encoded[rows]["latents"],
            validation.condition(family.conditions, rows),
            family.null_condition(),
            family,
            [timestep],
            row_keys(seed, Purpose.NONMEMBERS, (validation.numbers[row] for row in rows)),
            BATCH,
        )
        largest.append(norms.max().item())
    trainer.model.train(training)
    return sum(largest) / len(largest)


def point(trainer: MemControlTrainer, data: str, seed: int) -> Figures:
    """The figures of the present model, and the ranks of the images' scores in the two primary attacks.

    `ranks_<attack>` has twice the rank of each image among all, so that shared ranks are whole numbers: first the
    `members` training images, then the held-out images. All AUCs of a part of the images follow from them.
    """
    members, others = held_out_scores(trainer, images(data, None), seed)
    ranks = {
        f"ranks_{name}": (2 * rankdata(torch.cat([members[name], others[name]]).numpy())).astype(int).tolist()
        for name in ("loss", "clid")
    }
    validation = trainer.encode(trainer.eval_dataset)
    return {
        **losses_and_attacks(members, others),
        "max_norm": max_norm(trainer, validation, seed),
        "members": len(members["loss"]),
        **ranks,
    }


class Study:
    """The jobs of the study, and what they need of each other.

    Args:
        pieces: The finished pieces.
    """

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces
        self.trainer = cache(self._trainer)

    def row_trainer(self, data: str, method: str, row: str) -> MemControlTrainer:
        """The trainer of a row: the full fine-tune has one of its own, and each mitigation."""
        return self.trainer(data, FULL if row == FULL else method, ROWS[row].mitigation)

    def _trainer(self, data: str, method: str, mitigation: tuple[str, ...]) -> MemControlTrainer:
        script = ScriptArguments(
            output_dir=str(self.pieces.folder / "runs"),
            max_train_steps=STEPS[-1],
            eval_batch_size=128,
            mitigation=list(mitigation),
        )
        tuned, blocks = ("weights", [".*"]) if method == FULL else (method, "block")
        return demo_trainer(images(data, None), tuned, training_arguments(script), blocks)

    # ---- jobs ----

    def jobs(self, data: str, method: str, seeds: list[int]) -> list[Job]:
        """All jobs of a data set and a method: first the learning rates, then seed by seed."""
        jobs = [*self._rate_jobs(data, method)]
        for seed in seeds:
            jobs += self._screening_jobs(data, method, seed)
            for row in ROWS:
                if row == TRANSFERRED:
                    jobs += self._screening_jobs(_other(data), method, seed)
                needs = self._needs(data, method, row, seed)
                piece = piece_of("runs", data, method, row, seed)
                jobs.append(Job(piece, piece, partial(self.run, data, method, row, seed), needs))
        return list({job.piece: job for job in jobs}.values())

    def _rate_jobs(self, data: str, method: str) -> list[Job]:
        jobs = [self._rate_job(data, method, ALL), self._rate_job(data, method, FULL)]
        jobs += self._screening_jobs(data, method, RATE_SEED)
        return jobs + [self._rate_job(data, method, row) for row in TUNED if row != ALL]

    def _rate_job(self, data: str, method: str, row: str) -> Job:
        piece = piece_of("rates", data, method, row, RATE_SEED)
        needs = (_screening(data, method, RATE_SEED),) if row == OWN_RATE else ()
        return Job(piece, piece, partial(self.choose_rate, data, method, row), needs)

    def _screening_jobs(self, data: str, method: str, seed: int) -> list[Job]:
        rate, piece = self._rate_job(data, method, ALL), _screening(data, method, seed)
        return [rate, Job(piece, piece, partial(self.screen, data, method, seed), (rate.piece,))]

    def _needs(self, data: str, method: str, row: str, seed: int) -> tuple[str, ...]:
        if row == BASE:
            return ()
        needs = [piece_of("rates", data, method, ROWS[row].rate, RATE_SEED)]
        if row not in (FULL, ALL):
            needs.append(_screening(_other(data) if row == TRANSFERRED else data, method, seed))
        if row == OWN_RATE:
            needs.append(piece_of("runs", data, method, FOUND, seed))
        return tuple(needs)

    # ---- work ----

    def choose_rate(self, data: str, method: str, row: str) -> Figures:
        """The learning rate with the lowest validation loss; more are tried until the best is not at an end."""
        trainer, mask = self.row_trainer(data, method, row), self.mask(data, method, row, RATE_SEED)
        low, high = SEARCHED_RATES["weights" if row == FULL else method][1]
        middle = round(math.log10(low * high))  # in half decades
        losses: dict[int, float] = {}
        wanted = [middle - 1, middle, middle + 1]
        while wanted:
            losses |= {place: self._lowest_validation_loss(trainer, mask, 10 ** (place / 2)) for place in wanted}
            best = min(losses, key=losses.__getitem__)
            outside = [place for place in (best - 1, best + 1) if place not in losses]
            wanted = outside if len(losses) < MOST_RATES else []
        tried = sorted(losses)
        return {
            "rates": [10 ** (place / 2) for place in tried],
            "losses": [losses[place] for place in tried],
            "learning_rate": 10 ** (best / 2),
        }

    def _lowest_validation_loss(self, trainer: MemControlTrainer, mask: Mask, rate: float) -> float:
        trainer.args.seed = RATE_SEED
        trainer.apply_hyperparameters({"mask": mask, "learning_rate": rate})
        try:
            losses = train_along(trainer, lambda: trainer.evaluate_mid_training(["loss"])["eval_loss"]).values()
        except Diverged:
            return math.inf
        return min((loss for loss in losses if math.isfinite(loss)), default=math.inf)

    def rate(self, data: str, method: str, row: str) -> float:
        """The learning rate of a row."""
        return self.pieces.read(piece_of("rates", data, method, ROWS[row].rate, RATE_SEED))["learning_rate"]

    def screen(self, data: str, method: str, seed: int) -> Figures:
        """The screening that suggests the mask of a seed."""
        trainer = self.trainer(data, method, ())
        trainer.args.seed = SCREENING_SEED + seed
        return trainer.screen(EQUAL, learning_rate=self.rate(data, method, ALL)).to_dict()

    def mask(self, data: str, method: str, row: str, seed: int) -> Mask:
        """The mask of a row: a mitigation and a rate of its own change nothing of it."""
        row = FOUND if row == OWN_RATE else row.partition("+")[0]
        if row in (BASE, FULL, ALL):
            return self.row_trainer(data, method, row).search_space.mask(row != BASE)
        source = _other(data) if row == TRANSFERRED else data
        screening = Screening.from_dict(self.pieces.read(_screening(source, method, seed)))
        return mask_from(screening, row, seed)

    def run(self, data: str, method: str, row: str, seed: int) -> Figures:
        """Fine-tune a row with a seed, and measure its curve."""
        if row == BASE:
            trainer = self.trainer(data, "attention", ())
            trainer.args.seed = seed
            trainer.apply_hyperparameters({"mask": trainer.search_space.mask(False)})
            return {"mask": [], "learning_rate": 0.0, "parameters": 0, "points": {0: point(trainer, data, seed)}}
        rate = self.rate(data, method, row)
        if row == OWN_RATE and rate == self.rate(data, method, FOUND):
            return self.pieces.read(piece_of("runs", data, method, FOUND, seed))
        trainer, mask = self.row_trainer(data, method, row), self.mask(data, method, row, seed)
        trainer.args.seed = seed
        trainer.apply_hyperparameters({"mask": mask, "learning_rate": rate})
        return {
            "mask": [block for block, on in mask.items() if on],
            "learning_rate": rate,
            "parameters": trainer.trainable_parameters,
            "points": train_along(trainer, partial(point, trainer, data, seed)),
        }


def mask_from(screening: Screening, row: str, seed: int) -> Mask:
    """The mask of a row that a screening, or the size of its mask, decides."""
    found = suggested_mask(screening)
    if row in (FOUND, TRANSFERRED):
        return found
    if row == WORST:
        return worst_mask(found, screening)
    if row in RANDOMS:
        return random_masks(found, screening.parameters, "parameters", RANDOM, seed)[RANDOMS.index(row)]
    goal = SHARES[row] * sum(screening.parameters.values())
    return random.Random(seed).choice(masks_of_size(screening.parameters, goal))


def _other(data: str) -> str:
    return next(name for name in DATA if name != data)


def _screening(data: str, method: str, seed: int) -> str:
    return f"screenings/{data}-{method}/{seed}"
