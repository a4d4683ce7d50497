"""The audit: every attack, beside its controls, on a pipeline with an adapter or on generated images alone.

One function runs the attacks on a model, a set that it may have memorized and a set that it cannot have. The audit
calls it three times: on the model, on the frozen base (what of the leak was there before), and on the model with one
half of the held-out images in the place of the training images (the false alarms). Repeated training images are the
canaries: a clean result counts only when the attacks are seen to fire on them, or when there are none and it says so.
"""

import base64
import copy
import hashlib
import hmac
import io
import re
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from datasets import Dataset
from torch.nn import functional as F

from . import metrics as measures
from .data import encode, first_rows, to_pixels
from .diffusion import family_of, seeded_generator
from .features import Encoder, encoder_name, features_of, load_encoder
from .report import MemorizationReport
from .sampling import generate

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# The purposes that random draws are seeded for; the trainer's own are below 100.
_PROMPTS, _MEMBERS, _NONMEMBERS, _SAMPLES, _QUALITY, _HALVES, _REFERENCES = range(100, 107)

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

MARKERS = {
    "blank (___)": re.compile(r"_{2,}"),
    "placeholder ([** **])": re.compile(r"\[\*\*.*?\*\*\]"),
    "redaction (XXXX)": re.compile(r"\bX{3,}\b"),
    "date": re.compile(r"\b\d{1,4}[/.-]\d{1,2}[/.-]\d{1,4}\b"),
    "long number": re.compile(r"\b\d{6,}\b"),
    "titled name": re.compile(r"\b(?:Dr|Mr|Mrs|Ms|Prof)\.? [A-Z]\w+"),
}
"""What de-identification leaves in captions or misses; such tokens are among the most memorized ones."""


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
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = {"images_per_prompt": CLIQUE, "guidance_scale": 0, "seed": 0}.get(name, 1)
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
        digests = [
            hashlib.sha256(repr(i.size).encode() + i.convert("RGB").tobytes()).hexdigest() for i in data["image"]
        ]
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


@dataclass
class _Attacked:
    """What one run of the attacks gives: figures to publish, and verdicts on single images, which stay here."""

    figures: dict[str, Figure]
    caught: dict[str, tuple[set[int], set[int]]]  # attack -> rows that it takes for memorized, rows that it looked at
    pairs: list[tuple[float, int, torch.Tensor]]  # similarity, row of the member, generated image [3, H, W]


def audit_memorization(
    train: Dataset,
    held_out: Dataset,
    pipeline: "DiffusionPipeline | None" = None,
    adapter: str | Path | None = None,
    base_pipeline: "DiffusionPipeline | None" = None,
    generated: Dataset | None = None,
    encoder: str | torch.nn.Module = "demo",
    settings: AuditSettings | None = None,
    output_dir: str | Path | None = None,
) -> MemorizationReport:
    """Attack a model, or images that it generated.

    Args:
        train (`Dataset`):
            The images that it was fine-tuned on: column `image`, and `text` unless only `generated` is given.
        held_out (`Dataset`):
            Likewise, of the same domain, which it never saw.
        pipeline (`DiffusionPipeline`, *optional*):
            With `adapter`: the base, which gets the adapter. Without: the whole fine-tuned pipeline.
        adapter (`str`, *optional*):
            Whatever [`load_adapter`] takes.
        base_pipeline (`DiffusionPipeline`, *optional*):
            The base of a whole fine-tuned pipeline, for the control.
        generated (`Dataset`, *optional*):
            Instead of a pipeline: images, column `image`. Only their distances can be measured.
        encoder (`str` or `nn.Module`):
            See [`~memcontrol_hf.features.load_encoder`]; of the distances, of copies and of the quality.
        settings ([`AuditSettings`], *optional*):
            How much is attacked.
        output_dir (`str`, *optional*):
            `private/review.html` and the key of the data's fingerprint go there; nothing is written without it.

    Returns:
        [`MemorizationReport`]: with `audit`, not yet judged by a gate.

    Raises:
        ValueError: for sets that are too small or overlap, and for neither or both of pipeline and images.
    """
    settings = settings or AuditSettings()
    if (pipeline is None) == (generated is None):
        raise ValueError("give either a pipeline or generated images")
    columns = ["image"] if pipeline is None else ["image", "text"]
    _check_columns({"train": train, "held_out": held_out}, columns)
    if pipeline is not None:
        family_of(pipeline).check_resolution(settings.resolution)
    if adapter is not None:
        base_pipeline = _copied(pipeline)
        load_adapter(pipeline, adapter)  # before the long work, so that a bad one costs nothing
    name, encoder = encoder_name(encoder), load_encoder(encoder)
    members, others = (_Images.read(data, settings.resolution, encoder) for data in (train, held_out))
    _check_sets(members, others)
    half, other_half = others.halves(settings.seed)
    base = None
    if pipeline is None:
        _check_columns({"generated": generated}, ["image"])
        images = _Images.read(generated, settings.resolution, encoder)
        model, control = (_of_images(images, *pair, settings) for pair in ((members, others), (half, other_half)))
    else:
        if base_pipeline is not None:
            base = _of_pipeline(base_pipeline, members, others, settings)
        model = _of_pipeline(pipeline, members, others, settings)
        control = _of_pipeline(pipeline, half, other_half, settings, quality=False)
    results = {"model": model, "frozen_base": base, "held_out_as_train": control}
    canaries = members.repeated()
    content = {
        "subject": "generated images" if pipeline is None else "adapter" if adapter is not None else "pipeline",
        "settings": asdict(settings),
        "encoder": name,
        "images": {"train": len(members), "held_out": len(others)},
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
        "caption_markers": caption_markers(train["text"]) if "text" in train.column_names else {},
    }
    if output_dir is not None:
        private = Path(output_dir) / "private"
        private.mkdir(parents=True, exist_ok=True)
        content["data_fingerprint"] = _fingerprint(members.digests, private / "fingerprint.key")
        write_review(model.pairs, members, private / "review.html")
    return MemorizationReport(base_model="" if pipeline is None else type(pipeline).__name__, audit=content)


def load_adapter(pipeline: "DiffusionPipeline", adapter: str | Path) -> None:
    """Put an adapter into a pipeline's denoiser.

    Args:
        adapter (`str`):
            A PEFT folder or Hub id (ours or any method of PEFT's), or a LoRA file of diffusers or kohya: a
            `.safetensors` file, or a folder or Hub id that holds `pytorch_lora_weights.safetensors`.

    Raises:
        ValueError: when it is none of these, or does not fit the pipeline.
    """
    from huggingface_hub import file_exists
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from peft import PeftModel

    path, name = Path(adapter), family_of(pipeline).denoiser_name
    try:
        if path.is_file():
            pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
        elif (path / "adapter_config.json").is_file() or (
            not path.exists() and file_exists(str(adapter), "adapter_config.json")
        ):
            setattr(pipeline, name, PeftModel.from_pretrained(getattr(pipeline, name), str(adapter)).eval())
        else:
            pipeline.load_lora_weights(str(adapter))
    except (OSError, KeyError, ValueError, RuntimeError, HfHubHTTPError, HFValidationError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"cannot load the adapter {str(adapter)!r}: {reason} Give a PEFT folder or Hub id, or a LoRA file"
        ) from None


def _copied(pipeline: "DiffusionPipeline") -> "DiffusionPipeline":
    """The same pipeline with a denoiser and text encoders of its own, which an adapter of the other does not reach."""
    names = (family_of(pipeline).denoiser_name, "text_encoder", "text_encoder_2")
    parts = {name: copy.deepcopy(part) for name in names if (part := getattr(pipeline, name, None)) is not None}
    return type(pipeline).from_pipe(pipeline, **parts)


def caption_markers(captions: Sequence[str]) -> dict[str, int]:
    """How many captions hold each of `MARKERS`, where any does."""
    counts = {name: sum(bool(pattern.search(text)) for text in captions) for name, pattern in MARKERS.items()}
    return {name: count for name, count in counts.items() if count}


# ---- the attacks ----


def _of_pipeline(
    pipeline: "DiffusionPipeline", members: _Images, others: _Images, settings: AuditSettings, quality: bool = True
) -> _Attacked:
    """All attacks on a model: did it memorize `members`, given that it cannot have memorized `others`?"""
    family = family_of(pipeline)
    denoiser = getattr(pipeline, family.denoiser_name).eval()
    figures: dict[str, Figure] = {}
    caught: dict[str, tuple[set[int], set[int]]] = {}

    scores = [
        _membership_scores(family, denoiser, images, purpose, settings)
        for purpose, images in ((_MEMBERS, members), (_NONMEMBERS, others))
    ]
    for attack, of_members in scores[0].items():
        of_others = scores[1][attack]
        outcome = measures.membership(of_members, of_others)
        figures[f"membership_auc_{attack}"] = Figure(outcome.auc, *outcome.interval)
        figures[f"membership_tpr_{attack}"] = _tpr(outcome)
        limit = torch.quantile(of_others, 1 - FALSE_ALARMS)
        found = {row for row, score in zip(members.rows, of_members) if score > limit}
        caught[f"membership_{attack}"] = (found, set(members.rows))

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

    features, limit = members.encoder(images), _copy_limit(members, others)
    distances = _of_features(images, features, count, members, others, limit, settings)
    figures |= distances.figures
    own = F.normalize(members.encoder(originals), dim=1)[:, None]
    to_own = (F.normalize(features, dim=1).unflatten(0, (len(rows), count)) * own).sum(-1).amax(1)
    caught["copy"] = ({row for row, similarity in zip(rows, to_own) if similarity > limit}, set(rows))
    if quality:
        fresh_rows = others.shuffled(settings.seed, _QUALITY)[: settings.num_quality_images]
        fresh = _generate(pipeline, others, fresh_rows, 1, _QUALITY, settings)
        figures["fid"] = Figure(measures.fid(others.encoder(fresh), others.features))
    return _Attacked(figures, caught, distances.pairs)


def _membership_scores(family, denoiser, images: _Images, purpose: int, settings: AuditSettings) -> dict:
    """White-box attack -> its score of each image, higher for what looks trained on: `[N]`."""
    encoded = encode(images.data, family, settings.resolution)[images.rows]
    seeds = [(settings.seed, purpose, row) for row in images.rows]
    latents, embeds = encoded["latents"], encoded["prompt_embeds"]
    null, timesteps, size = family.encode_prompts([""]), family.timesteps(settings.num_timesteps), settings.batch_size
    losses = measures.denoising_losses(family, denoiser, latents, embeds, timesteps, seeds, size)
    return {
        "loss": -losses.mean(1),
        "secmi": measures.secmi(family, denoiser, latents, embeds, batch_size=size),
        "pia": measures.pia(family, denoiser, latents, embeds, batch_size=size),
        "clid": measures.clid(family, denoiser, latents, embeds, null.to(embeds), timesteps, seeds, size, losses),
    }


def _of_images(images: _Images, members: _Images, others: _Images, settings: AuditSettings) -> _Attacked:
    limit = _copy_limit(members, others)
    return _of_features(images.pixels(images.rows), images.features, 1, members, others, limit, settings)


def _of_features(
    images: torch.Tensor,
    features: torch.Tensor,
    per_prompt: int,
    members: _Images,
    others: _Images,
    limit: float,
    settings: AuditSettings,
) -> _Attacked:
    """How near generated images `[N, 3, H, W]`, with their features `[N, D]`, are to both sets."""
    count = min(len(members), len(others))  # a larger set has nearer neighbours
    equal = [
        data.features[torch.randperm(len(data), generator=seeded_generator(settings.seed, _HALVES, i))[:count]]
        for i, data in enumerate((members, others))
    ]
    to_members, to_others = (measures.nearest_distances(features, references) for references in equal)
    similarity = F.normalize(features, dim=1) @ F.normalize(members.features, dim=1).T
    best, nearest = similarity.max(1)
    prompts = len(features) // per_prompt
    figures = {
        "nearest_share": _share((to_members < to_others).double().mean().item() * prompts, prompts),
        "copy_share": _share((best > limit).double().mean().item() * prompts, prompts),
        "amd": Figure(to_members.mean().item()),
        "amd_held_out": Figure(to_others.mean().item()),
        "c_t": Figure(measures.c_t(features, members.features, others.features)),
        "auth_pct": Figure(measures.auth_pct(features, members.features)),
    }
    worst = best.argsort(descending=True)[:REVIEWED].tolist()
    return _Attacked(figures, {}, [(best[i].item(), members.rows[int(nearest[i])], images[i]) for i in worst])


def _copy_limit(members: _Images, others: _Images) -> float:
    """The similarity to the nearest member that 99 % of the other images, which cannot be copies, stay below."""
    return 1 - torch.quantile(measures.nearest_distances(others.features, members.features), FALSE_ALARMS).item()


def _share(found: float, of: int) -> Figure:
    """With its Clopper-Pearson interval. `found` may be a fraction: the images of a prompt count as one draw."""
    return Figure(found / of, *measures.clopper_pearson(found, of))


def _tpr(outcome: measures.MembershipResult) -> Figure:
    rate = outcome.tpr_at_fpr(FALSE_ALARMS)
    if rate != rate:
        return Figure(None, note=f"not estimable from {outcome.nonmembers} held-out images: it needs 100")
    return Figure(rate, *outcome.tpr_interval(FALSE_ALARMS))


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


def _check_sets(members: _Images, others: _Images) -> None:
    for name, images, least in (("train", members, 2), ("held_out", others, 8)):
        if len(images) < least:
            raise ValueError(f"the {name} set has {len(images)} different images, but an audit needs {least} or more")
    shared = len(set(members.digests) & set(others.digests))
    if shared:
        raise ValueError(f"{shared} images are in train and in held_out too: they must be disjoint")
    for name, images in (("train", members), ("held_out", others)):  # last, since features take long
        if (images.features == images.features[0]).all():
            raise ValueError(f"the encoder gives all {len(images)} images of the {name} set the same features")


def _fingerprint(digests: Sequence[str], key_file: Path) -> str:
    """A keyed hash of the training images: whoever lacks the key cannot test whether a set of images was used."""
    if not key_file.exists():
        key_file.write_text(secrets.token_hex(32), encoding="ascii")
        key_file.chmod(0o600)
    key = bytes.fromhex(key_file.read_text(encoding="ascii"))
    return hmac.new(key, "".join(sorted(digests)).encode(), hashlib.sha256).hexdigest()


# ---- the local page for a person to look through ----


def write_review(pairs: Sequence[tuple[float, int, torch.Tensor]], members: _Images, path: Path) -> None:
    """One self-contained page: generated images beside their nearest training images, the most similar first.

    It shows training images: it is for people who may see them, and is never uploaded.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, autoescape=True)
    template = environment.from_string(Path(__file__).with_name("review_template.html").read_text(encoding="utf-8"))
    rows = [
        {"similarity": f"{similarity:.4f}", "generated": _data_uri(image), "training": _data_uri(original)}
        for (similarity, _, image), original in zip(pairs, members.pixels([row for _, row, _ in pairs]))
    ]
    path.write_text(template.render(pairs=rows), encoding="utf-8")


def _data_uri(image: torch.Tensor) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
