"""Whether a set of images was trained on as a whole: many weak scores of many images, joined into one test."""

import numpy as np
import torch
from scipy.stats import ttest_ind

LEAST_DRAWS = 8
"""Smallest number of images or persons in each set."""


def dataset_inference(
    member_scores: torch.Tensor, nonmember_scores: torch.Tensor, splits: int = 100, seed: int = 0, ridge: float = 0.1
) -> float:
    """Dataset inference after CDI (Dubiński et al., https://huggingface.co/papers/2411.12858), for small sets.

    Half of each set, drawn at random, fits a linear score of several attacks; the other halves are compared by Welch's
    one-sided t-test. The paper takes one such split; small sets are used better by many, whose p-values are joined as
    twice their mean, which is valid however they depend on each other (Vovk & Wang, Biometrika 2020, 107:791). The
    linear score is Fisher's discriminant with a ridge, in the place of the paper's logistic regression.

    Args:
        member_scores (`torch.Tensor`): scores of training images by `F` attacks, `[N, F]`.
        nonmember_scores (`torch.Tensor`): the same of held-out images of the same domain, `[M, F]`.
        splits (`int`): number of random splits.
        seed (`int`): random seed of the splits.
        ridge (`float`): what is added to each variance of the standardized scores.

    Returns:
        `float`: p-value in [0, 1]: small where the training set can be told from the held-out set as a whole, at most
        p in a share p of the cases where it cannot.

    Raises:
        ValueError: for fewer than `LEAST_DRAWS` rows in a set, and for scores that do not fit or are not finite.
    """
    sets = [torch.as_tensor(scores).double().cpu().numpy() for scores in (member_scores, nonmember_scores)]
    for name, scores in zip(("member_scores", "nonmember_scores"), sets):
        if scores.ndim != 2 or len(scores) < LEAST_DRAWS or not np.isfinite(scores).all():
            raise ValueError(f"{name}: must be [N, F], N >= {LEAST_DRAWS}, and finite, but are {list(scores.shape)}")
    if sets[0].shape[1] != sets[1].shape[1]:
        raise ValueError(f"{sets[0].shape[1]} and {sets[1].shape[1]} attacks: give the same for both sets")
    rng, found = np.random.default_rng(seed), []
    for _ in range(splits):
        orders = [rng.permutation(len(scores)) for scores in sets]
        fit = [scores[order[: len(order) // 2]] for scores, order in zip(sets, orders)]
        test = [scores[order[len(order) // 2 :]] for scores, order in zip(sets, orders)]
        weights = _discriminant(*fit, ridge)
        found.append(ttest_ind(*(scores @ weights for scores in test), equal_var=False, alternative="greater").pvalue)
    return min(1.0, 2 * float(np.mean(np.nan_to_num(found, nan=1.0))))


def _discriminant(members: np.ndarray, others: np.ndarray, ridge: float) -> np.ndarray:
    """Fisher's linear discriminant `[F]` of scores `[n, F]` and `[m, F]`, standardized by both together."""
    scale = np.concatenate([members, others]).std(0)
    scale[scale == 0] = 1.0
    within = [np.cov(scores / scale, rowvar=False, bias=True).reshape(len(scale), -1) for scores in (members, others)]
    covariance = sum(within) / 2 + ridge * np.eye(len(scale))
    return np.linalg.solve(covariance, (members.mean(0) - others.mean(0)) / scale) / scale
