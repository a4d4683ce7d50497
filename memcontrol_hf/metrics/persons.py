"""Figures of persons instead of images. Images of one person are alike, so they are no independent draws."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import hypergeom

from .intervals import clopper_pearson


def mean_of_persons(values: torch.Tensor, persons: Sequence[int]) -> torch.Tensor:
    """The mean value of each person.

    Args:
        values (`torch.Tensor`): a value of each image, `[N]`.
        persons (list of `int`): number of the person of each image, `N` of them.

    Returns:
        `torch.Tensor`: `[P]` in double precision on the CPU, in the order in which the persons first occur.

    Raises:
        ValueError: when there are not as many persons as values.
    """
    values = torch.as_tensor(values).double().cpu()
    if len(values) != len(persons):
        raise ValueError(f"{len(values)} values but {len(persons)} persons: give the person of each value")
    numbers: dict[int, int] = {}
    places = torch.tensor([numbers.setdefault(person, len(numbers)) for person in persons])
    sums = torch.zeros(len(numbers), dtype=torch.double).index_add_(0, places, values)
    return sums / torch.bincount(places, minlength=len(numbers))


def share_of_draws(
    hits: torch.Tensor, per_prompt: int = 1, persons: Sequence[int] = ()
) -> tuple[float, tuple[float, float]]:
    """The share of generated images that an attack hits, with its interval over prompts or persons.

    Args:
        hits (`torch.Tensor`): whether each generated image is hit, bool `[M]`.
        per_prompt (`int`): number of generated images in a row that belong to one prompt, which counts as one draw.
        persons (list of `int`): number of the person of each prompt, where persons and not prompts are the draws: the
            share is then the mean over persons.

    Returns:
        The share, and its Clopper-Pearson interval at 95 %.
    """
    values, draws = hits.double(), len(hits) / per_prompt
    if persons:
        values = mean_of_persons(values.view(-1, per_prompt).mean(1), persons)
        draws = len(values)
    share = values.mean().item()
    return share, clopper_pearson(share * draws, draws)


@dataclass(frozen=True)
class WorstCase:
    """A figure of persons: its mean, and how it is for the persons who fare worst.

    Args:
        mean (`float`): mean over all persons.
        worst_decile (`float`): mean over the tenth of the persons (at least one) with the largest values.
        worst_person (`float`): largest value of all.
    """

    mean: float
    worst_decile: float
    worst_person: float


def worst_case(values: torch.Tensor, persons: int | None = None) -> WorstCase:
    """Mean, worst decile and worst person of a value of each person, `[P]`; a larger value is worse.

    The largest of many values is large by chance alone: compare with the same figures of as many persons who were not
    trained on. Of more persons than that, `persons` gives the figures that so many of them have in expectation, drawn
    without replacement: a person is among the worst `t` of them when fewer than `t` of the worse ones were drawn, too,
    whose number is hypergeometric.

    Args:
        values (`torch.Tensor`): value of each person, `[P]`.
        persons (`int`, *optional*): number of persons that are drawn, 1 to P; all of them by default.

    Raises:
        ValueError: for no value at all, for values that are not finite, and for more persons than there are.
    """
    values = torch.as_tensor(values).double().cpu()
    if values.ndim != 1 or len(values) == 0 or not values.isfinite().all():
        raise ValueError(f"values of persons must be [P], P > 0, and finite, but are {list(values.shape)}")
    count = len(values)
    persons = count if persons is None else persons
    if not 1 <= persons <= count:
        raise ValueError(f"{persons} of {count} persons cannot be drawn: give 1 to {count}")
    ordered = values.sort(descending=True).values

    def of_worst(number: int) -> float:
        if persons == count:
            return ordered[:number].mean().item()
        worse = np.arange(count)  # the number of persons who are worse than the one at this place
        among = hypergeom.cdf(number - 1, count - 1, worse, persons - 1)
        return (ordered @ torch.from_numpy(among)).item() * persons / count / number

    return WorstCase(ordered.mean().item(), of_worst(max(1, round(persons / 10))), of_worst(1))


@dataclass(frozen=True)
class ReidentificationResult:
    """Of how many persons the generated images show the person to a verifier.

    Args:
        share (`float`): share of the persons who are re-identified, in [0, 1].
        interval (`tuple[float, float]`): Clopper-Pearson at 95 % over the persons.
        found (`torch.Tensor`): whether each person is re-identified, bool `[P]`.
    """

    share: float
    interval: tuple[float, float]
    found: torch.Tensor


def reidentification(
    to_own: torch.Tensor, to_others: torch.Tensor, false_accepts: float = 0.01
) -> ReidentificationResult:
    """Re-identification of persons by a verifier, with persons who cannot be meant as the reference.

    A person is re-identified when at most the share `false_accepts` of the other persons lie as near to the images as
    the person. The references set the threshold of each person anew, since no threshold carries from one verifier or
    domain to another. The measure is an identification rate at rank `1 + false_accepts * Q` (ISO/IEC 2382-37).

    Args:
        to_own (`torch.Tensor`): distance from images that may show a person to real images of that person, `[P]`.
        to_others (`torch.Tensor`): distance from the same images to each of `Q` other persons, `[P, Q]`.
        false_accepts (`float`): share of the other persons who may lie as near; with fewer than `1 / false_accepts`
            others none may, and a person who cannot be found is found by chance in one of `Q + 1` cases.

    Raises:
        ValueError: for shapes that do not fit, distances that are NaN, and no other person.
    """
    if to_own.ndim != 1 or len(to_own) == 0 or to_others.ndim != 2 or to_others.shape[0] != len(to_own):
        raise ValueError(f"to_own must be [P] and to_others [P, Q], not {list(to_own.shape)}, {list(to_others.shape)}")
    if to_others.shape[1] == 0:
        raise ValueError("to_others: re-identification needs other persons to compare with")
    if to_own.isnan().any() or to_others.isnan().any():
        raise ValueError("the verifier gave a distance that is no number (NaN), by which nobody can be told")
    as_near = (to_others <= to_own[:, None]).double().mean(1)
    found = (as_near <= false_accepts).cpu()
    share = found.double().mean().item()
    return ReidentificationResult(share, clopper_pearson(int(found.sum()), len(found)), found)


def person_distances(distances: torch.Tensor, probes: Sequence[int], references: Sequence[int]) -> torch.Tensor:
    """Distances between persons, from distances between images.

    The mean over the real images of one person of the distance to the nearest image of the other. A minimum over both
    would make persons with many images look near.

    Args:
        distances (`torch.Tensor`): distances `[N, M]` between `N` images to be judged and `M` real ones.
        probes (list of `int`): number of the person of each of the `N` images, 0 to `P - 1`, none missing.
        references (list of `int`): number of the person of each of the `M` images, 0 to `Q - 1`, none missing.

    Returns:
        `torch.Tensor`: `[P, Q]` in double precision on the CPU.
    """
    distances = distances.double().cpu().numpy()
    probes, references = np.asarray(probes), np.asarray(references)
    nearest = np.stack([distances[probes == person].min(0) for person in range(probes.max() + 1)])
    of_reference = [nearest[:, references == person].mean(1) for person in range(references.max() + 1)]
    return torch.from_numpy(np.stack(of_reference, axis=1))
