"""The command `memcontrol audit`.

It imports what it needs when it runs, so that the other commands start without PyTorch.
"""

import argparse
import logging
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapter_folder import LORA, REPORT, adapter_digests
from .command_line import GATE_FAILED, PASSED
from .error_lines import first_line

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    from .images import Framing
    from .report import MemorizationReport

logger = logging.getLogger(__name__)

_ASKS_A_MODEL = (
    *("revision", "adapter", "base_pipeline", "canaries", "delta", "attribute_column", "clip_model"),
    *("num_prompts", "images_per_prompt", "num_quality_images", "inference_steps", "guidance_scale"),
    *("num_timesteps", "embedding_attack"),
)
"""Flags of an audit that say nothing about images which a model generated before."""

_NAMES = ("pipeline", "revision", "adapter", "base_pipeline", "encoder", "verifier", "clip_model", "delta")
"""Flags whose value stands in the published command, unless it is a path on this machine."""

_PLACES = (
    *("generated", "train", "held_out", "output_dir", "gate", "canaries"),
    *("caption_column", "attribute_column", "group_column"),
)
"""Flags that name a place or a column, which the published command holds by a placeholder."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    model = parser.add_argument_group("what is audited")
    subject = model.add_mutually_exclusive_group(required=True)
    subject.add_argument("--pipeline", help="diffusers pipeline: a Hub id, a folder, or demo")
    subject.add_argument("--generated", help="folder of generated images, in the place of a pipeline")
    model.add_argument("--revision", help="revision of the pipeline on the Hub")
    model.add_argument(
        "--adapter", help="adapter of the pipeline: a PEFT folder or Hub id, or a LoRA file of diffusers or kohya"
    )
    model.add_argument("--base_pipeline", help="base of a whole fine-tuned pipeline, as the control")
    images = parser.add_argument_group("real images")
    images.add_argument("--train", required=True, help="folder with the training images, or demo")
    images.add_argument(
        "--held_out", required=True, help="folder with images of the domain that were never trained on, or demo"
    )
    images.add_argument(
        "--caption_column",
        default="text",
        help="captions in the folders' metadata.jsonl; '' for images without captions",
    )
    images.add_argument(
        "--group_column",
        help="column with the person of each image, such as a patient's id: rates and intervals are of persons then",
    )
    images.add_argument(
        "--attribute_column",
        help="column with an attribute that the captions name, such as a diagnosis: whether the model tells it of "
        "training persons more often than of held-out persons",
    )
    images.add_argument(
        "--fit",
        choices=("crop", "pad"),
        default="crop",
        help="how images become square, as in training: the ends cut away, or between bars",
    )
    images.add_argument(
        "--background", default="white", help="colour of the bars, and under what is transparent: a name or #rrggbb"
    )
    images.add_argument(
        "--near_duplicates",
        type=float,
        default=0.05,
        help="least difference between a held-out and a training image, 0 to 1; a nearer pair is an error",
    )
    images.add_argument(
        "--canaries",
        help="folder private/split/canaries of a training with --flip_canaries, to measure a lower bound of epsilon",
    )
    images.add_argument("--delta", type=float, default=1e-5, help="delta of the measured epsilon")
    output = parser.add_argument_group("verdict and output")
    output.add_argument(
        "--output_dir", required=True, type=Path, help="folder of the report and of private/review.html"
    )
    output.add_argument("--gate", type=Path, help="gate file with limits for the measures; the package's by default")
    _add_amounts(parser.add_argument_group("how much is attacked"))


def _add_amounts(amounts: argparse._ArgumentGroup) -> None:
    """The flags that decide how long an audit takes and how sharp its figures are."""
    amounts.add_argument(
        "--encoder",
        help="image encoder of distances, copies and quality, needed for other images than the demo's: a Hub id or "
        "folder of a vision model (facebook/dinov2-small, microsoft/rad-dino, ...), xrv:..., or demo",
    )
    amounts.add_argument(
        "--verifier",
        help="encoder that tells whether two images show the same person, with --group_column; --encoder by default",
    )
    amounts.add_argument("--clip_model", help="CLIP model for the CLIP score: a Hub id or a folder")
    amounts.add_argument(
        "--resolution",
        type=int,
        help="side of the images in pixels; by default the resolution that the adapter's report or the pipeline "
        "says it was trained at, or the smaller side of the first generated image",
    )
    amounts.add_argument("--num_prompts", type=int, default=100, help="number of training captions to sample")
    amounts.add_argument(
        "--images_per_prompt", type=int, default=10, help="number of images for each training caption"
    )
    amounts.add_argument(
        "--num_quality_images", type=int, default=256, help="number of images from held-out captions, for fid"
    )
    amounts.add_argument("--inference_steps", type=int, default=25, help="sampling steps of an image")
    amounts.add_argument("--guidance_scale", type=float, default=7.5, help="guidance scale of the sampling")
    amounts.add_argument("--num_timesteps", type=int, default=5, help="timesteps of the membership attacks")
    amounts.add_argument(
        "--embedding_attack",
        type=int,
        default=0,
        help="number of images of each set whose text embedding is searched to bring them back; each costs as much as "
        "400 images of a training, three times",
    )
    amounts.add_argument("--batch_size", type=int, default=32, help="images at once; the figures do not depend on it")
    amounts.add_argument("--device", help="cuda, mps, cpu, ...; the accelerator by default, if there is one")
    amounts.add_argument("--seed", type=int, default=0, help="random seed of all draws")


def run(args: argparse.Namespace) -> int:
    """Attack what the flags name, judge it, and write report and review page.

    Args:
        args (`argparse.Namespace`): Values of the flags, and `parser`, which has their defaults.

    Returns:
        `int`: The exit code.

    Raises:
        ValueError: For flags that do not belong together and for what they name, before the long work starts.
    """
    from .report import DEFAULT_GATE, check_no_training, load_gate

    limits = load_gate(args.gate or DEFAULT_GATE)
    check_no_training(args.output_dir)
    asked = [f"--{name}" for name in _ASKS_A_MODEL if getattr(args, name) != args.parser.get_default(name)]
    if args.generated and asked:
        raise ValueError(
            f"--generated has images and no model to ask: give --pipeline, or leave out {', '.join(asked)}"
        )
    if args.generated == "demo":
        raise ValueError("--generated takes a folder of images that a model generated: the demo has no such folder")
    if args.verifier and not args.group_column:
        raise ValueError(f"--verifier {args.verifier!r} tells persons apart: give their column with --group_column")
    if args.attribute_column and not args.caption_column:
        raise ValueError("--attribute_column is inferred by a model that takes captions: give --caption_column")
    if args.base_pipeline and args.adapter:
        raise ValueError("--base_pipeline is for a whole fine-tuned --pipeline: an adapter's base is the pipeline")

    from .progress import quiet_log
    from .report.plots import plot_distances

    with quiet_log():
        report = _attack(args)
    plot_distances(report.audit["distances"], args.output_dir / "distances.png")
    passed = report.judge(limits)
    report.to_json(args.output_dir / REPORT)
    print(report.summary())
    print(f"\nreport: {args.output_dir / REPORT}")
    print(f"to look through, on this machine only: {args.output_dir / 'private' / 'review.html'}")
    return PASSED if passed else GATE_FAILED


def _attack(args: argparse.Namespace) -> "MemorizationReport":
    """Load what the flags name, and audit it."""
    from .encoders import NEEDS_ENCODER

    if args.encoder is None and (args.train, args.held_out) != ("demo", "demo"):
        raise ValueError(NEEDS_ENCODER)
    from .adapter_checks import check_base
    from .audit import AuditSettings, audit_memorization
    from .data import load_canaries, warn_of_crops
    from .families import family_of, load_pipeline
    from .images import Framing

    amounts = {name: getattr(args, name) for name in AuditSettings.__dataclass_fields__ if name != "resolution"}
    given = {} if args.resolution is None else {"resolution": args.resolution}
    AuditSettings(**given, **amounts)  # wrong amounts are an error before anything is loaded
    device = _device(args.device)
    framing, trained = Framing(args.fit, args.background), _report_of(args.adapter)
    training, of_base = {}, {}
    if trained:  # the base as it was: in another precision the shifts of singular values make another change
        training = trained.training
        of_base = {"dtype": trained.half_precision, "variant": trained.card.get("base_variant")}
    _check_as_trained(training, framing, args.resolution)
    captions = (args.caption_column or None) if args.pipeline else None
    train, held_out = (
        _images(getattr(args, name), name, captions, args.group_column, args.attribute_column)
        for name in ("train", "held_out")
    )
    warn_of_crops(train, framing, "training")
    generated = None if args.generated is None else _images(args.generated, "generated", None)
    canaries = None if args.canaries is None else load_canaries(args.canaries)
    pipeline = args.pipeline and load_pipeline(args.pipeline, args.revision, **of_base).to(device)
    base = args.base_pipeline and load_pipeline(args.base_pipeline).to(device)
    if training:
        check_base(training, family_of(pipeline).denoiser, args.pipeline)
    resolution = args.resolution or training.get("resolution")
    if resolution is None:
        resolution = min(generated[0]["image"].size) if pipeline is None else family_of(pipeline).trained_at
    report = audit_memorization(
        train=train,
        held_out=held_out,
        pipeline=pipeline,
        adapter=args.adapter,
        base_pipeline=base,
        generated=generated,
        encoder=args.encoder,
        clip_model=args.clip_model,
        verifier=args.verifier,
        canaries=canaries,
        delta=args.delta,
        settings=AuditSettings(resolution=resolution, **amounts),
        output_dir=args.output_dir,
    )
    report.command = f"memcontrol audit {shlex.join(_public_words(args, report.audit['settings']))}"
    if args.adapter is not None and Path(args.adapter).is_dir():
        report.weights = adapter_digests(Path(args.adapter))
    return report


def _device(name: str | None) -> "torch.device":
    """The device of a name, or the accelerator, if there is one."""
    import torch

    if name is None:
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name!r} cannot be used: {first_line(error)}") from None


def _public_words(args: argparse.Namespace, settings: Mapping[str, Any]) -> Iterator[str]:
    """The flags that repeat the audit, with `YOUR_NAME` in the place of what names a place or a column."""
    from .flags import without_place

    def public(name: str) -> Iterator[str]:
        value = getattr(args, name)
        if value != args.parser.get_default(name):
            hidden = without_place(value) != value or (name in _PLACES and value != "demo")
            yield from (f"--{name}", f"YOUR_{name.upper()}" if hidden else str(value))

    for name in _NAMES:
        yield from public(name)
    for name, value in settings.items():
        yield from (f"--{name}", str(value))
    for name in _PLACES:
        yield from public(name)


def _report_of(adapter: str | None) -> "MemorizationReport | None":
    """The report of an adapter; `None` without an adapter, and without a report.

    The report lies in the adapter's folder, beside the LoRA file of an export, or in the adapter's repository.
    """
    from .report import MemorizationReport

    if adapter is None:
        return None
    path = Path(adapter)
    if path.exists():
        file = path / REPORT if path.is_dir() or path.name != LORA else path.with_name(REPORT)
    else:
        file = _downloaded_report(adapter)
    if not (file and file.is_file()):
        logger.info(f"no {REPORT} says how {adapter} was trained: give its base, --resolution and --fit as they were")
        return None
    return MemorizationReport.from_json(file)


def _downloaded_report(repository: str) -> Path | None:
    """The report in a repository on the Hub; `None` when there is none, or no such repository."""
    from huggingface_hub import HfApi  # its HTTP client is slow to import, and a folder needs none

    try:
        return Path(HfApi().hf_hub_download(repository, REPORT))
    except (OSError, ValueError):  # the adapter's loading says whether there is such a repository
        return None


def _check_as_trained(training: dict[str, Any], framing: "Framing", resolution: int | None) -> None:
    """Raise `ValueError` when an adapter was trained with images in another framing or at another resolution."""
    from .images import Framing

    if not training:
        return
    trained = Framing(training.get("fit", "crop"), training.get("background", "white"))
    safer = "attack it with the same, or its figures look safer than they are"
    if trained != framing:
        raise ValueError(
            f"the adapter was trained with images of --fit {trained.fit} --background {trained.background}: {safer}"
        )
    if resolution and (known := training.get("resolution")) and known != resolution:
        raise ValueError(f"--resolution {resolution}: the adapter was trained at {known} pixels: {safer}")


def _images(
    source: str,
    flag: str,
    caption_column: str | None,
    group_column: str | None = None,
    attribute_column: str | None = None,
) -> "Dataset":
    """The images that a flag names: a folder, or `demo` for the demo's split of the flag's name."""
    from .data import load_image_folder
    from .demo import demo_dataset

    if source == "demo":
        if group_column:
            raise ValueError(f"--group_column {group_column!r}: the demo's images show no persons, so leave it out")
        if attribute_column:
            raise ValueError(f"--attribute_column {attribute_column!r}: the demo's images have none, so leave it out")
        return demo_dataset()[flag]
    try:
        return load_image_folder(source, flag, caption_column, group_column, attribute_column)
    except ValueError as error:
        raise ValueError(f"--{flag}: {error}") from None
