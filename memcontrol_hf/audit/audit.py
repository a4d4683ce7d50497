"""The audit: every attack, beside its controls, on a pipeline with an adapter or on generated images alone.

One function runs the attacks on a model, a set that it may have memorized and a set that it cannot have. The audit
calls it three times: on the model, on the frozen base (what of the leak was there before), and on the model with one
half of the held-out images in the place of the training images (the false alarms). Repeated training images are the
canaries: a clean result counts only when the attacks are seen to fire on them, or when there are none and it says so.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset

from .. import metrics
from ..adapters import adapter_in_place, load_adapter, unload_adapter
from ..data import EncodedImages, weights_digest, without_captions
from ..encoders import Encoder, encoder_name, load_encoder
from ..families import family_of
from ..images import near_duplicates
from ..report import MemorizationReport
from .attacks import Attacked, attack_images, attack_pipeline
from .captions import caption_markers
from .private import fingerprint, private_folder, write_review
from .settings import LEAST_IMAGES, AuditSettings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def audit_memorization(
    train: Dataset,
    held_out: Dataset,
    pipeline: "DiffusionPipeline | None" = None,
    adapter: str | Path | None = None,
    base_pipeline: "DiffusionPipeline | None" = None,
    generated: Dataset | None = None,
    encoder: str | torch.nn.Module = "demo",
    clip_model: str | None = None,
    settings: AuditSettings | None = None,
    output_dir: str | Path | None = None,
    control: bool = True,
) -> MemorizationReport:
    """Attack a model, or images that it generated.

    Args:
        train (`Dataset`):
            The images that it was fine-tuned on: column `image`, and `text` unless only `generated` is given or the
            pipeline is unconditional.
        held_out (`Dataset`):
            Likewise, of the same domain, which it never saw.
        pipeline (`DiffusionPipeline`, *optional*):
            With `adapter`: the base, which has the adapter during the attacks alone. Without: the whole fine-tuned
            pipeline.
        adapter (`str`, *optional*):
            Whatever [`~memcontrol_hf.adapters.load_adapter`] takes.
        base_pipeline (`DiffusionPipeline`, *optional*):
            The base of a whole fine-tuned pipeline, for the control.
        generated (`Dataset`, *optional*):
            Instead of a pipeline: images, column `image`. Only their distances can be measured.
        encoder (`str` or `nn.Module`):
            See [`~memcontrol_hf.encoders.load_encoder`]; of the distances, of copies and of the quality.
        clip_model (`str`, *optional*):
            Hub id or folder of a CLIP model, for the CLIP score; it is not measured without.
        settings ([`AuditSettings`], *optional*):
            How much is attacked.
        output_dir (`str`, *optional*):
            `private/review.html` and the key of the data's fingerprint go there; nothing is written without it.
        control (`bool`):
            Whether the attacks also look for half of the held-out images as if they were training images. The default
            gate does not pass without.

    Returns:
        [`MemorizationReport`]: with `audit`, not yet judged by a gate.

    Raises:
        ValueError: for sets that are too small or overlap, for neither or both of pipeline and images, and before the
            long work for an adapter or a CLIP model that cannot be loaded and a folder that cannot be written to.
    """
    settings = settings or AuditSettings()
    if (pipeline is None) == (generated is None):
        raise ValueError("give either a pipeline or generated images")
    if pipeline is not None and not family_of(pipeline).conditions:
        train, held_out = (without_captions(data) for data in (train, held_out))
    columns = ["image"] if pipeline is None else ["image", "text"]
    _check_columns({"train": train, "held_out": held_out}, columns)
    if pipeline is not None:
        family_of(pipeline).check_resolution(settings.resolution)
    else:
        _check_columns({"generated": generated}, ["image"])
    if adapter is not None:
        load_adapter(pipeline, adapter)  # before the long work, so that a bad one costs nothing
        unload_adapter(pipeline)
    clip = None if clip_model is None or pipeline is None else metrics.load_clip(clip_model)
    private = None if output_dir is None else private_folder(Path(output_dir))
    name = encoder_name(encoder)
    encoder = load_encoder(encoder, "cpu" if pipeline is None else pipeline.device)
    members, others = (EncodedImages(data, settings.resolution) for data in (train, held_out))
    _check_sets(members, others, settings.near_duplicates, encoder)

    results: dict[str, Attacked | None] = {"model": None, "frozen_base": None, "held_out_as_train": None}
    if pipeline is None:
        images = EncodedImages(generated, settings.resolution)
        results["model"] = attack_images(images, members, others, settings, encoder)
        if control:
            halves = others.halves(settings.seed)
            results["held_out_as_train"] = attack_images(images, *halves, settings, encoder)
    else:
        if base_pipeline is not None or adapter is not None:
            base = base_pipeline or pipeline
            results["frozen_base"] = attack_pipeline(base, *_encoded(base, members, others), settings, encoder, clip)
        with adapter_in_place(pipeline, adapter):
            sets = _encoded(pipeline, members, others)
            results["model"] = attack_pipeline(pipeline, *sets, settings, encoder, clip)
            if control:
                halves = sets[1].halves(settings.seed)
                results["held_out_as_train"] = attack_pipeline(pipeline, *halves, settings, encoder, quality=False)
    subject = "generated images" if pipeline is None else "adapter" if adapter is not None else "pipeline"
    content = {"subject": subject, "settings": asdict(settings), "encoder": name}
    content |= _published(results, members, others, settings)
    content["caption_markers"] = caption_markers(train["text"]) if "text" in train.column_names else {}
    if private is not None:
        content["data_fingerprint"] = fingerprint(members.digests, private / "fingerprint.key")
        write_review(results["model"], members, private / "review.html")
    return MemorizationReport(base_model="" if pipeline is None else type(pipeline).__name__, audit=content)


def _encoded(pipeline: "DiffusionPipeline", *sets: EncodedImages) -> list[EncodedImages]:
    """The sets beside their latents and conditions by a pipeline's encoders as they are now."""
    family = family_of(pipeline)
    digests = [weights_digest(module) for module in family.encoder_modules]
    return [images.encoded_by(family, digests) for images in sets]


def _published(
    results: dict[str, Attacked | None], members: EncodedImages, others: EncodedImages, settings: AuditSettings
) -> dict[str, Any]:
    """What of the results is published: aggregates only."""
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
            raise ValueError(f"the {name} set is empty: without it nothing can be said")


def _check_sets(members: EncodedImages, others: EncodedImages, threshold: float, encoder: Encoder) -> None:
    """Raise `ValueError` for sets that are too small, share or nearly share an image, or have no features."""
    for name, images in (("train", members), ("held_out", others)):
        if (count := len(images.distinct)) < (least := LEAST_IMAGES[name]):
            raise ValueError(f"the {name} set has {count} different images, but an audit needs {least} or more")
    shared = len(set(members.digests) & set(others.digests))
    if shared:
        raise ValueError(f"{shared} images are in train and in held_out too: they must be disjoint")
    near = near_duplicates(members.thumbnails, others.thumbnails, threshold)
    if near:
        rows = ", ".join(f"{members.distinct[i]} and {others.distinct[j]}" for i, j in near[:5])
        raise ValueError(
            f"{len({j for _, j in near})} held-out images are near-duplicates of training images, which makes the "
            f"figures look safer than they are: rows {rows}{' ...' if len(near) > 5 else ''}. Take them out, or lower "
            f"the threshold --near_duplicates {threshold:g} if they are different pictures"
        )
    for name, images in (("train", members), ("held_out", others)):  # last, since features take long
        features = images.features(encoder)
        if (features == features[0]).all():
            raise ValueError(f"the encoder gives all {len(features)} images of the {name} set the same features")
