"""Copies among generated images: of whole training images, and of parts of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .. import metrics
from ..data import EncodedImages
from ..encoders import Encoder
from .settings import FALSE_ALARMS, Figure


@dataclass
class Copies:
    """The copies among generated images.

    Args:
        figures (dict of [`Figure`]): figures by the name of the measure.
        caught (dict): whether each prompt's own image was copied, by this prompt or another one with its caption, bool
            `[P]`, by the attack's name; empty where the prompts' images are not known, and without an attack that
            could not be judged.
    """

    figures: dict[str, Figure]
    caught: dict[str, torch.Tensor]


def find_copies(
    images: torch.Tensor,
    features: torch.Tensor,
    per_prompt: int,
    members: EncodedImages,
    others: EncodedImages,
    encoder: Encoder,
    own: Sequence[int] = (),
    persons: Sequence[int] = (),
) -> Copies:
    """Find generated images that are more like a training image, or like a part of one, than held-out images are.

    Args:
        images (`torch.Tensor`): generated images `[N, 3, H, W]` in [0, 1].
        features (`torch.Tensor`): features `[N, D]` of the generated images.
        per_prompt (`int`): number of consecutive images that were generated from the same caption.
        members ([`~memcontrol_hf.data.EncodedImages`]): images that may be memorized.
        others ([`~memcontrol_hf.data.EncodedImages`]): images that cannot be memorized.
        encoder ([`~memcontrol_hf.encoders.Encoder`]): image encoder.
        own (list of `int`): positions of the captions' own images among the distinct images of `members`.
        persons (list of `int`): the person of each caption, where persons are known.
    """
    result, captions = Copies({}, {}), members.captions([members.distinct[place] for place in own]) if own else []
    alike = torch.tensor([[caption == other for other in captions] for caption in captions])
    try:
        sets = members.features(encoder), others.features(encoder)
        copies = metrics.copy_similarity(features, *sets, FALSE_ALARMS, per_prompt, persons)
        result.figures["copy_share"] = Figure(copies.share, *copies.interval)
        result.figures["copy_similarity"] = Figure(copies.percentile_95)
        result.figures["copy_threshold"] = Figure(copies.threshold)
        if own:
            originals = F.normalize(sets[0][list(own)], dim=1).T
            of_prompts = F.normalize(features, dim=1).split(per_prompt)
            found = torch.stack([(one @ originals > copies.threshold).any(0) for one in of_prompts])
            result.caught["copy"] = (found.cpu() & alike).any(0)
    except ValueError as error:
        names = ("copy_share", "copy_similarity", "copy_threshold")
        result.figures |= dict.fromkeys(names, Figure(None, note=f"not estimable: {error}"))
    try:
        # `features` computes any function of the images once, and a few images at a time
        sets = (of.features(metrics.comparable) for of in (members, others))
        of_others = others.units_of(others.distinct)
        copies = metrics.partial_copies(
            metrics.comparable(images), *sets, FALSE_ALARMS, per_prompt, persons, of_others
        )
        result.figures["partial_copy_share"] = Figure(copies.share, *copies.interval)
        if own:
            hits = copies.distances < copies.threshold
            found = (copies.nearest[:, None] == torch.tensor(own)) & hits[:, None]
            result.caught["partial_copy"] = (found.unflatten(0, (len(own), per_prompt)).any(1) & alike).any(0)
    except ValueError as error:
        result.figures["partial_copy_share"] = Figure(None, note=f"not estimable: {error}")
    return result
