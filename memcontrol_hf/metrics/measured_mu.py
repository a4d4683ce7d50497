"""A lower bound of Gaussian differential privacy's µ, from the same guesses at the coins of canaries."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr, ndtri

from .measured_epsilon import GUESSED_SHARES, checked, guesses_at
from .membership_inference import membership

MOST = 32.0
"""Largest µ that is looked for; more cannot be told apart from no privacy."""


@dataclass(frozen=True)
class MeasuredMu:
    """What the guesses at the coins say of a training's µ.

    Args:
        lower (`float`): the training is not µ-Gaussian differentially private for any µ below this, >= 0.
        epsilon (`float`, *optional*): epsilon at `delta` of a training with exactly that µ; `None` for a delta of 0.
        estimate (`float`): µ of two normal distributions with the AUC of the scores, >= 0; it has no confidence.
        guesses (`int`): number of guesses that gave the bound.
        correct (`int`): how many of these guesses were right.
    """

    lower: float
    epsilon: float | None
    estimate: float
    guesses: int
    correct: int


def measured_mu(
    scores: torch.Tensor, included: Sequence[bool], delta: float = 0.0, confidence: float = 0.95
) -> MeasuredMu:
    """A lower bound of µ in one training, and an estimate, by the scores of canaries for which a coin was flipped.

    The guesses are those of [`~memcontrol_hf.metrics.measured_epsilon`], and the bound is the largest µ that one of
    the three numbers of guesses refutes, each at a third of the allowed error. See [`refuted_mu`] for the theorem. A
    training by DP-SGD is nearly Gaussian differentially private (Dong, Roth & Su 2019,
    https://huggingface.co/papers/1905.02383), so that µ describes it better than one pair of epsilon and delta. Of a
    training that is not, `lower` is true all the same, but `epsilon` is no bound.

    Args:
        scores (`torch.Tensor`): score of each canary, `[m]`; higher = more like a training image.
        included (list of `bool`): whether each canary was trained on, by a fair coin of its own.
        delta (`float`): delta of the statement, in [0, 1).
        confidence (`float`): probability with which the bound holds, in (0, 1).

    Raises:
        ValueError: as [`~memcontrol_hf.metrics.measured_epsilon`].
    """
    scores, coins = checked(scores, included, delta, confidence)
    error = (1 - confidence) / len(GUESSED_SHARES)
    found = [(refuted_mu(len(coins), *of, error), *of) for of in guesses_at(scores, coins)]
    lower, guesses, correct = max(found)
    return MeasuredMu(lower, epsilon_of_mu(lower, delta), _estimate(scores, torch.from_numpy(coins)), guesses, correct)


def refuted_mu(canaries: int, guesses: int, correct: int, error: float) -> float:
    """The largest µ under which so many right guesses have a probability below `error`; 0 if there is none.

    Flipping the coin of canary `i` turns a right guess at it into a wrong one, and leaves the other guesses as they
    are. For the trade-off function `f` of the training, with `F(x) = 1 - f(x)`, that gives for each `j`

        P[i is guessed right, V >= j] <= F(P[i is guessed wrong, V >= j - 1]),

    where `V` is the number of right ones among `r` guesses at `m` coins, and `i` is drawn among all `m` canaries
    (Mahloujifar, Melis & Chaudhuri 2024, https://huggingface.co/papers/2410.22235; the case of two values). With
    `q_j = P[V >= j]` and `Q_j = q_j + q_{j+1} + ...` this is

        (r - j + 1) q_{j-1} >= Q_j + m F⁻¹((j q_j + Q_{j+1}) / m),    F⁻¹(y) = Φ(Φ⁻¹(y) - µ).

    Beginning with `q_v = error`, this bounds `q_{v-1}, ..., q_0` from below. Where `q_0` would have to be above 1, `v`
    right guesses have a probability below `error`. A tighter analysis of the same game is in
    https://huggingface.co/papers/2509.08704, of which only the abstract was read.

    Args:
        canaries (`int`): number of canaries, `m`.
        guesses (`int`): number of guesses, `r`.
        correct (`int`): number of right guesses, `v`.
        error (`float`): allowed error, in (0, 1).
    """

    def impossible(mu: float) -> bool:
        tail, tails = error, 0.0  # q_j and Q_{j+1}
        for j in range(correct, 0, -1):
            right = (j * tail + tails) / canaries
            if right >= 1:
                return True
            tails += tail
            wrong = float(ndtr(ndtri(right) - mu))
            tail = max(tail, (tails + canaries * wrong) / (guesses - j + 1))
            if tail > 1:
                return True
        return False

    if not impossible(0.0):
        return 0.0
    low, high = 0.0, MOST
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if impossible(middle) else (low, middle)
    return low


def epsilon_of_mu(mu: float, delta: float) -> float | None:
    """Epsilon at `delta` of a µ-Gaussian differentially private training (Dong, Roth & Su 2019, Corollary 2.13).

    Returns:
        `float`: 0 for a µ of 0; `None` for a delta of 0 and a larger µ, where there is no epsilon.
    """
    if mu == 0:
        return 0.0
    if delta == 0:
        return None

    def excess(epsilon: float) -> float:
        return delta_of_mu(mu, epsilon) - delta

    if excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 2
    return float(brentq(excess, 0.0, high, xtol=1e-6))


def delta_of_mu(mu: float, epsilon: float) -> float:
    """Delta at `epsilon` of a µ-Gaussian differentially private training; see [`epsilon_of_mu`]."""
    return float(ndtr(mu / 2 - epsilon / mu)) - math.exp(epsilon + float(log_ndtr(-mu / 2 - epsilon / mu)))


def _estimate(scores: torch.Tensor, coins: torch.Tensor) -> float:
    """µ of two normal distributions with the AUC of the scores: AUC = Φ(µ / √2); 0 where there is but one side."""
    members, others = scores[coins], scores[~coins]
    if not len(members) or not len(others):
        return 0.0
    most = 1 - 0.5 / (len(members) * len(others))  # half a pair from 1, whose µ is infinite
    return max(0.0, math.sqrt(2) * float(ndtri(min(membership(members, others).auc, most))))
