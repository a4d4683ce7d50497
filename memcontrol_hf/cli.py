"""The command `memcontrol`. Exit codes: 0 passed or done, 3 the gate failed, 2 wrong use, 1 an error.

Each command imports what it needs when it runs, so that a card is rendered without loading PyTorch.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .adapter_folder import REPORT
from .command_line import ERROR, GATE_FAILED, PASSED, WRONG_USE, HelpFormatter

if TYPE_CHECKING:
    from datasets import Dataset

    from .images import Framing
    from .report import MemorizationReport

_WITH_FLAGS_OF_TRAIN = {
    "train": "search, fine-tune, audit and save an adapter",
    "screen": "tell what each block of a model learns and what it memorizes on a data set",
}
"""Commands whose flags are those of the training, each a module of its own."""


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv (list of `str`, *optional*): Arguments; those of the process by default.

    Returns:
        `int`: The exit code.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in _WITH_FLAGS_OF_TRAIN:
        from . import screen, train

        {"train": train, "screen": screen}[argv[0]].main(argv[1:], prog=f"memcontrol {argv[0]}")
        return PASSED
    args, unknown = _parser().parse_known_args(argv)
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")  # beside the usage of the command itself
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        return args.run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_USE
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return ERROR
    except Exception as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return ERROR


# ---- the parsers ----


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memcontrol",
        description="Fine-tune on images that must not leak; audit models; publish adapters with the evidence.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in _WITH_FLAGS_OF_TRAIN.items():
        commands.add_parser(name, help=text, add_help=False)
    for add in (_add_audit, _add_card, _add_dossier, _add_push, _add_push_mask, _add_export, _add_filter):
        add(commands)
    return parser


def _command(
    commands: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
    gated: bool = False,
) -> argparse.ArgumentParser:
    """Add a command with a one-line help text; `gated`: its exit code can be that of a failed gate."""
    codes = "Exit codes: 0 passed, 3 the gate failed, 2 wrong use, 1 an error."
    if not gated:
        codes = "Exit codes: 0 done, 2 wrong use, 1 an error."
    description = f"{text[0].upper()}{text[1:]}. {codes}"
    parser = commands.add_parser(name, help=text, description=description, formatter_class=HelpFormatter)
    parser.set_defaults(run=run, parser=parser)
    return parser


def _add_audit(commands: argparse._SubParsersAction) -> None:
    text = "attack a model, or images that a model generated, beside controls, and apply a release gate"
    parser = _command(commands, "audit", _audit, text, gated=True)
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
    _add_audit_amounts(parser.add_argument_group("how much is attacked"))


def _add_audit_amounts(amounts: argparse._ArgumentGroup) -> None:
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
        help="side of the images in pixels; by default the resolution that the pipeline was trained at, or the "
        "smaller side of the first generated image",
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


def _add_card(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "card", _card, "render the card of a folder again from the files in the folder")
    parser.add_argument(
        "folder", type=Path, help="folder of an adapter, an export, an audit, a mask or the demo's pipeline"
    )
    parser.add_argument(
        "--gate",
        help="gate file by which the stored audit is judged again before; default: the package's own gate",
    )


def _add_dossier(commands: argparse._SubParsersAction) -> None:
    text = "write a dossier for a data protection officer, HTML and PDF, from a report and what people filled in"
    parser = _command(commands, "dossier", _dossier, text)
    parser.add_argument("folder", type=Path, help="folder that memcontrol train or memcontrol audit left")
    parser.add_argument(
        "--facts",
        type=Path,
        help="YAML file that people filled in; by default dossier.yaml in the folder, which is written for them if it "
        "is missing",
    )
    parser.add_argument("--output_dir", type=Path, help="folder of dossier.html and dossier.pdf; the same by default")
    parser.add_argument("--no_pdf", action="store_true", help="write the HTML page alone, which needs no fpdf2")


def _add_push(commands: argparse._SubParsersAction) -> None:
    text = "upload adapter, report and card to a private repository"
    parser = _command(commands, "push", _push, text, gated=True)
    parser.add_argument("folder", type=Path, help="folder that a fine-tune or an export left")
    parser.add_argument(
        "--hub_model_id", help="repository; by default the repository of the last push, or else the folder's name"
    )
    _add_hub_flags(parser)
    parser.add_argument(
        "--allow_failed_gate", action="store_true", help="push although the gate failed; the card says so first"
    )


def _add_push_mask(commands: argparse._SubParsersAction) -> None:
    text = "share the mask of an adapter alone, without weights"
    parser = _command(commands, "push-mask", _push_mask, text)
    parser.add_argument("folder", type=Path, help="folder of the adapter")
    parser.add_argument("hub_model_id", help="repository of the mask; memcontrol train takes the mask by --mask_from")
    _add_hub_flags(parser)


def _add_hub_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hub_revision", help="branch to push to")
    parser.add_argument(
        "--hub_public", action="store_true", help="make a new repository public, or push to a public repository"
    )


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "export", _export, "write an adapter for people without this package")
    parser.add_argument("folder", help="folder of the adapter")
    parser.add_argument(
        "--to",
        "--format",
        dest="to",
        required=True,
        choices=("merged", "pipeline", "lora", "peft"),
        help="merged (or pipeline): a whole pipeline; lora: a file for pipe.load_lora_weights; peft: the adapter as "
        "it is, if its method is one of PEFT's own",
    )
    parser.add_argument("--output_dir", required=True, type=Path, help="new or empty folder")
    parser.add_argument(
        "--pipeline", help="base pipeline: a Hub id, a folder, or demo; the adapter's own base by default"
    )
    parser.add_argument("--rank", type=int, default=64, help="largest rank of a lora that approximates another method")


def _add_filter(commands: argparse._SubParsersAction) -> None:
    text = "shrink an adapter that failed, or leave blocks out of it, without data and without training"
    parser = _command(commands, "filter", _filter, text)
    parser.add_argument("folder", metavar="ADAPTER", help="folder of the adapter")
    parser.add_argument("--output_dir", required=True, type=Path, help="new or empty folder")
    parser.add_argument("--shrink", type=float, help="factor of the adapter's effect, between 0 and 1")
    parser.add_argument("--drop", nargs="+", default=[], metavar="BLOCK", help="blocks to leave out")
    parser.add_argument(
        "--screening",
        type=Path,
        help="screening.json of memcontrol screen: leave out the blocks that memorize much for what they learn",
    )
    parser.add_argument(
        "--spectral",
        type=float,
        metavar="FRACTION",
        help="remove this share of the spectral channels of each changed matrix, between 0 and 1: those that are "
        "aligned least with the base's weight",
    )
    parser.add_argument(
        "--pipeline",
        help="base of the adapter, for --spectral: Hub id, folder or demo (default: the one that the adapter names)",
    )


# ---- the commands ----


def _card(args: argparse.Namespace) -> int:
    from .report import DEFAULT_GATE, MemorizationReport, load_gate
    from .report.card import write_card

    if args.gate:
        report = MemorizationReport.from_json(args.folder / REPORT)
        report.judge(load_gate(DEFAULT_GATE if args.gate == "default" else args.gate))
        report.to_json(args.folder / REPORT)
    print(f"card: {write_card(args.folder)}")
    return PASSED


def _dossier(args: argparse.Namespace) -> int:
    from .report.dossier import Dossier
    from .report.dossier_facts import FACTS, Facts, empty_facts
    from .report.dossier_pdf import check_fpdf, write_pdf
    from .whole_files import write_whole

    if not args.no_pdf:
        check_fpdf()
    file, output = args.facts or args.folder / FACTS, args.output_dir or args.folder
    facts = Facts.from_yaml(file) if args.facts or file.exists() else Facts()
    dossier = Dossier.from_folder(args.folder, facts)
    output.mkdir(parents=True, exist_ok=True)
    if not args.facts and not file.exists():
        write_whole(file, empty_facts())
        print(f"to fill in, then run the same command again: {file}")
    write_whole(output / "dossier.html", dossier.html())
    print(f"dossier: {output / 'dossier.html'}")
    if not args.no_pdf:
        write_pdf(dossier, output / "dossier.pdf")
        print(f"dossier: {output / 'dossier.pdf'}")
    return PASSED


def _push(args: argparse.Namespace) -> int:
    from .publish.hub import GateFailed, push

    try:
        address = push(
            args.folder,
            args.hub_model_id,
            revision=args.hub_revision,
            public=args.hub_public,
            allow_failed_gate=args.allow_failed_gate,
        )
    except GateFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return GATE_FAILED
    print(f"pushed: {address}")
    return PASSED


def _push_mask(args: argparse.Namespace) -> int:
    from .publish.hub import push_mask

    address = push_mask(args.folder, args.hub_model_id, revision=args.hub_revision, public=args.hub_public)
    print(f"pushed: {address}")
    return PASSED


def _export(args: argparse.Namespace) -> int:
    from .progress import quiet_log
    from .publish.export import export

    with quiet_log():
        written = export(args.folder, args.output_dir, args.to, pipeline=args.pipeline, rank=args.rank)
    print(written)
    return PASSED


def _filter(args: argparse.Namespace) -> int:
    from .publish.filter import filter_adapter

    arguments = (args.shrink, args.drop, args.screening, args.spectral, args.pipeline)
    print(filter_adapter(args.folder, args.output_dir, *arguments))
    print("it was not audited: the report of the adapter does not hold for it. Compare the two with")
    for folder in (args.folder, args.output_dir):
        print(f"  memcontrol audit --pipeline ... --train ... --held_out ... --adapter {folder} --output_dir ...")
    return PASSED


def _audit(args: argparse.Namespace) -> int:
    from .report import DEFAULT_GATE, check_no_training, load_gate

    limits = load_gate(args.gate or DEFAULT_GATE)
    check_no_training(args.output_dir)
    if args.adapter and not args.pipeline:
        raise ValueError("--adapter needs the --pipeline that it belongs to")
    if args.generated == "demo":
        raise ValueError("--generated takes a folder of images that a model generated: the demo has no such folder")
    if args.verifier and not args.group_column:
        raise ValueError(f"--verifier {args.verifier!r} tells persons apart: give their column with --group_column")
    if args.attribute_column and not (args.pipeline and args.caption_column):
        raise ValueError("--attribute_column is inferred by a model that takes captions: give --pipeline and captions")
    if args.base_pipeline and (args.adapter or not args.pipeline):
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
    import torch

    from .audit import AuditSettings, audit_memorization
    from .data import load_canaries, warn_of_crops
    from .families import family_of, load_pipeline
    from .images import Framing

    framing = Framing(args.fit, args.background)
    _check_framing(args.adapter, framing)
    captions = (args.caption_column or None) if args.pipeline else None
    train, held_out = (
        _images(getattr(args, name), name, captions, args.group_column, args.attribute_column)
        for name in ("train", "held_out")
    )
    warn_of_crops(train, framing, "training")
    generated = None if args.generated is None else _images(args.generated, "generated", None)
    canaries = None if args.canaries is None else load_canaries(args.canaries)
    device = torch.device(args.device) if args.device else torch.accelerator.current_accelerator() or "cpu"
    pipeline = args.pipeline and load_pipeline(args.pipeline, args.revision).to(device)
    base = args.base_pipeline and load_pipeline(args.base_pipeline).to(device)
    resolution = args.resolution
    if resolution is None:
        resolution = min(generated[0]["image"].size) if pipeline is None else family_of(pipeline).trained_at
    amounts = {name: getattr(args, name) for name in AuditSettings.__dataclass_fields__ if name != "resolution"}
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
    words = [word for name, value in amounts.items() for word in (f"--{name}", str(value))]
    words += ["--group_column", "YOUR_GROUP_COLUMN"] if args.group_column else []
    words += ["--attribute_column", "YOUR_ATTRIBUTE_COLUMN"] if args.attribute_column else []
    report.command = f"memcontrol audit {shlex.join(words)}"
    return report


def _check_framing(adapter: str | None, framing: "Framing") -> None:
    """Raise `ValueError` when the report beside an adapter says that it was trained with images in another framing."""
    from .images import Framing
    from .report import MemorizationReport

    if adapter is None or not (file := Path(adapter) / REPORT).is_file():
        return
    training = MemorizationReport.from_json(file).training
    trained = Framing(training.get("fit", "crop"), training.get("background", "white"))
    if trained != framing:
        raise ValueError(
            f"the adapter was trained with images of --fit {trained.fit} --background {trained.background}: attack it "
            "with the same, or its figures look safer than they are"
        )


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


if __name__ == "__main__":
    raise SystemExit(main())
