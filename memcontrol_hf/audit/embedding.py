"""Extraction by optimized embeddings: the images that come back when the embedding is searched instead of written."""

import itertools

import torch

from .. import metrics
from ..data import EncodedImages
from ..evaluation import Evaluator
from ..randomness import Purpose, row_keys
from .membership import Caught, not_applicable
from .settings import CLIQUE, PAPER_THRESHOLD, REFERENCES, AuditSettings, Figure

MEASURES = ("embedding_attack_auc", "embedding_attack_rate", "embedding_attack_rate_held_out")


def embedding_attack(
    evaluator: Evaluator, members: EncodedImages, others: EncodedImages, settings: AuditSettings
) -> tuple[dict[str, Figure], Caught]:
    """Search an embedding for some images of both sets, sample from it, and see which images come back.

    A search alone can write an image into an embedding. What was memorized shows in how much sooner training images
    come back than held-out images, for which the same search is made. The distance of what comes back is the
    calibrated distance of [`~memcontrol_hf.metrics.extraction`], to held-out images of persons (or, where persons are
    not known, of images) that are not searched for.

    Args:
        evaluator ([`~memcontrol_hf.evaluation.Evaluator`]): what measures the model.
        members ([`~memcontrol_hf.data.EncodedImages`]): images that the model may have memorized.
        others ([`~memcontrol_hf.data.EncodedImages`]): images that the model cannot have memorized.
        settings ([`AuditSettings`]): settings of the audit; `embedding_attack` is the number of images of each set.

    Returns:
        Figures, and the rows that are extracted with all rows that are attacked:

        - `embedding_attack_auc`: in how many of all pairs of a training and a held-out image the training image comes
          back nearer; .5 where the search alone brings images back.
        - `embedding_attack_rate`: share of the training images that come back within half the distance to held-out
          images.
        - `embedding_attack_rate_held_out`: the same share of the held-out images.
    """
    if "embedding_attack" in evaluator.family.not_applicable:
        return dict.fromkeys(MEASURES, not_applicable(evaluator.family, "embedding_attack")), {}
    count = min(settings.embedding_attack, len(set(others.units.values())) // 2)
    rows, other_rows = (one_of_each_unit(images, settings.seed, count) for images in (members, others))
    searched = set(others.units_of(other_rows))
    shuffled = others.shuffled(settings.seed, Purpose.AUDIT_REFERENCES)
    references = [row for row in shuffled if others.units[row] not in searched]
    reference_pixels = others.pixels(references[:REFERENCES])
    of_members, of_others = (
        nearest_found(evaluator, images, chosen, reference_pixels, settings)
        for images, chosen in ((members, rows), (others, other_rows))
    )
    outcome = metrics.membership(-of_members.calibrated_distance, -of_others.calibrated_distance)
    figures = (
        Figure(outcome.auc, *outcome.interval),
        Figure(of_members.calibrated_rate, *of_members.calibrated_interval),
        Figure(of_others.calibrated_rate, *of_others.calibrated_interval),
    )
    found = set(itertools.compress(rows, of_members.calibrated))
    return dict(zip(MEASURES, figures)), {"embedding_attack": (found, set(rows))}


def one_of_each_unit(images: EncodedImages, seed: int, count: int) -> list[int]:
    """Rows of `count` units (persons or images), one row of each: canaries first, in an order drawn by the seed."""
    shuffled = images.shuffled(seed, Purpose.AUDIT_EMBEDDINGS)
    ordered = sorted(shuffled, key=lambda row: row not in images.repeated)
    first: dict[int, int] = {}
    for row in ordered:
        first.setdefault(images.units[row], row)
    return list(first.values())[:count]


def nearest_found(
    evaluator: Evaluator, images: EncodedImages, rows: list[int], references: torch.Tensor, settings: AuditSettings
) -> metrics.ExtractionResult:
    """What comes back of some rows: a search for each, and as many images from it as a caption gets.

    Args:
        evaluator ([`~memcontrol_hf.evaluation.Evaluator`]): what measures the model.
        images ([`~memcontrol_hf.data.EncodedImages`]): images of one set.
        rows (list of `int`): rows of the images that are searched for.
        references (`torch.Tensor`): held-out images in [0, 1] that are not searched for, `[L, 3, H, W]`, by which the
            distances are calibrated.
        settings ([`AuditSettings`]): settings of the audit.
    """
    condition = metrics.search_embeddings(
        evaluator.family,
        evaluator.denoiser,
        images.batch(rows, ["latents"])["latents"],
        evaluator.condition_of(images, rows),
        row_keys(settings.seed, Purpose.AUDIT_EMBEDDINGS, (images.numbers[row] for row in rows)),
        batch_size=settings.batch_size,
    )
    per_image = settings.images_per_prompt
    generated = evaluator.images(images, rows, Purpose.AUDIT_EMBEDDING_SAMPLES, per_image, condition)
    return metrics.extraction(
        generated.unflatten(0, (len(rows), per_image)),
        images.pixels(rows),
        PAPER_THRESHOLD * settings.resolution / 224,
        CLIQUE,
        held_out=references,
    )
