"""A lower bound of epsilon that is measured in one training, from canaries for which a coin was flipped."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.stats import binom

GUESSED_SHARES = (1.0, 0.5, 0.2)
"""Shares of the canaries that are guessed at. They are fixed beforehand, so that the scores choose nothing."""


@dataclass(frozen=True)
class MeasuredEpsilon:
    """What the guesses at the coins prove of a training.

    Args:
        lower (`float`): the training is not (epsilon, delta)-differentially private for any epsilon below this, >= 0.
        confidence (`float`): probability with which that is true, for whatever training.
        delta (`float`): delta of the statement.
        canaries (`int`): number of canaries.
        included (`int`): how many of them were trained on.
        guesses (`int`): number of guesses that gave the bound; the others were not guessed at.
        correct (`int`): how many of these guesses were right.
    """

    lower: float
    confidence: float
    delta: float
    canaries: int
    included: int
    guesses: int
    correct: int


def measured_epsilon(
    scores: torch.Tensor, included: Sequence[bool], delta: float = 0.0, confidence: float = 0.95
) -> MeasuredEpsilon:
    """The lower bound of Steinke, Nasr & Jagielski 2023 (https://huggingface.co/papers/2305.08846), Theorem 5.2.

    For each canary a fair coin decides whether it is trained on. Afterwards the canaries with the highest scores are
    guessed to be in, as many with the lowest scores to be out, and the rest is not guessed at. If the training is
    (epsilon, delta)-differentially private, then `v` or more of `r` guesses at `m` coins are right with a probability
    of at most

        P[W >= v] + 2 m delta max_{1 <= i <= v} P[v - i <= W < v] / i,   W ~ Binomial(r, 1 / (1 + exp(-epsilon))).

    The bound is the largest epsilon that this refutes. Three numbers of guesses (`GUESSED_SHARES`) are tried, each at
    a third of the allowed error (Bonferroni).

    Args:
        scores (`torch.Tensor`): score of each canary, `[m]`; higher = more like a training image.
        included (list of `bool`): whether each canary was trained on, by a fair coin of its own.
        delta (`float`): delta of the statement, in [0, 1).
        confidence (`float`): probability with which the bound holds, in (0, 1).

    Returns:
        [`MeasuredEpsilon`]: a lower bound of 0 says nothing. With `m` canaries the bound is at most about
        `log(m / 4)`, however much was memorized.

    Raises:
        ValueError: for fewer than 2 canaries, scores that are not finite, and a delta or confidence out of range.
    """
    scores, coins = checked(scores, included, delta, confidence)
    error = (1 - confidence) / len(GUESSED_SHARES)
    found = [(_refuted(len(coins), *of, delta, error), *of) for of in guesses_at(scores, coins)]
    lower, guesses, correct = max(found, key=lambda of: of[0])
    return MeasuredEpsilon(lower, confidence, delta, len(coins), int(coins.sum()), guesses, correct)


def checked(
    scores: torch.Tensor, included: Sequence[bool], delta: float, confidence: float
) -> tuple[torch.Tensor, np.ndarray]:
    """The scores `[m]` in double precision and the coins `[m]`, once they and the numbers are known to be right."""
    scores, coins = torch.as_tensor(scores).double().cpu(), np.asarray(included, dtype=bool)
    if scores.ndim != 1 or len(scores) < 2 or len(scores) != len(coins) or not scores.isfinite().all():
        raise ValueError(
            f"give finite scores [m], m > 1, and as many coins, not {list(scores.shape)} and {len(coins)}"
        )
    if not (0 <= delta < 1 and 0 < confidence < 1):
        raise ValueError(f"delta must lie in [0, 1) and confidence in (0, 1), but are {delta} and {confidence}")
    return scores, coins


def guesses_at(scores: torch.Tensor, coins: np.ndarray) -> list[tuple[int, int]]:
    """For each of `GUESSED_SHARES` the number of guesses, and how many of them are right."""
    ordered, found = coins[torch.argsort(scores, stable=True).numpy()], []
    for share in GUESSED_SHARES:
        half = max(1, int(len(coins) * share) // 2)
        found.append((2 * half, int((~ordered[:half]).sum() + ordered[-half:].sum())))
    return found


def chance_of_guesses(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The largest probability of `correct` or more right guesses under (epsilon, delta); see [`measured_epsilon`]."""
    accuracy = 1 / (1 + math.exp(-epsilon))
    chance = float(binom.sf(correct - 1, guesses, accuracy))
    if delta > 0 and correct > 0:
        below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, accuracy))  # P[v - i <= W < v], i = 1 ...
        chance += 2 * canaries * delta * float((below / np.arange(1, correct + 1)).max())
    return min(chance, 1.0)


def _refuted(canaries: int, guesses: int, correct: int, delta: float, error: float) -> float:
    """The largest epsilon under which so many right guesses have a probability below `error`; 0 if there is none."""

    def excess(epsilon: float) -> float:
        return chance_of_guesses(canaries, guesses, correct, epsilon, delta) - error

    if excess(0.0) >= 0:
        return 0.0
    high = 1.0
    while excess(high) < 0 and high < 64:
        high *= 2
    return float(brentq(excess, 0.0, high, xtol=1e-4)) if excess(high) >= 0 else high
