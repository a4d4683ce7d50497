"""The command `memcontrol`. Exit codes: 0 passed, 3 the gate failed, 2 wrong use, 1 an error."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

PASSED, ERROR, WRONG_USE, GATE_FAILED = 0, 1, 2, 3


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memcontrol",
        description="Audit models for memorized training images; publish adapters with the evidence.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    audit = commands.add_parser(
        "audit",
        help="attack a model, or images that it generated, and apply a release gate",
        description="Attack a model, or images that it generated, beside its controls, and apply a release gate. "
        "Exit codes: 0 passed, 3 the gate failed, 2 wrong use, 1 an error.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    subject = audit.add_mutually_exclusive_group(required=True)
    subject.add_argument("--pipeline", help="diffusers pipeline: a Hub id, a folder, or demo")
    subject.add_argument("--generated", help="instead: a folder of generated images")
    audit.add_argument("--revision", help="of the pipeline on the Hub")
    audit.add_argument(
        "--adapter", help="of the pipeline: a PEFT folder or Hub id, or a LoRA file of diffusers or kohya"
    )
    audit.add_argument("--base_pipeline", help="base of a whole fine-tuned pipeline, for the control")
    audit.add_argument("--train", required=True, help="folder with the training images, or demo")
    audit.add_argument("--held_out", required=True, help="folder with images of the domain, never trained on, or demo")
    audit.add_argument("--caption_column", default="text", help="in the folders' metadata.jsonl; '' if none")
    audit.add_argument("--output_dir", required=True, type=Path, help="the report goes there, and private/review.html")
    audit.add_argument("--gate", type=Path, help="gate file; the package's own by default")
    audit.add_argument("--encoder", default="demo", help="image encoder: demo, a Hub id or a folder, or xrv:...")
    audit.add_argument("--clip_model", help="CLIP model for the CLIP score: a Hub id or a folder")
    audit.add_argument("--device", help="cuda, mps, cpu, ...; the accelerator if there is one by default")
    audit.add_argument(
        "--resolution",
        type=int,
        help="side in pixels; by default what the pipeline was trained at, or of the first of the generated images",
    )
    audit.add_argument("--num_prompts", type=int, default=100, help="training captions to sample")
    audit.add_argument("--images_per_prompt", type=int, default=10, help="images for each of them")
    audit.add_argument("--num_quality_images", type=int, default=256, help="images of held-out captions, for fid")
    audit.add_argument("--inference_steps", type=int, default=25, help="sampling steps")
    audit.add_argument("--guidance_scale", type=float, default=7.5, help="of the sampling")
    audit.add_argument("--num_timesteps", type=int, default=5, help="timesteps of the membership attacks")
    audit.add_argument(
        "--near_duplicates",
        type=float,
        default=0.05,
        help="how unlike held-out and training images must be, 0 to 1",
    )
    audit.add_argument("--batch_size", type=int, default=32, help="only a matter of speed")
    audit.add_argument("--seed", type=int, default=0, help="of all draws")
    audit.set_defaults(run=_audit)

    card = _command(commands, "card", "render the card of a folder again from its files", _card)
    card.add_argument("folder", type=Path, help="of an adapter, an export, a mask or the demo's pipeline")

    push = _command(commands, "push", "upload adapter, report and card to a private repository", _push)
    push.add_argument("folder", type=Path, help="that a fine-tune or an export left")
    push.add_argument("--hub_model_id", help="where it was pushed before, or else the folder's name")
    _hub_flags(push)
    push.add_argument(
        "--allow_failed_gate", action="store_true", help="push although the gate failed; the card says so first"
    )

    mask = _command(commands, "push-mask", "share the mask of an adapter alone, without weights", _push_mask)
    mask.add_argument("folder", type=Path, help="of the adapter")
    mask.add_argument("hub_model_id", help="repository of the mask; train_memcontrol.py takes it as --mask_from")
    _hub_flags(mask)

    export = _command(commands, "export", "write an adapter for people without this package", _export)
    export.add_argument("folder", help="of the adapter")
    export.add_argument(
        "--to",
        "--format",
        dest="to",
        required=True,
        choices=("merged", "pipeline", "lora", "peft"),
        help="merged (or pipeline): a whole pipeline; lora: for pipe.load_lora_weights; peft: the adapter, if its "
        "method is one of PEFT's own",
    )
    export.add_argument("--output_dir", required=True, type=Path, help="a new or empty folder")
    export.add_argument("--pipeline", help="base pipeline: a Hub id, a folder, or demo; the adapter's own by default")
    export.add_argument("--rank", type=int, default=64, help="of a lora that stands for another method, at most")
    return parser


def _command(commands, name: str, text: str, run) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}. Exit codes: 0 done, 2 wrong use, 1 an error"
        + (", 3 the gate failed." if name == "push" else "."),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _hub_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hub_revision", help="branch to push to")
    parser.add_argument(
        "--hub_public", action="store_true", help="make a new repository public, or push to one that is public"
    )


def _card(args: argparse.Namespace) -> int:
    from .report.card import write_card

    print(f"card: {write_card(args.folder)}")
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
    from .publish.export import export

    exported = export(args.folder, args.output_dir, args.to, pipeline=args.pipeline, rank=args.rank)
    print(exported)
    return PASSED


def _audit(args: argparse.Namespace) -> int:
    from .report import DEFAULT_GATE, load_gate
    from .report.plots import plot_distances

    limits = load_gate(args.gate or DEFAULT_GATE)
    if args.adapter and not args.pipeline:
        raise ValueError("--adapter needs the --pipeline that it belongs to")
    if args.generated == "demo":
        raise ValueError("--generated takes a folder of images that a model generated: the demo ships none")
    if args.base_pipeline and (args.adapter or not args.pipeline):
        raise ValueError("--base_pipeline is for a whole fine-tuned --pipeline: an adapter's base is the pipeline")

    import torch

    from .audit import AuditSettings, audit_memorization
    from .families import load_pipeline

    captions = (args.caption_column or None) if args.pipeline else None
    train, held_out = (_images(getattr(args, name), name, captions) for name in ("train", "held_out"))
    generated = None if args.generated is None else _images(args.generated, "generated", None)
    device = torch.device(args.device) if args.device else torch.accelerator.current_accelerator() or "cpu"
    pipeline = args.pipeline and load_pipeline(args.pipeline, args.revision).to(device)
    base = args.base_pipeline and load_pipeline(args.base_pipeline).to(device)
    resolution = args.resolution
    if resolution is None:
        resolution = min(generated[0]["image"].size) if pipeline is None else _trained_at(pipeline)
    amounts = {name: getattr(args, name) for name in AuditSettings.__dataclass_fields__ if name != "resolution"}
    settings = AuditSettings(resolution=resolution, **amounts)
    report = audit_memorization(
        train=train,
        held_out=held_out,
        pipeline=pipeline,
        adapter=args.adapter,
        base_pipeline=base,
        generated=generated,
        encoder=args.encoder,
        clip_model=args.clip_model,
        settings=settings,
        output_dir=args.output_dir,
    )
    report.command = " ".join(["memcontrol audit", *(f"--{name} {value}" for name, value in amounts.items())])
    plot_distances(report.audit["distances"], args.output_dir / "distances.png")
    passed = report.judge(limits)
    report.to_json(args.output_dir / "memorization_report.json")
    print(report.summary())
    print(f"\nreport: {args.output_dir / 'memorization_report.json'}")
    print(f"to look through, on this machine only: {args.output_dir / 'private' / 'review.html'}")
    return PASSED if passed else GATE_FAILED


def _images(name: str, split: str, caption_column: str | None) -> "Dataset":
    """The images of a folder, with their captions if a column is given; `demo`: the demo's split of that name."""
    from datasets import load_dataset

    from .data import check_readable

    if name == "demo":
        from .demo import demo_dataset

        return demo_dataset()[split]
    if not Path(name).is_dir():
        raise ValueError(f"--{split} {name!r} is no folder")
    try:
        # With "**", since it would find splits in the names of files.
        data = load_dataset("imagefolder", data_dir=name, data_files={"train": "**"}, split="train")
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"--{split} {name!r} holds no images: {str(error).splitlines()[0]}") from None
    check_readable(data, split)
    if caption_column is None:
        return data.select_columns(["image"])
    if caption_column not in data.column_names:
        raise ValueError(
            f"--{split} {name!r} has no column {caption_column!r}; it has: {', '.join(data.column_names)}. "
            "Captions stand in a metadata.jsonl beside the images; choose with --caption_column"
        )
    data = data.select_columns(["image", caption_column])
    return data if caption_column == "text" else data.rename_column(caption_column, "text")


def _trained_at(pipeline) -> int:
    from .families import family_of

    return family_of(pipeline).trained_at


if __name__ == "__main__":
    raise SystemExit(main())
