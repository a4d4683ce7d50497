"""The membership attacks of an audit: their scores, and the figures that follow from them."""

import torch

from .. import metrics
from ..data import EncodedImages
from ..evaluation import Evaluator
from ..families import Family
from ..metrics.dataset_inference import LEAST_DRAWS
from ..randomness import Purpose
from ..report import NOT_APPLICABLE
from .persons import Exposure, exposure_by_membership
from .settings import FALSE_ALARMS, Figure

MembershipScores = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Scores of the distinct images of both sets, `[N]` and `[M]`, by the name of the attack."""

Caught = dict[str, tuple[set[int], set[int]]]
"""Rows that an attack takes for memorized and all rows that it attacked, by the attack's name."""


def scores_of(evaluator: Evaluator, members: EncodedImages, others: EncodedImages) -> MembershipScores:
    """The scores of the attacks on both sets; higher = more like a training image."""
    of_members = evaluator.membership_scores(members, Purpose.AUDIT_MEMBERS)
    of_others = evaluator.membership_scores(others, Purpose.AUDIT_NONMEMBERS)
    return {attack: (scores, of_others[attack]) for attack, scores in of_members.items()}


def losses_of(
    evaluator: Evaluator, members: EncodedImages, others: EncodedImages
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of both sets alone, `[N]` and `[M]`, under the noise of [`scores_of`]."""
    return evaluator.losses(members, Purpose.AUDIT_MEMBERS), evaluator.losses(others, Purpose.AUDIT_NONMEMBERS)


def membership_figures(
    family: Family,
    scores: MembershipScores,
    members: EncodedImages,
    others: EncodedImages,
    seed: int,
    base_losses: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[dict[str, Figure], Caught, dict[str, Exposure]]:
    """The figures of the attacks, the rows that each catches at `FALSE_ALARMS`, and the persons' exposure.

    The score of a person is the mean score of the person's images. Rows are caught one by one. With the losses of the
    frozen base there is one more attack, `calibrated`: how much less the model loses on an image than its base does.
    The base is a reference model that costs no training, in the way of the difficulty calibration of Watson et al.
    (https://huggingface.co/papers/2111.08440).

    Args:
        family ([`~memcontrol_hf.families.Family`]): family of the pipeline.
        scores ([`MembershipScores`]): what [`scores_of`] gives.
        members, others ([`~memcontrol_hf.data.EncodedImages`]): images that may be memorized, and that cannot be.
        seed (`int`): random seed of the splits of the dataset inference.
        base_losses (pair of `torch.Tensor`, *optional*): what [`losses_of`] gives for the frozen base.
    """
    figures: dict[str, Figure] = {}
    caught: Caught = {}
    exposure: dict[str, Exposure] = {}
    if base_losses is not None:
        calibrated = (score + of_base for score, of_base in zip(scores["loss"], base_losses))
        scores = scores | {"calibrated": tuple(calibrated)}
    unit, features = "persons" if members.by_person else "images", []
    for attack, of_images in scores.items():
        of_members, of_others = (
            metrics.mean_of_persons(values, images.units_of(images.distinct))
            for values, images in zip(of_images, (members, others))
        )
        features.append((of_members, of_others))
        outcome = metrics.membership(of_members, of_others)
        figures[f"membership_auc_{attack}"] = Figure(outcome.auc, *outcome.interval)
        figures[f"membership_tpr_{attack}"] = _tpr(outcome, FALSE_ALARMS, unit)
        figures[f"membership_tpr_strict_{attack}"] = _tpr(outcome, FALSE_ALARMS / 10, unit)
        if members.by_person:
            exposure[f"membership_{attack}"] = exposure_by_membership(of_members, of_others)
        limit = highest_innocent(of_images[1])
        found = {row for row, score in zip(members.distinct, of_images[0]) if score > limit}
        caught[f"membership_{attack}"] = (found, set(members.distinct))
    if "clid" in family.not_applicable:
        for measure in ("membership_auc_clid", "membership_tpr_clid", "membership_tpr_strict_clid"):
            figures[measure] = not_applicable(family, "clid")
    figures["dataset_inference_p"] = _dataset_inference(features, unit, seed)
    return figures, caught, exposure


def highest_innocent(scores: torch.Tensor) -> torch.Tensor:
    """The score of images that were never trained on, `[M]`, that `FALSE_ALARMS` of them exceed.

    Of fewer than `1 / FALSE_ALARMS` images it is the largest score, which an image of the same kind exceeds by chance
    in one of `M + 1` cases.
    """
    return torch.quantile(scores, 1 - FALSE_ALARMS) if len(scores) * FALSE_ALARMS >= 1 else scores.amax()


def _dataset_inference(features: list[tuple[torch.Tensor, torch.Tensor]], unit: str, seed: int) -> Figure:
    """The p-value of all attacks together, or a note that there are too few units for it."""
    sets = [torch.stack(columns, dim=1) for columns in zip(*features)]
    if min(map(len, sets)) < LEAST_DRAWS:
        return Figure(None, note=f"not estimable from fewer than {LEAST_DRAWS} {unit} in each set")
    return Figure(metrics.dataset_inference(*sets, seed=seed))


def _tpr(outcome: metrics.MembershipResult, false_alarms: float, unit: str) -> Figure:
    """The true-positive rate at a rate of false alarms, or a note that there are too few held-out units for it."""
    rate = outcome.tpr_at_fpr(false_alarms)
    if rate != rate:
        needed = f"it needs {1 / false_alarms:.0f}"
        return Figure(None, note=f"not estimable from {outcome.nonmembers} held-out {unit}: {needed}")
    return Figure(rate, *outcome.tpr_interval(false_alarms))


def not_applicable(family: Family, measure: str) -> Figure:
    """The figure of a measure that has no meaning for a family."""
    return Figure(None, note=f"{NOT_APPLICABLE}: {family.not_applicable[measure]}")
