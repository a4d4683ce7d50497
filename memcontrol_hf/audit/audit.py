"""The audit: every attack, beside its controls, on a pipeline with an adapter or on generated images alone.

One function runs the attacks on a model, a set that it may have memorized and a set that it cannot have. The audit
calls it three times: on the model, on the frozen base (what of the leak was there before), and on the model with one
half of the held-out images in the place of the training images (the false alarms). Repeated training images are the
canaries: a clean result counts only when the attacks are seen to fire on them, or when there are none and it says so.
"""

import base64
import hashlib
import hmac
import io
import re
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn import functional as F

from .. import metrics as measures
from ..data import encode, first_rows, weights_digest, without_captions
from ..encoders import Encoder, encoder_name, features_of, load_encoder
from ..families import family_of
from ..images import thumbnails, to_pixels, to_rgb
from ..randomness import seeded_generator
from ..report import NOT_APPLICABLE, MemorizationReport
from ..sampling import generate
from ..tuners import MemControlConfig

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import CLIPModel, CLIPProcessor

# The purposes that random draws are seeded for; the trainer's own are below 100.
_PROMPTS, _MEMBERS, _NONMEMBERS, _SAMPLES, _QUALITY, _HALVES, _REFERENCES, _TRAJECTORIES = range(100, 108)

CLIQUE = 3
"""Images of one prompt that must be alike for an extraction."""
PAPER_THRESHOLD = 20.0
"""Of the tile distance, for RGB at 224 pixels; it scales with the side."""
FALSE_ALARMS = 0.01
"""Rate at which copies and members are allowed to be found among held-out images."""
REFERENCES = 500
"""Held-out images that the calibrated extraction looks for neighbours among, at most."""
REVIEWED = 50
"""Pairs on the page for a person to look through."""
BINS = 40
"""Of the histograms of distances."""

MARKERS = {
    "blank (___)": re.compile(r"_{2,}"),
    "placeholder ([** **])": re.compile(r"\[\*\*.*?\*\*\]"),
    "redaction (XXXX)": re.compile(r"\bX{3,}\b"),
    "date": re.compile(r"\b\d{1,4}[/.-]\d{1,2}[/.-]\d{1,4}\b"),
    "long number": re.compile(r"\b\d{6,}\b"),
    "titled name": re.compile(r"\b(?:Dr|Mr|Mrs|Ms|Prof)\.? [A-Z]\w+"),
}
"""What de-identification leaves in captions or misses; such tokens are among the most memorized ones."""


LEAST_IMAGES = {"train": 2, "held_out": 8}
"""How many different images an audit needs."""


@dataclass(frozen=True)
class AuditSettings:
    """How much is attacked.

    Args:
        resolution (`int`):
            Side of the images in pixels.
        num_prompts (`int`):
            Training captions whose images are generated; the canaries' come first.
        images_per_prompt (`int`):
            Images generated for each; at least 3, the size of a clique.
        num_quality_images (`int`):
            Images generated from held-out captions for the quality, one for each.
        inference_steps (`int`):
            Sampling steps.
        guidance_scale (`float`):
            Of the sampling.
        num_timesteps (`int`):
            Fixed timesteps of the denoising-loss attack.
        near_duplicates (`float`):
            Threshold of [`~memcontrol_hf.metrics.near_duplicates`]: a held-out image that is so near to a training
            image is an error. With 0 only equal thumbnails are.
        batch_size (`int`):
            Only a matter of speed.
        seed (`int`):
            Of all draws.

    Raises:
        ValueError: for a number that is too small.
    """

    resolution: int = 512
    num_prompts: int = 100
    num_quality_images: int = 256
    images_per_prompt: int = 10
    inference_steps: int = 25
    guidance_scale: float = 7.5
    num_timesteps: int = 5
    near_duplicates: float = 0.05
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = {"images_per_prompt": CLIQUE, "guidance_scale": 0, "near_duplicates": 0, "seed": 0}.get(name, 1)
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, but is {value}")


@dataclass(frozen=True)
class Figure:
    """One measure with its 95 % interval; without a value, `note` says why it could not be estimated."""

    value: float | None
    low: float | None = None
    high: float | None = None
    note: str | None = None


class _Images:
    """Rows of a dataset with different pictures, and what is computed of them once."""

    def __init__(self, data: Dataset, rows: Sequence[int], digests: Sequence[str], resolution: int, encoder: Encoder):
        self.data, self.rows, self.digests, self.resolution, self.encoder = data, rows, digests, resolution, encoder

    @classmethod
    def read(cls, data: Dataset, resolution: int, encoder: Encoder) -> "_Images":
        """All different images of a dataset: the first row of each."""
        digests = [hashlib.sha256(repr(i.size).encode() + to_rgb(i).tobytes()).hexdigest() for i in data["image"]]
        return cls(data, first_rows(digests), digests, resolution, encoder)

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, rows: Sequence[int]) -> "_Images":
        return _Images(self.data, rows, self.digests, self.resolution, self.encoder)

    def shuffled(self, seed: int, purpose: int) -> list[int]:
        """The rows in an order that the seed and the purpose draw."""
        order = torch.randperm(len(self), generator=seeded_generator(seed, purpose)).tolist()
        return [self.rows[i] for i in order]

    def halves(self, seed: int) -> "tuple[_Images, _Images]":
        rows, middle = self.shuffled(seed, _HALVES), len(self) // 2
        return self.select(sorted(rows[:middle])), self.select(sorted(rows[middle:]))

    def repeated(self) -> set[int]:
        """Rows of the images that occur more than once: the canaries."""
        counts = Counter(self.digests)
        return {row for row in self.rows if counts[self.digests[row]] > 1}

    def pixels(self, rows: Sequence[int]) -> torch.Tensor:
        """`[n, 3, H, W]` in [0, 1]."""
        return to_pixels(self.data[list(rows)]["image"], self.resolution)

    @cached_property
    def features(self) -> torch.Tensor:
        """`[N, D]` of all rows."""
        return features_of(self.encoder, self.data, self.rows, self.resolution)

    @cached_property
    def thumbnails(self) -> torch.Tensor:
        """`[N, 3, 32, 32]` of all rows."""
        return thumbnails(self.data, self.rows)


@dataclass
class _Attacked:
    """What one run of the attacks gives: figures to publish, and verdicts on single images, which stay here."""

    figures: dict[str, Figure]
    caught: dict[str, tuple[set[int], set[int]]]  # attack -> rows that it takes for memorized, rows that it looked at
    pairs: list[tuple[float, int, torch.Tensor]]  # similarity, row of the member, generated image [3, H, W]
    distances: dict[str, list[float]]  # histograms of the distances to the nearest image of each set


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
            Whatever [`load_adapter`] takes.
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
    if adapter is not None:
        load_adapter(pipeline, adapter)  # before the long work, so that a bad one costs nothing
        _unload_adapter(pipeline)
    clip = None if clip_model is None or pipeline is None else measures.load_clip(clip_model)
    private = None if output_dir is None else _private_folder(Path(output_dir))
    name = encoder_name(encoder)
    encoder = load_encoder(encoder, "cpu" if pipeline is None else pipeline.device)
    members, others = (_Images.read(data, settings.resolution, encoder) for data in (train, held_out))
    _check_sets(members, others, settings.near_duplicates)
    half, other_half = others.halves(settings.seed)
    base = None
    if pipeline is None:
        _check_columns({"generated": generated}, ["image"])
        images = _Images.read(generated, settings.resolution, encoder)
        model = _of_images(images, members, others, settings)
        false_alarms = _of_images(images, half, other_half, settings) if control else None
    else:
        if base_pipeline is not None or adapter is not None:
            base = _of_pipeline(base_pipeline or pipeline, members, others, settings, clip)
        with _adapted(pipeline, adapter):
            model = _of_pipeline(pipeline, members, others, settings, clip)
            false_alarms = _of_pipeline(pipeline, half, other_half, settings, quality=False) if control else None
    doubles = measures.near_duplicates(members.thumbnails, None, settings.near_duplicates)
    results = {"model": model, "frozen_base": base, "held_out_as_train": false_alarms}
    canaries = members.repeated()
    content = {
        "subject": "generated images" if pipeline is None else "adapter" if adapter is not None else "pipeline",
        "settings": asdict(settings),
        "encoder": name,
        "images": {
            "train": len(members),
            "held_out": len(others),
            "train_near_duplicates": len({row for pair in doubles for row in pair}),
        },
        "measures": {
            measure: {
                who: asdict(result.figures[measure]) if result and measure in result.figures else None
                for who, result in results.items()
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
        "caption_markers": caption_markers(train["text"]) if "text" in train.column_names else {},
    }
    if private is not None:
        content["data_fingerprint"] = _fingerprint(members.digests, private / "fingerprint.key")
        write_review(model, members, private / "review.html")
    return MemorizationReport(base_model="" if pipeline is None else type(pipeline).__name__, audit=content)


def load_adapter(pipeline: "DiffusionPipeline", adapter: str | Path) -> None:
    """Put an adapter into a pipeline.

    Args:
        adapter (`str`):
            A PEFT folder or Hub id (ours or any method of PEFT's), in which text encoders' adapters have folders of
            their names. Or a LoRA file of diffusers or kohya: a `.safetensors` file, or a folder or Hub id that holds
            `pytorch_lora_weights.safetensors`.

    Raises:
        ValueError: when it is none of these, or does not fit the pipeline.
    """
    from huggingface_hub import file_exists
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    path, family = Path(adapter), family_of(pipeline)

    def is_there(folder: str) -> bool:
        file = f"{folder}/adapter_config.json".lstrip("/")
        return (path / file).is_file() if path.exists() else file_exists(str(adapter), file)

    try:
        if path.is_file():
            pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
        elif folders := [folder for folder in family.parts if is_there(folder)]:
            for folder in folders:
                tuned = PeftModel.from_pretrained(family.parts[folder], str(adapter), subfolder=folder or None)
                setattr(pipeline, folder or family.denoiser_name, tuned.eval())
        else:
            pipeline.load_lora_weights(str(adapter))
    except (OSError, AttributeError, KeyError, ValueError, RuntimeError, HfHubHTTPError, HFValidationError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"cannot load the adapter {str(adapter)!r}: {reason} Give a PEFT folder or Hub id, or a LoRA file"
        ) from None


@contextmanager
def _adapted(pipeline: "DiffusionPipeline", adapter: str | Path | None) -> Iterator[None]:
    """The pipeline with an adapter, and as before afterwards. Our own, which merge exactly, sample faster merged."""
    if adapter is None:
        yield
        return
    load_adapter(pipeline, adapter)
    try:
        for part in family_of(pipeline).parts.values():
            if isinstance(part, PeftModel) and isinstance(part.active_peft_config, MemControlConfig):
                part.merge_adapter()
        yield
    finally:
        _unload_adapter(pipeline)


def _unload_adapter(pipeline: "DiffusionPipeline") -> None:
    """Undo [`load_adapter`]."""
    family = family_of(pipeline)
    adapted = {folder: part for folder, part in family.parts.items() if isinstance(part, PeftModel)}
    for folder, part in adapted.items():
        setattr(pipeline, folder or family.denoiser_name, part.unload())
    if not adapted:
        pipeline.unload_lora_weights()


def caption_markers(captions: Sequence[str]) -> dict[str, int]:
    """How many captions hold each of `MARKERS`, where any does."""
    counts = {name: sum(bool(pattern.search(text)) for text in captions) for name, pattern in MARKERS.items()}
    return {name: count for name, count in counts.items() if count}


# ---- the attacks ----


@torch.no_grad()
def _of_pipeline(
    pipeline: "DiffusionPipeline",
    members: _Images,
    others: _Images,
    settings: AuditSettings,
    clip: "tuple[CLIPModel, CLIPProcessor] | None" = None,
    quality: bool = True,
) -> _Attacked:
    """All attacks on a model: did it memorize `members`, given that it cannot have memorized `others`?"""
    family = family_of(pipeline)
    denoiser = family.denoiser.eval()
    figures: dict[str, Figure] = {}
    caught: dict[str, tuple[set[int], set[int]]] = {}

    digests = [weights_digest(module) for module in family.encoder_modules]
    encoded, encoded_others = (
        encode(images.data, family, settings.resolution, digests=digests) for images in (members, others)
    )
    scores = [
        _membership_scores(family, denoiser, data, rows, purpose, settings)
        for purpose, data, rows in ((_MEMBERS, encoded, members.rows), (_NONMEMBERS, encoded_others, others.rows))
    ]
    for attack, of_members in scores[0].items():
        of_others = scores[1][attack]
        outcome = measures.membership(of_members, of_others)
        figures[f"membership_auc_{attack}"] = Figure(outcome.auc, *outcome.interval)
        figures[f"membership_tpr_{attack}"] = _tpr(outcome, FALSE_ALARMS)
        figures[f"membership_tpr_strict_{attack}"] = _tpr(outcome, FALSE_ALARMS / 10)
        limit = torch.quantile(of_others, 1 - FALSE_ALARMS)
        found = {row for row, score in zip(members.rows, of_members) if score > limit}
        caught[f"membership_{attack}"] = (found, set(members.rows))
    if "clid" in family.not_applicable:
        for measure in ("membership_auc_clid", "membership_tpr_clid", "membership_tpr_strict_clid"):
            figures[measure] = Figure(None, note=f"{NOT_APPLICABLE}: {family.not_applicable['clid']}")

    rows, count = _prompt_rows(members, settings), settings.images_per_prompt
    images = _generate(pipeline, members, rows, count, _SAMPLES, settings)
    originals = members.pixels(rows)
    threshold = PAPER_THRESHOLD * settings.resolution / 224
    references = others.pixels(others.shuffled(settings.seed, _REFERENCES)[:REFERENCES])
    extracted = measures.extraction(
        images.unflatten(0, (len(rows), count)), originals, threshold, CLIQUE, held_out=references
    )
    figures["extraction_rate"] = Figure(extracted.rate, *extracted.interval)
    figures["extraction_rate_calibrated"] = Figure(extracted.calibrated_rate, *extracted.calibrated_interval)
    for name, hits in (("extraction", extracted.extracted), ("extraction_calibrated", extracted.calibrated)):
        caught[name] = ({row for row, hit in zip(rows, hits) if hit}, set(rows))

    features = members.encoder(images)
    place = {row: i for i, row in enumerate(members.rows)}
    own = [place[row] for row in rows]
    result = _of_features(images, features, count, members, others, settings, own)
    result.figures, result.caught = figures | result.figures, caught
    limit = result.figures["copy_threshold"].value
    if limit is not None:
        own_features = F.normalize(members.features[own], dim=1)[:, None]
        to_own = (F.normalize(features, dim=1).unflatten(0, (len(rows), count)) * own_features).sum(-1).amax(1)
        caught["copy"] = ({row for row, similarity in zip(rows, to_own) if similarity > limit}, set(rows))

    if "noise_norm" in family.not_applicable:
        note = f"{NOT_APPLICABLE}: {family.not_applicable['noise_norm']}"
        result.figures["trajectory_norm_auc"] = Figure(None, note=note)
    else:
        other_rows = others.shuffled(settings.seed, _PROMPTS)[: settings.num_prompts]
        norms = _trajectory_norms(family, denoiser, encoded, rows, settings)
        of_others = _trajectory_norms(family, denoiser, encoded_others, other_rows, settings)
        _compare_trajectories(result, norms, of_others, rows, members.repeated())

    if quality:
        fresh_rows = others.shuffled(settings.seed, _QUALITY)[: settings.num_quality_images]
        fresh = _generate(pipeline, others, fresh_rows, 1, _QUALITY, settings)
        result.figures |= _quality(fresh, others, others.data[fresh_rows]["text"], clip)
    return result


def _compare_trajectories(
    result: _Attacked, norms: torch.Tensor, of_others: torch.Tensor, rows: list[int], repeated: set[int]
) -> None:
    """Add whether the captions of `rows`, and the canaries' among them, steer harder than held-out captions do."""
    outcome = measures.membership(norms, of_others)
    result.figures["trajectory_norm_auc"] = Figure(outcome.auc, *outcome.interval)
    limit = torch.quantile(of_others, 1 - FALSE_ALARMS)
    result.caught["trajectory_norm"] = ({row for row, norm in zip(rows, norms) if norm > limit}, set(rows))
    of_canaries = [norm for row, norm in zip(rows, norms.tolist()) if row in repeated]
    if of_canaries:
        outcome = measures.membership(torch.tensor(of_canaries), of_others)
        result.figures["trajectory_norm_auc_canaries"] = Figure(outcome.auc, *outcome.interval)


def _quality(
    images: torch.Tensor, others: _Images, captions: list[str], clip: "tuple[CLIPModel, CLIPProcessor] | None"
) -> dict[str, Figure]:
    """Of images `[N, 3, H, W]` of held-out captions, against the held-out images."""
    features = others.encoder(images)
    figures = {"fid": Figure(measures.fid(features, others.features))}
    try:
        precision, recall = measures.precision_recall(features, others.features)
        figures["kid"] = Figure(measures.kid(features, others.features))
        figures["precision"], figures["recall"] = Figure(precision), Figure(recall)
    except ValueError as error:
        figures |= dict.fromkeys(("kid", "precision", "recall"), Figure(None, note=f"not estimable: {error}"))
    if clip is not None:
        figures["clip_score"] = Figure(measures.clip_score(images, captions, clip))
    return figures


def _batches(
    family, encoded: Dataset, rows: Sequence[int], size: int
) -> Iterator[tuple[list[int], torch.Tensor, dict]]:
    """Some rows, `size` at a time, with their latents and conditions."""
    for start in range(0, len(rows), size):
        part = list(rows[start : start + size])
        batch = encoded[part]
        yield part, batch["latents"], {name: batch[name] for name in family.conditions}


def _trajectory_norms(
    family, denoiser, encoded: Dataset, rows: Sequence[int], settings: AuditSettings
) -> torch.Tensor:
    """How hard the caption of each row steers the sampling: `[len(rows)]`."""
    null = family.null_condition()
    norms = [
        measures.trajectory_noise_norms(
            denoiser,
            condition,
            null,
            family,
            latents.shape[1:],
            [(settings.seed, _TRAJECTORIES, row) for row in part],
            settings.inference_steps,
            settings.guidance_scale,
            batch_size=settings.batch_size,
        )
        for part, latents, condition in _batches(family, encoded, rows, settings.batch_size)
    ]
    return torch.cat(norms)


def _membership_scores(
    family, denoiser, encoded: Dataset, rows: Sequence[int], purpose: int, settings: AuditSettings
) -> dict[str, torch.Tensor]:
    """White-box attack -> its score of each row, higher for what looks trained on: `[N]`."""
    timesteps, size = family.timesteps(settings.num_timesteps), settings.batch_size
    null = None if "clid" in family.not_applicable else family.null_condition()
    scores: dict[str, list[torch.Tensor]] = {}
    for part, latents, condition in _batches(family, encoded, rows, size):
        seeds = [(settings.seed, purpose, row) for row in part]
        losses = measures.denoising_losses(family, denoiser, latents, condition, timesteps, seeds, size)
        batch = {
            "loss": -losses.mean(1),
            "secmi": measures.secmi(family, denoiser, latents, condition, batch_size=size),
            "pia": measures.pia(family, denoiser, latents, condition, batch_size=size),
        }
        if null is not None:
            batch["clid"] = measures.clid(family, denoiser, latents, condition, null, timesteps, seeds, size, losses)
        for attack, values in batch.items():
            scores.setdefault(attack, []).append(values)
    return {attack: torch.cat(values) for attack, values in scores.items()}


def _of_images(images: _Images, members: _Images, others: _Images, settings: AuditSettings) -> _Attacked:
    return _of_features(images.pixels(images.rows), images.features, 1, members, others, settings)


def _of_features(
    images: torch.Tensor,
    features: torch.Tensor,
    per_prompt: int,
    members: _Images,
    others: _Images,
    settings: AuditSettings,
    own: Sequence[int] = (),
) -> _Attacked:
    """How near generated images `[N, 3, H, W]`, with their features `[N, D]`, are to both sets.

    `own`: for each prompt, which of the members it is the caption of.
    """
    nearest = measures.nearest_share(
        features, members.features, others.features, settings.seed, per_prompt=per_prompt, own=own
    )
    figures = {
        "nearest_share": Figure(nearest.share, *nearest.interval),
        "amd": Figure(nearest.to_train.mean().item()),
        "amd_held_out": Figure(nearest.to_held_out.mean().item()),
        "c_t": Figure(measures.c_t(features, members.features, others.features)),
        "auth_pct": Figure(measures.auth_pct(features, members.features)),
    }
    try:
        copies = measures.copy_similarity(features, members.features, others.features, FALSE_ALARMS, per_prompt)
        figures["copy_share"] = Figure(copies.share, *copies.interval)
        figures["copy_similarity"] = Figure(copies.percentile_95)
        figures["copy_threshold"] = Figure(copies.threshold)
    except ValueError as error:
        names = ("copy_share", "copy_similarity", "copy_threshold")
        figures |= dict.fromkeys(names, Figure(None, note=f"not estimable: {error}"))
    largest = max(nearest.to_train.max().item(), nearest.to_held_out.max().item())
    edges = torch.linspace(0, largest or 1.0, BINS + 1, dtype=torch.double)
    distances = {
        "edges": edges.tolist(),
        "train": torch.histogram(nearest.to_train, edges).hist.tolist(),
        "held_out": torch.histogram(nearest.to_held_out, edges).hist.tolist(),
    }
    originals = F.normalize(members.features, dim=1).T
    nearest_of = [(F.normalize(part, dim=1) @ originals).max(1) for part in features.split(4096)]
    best, own = (torch.cat(parts) for parts in zip(*nearest_of))
    worst = best.argsort(descending=True)[:REVIEWED].tolist()
    pairs = [(best[i].item(), members.rows[int(own[i])], images[i].clone()) for i in worst]
    return _Attacked(figures, {}, pairs, distances)


def _tpr(outcome: measures.MembershipResult, false_alarms: float) -> Figure:
    rate = outcome.tpr_at_fpr(false_alarms)
    if rate != rate:
        needed = f"it needs {1 / false_alarms:.0f}"
        return Figure(None, note=f"not estimable from {outcome.nonmembers} held-out images: {needed}")
    return Figure(rate, *outcome.tpr_interval(false_alarms))


def _prompt_rows(images: _Images, settings: AuditSettings) -> list[int]:
    """Rows whose captions are sampled: repeated images first, the others in a seeded order."""
    repeated = images.repeated()
    rows = sorted(images.shuffled(settings.seed, _PROMPTS), key=lambda row: row not in repeated)
    return rows[: settings.num_prompts]


def _generate(
    pipeline: "DiffusionPipeline", images: _Images, rows: Sequence[int], count: int, purpose: int, s: AuditSettings
) -> torch.Tensor:
    """`count` images for the caption of each row: `[len(rows) * count, 3, H, W]` in [0, 1]."""
    prompts = [text for text in images.data[list(rows)]["text"] for _ in range(count)]
    keys = [(s.seed, purpose, row, i) for row in rows for i in range(count)]
    return generate(pipeline, prompts, keys, s.resolution, s.inference_steps, s.guidance_scale, s.batch_size)


# ---- the data ----


def _check_columns(sets: dict[str, Dataset], columns: Sequence[str]) -> None:
    for name, data in sets.items():
        for column in columns:
            if column not in data.column_names:
                raise ValueError(f"the {name} set has no column {column!r}; it has: {', '.join(data.column_names)}")
        if len(data) == 0:
            raise ValueError(f"the {name} set is empty: without it nothing can be said")


def _check_sets(members: _Images, others: _Images, near_duplicates: float) -> None:
    for name, images in (("train", members), ("held_out", others)):
        if len(images) < (least := LEAST_IMAGES[name]):
            raise ValueError(f"the {name} set has {len(images)} different images, but an audit needs {least} or more")
    shared = len(set(members.digests) & set(others.digests))
    if shared:
        raise ValueError(f"{shared} images are in train and in held_out too: they must be disjoint")
    near = measures.near_duplicates(members.thumbnails, others.thumbnails, near_duplicates)
    if near:
        rows = ", ".join(f"{members.rows[i]} and {others.rows[j]}" for i, j in near[:5])
        raise ValueError(
            f"{len({j for _, j in near})} held-out images are near-duplicates of training images, which makes the "
            f"figures look safer than they are: rows {rows}{' ...' if len(near) > 5 else ''}. Take them out, or lower "
            f"the threshold --near_duplicates {near_duplicates:g} if they are different pictures"
        )
    for name, images in (("train", members), ("held_out", others)):  # last, since features take long
        if (images.features == images.features[0]).all():
            raise ValueError(f"the encoder gives all {len(images)} images of the {name} set the same features")


def _private_folder(output_dir: Path) -> Path:
    """The folder of what stays on this machine, made and written to before the long work."""
    private = output_dir / "private"
    try:
        private.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=private).close()
    except OSError as error:
        raise ValueError(f"cannot write to the folder {str(private)!r}: {error.strerror}") from None
    return private


def _fingerprint(digests: Sequence[str], key_file: Path) -> str:
    """A keyed hash of the training images: whoever lacks the key cannot test whether a set of images was used."""
    if not key_file.exists():
        key_file.write_text(secrets.token_hex(32), encoding="ascii")
        key_file.chmod(0o600)
    key = bytes.fromhex(key_file.read_text(encoding="ascii"))
    return hmac.new(key, "".join(sorted(digests)).encode(), hashlib.sha256).hexdigest()


# ---- the local page for a person to look through ----


def write_review(result: _Attacked, members: _Images, path: Path) -> None:
    """One self-contained page: generated images beside their nearest training images, the most similar first.

    It shows training images: it is for people who may see them, and is never uploaded.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, autoescape=True)
    template = environment.from_string(Path(__file__).with_name("review_template.html").read_text(encoding="utf-8"))
    rows = [
        {
            "similarity": f"{similarity:.4f}",
            "generated": _data_uri(image),
            "training": _data_uri(original),
            "attacks": ", ".join(name for name, (found, _) in result.caught.items() if row in found),
        }
        for (similarity, row, image), original in zip(
            result.pairs, members.pixels([row for _, row, _ in result.pairs])
        )
    ]
    path.write_text(template.render(pairs=rows), encoding="utf-8")


def _data_uri(image: torch.Tensor) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
