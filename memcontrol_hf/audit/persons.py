"""Persons in an audit: how exposed those are who fare worst, and of whom generated images show the person."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from datasets import DatasetDict
from torch.nn import functional as F

from .. import metrics
from ..data import EncodedImages, check_groups, group_name
from ..encoders import Encoder
from .settings import FALSE_ALARMS, LEAST_PERSONS, Figure

Verifier = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A function of two sets of images in [0, 1], `[N, 3, H, W]` and `[M, 3, H, W]`, that gives distances `[N, M]`: small
where both show the same person."""


@dataclass(frozen=True)
class Exposure:
    """How exposed the training persons are by one measure, beside the same figures for held-out persons.

    Args:
        train ([`~memcontrol_hf.metrics.WorstCase`]): training persons; larger is worse.
        as_many ([`~memcontrol_hf.metrics.WorstCase`]):
            As many training persons as there are held-out ones, where these are fewer: what so many, drawn at random,
            have in expectation. Else all training persons.
        floor ([`~memcontrol_hf.metrics.WorstCase`]):
            Held-out persons, who cannot be exposed; where they are more, as many as there are training persons.
    """

    train: metrics.WorstCase
    as_many: metrics.WorstCase
    floor: metrics.WorstCase

    @classmethod
    def of(cls, train: torch.Tensor, held_out: torch.Tensor) -> "Exposure":
        """From the value of each training person `[P]` and of each held-out person `[Q]`; larger is worse."""
        fewer = min(len(train), len(held_out))
        return cls(metrics.worst_case(train), metrics.worst_case(train, fewer), metrics.worst_case(held_out, fewer))


def verifier_of(encoder: Encoder) -> Verifier:
    """The verifier that compares images by the cosine distance of an encoder's features."""

    def distances(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        one, other = (F.normalize(encoder(part), dim=1) for part in (images, others))
        return (1 - one @ other.T).clamp(0, 2)

    return distances


def check_persons(members: EncodedImages, others: EncodedImages) -> None:
    """Raise `ValueError` where one set alone has persons, a person is in both sets, or there are too few persons."""
    if members.by_person != others.by_person:
        with_persons, without = ("train", "held_out") if members.by_person else ("held_out", "train")
        raise ValueError(f"the {with_persons} set has a column 'group' and the {without} set has none: give both one")
    if not members.by_person:
        return
    check_groups(DatasetDict(train=members.images, held_out=others.images))
    names = [{group_name(group) for group in images.images["group"]} for images in (members, others)]
    if shared := names[0] & names[1]:
        raise ValueError(
            f"{len(shared)} persons (groups) have images in train and in held_out, which must be disjoint: move all "
            "images of a person to one of the sets"
        )
    for (name, least), found in zip(LEAST_PERSONS.items(), names):
        if len(found) < least:
            raise ValueError(
                f"the {name} set has {len(found)} persons, but an audit by persons needs {least} or more. Without a "
                "group column the audit is of images, and its intervals are too narrow if persons have several"
            )


def exposure_by_membership(train: torch.Tensor, held_out: torch.Tensor) -> Exposure:
    """How far the scores of training persons lie above those of held-out persons, in standard deviations of these.

    An AUC is the mean over persons of a rank, and the rank of the worst person is near 1 whatever is trained. The
    distance to the mean held-out person has no such end.

    Args:
        train (`torch.Tensor`): score of each training person, `[P]`; higher = more like a training image.
        held_out (`torch.Tensor`): score of each held-out person, `[Q]`, Q > 1.
    """
    mean, deviation = held_out.mean(), held_out.std().clamp(min=torch.finfo(torch.double).tiny)
    return Exposure.of(*((scores - mean) / deviation for scores in (train, held_out)))


def exposure_by_similarity(
    features: torch.Tensor, members: EncodedImages, others: EncodedImages, encoder: Encoder
) -> dict[str, Exposure]:
    """How similar the most similar generated image is to an image of each training person.

    The floor is how similar the most similar of the same images is to an image of each held-out person.

    Args:
        features (`torch.Tensor`): features `[N, D]` of the generated images.
        members, others ([`~memcontrol_hf.data.EncodedImages`]): training and held-out images.
        encoder ([`~memcontrol_hf.encoders.Encoder`]): encoder of the features.

    Returns:
        `dict`: of `similarity`, in [-1, 1]; empty where persons are not known.
    """
    if not members.by_person:
        return {}

    def largest(images: EncodedImages) -> torch.Tensor:
        similarities = 1 - metrics.nearest_distances(images.features(encoder), features)
        units = torch.tensor(images.units_of(images.distinct))
        of_persons = torch.full((len(set(units.tolist())),), -torch.inf, dtype=torch.double)
        return of_persons.scatter_reduce(0, units, similarities.double().cpu(), "amax")

    return {"similarity": Exposure.of(largest(members), largest(others))}


def reidentified(
    generated: torch.Tensor,
    rows: Sequence[int],
    per_prompt: int,
    members: EncodedImages,
    others: EncodedImages,
    verifier: Verifier,
) -> dict[str, Figure]:
    """Whether a verifier finds a person again in the images that are generated from the person's captions.

    The control is of real images: whether the verifier finds a held-out person again in one image of the person, by
    the others. A verifier that cannot do that proves nothing by finding no training person.

    Args:
        generated (`torch.Tensor`): images `[len(rows) * per_prompt, 3, H, W]` of the captions of rows.
        rows (list of `int`): rows of `members`.
        per_prompt (`int`): number of images of each caption.
        members, others ([`~memcontrol_hf.data.EncodedImages`]): images of training and of held-out persons.
        verifier: see [`Verifier`].
    """
    prompted = members.units_of(rows)
    numbers = {unit: number for number, unit in enumerate(dict.fromkeys(prompted))}
    probes = [numbers[unit] for unit in prompted for _ in range(per_prompt)]
    own_rows = [row for row in members.distinct if members.units[row] in numbers]
    own = [numbers[members.units[row]] for row in own_rows]
    to_own = metrics.person_distances(verifier(generated, members.pixels(own_rows)), probes, own).diagonal()
    real, of_others = others.pixels(others.distinct), others.units_of(others.distinct)
    to_others = metrics.person_distances(verifier(generated, real), probes, of_others)
    try:
        result = metrics.reidentification(to_own, to_others, FALSE_ALARMS)
        control = _found_among_real(verifier(real, real), of_others)
    except ValueError as error:  # a verifier of one's own may give no numbers
        names = ("reidentified_share", "reidentified_share_real")
        return dict.fromkeys(names, Figure(None, note=f"not estimable: {error}"))
    return {"reidentified_share": Figure(result.share, *result.interval), "reidentified_share_real": control}


def _found_among_real(distances: torch.Tensor, persons: Sequence[int]) -> Figure:
    """The share of the persons with two images or more whom a verifier finds by the first image, among all others.

    Args:
        distances (`torch.Tensor`): distances `[N, N]` among real images.
        persons (list of `int`): person of each image.
    """
    of = torch.tensor(persons)
    distances, found = distances.cpu(), []
    for person in range(int(of.max()) + 1):
        first, *rest = (of == person).nonzero().flatten().tolist()
        if not rest:
            continue
        others = [i for i, other in enumerate(persons) if other != person]
        names = {other: number for number, other in enumerate(dict.fromkeys(persons[i] for i in others))}
        to_others = metrics.person_distances(distances[[first]][:, others], [0], [names[persons[i]] for i in others])
        to_own = distances[first, rest].double().mean()[None]
        found.append(bool(metrics.reidentification(to_own, to_others, FALSE_ALARMS).found))
    if not found:
        return Figure(None, note="not estimable: no held-out person has two images")
    return Figure(sum(found) / len(found), *metrics.clopper_pearson(sum(found), len(found)))


def published_persons(
    exposures: Mapping[str, Mapping[str, Exposure] | None],
    members: EncodedImages,
    others: EncodedImages,
    verifier: str,
) -> dict[str, Any]:
    """The part of a report on persons: their number, their images, and how exposed those are who fare worst.

    Args:
        exposures (dict): of the `model` and of each control, by the name of what exposes persons.
        members, others ([`~memcontrol_hf.data.EncodedImages`]): images of training and of held-out persons.
        verifier (`str`): published name of the verifier.
    """
    images = {}
    for name, of in (("train", members), ("held_out", others)):
        units = of.units_of(of.distinct)
        counts = sorted(units.count(unit) for unit in set(units))
        images[name] = {"least": counts[0], "median": median(counts), "most": counts[-1]}
    of_model = exposures["model"]
    return {
        "train": len(set(members.units.values())),
        "held_out": len(set(others.units.values())),
        "images_per_person": images,
        "verifier": verifier,
        "exposure": {
            name: {
                **{who: asdict(of[name].train) if of and name in of else None for who, of in exposures.items()},
                "model_as_many": asdict(of_model[name].as_many),
                "floor": asdict(of_model[name].floor),
            }
            for name in of_model
        },
    }
