"""The attacks of one audit. An attack compares a set that may be memorized with a set that cannot be memorized."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from .. import metrics
from ..data import ATTRIBUTE, EncodedImages
from ..encoders import Encoder
from ..evaluation import Evaluator
from ..families import family_of
from ..images import tile_distances
from ..randomness import Purpose
from .attributes import attribute_figures
from .copies import find_copies
from .embedding import embedding_attack
from .membership import MembershipScores, highest_innocent, membership_figures, not_applicable, scores_of
from .persons import Exposure, Verifier, exposure_by_similarity, reidentified
from .settings import BINS, CLIQUE, PAPER_THRESHOLD, REFERENCES, REVIEWED, AuditSettings, Figure

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import CLIPModel, CLIPProcessor


@dataclass
class Attacked:
    """Results of one run of the attacks: figures, which may be published, and single images, which stay private.

    Args:
        figures (dict of [`Figure`]): figures by the name of the measure.
        caught (dict): rows that an attack takes for memorized and all rows that it attacked, by the attack's name.
        pairs (list): most similar pairs: similarity, row of the training image, generated image `[3, H, W]`.
        distances (dict): histograms of the distances from generated images to the nearest image of each set.
        exposure (dict of [`Exposure`]): for the persons who fare worst, by the name of what exposes them; empty where
            persons are not known.
        scores (dict): scores of the membership attacks on the distinct images of both sets, by the attack's name.
    """

    figures: dict[str, Figure]
    caught: dict[str, tuple[set[int], set[int]]]
    pairs: list[tuple[float, int, torch.Tensor]]
    distances: dict[str, list[float]]
    exposure: dict[str, Exposure] = field(default_factory=dict)
    scores: MembershipScores = field(default_factory=dict)


@torch.no_grad()
def attack_pipeline(
    pipeline: "DiffusionPipeline",
    members: EncodedImages,
    others: EncodedImages,
    settings: AuditSettings,
    encoder: Encoder,
    clip: "tuple[CLIPModel, CLIPProcessor] | None" = None,
    quality: bool = True,
    verifier: Verifier | None = None,
    base_losses: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Attacked:
    """Run all attacks on a model.

    Args:
        pipeline (`DiffusionPipeline`): pipeline to attack.
        members ([`~memcontrol_hf.data.EncodedImages`]): images that the model may have memorized.
        others ([`~memcontrol_hf.data.EncodedImages`]): images that the model cannot have memorized.
        settings ([`AuditSettings`]): settings of the audit.
        encoder ([`~memcontrol_hf.encoders.Encoder`]): image encoder of distances, copies and quality.
        clip (tuple, *optional*): CLIP model and processor of the CLIP score.
        quality (`bool`): whether to measure the quality of images generated from captions of `others`.
        verifier ([`~memcontrol_hf.audit.persons.Verifier`], *optional*): tells persons apart, where persons are known.
        base_losses (pair of `torch.Tensor`, *optional*):
            Losses of the frozen base on the distinct images of `members` and `others`, under the same noise.
    """
    evaluator = evaluator_of(pipeline, settings)
    family = evaluator.family
    scores = scores_of(evaluator, members, others)
    figures, caught, exposure = membership_figures(
        evaluator.family, scores, members, others, settings.seed, base_losses
    )
    if ATTRIBUTE in members.images.column_names:
        figures |= attribute_figures(evaluator, members, others)
    rows, per_prompt = _prompt_rows(members, settings), settings.images_per_prompt
    images = evaluator.images(members, rows, Purpose.AUDIT_SAMPLES, per_prompt)
    extracted, found = _extraction(images, rows, members, others, settings)

    features = encoder(images)
    place = {row: i for i, row in enumerate(members.distinct)}
    own = [place[row] for row in rows]
    result = compare_with_training_images(images, features, per_prompt, members, others, settings, encoder, own)
    result.figures = figures | extracted | result.figures
    result.caught = caught | found | result.caught
    result.exposure = exposure | result.exposure
    result.scores = scores
    if verifier is not None and members.by_person:
        result.figures |= reidentified(images, rows, per_prompt, members, others, verifier)

    if settings.embedding_attack:
        searched, found = embedding_attack(evaluator, members, others, settings)
        result.figures |= searched
        result.caught |= found
    if "noise_norm" in family.not_applicable:
        result.figures["trajectory_norm_auc"] = not_applicable(family, "noise_norm")
    else:
        other_rows = others.shuffled(settings.seed, Purpose.AUDIT_PROMPTS)[: settings.num_prompts]
        norms, other_norms = evaluator.trajectory_norms(members, rows), evaluator.trajectory_norms(others, other_rows)
        units = members.units_of(rows), others.units_of(other_rows)
        _compare_trajectories(result, norms, other_norms, rows, members.repeated, *units)

    if quality:
        fresh_rows = others.shuffled(settings.seed, Purpose.AUDIT_QUALITY)[: settings.num_quality_images]
        fresh = evaluator.images(others, fresh_rows, Purpose.AUDIT_QUALITY, 1)
        result.figures |= _quality(fresh, others, encoder, others.captions(fresh_rows), clip)
    return result


def evaluator_of(pipeline: "DiffusionPipeline", settings: AuditSettings) -> Evaluator:
    """What measures a pipeline with the settings of an audit."""
    family = family_of(pipeline)
    return Evaluator(
        family=family,
        denoiser=family.denoiser.eval(),
        resolution=settings.resolution,
        seed=settings.seed,
        batch_size=settings.batch_size,
        num_timesteps=settings.num_timesteps,
        inference_steps=settings.inference_steps,
        guidance_scale=settings.guidance_scale,
        null=family.null_condition(),
    )


def attack_images(
    images: EncodedImages, members: EncodedImages, others: EncodedImages, settings: AuditSettings, encoder: Encoder
) -> Attacked:
    """Measure generated images without a model: how near they are to `members`, and to `others`.

    An image that was generated several times counts as often: models repeat what they memorized.
    """
    place = {images.digests[row]: i for i, row in enumerate(images.distinct)}
    features = images.features(encoder)[[place[digest] for digest in images.digests]]
    pixels = images.pixels(range(len(images)))
    return compare_with_training_images(pixels, features, 1, members, others, settings, encoder)


def compare_with_training_images(
    images: torch.Tensor,
    features: torch.Tensor,
    per_prompt: int,
    members: EncodedImages,
    others: EncodedImages,
    settings: AuditSettings,
    encoder: Encoder,
    own: Sequence[int] = (),
) -> Attacked:
    """Measure how near generated images are to both sets.

    Args:
        images (`torch.Tensor`): generated images `[N, 3, H, W]` in [0, 1].
        features (`torch.Tensor`): features `[N, D]` of the generated images.
        per_prompt (`int`): number of consecutive images that were generated from the same caption.
        members ([`~memcontrol_hf.data.EncodedImages`]): images that may be memorized.
        others ([`~memcontrol_hf.data.EncodedImages`]): images that cannot be memorized.
        settings ([`AuditSettings`]): settings of the audit.
        encoder ([`~memcontrol_hf.encoders.Encoder`]): image encoder.
        own (list of `int`): positions of the captions' own images among the distinct images of `members`.
    """
    member_features, other_features = members.features(encoder), others.features(encoder)
    persons = members.units_of([members.distinct[place] for place in own]) if members.by_person else ()
    nearest = metrics.nearest_share(
        features, member_features, other_features, settings.seed, per_prompt=per_prompt, own=own, persons=persons
    )
    figures = {
        "nearest_share": Figure(nearest.share, *nearest.interval),
        "amd": Figure(nearest.to_train.mean().item()),
        "amd_held_out": Figure(nearest.to_held_out.mean().item()),
        "c_t": Figure(metrics.c_t(features, member_features, other_features)),
        "auth_pct": Figure(metrics.auth_pct(features, member_features)),
    }
    copies = find_copies(images, features, per_prompt, members, others, encoder, own, persons)
    figures |= copies.figures
    rows = [members.distinct[place] for place in own]
    caught = {name: (set(itertools.compress(rows, hits)), set(rows)) for name, hits in copies.caught.items()}
    largest = max(nearest.to_train.max().item(), nearest.to_held_out.max().item())
    edges = torch.linspace(0, largest or 1.0, BINS + 1, dtype=torch.double)
    distances = {
        "edges": edges.tolist(),
        "train": torch.histogram(nearest.to_train, edges).hist.tolist(),
        "held_out": torch.histogram(nearest.to_held_out, edges).hist.tolist(),
    }
    exposure = exposure_by_similarity(features, members, others, encoder)
    pairs = _most_similar_pairs(images, features, members, member_features)
    return Attacked(figures, caught, pairs, distances, exposure)


# ---- single attacks ----


def _extraction(
    images: torch.Tensor, rows: list[int], members: EncodedImages, others: EncodedImages, settings: AuditSettings
) -> tuple[dict[str, Figure], dict[str, tuple[set[int], set[int]]]]:
    """The extraction attack on images `[len(rows) * K, 3, H, W]`: K generated images for the caption of each row.

    A caption gives a training image back when one of the training images with this caption comes out of it.
    """
    references = others.pixels(others.shuffled(settings.seed, Purpose.AUDIT_REFERENCES)[:REFERENCES])
    threshold = PAPER_THRESHOLD * settings.resolution / 224
    images = images.unflatten(0, (len(rows), settings.images_per_prompt))

    def attack(generated: torch.Tensor, originals: torch.Tensor) -> dict[str, torch.Tensor]:
        result = metrics.extraction(generated, originals, threshold, CLIQUE, held_out=references)
        return {"extraction": result.extracted, "extraction_calibrated": result.calibrated}

    nearest, prompts = _nearest_with_the_caption(images, rows, members)
    originals = members.pixels(nearest)
    hits, persons = attack(images, originals), members.units_of(rows)
    caught = {name: set(itertools.compress(nearest, found.tolist())) for name, found in hits.items()}
    if nearest != rows and (canaries := [row for row in rows if row in members.repeated]):
        of_canaries = images[[prompts[row] for row in canaries]]
        for name, found in attack(of_canaries, members.pixels(canaries)).items():
            caught[name] |= set(itertools.compress(canaries, found.tolist()))
    figures = {
        "extraction_rate": _share_of_units(hits["extraction"], persons),
        "extraction_rate_calibrated": _share_of_units(hits["extraction_calibrated"], persons),
        # pairs of real images that the absolute threshold takes for the same picture
        "extraction_false_alarms": Figure((tile_distances(originals, references) <= threshold).double().mean().item()),
    }
    return figures, {name: (found & {*rows}, {*rows}) for name, found in caught.items()}


def _nearest_with_the_caption(
    images: torch.Tensor, rows: list[int], members: EncodedImages
) -> tuple[list[int], dict[int, int]]:
    """Which training images with a caption its generated images come nearest to, at 32 pixels.

    That is the caption's own image where all captions differ. Where images share a caption, such as a class or the
    empty one, a model that gives back another of them has given back a training image all the same.

    Args:
        images (`torch.Tensor`): generated images of the caption of each row, `[P, K, 3, H, W]`.
        rows (list of `int`): rows of the captions, P of them.
        members ([`~memcontrol_hf.data.EncodedImages`]): training images.

    Returns:
        The row of the nearest image of each caption, and for each of `rows` the position of the nearest caption.
    """
    captions, with_caption = members.captions(rows), {}
    for place, caption in enumerate(members.captions(members.distinct)):
        with_caption.setdefault(caption, []).append(place)
    originals = members.features(metrics.comparable).flatten(1).cpu()
    nearest, prompts = list(rows), {row: prompt for prompt, row in enumerate(rows)}
    for caption in set(captions):
        if len(places := with_caption[caption]) == 1:
            continue
        of_caption = [prompt for prompt, other in enumerate(captions) if other == caption]
        generated = (metrics.comparable(images[prompt]).flatten(1).cpu() for prompt in of_caption)
        distances = torch.stack([torch.cdist(one, originals[places]).amin(0) for one in generated])
        for prompt, place in zip(of_caption, distances.argmin(1).tolist()):
            nearest[prompt] = members.distinct[places[place]]
        for place, prompt in zip(places, distances.argmin(0).tolist()):
            prompts[members.distinct[place]] = of_caption[prompt]
    return nearest, prompts


def _share_of_units(hits: torch.Tensor, units: list[int]) -> Figure:
    """The share of the units (persons or images) of which one prompt or more is a hit, bool `[P]`."""
    hit = {unit for unit, found in zip(units, hits.tolist()) if found}
    count = len(set(units))
    return Figure(len(hit) / count, *metrics.clopper_pearson(len(hit), count))


def _compare_trajectories(
    result: Attacked,
    norms: torch.Tensor,
    other_norms: torch.Tensor,
    rows: list[int],
    repeated: set[int],
    units: Sequence[int],
    other_units: Sequence[int],
) -> None:
    """Add to `result` whether training captions, and canaries' captions, steer harder or less than held-out captions.

    A caption whose image is memorized can lie on either side: `trajectory_norm` catches the largest norms, and
    `trajectory_norm_low` the smallest.

    Args:
        result ([`Attacked`]): results so far, which are changed.
        norms (`torch.Tensor`): noise norms `[len(rows)]` along the trajectories of training captions.
        other_norms (`torch.Tensor`): noise norms along the trajectories of held-out captions.
        rows (list of `int`): rows of the training captions.
        repeated (set of `int`): rows of the canaries.
        units, other_units (list of `int`): the unit (person or image) of each training and held-out caption.
    """
    of_others = metrics.mean_of_persons(other_norms, other_units)
    outcome = metrics.membership(metrics.mean_of_persons(norms, units), of_others)
    result.figures["trajectory_norm_auc"] = Figure(outcome.auc, *outcome.interval)
    low, high = -highest_innocent(-other_norms), highest_innocent(other_norms)
    result.caught["trajectory_norm"] = ({row for row, norm in zip(rows, norms) if norm > high}, set(rows))
    result.caught["trajectory_norm_low"] = ({row for row, norm in zip(rows, norms) if norm < low}, set(rows))
    canaries = [(norm, unit) for row, norm, unit in zip(rows, norms.tolist(), units) if row in repeated]
    if canaries:
        canary_norms = metrics.mean_of_persons(*map(list, zip(*canaries)))
        outcome = metrics.membership(canary_norms, of_others)
        result.figures["trajectory_norm_auc_canaries"] = Figure(outcome.auc, *outcome.interval)


def _quality(
    images: torch.Tensor,
    others: EncodedImages,
    encoder: Encoder,
    captions: list[str],
    clip: "tuple[CLIPModel, CLIPProcessor] | None",
) -> dict[str, Figure]:
    """The quality of images `[N, 3, H, W]` generated from held-out captions, compared with the held-out images."""
    features, real = encoder(images), others.features(encoder)
    figures = {"fid": Figure(metrics.fid(features, real))}
    try:
        precision, recall = metrics.precision_recall(features, real)
        figures["kid"] = Figure(metrics.kid(features, real))
        figures["precision"], figures["recall"] = Figure(precision), Figure(recall)
    except ValueError as error:
        figures |= dict.fromkeys(("kid", "precision", "recall"), Figure(None, note=f"not estimable: {error}"))
    if clip is not None:
        figures["clip_score"] = Figure(metrics.clip_score(images, captions, clip))
    return figures


def _most_similar_pairs(
    images: torch.Tensor, features: torch.Tensor, members: EncodedImages, member_features: torch.Tensor
) -> list[tuple[float, int, torch.Tensor]]:
    """The `REVIEWED` generated images that are most similar to a training image, each with the row of that image."""
    originals = F.normalize(member_features, dim=1).T
    nearest = [(F.normalize(part, dim=1) @ originals).max(1) for part in features.split(4096)]
    similarities, places = (torch.cat(parts) for parts in zip(*nearest))
    most_similar = similarities.argsort(descending=True)[:REVIEWED].tolist()
    return [(similarities[i].item(), members.distinct[int(places[i])], images[i].clone()) for i in most_similar]


def _prompt_rows(images: EncodedImages, settings: AuditSettings) -> list[int]:
    """Rows whose captions are sampled: repeated images first, and both parts in an order drawn by the seed."""
    shuffled = images.shuffled(settings.seed, Purpose.AUDIT_PROMPTS)
    rows = sorted(shuffled, key=lambda row: row not in images.repeated)
    return rows[: settings.num_prompts]
