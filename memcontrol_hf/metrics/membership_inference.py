"""How well the scores of a membership inference attack tell members from non-members."""

import math
from dataclasses import dataclass

import torch
from scipy.optimize import brentq
from scipy.stats import mannwhitneyu, norm
from torchmetrics.functional.classification import binary_roc

from .intervals import clopper_pearson


@dataclass(frozen=True)
class MembershipResult:
    """How well an attack tells members from non-members.

    Args:
        auc (`float`):
            Area under the ROC curve: .5 is chance, 1 finds every member.
        interval (`tuple[float, float]`):
            Interval of `auc` at 95 %.
        members, nonmembers (`int`):
            Number of scores of each kind.
        fpr, tpr (`torch.Tensor`):
            False-positive and true-positive rates of the ROC curve, `[K]` each.
    """

    auc: float
    interval: tuple[float, float]
    members: int
    nonmembers: int
    fpr: torch.Tensor
    tpr: torch.Tensor

    def tpr_at_fpr(self, fpr: float) -> float:
        """The share of members found at a false-positive rate of at most `fpr`.

        The rate is NaN where it cannot be estimated: with fewer than `1 / fpr` non-members.

        Raises:
            ValueError: for an `fpr` outside (0, 1).
        """
        if not 0 < fpr < 1:
            raise ValueError(f"fpr must lie between 0 and 1, but got {fpr}")
        if self.nonmembers * fpr < 1:
            return math.nan
        return self.tpr[self.fpr <= fpr].max().item()

    def tpr_interval(self, fpr: float) -> tuple[float, float]:
        """Interval of [`tpr_at_fpr`]: Clopper-Pearson at 95 % over the members, at the threshold of these non-members.

        It says what other members would change, and not what other non-members, who set the threshold, would: with
        few of these the interval holds the true rate in fewer than 95 of 100 cases.

        The bounds are NaN where the rate cannot be estimated.
        """
        rate = self.tpr_at_fpr(fpr)
        if math.isnan(rate):
            return math.nan, math.nan
        return clopper_pearson(round(rate * self.members), self.members)


def membership(member_scores: torch.Tensor, nonmember_scores: torch.Tensor) -> MembershipResult:
    """Judge a membership inference attack by its scores.

    Args:
        member_scores (`torch.Tensor`): scores of training images, `[M]`; higher = more member-like.
        nonmember_scores (`torch.Tensor`): scores of held-out images of the same domain, `[N]`.

    Returns:
        [`MembershipResult`]: AUC with its 95 % score interval (Newcombe 2006, method 5, which keeps a width at
        AUC 0 and 1), and the ROC curve.

    Raises:
        ValueError: when a set has no score, or a score that is not finite.
    """
    member_scores, nonmember_scores = (torch.as_tensor(s).double().cpu() for s in (member_scores, nonmember_scores))
    for name, scores in (("member_scores", member_scores), ("nonmember_scores", nonmember_scores)):
        if scores.ndim != 1 or len(scores) == 0:
            raise ValueError(f"{name}: must be [N] with N > 0, but got {list(scores.shape)}")
        if not torch.isfinite(scores).all():
            raise ValueError(f"{name}: {int((~torch.isfinite(scores)).sum())} of {len(scores)} are not finite")
    auc = mannwhitneyu(member_scores, nonmember_scores).statistic.item() / (len(member_scores) * len(nonmember_scores))
    # Ranks in [0, 1], with ties kept: torchmetrics takes scores for logits unless all lie in [0, 1].
    ranks = torch.unique(torch.cat([member_scores, nonmember_scores]), return_inverse=True)[1].double()
    ranks = ranks / ranks.max().clamp(min=1)
    labels = torch.cat([torch.ones(len(member_scores)), torch.zeros(len(nonmember_scores))]).int()
    fpr, tpr, _ = binary_roc(ranks, labels)
    interval = auc_interval(auc, len(member_scores), len(nonmember_scores))
    return MembershipResult(auc, interval, len(member_scores), len(nonmember_scores), fpr, tpr)


def auc_interval(auc: float, members: int, nonmembers: int, level: float = 0.95) -> tuple[float, float]:
    """The true AUCs within z standard errors of the observed one (Newcombe, Statistics in Medicine 2006, 25:559)."""
    z = norm.ppf((1 + level) / 2)
    mean_size = (members + nonmembers) / 2 - 1

    def excess(theta: float) -> float:
        variance = theta * (1 - theta) / (members * nonmembers)
        variance *= 1 + mean_size * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return abs(auc - theta) - z * math.sqrt(variance)

    # 0 and 1 are roots without a meaning; the brackets end just before them.
    low = 0.0 if auc <= 0 else brentq(excess, 0.0, min(auc, 1 - 1e-9))
    high = 1.0 if auc >= 1 else brentq(excess, max(auc, 1e-9), 1.0)
    return low, high
