"""The audit: every attack beside its controls, on a pipeline (with or without an adapter) or on generated images.

An attack compares images that the model may have memorized with images that it cannot have memorized. The audit runs
all attacks three times:

- on the model, with the training images and the held-out images;
- on the frozen base, which shows how much the base knew before the fine-tune;
- on the model, with one half of the held-out images in the place of the training images. Whatever an attack finds here
  is a false alarm.

Training images that are repeated are the canaries. The report counts the canaries that each attack caught: an attack
that finds nothing is evidence only if it catches canaries.

Where both sets have a column `group`, persons are the unit: each rate and each interval is of persons.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset

from .. import metrics
from ..adapters import adapter_in_place, load_adapter, unload_adapter
from ..data import ATTRIBUTE, EncodedImages, check_captions, weights_digest, without_captions
from ..encoders import Encoder, encoder_name, load_encoder, named_encoder
from ..families import family_of
from ..images import TILES, near_duplicates
from ..randomness import Purpose, row_keys
from ..report import MemorizationReport
from .attacks import Attacked, attack_images, attack_pipeline, evaluator_of
from .attributes import check_attribute
from .captions import caption_identifiers, caption_markers
from .coins import canary_losses, check_canaries, epsilon_from_coins
from .membership import losses_of
from .persons import Verifier, check_persons, published_persons, verifier_of
from .private import fingerprint, fingerprint_key, private_folder, write_review
from .settings import LEAST_IMAGES, AuditSettings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)


class TooFewImages(ValueError):
    """A set is too small to be audited. The message holds numbers alone, so that it may be published."""


def audit_memorization(
    train: Dataset,
    held_out: Dataset,
    pipeline: "DiffusionPipeline | None" = None,
    adapter: str | Path | None = None,
    base_pipeline: "DiffusionPipeline | None" = None,
    generated: Dataset | None = None,
    encoder: str | torch.nn.Module | None = None,
    clip_model: str | None = None,
    settings: AuditSettings | None = None,
    output_dir: str | Path | None = None,
    control: bool = True,
    verifier: "str | Verifier | None" = None,
    canaries: Dataset | None = None,
    delta: float = 1e-5,
) -> MemorizationReport:
    """Attack a model, or images that a model generated.

    Args:
        train (`Dataset`):
            Images that the model was fine-tuned on: column `image`, and column `text` if a pipeline with conditions is
            attacked. A column `group` in both sets names the person of each image; rates and intervals are of persons
            then. A column `attribute` in both sets is inferred by the model; see
            [`~memcontrol_hf.audit.attributes.attribute_figures`].
        held_out (`Dataset`):
            Images of the same domain that the model never saw, with the same columns.
        pipeline (`DiffusionPipeline`, *optional*):
            Base of the adapter, or without `adapter` the whole fine-tuned pipeline. The adapter is put on the pipeline
            during the attacks only.
        adapter (`str`, *optional*):
            Adapter to attack: whatever [`~memcontrol_hf.adapters.load_adapter`] takes.
        base_pipeline (`DiffusionPipeline`, *optional*):
            Base of a whole fine-tuned pipeline, which is attacked as a control.
        generated (`Dataset`, *optional*):
            Generated images instead of a pipeline, column `image`. Only distances between images can be measured then.
        encoder (`str` or `nn.Module`, *optional*):
            Image encoder of distances, copies and quality; see [`~memcontrol_hf.encoders.load_encoder`]. It can be
            left out for the demo's images alone, which the demo's encoder judges then.
        clip_model (`str`, *optional*):
            Hub id or folder of the CLIP model of the CLIP score. Without it the CLIP score is not measured.
        settings ([`AuditSettings`], *optional*):
            Settings of the audit.
        output_dir (`str`, *optional*):
            Folder for `private/review.html` and the key of the data's fingerprint. Without it nothing is written.
        control (`bool`):
            Whether to run the attacks also with half of the held-out images in the place of the training images. The
            default gate does not pass without this control.
        verifier (`str` or `Callable`, *optional*):
            Tells whether two images show the same person, where persons are known: an encoder's name as for
            `encoder`, whose features are compared, or any function that gives distances; see
            [`~memcontrol_hf.audit.persons.Verifier`]. By default the features of `encoder` are compared.
        canaries (`Dataset`, *optional*):
            Images for which [`~memcontrol_hf.data.flip_canaries`] flipped a coin: column `included`, and those of
            `train`. From them a lower bound of epsilon is measured; see [`~memcontrol_hf.metrics.measured_epsilon`].
        delta (`float`):
            Delta of the measured epsilon; that of DP-SGD where the training had one.

    Returns:
        [`MemorizationReport`]: report with `audit`, which no gate has judged yet.

    Raises:
        TooFewImages: for a set that is too small.
        ValueError: for sets that share an image or a person, for neither or both of `pipeline` and
            `generated`, and for images other than the demo's without an encoder; before the long work, for an adapter
            that cannot be loaded whole or changes nothing, a CLIP model that cannot be loaded, a folder that cannot be
            written to, an attribute that cannot be asked for, and canaries that do not belong to the training images.
    """
    settings = settings or AuditSettings()
    if (pipeline is None) == (generated is None):
        raise ValueError("give either a pipeline or generated images")
    if pipeline is None and (adapter is not None or base_pipeline is not None):
        raise ValueError("an adapter and a base_pipeline belong to a pipeline: leave them out with generated images")
    if pipeline is not None and not family_of(pipeline).conditions:
        train, held_out = (without_captions(data) for data in (train, held_out))
        canaries = None if canaries is None else without_captions(canaries)
    if ATTRIBUTE in train.column_names and (pipeline is None or not family_of(pipeline).conditions):
        raise ValueError("an attribute is inferred by a model that takes captions: leave --attribute_column out")
    if canaries is not None and pipeline is None:
        raise ValueError("canaries are guessed at by a model's losses: give a pipeline, not generated images")
    if not 0 <= delta < 1:
        raise ValueError(f"delta must lie in [0, 1), but is {delta}")
    columns = ["image"] if pipeline is None else ["image", "text"]
    given = {"train": train, "held_out": held_out} | ({} if canaries is None else {"canaries": canaries})
    _check_columns(given, columns)
    for name, data in given.items():
        check_captions(data, name)
    encoder = named_encoder(encoder, train, held_out)
    if pipeline is None:
        _check_columns({"generated": generated}, ["image"])
    else:
        for attacked in filter(None, (pipeline, base_pipeline)):
            family = family_of(attacked)
            family.check_resolution(settings.resolution)
            if settings.resolution % TILES:
                raise ValueError(
                    f"resolution {settings.resolution} is no multiple of {TILES}: extraction compares "
                    f"{TILES} x {TILES} tiles of an image"
                )
            family.noise.check_inference_steps(settings.inference_steps)
            family.pipeline_arguments(train["text"][:1], settings.resolution, settings.guidance_scale)
    if adapter is not None:
        _check_adapter(pipeline, adapter, _framed(train, settings))
    clip = None if clip_model is None or pipeline is None else metrics.load_clip(clip_model)
    private = None if output_dir is None else private_folder(Path(output_dir))
    key = None if private is None else fingerprint_key(private)
    name = encoder_name(encoder)
    encoder = load_encoder(encoder, "cpu" if pipeline is None else pipeline.device)
    members, others = (_framed(data, settings) for data in (train, held_out))
    check_persons(members, others)
    values = check_attribute(train, held_out)
    verifier, verifier_name = _verifier(verifier, encoder, name)
    coins = None if canaries is None else _framed(canaries, settings)
    if coins is not None:
        check_canaries(canaries, members, others, coins)
    _check_sets(members, others, settings.near_duplicates, encoder)

    losses: dict[str, torch.Tensor | None] = {"model": None, "frozen_base": None}
    results: dict[str, Attacked | None] = {"model": None, "frozen_base": None, "held_out_as_train": None}
    if pipeline is None:
        images = _framed(generated, settings)
        results["model"] = attack_images(images, members, others, settings, encoder)
        if control:
            halves = others.halves(settings.seed)
            results["held_out_as_train"] = attack_images(images, *halves, settings, encoder)
    else:
        base_losses = base_losses_of_halves = None
        if base_pipeline is not None or adapter is not None:
            base = base_pipeline or pipeline
            logger.info("audit: attacks on the frozen base")
            sets = _encoded(base, members, others)
            results["frozen_base"] = attack_pipeline(base, *sets, settings, encoder, clip, verifier=verifier)
            base_losses = tuple(-scores for scores in results["frozen_base"].scores["loss"])
            if control:
                base_losses_of_halves = losses_of(evaluator_of(base, settings), *sets[1].halves(settings.seed))
            if coins is not None:
                losses["frozen_base"] = canary_losses(base, *_encoded(base, coins), settings)
        with adapter_in_place(pipeline, adapter):
            logger.info(f"audit: attacks on the {'pipeline' if adapter is None else 'adapter'}")
            sets = _encoded(pipeline, members, others)
            results["model"] = attack_pipeline(
                pipeline, *sets, settings, encoder, clip, verifier=verifier, base_losses=base_losses
            )
            if coins is not None:
                losses["model"] = canary_losses(pipeline, *_encoded(pipeline, coins), settings)
            if control:
                logger.info("audit: attacks with held-out images in the place of training images")
                halves = sets[1].halves(settings.seed)
                results["held_out_as_train"] = attack_pipeline(
                    pipeline,
                    *halves,
                    settings,
                    encoder,
                    quality=False,
                    verifier=verifier,
                    base_losses=base_losses_of_halves,
                )
    subject = "generated images" if pipeline is None else "adapter" if adapter is not None else "pipeline"
    content = {"subject": subject, "settings": asdict(settings), "encoder": name}
    content |= _published(results, members, others, settings)
    if generated is not None:
        content["images"]["generated"] = len(generated)
    if members.by_person:
        exposures = {who: result and result.exposure for who, result in results.items()}
        content["persons"] = published_persons(exposures, members, others, verifier_name)
    if values:
        content["attribute"] = {"values": len(values)}
    if coins is not None:
        content["epsilon"] = epsilon_from_coins(losses["model"], losses["frozen_base"], canaries, delta)
    if "text" in train.column_names and any(captions := train["text"][:]):  # else nobody looked at captions
        content["caption_markers"] = caption_markers(captions)
        if (identifiers := caption_identifiers(captions)) is not None:
            content["caption_identifiers"] = identifiers
    if private is not None:
        content["data_fingerprint"] = fingerprint(members.digests, key)
        write_review(results["model"], members, private / "review.html")
    return MemorizationReport(base_model="" if pipeline is None else type(pipeline).__name__, audit=content)


def _framed(images: Dataset, settings: AuditSettings) -> EncodedImages:
    return EncodedImages(images, settings.resolution, framing=settings.framing)


def _verifier(verifier: "str | Verifier | None", encoder: Encoder, name: str) -> "tuple[Verifier, str]":
    """The verifier, and the name of it that is published."""
    if verifier is None:
        return verifier_of(encoder), name
    if isinstance(verifier, str):
        return verifier_of(load_encoder(verifier, encoder.mean.device)), encoder_name(verifier)
    return verifier, getattr(verifier, "__name__", type(verifier).__name__)


@torch.no_grad()
def _check_adapter(pipeline: "DiffusionPipeline", adapter: str | Path, images: EncodedImages) -> None:
    """Raise `ValueError` for an adapter that cannot be loaded, or that does not change what the model predicts.

    All figures of such an adapter would be those of the base, which memorized nothing.
    """
    family = family_of(pipeline)
    rows = range(min(4, len(images)))
    keys = row_keys(0, Purpose.AUDIT_SAMPLES, list(rows))

    def losses() -> torch.Tensor:
        latents, condition = family.encode_images(images.pixels(rows)), family.encode_prompts(images.captions(rows))
        return metrics.denoising_losses(
            family, family.denoiser.eval(), latents, condition, family.noise.timesteps(2), keys
        )

    of_base = losses()
    load_adapter(pipeline, adapter)
    try:
        same = torch.equal(losses(), of_base)
    finally:
        unload_adapter(pipeline)
    if same:
        raise ValueError(
            f"the adapter {str(adapter)!r} changes nothing: with it, the model predicts exactly what its base "
            "predicts. Give the folder of a trained adapter"
        )


def _encoded(pipeline: "DiffusionPipeline", *sets: EncodedImages) -> list[EncodedImages]:
    """The sets with the latents and conditions that the pipeline's present encoders compute."""
    family = family_of(pipeline)
    digests = [weights_digest(module) for module in family.encoder_modules]
    return [images.encoded_by(family, digests) for images in sets]


def _published(
    results: dict[str, Attacked | None], members: EncodedImages, others: EncodedImages, settings: AuditSettings
) -> dict[str, Any]:
    """The part of the results that is published: aggregates only."""
    model, canaries = results["model"], members.repeated
    doubles = near_duplicates(members.thumbnails, None, settings.near_duplicates)
    return {
        "images": {
            "train": len(members.distinct),
            "held_out": len(others.distinct),
            "train_near_duplicates": len({row for pair in doubles for row in pair}),
        },
        "measures": {
            measure: {
                subject: asdict(result.figures[measure]) if result and measure in result.figures else None
                for subject, result in results.items()
            }
            for measure in model.figures
        },
        "canaries": {
            "planted": len(canaries),
            "caught": {
                attack: {"caught": len(found & canaries), "of": len(looked_at & canaries)}
                for attack, (found, looked_at) in model.caught.items()
            },
        },
        "distances": model.distances,
    }


def _check_columns(sets: dict[str, Dataset], columns: Sequence[str]) -> None:
    for name, data in sets.items():
        for column in columns:
            if column not in data.column_names:
                raise ValueError(f"the {name} set has no column {column!r}; it has: {', '.join(data.column_names)}")
        if len(data) == 0:
            raise ValueError(f"the {name} set is empty: an audit needs images in each set")


def _check_sets(members: EncodedImages, others: EncodedImages, threshold: float, encoder: Encoder) -> None:
    """Raise `ValueError` for sets that are too small, share or nearly share an image, or have no features."""
    for name, images in (("train", members), ("held_out", others)):
        if (count := len(images.distinct)) < (least := LEAST_IMAGES[name]):
            raise TooFewImages(f"the {name} set has {count} different images, but an audit needs {least} or more")
    shared = len(set(members.digests) & set(others.digests))
    if shared:
        raise ValueError(f"{shared} images are in train and in held_out too: they must be disjoint")
    near = near_duplicates(members.thumbnails, others.thumbnails, threshold, altered=True)
    if near:
        rows = ", ".join(f"{members.distinct[i]} and {others.distinct[j]}" for i, j in near[:5])
        raise ValueError(
            f"{len({j for _, j in near})} held-out images are near-duplicates of training images, which makes the "
            f"figures look safer than they are: rows {rows}{' ...' if len(near) > 5 else ''}. Take them out, or lower "
            f"the threshold --near_duplicates {threshold:g} if they are different pictures"
        )
    for name, images in (("train", members), ("held_out", others)):  # checked last, because features take long
        features = images.features(encoder)
        if (features == features[0]).all():
            raise ValueError(f"the encoder gives all {len(features)} images of the {name} set the same features")
