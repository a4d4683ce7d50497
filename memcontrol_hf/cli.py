"""The command `memcontrol`. Exit codes: 0 passed or done, 3 the gate failed, 2 wrong use, 1 an error.

Each command imports what it needs when it runs, so that a card is rendered without loading PyTorch.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from . import audit_command
from .adapter_folder import REPORT
from .command_line import ERROR, GATE_FAILED, PASSED, WRONG_USE, HelpFormatter, did_you_mean

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
        hint = did_you_mean(unknown[0], args.parser._option_string_actions)
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")  # beside the command's own usage
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
    parser = _command(commands, "audit", audit_command.run, text, gated=True)
    audit_command.add_flags(parser)


def _add_card(commands: argparse._SubParsersAction) -> None:
    text = "render the card of a folder again from the files in the folder"
    parser = _command(commands, "card", _card, text, gated=True)
    parser.add_argument(
        "folder", type=Path, help="folder of an adapter, an export, an audit, a mask or the demo's pipeline"
    )
    parser.add_argument(
        "--gate",
        help="gate file by which the stored audit is judged again before; default: the package's own gate. The exit "
        "code is 3 when the gate fails",
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

    failures: list[str] = []
    if args.gate:
        if not (args.folder / REPORT).is_file():
            raise ValueError(f"--gate judges the audit in a {REPORT}, and {str(args.folder)!r} holds none")
        report = MemorizationReport.from_json(args.folder / REPORT)
        report.judge(load_gate(DEFAULT_GATE if args.gate == "default" else args.gate))
        report.to_json(args.folder / REPORT)
        failures = report.gate["failures"]
    print(f"card: {write_card(args.folder)}")
    for failure in failures:
        print(f"gate: FAILED, {failure}")
    return GATE_FAILED if failures else PASSED


def _dossier(args: argparse.Namespace) -> int:
    from .report.dossier import Dossier
    from .report.dossier_facts import FACTS, Facts, empty_facts
    from .report.dossier_pdf import check_fpdf, write_pdf
    from .whole_files import check_writable, write_whole

    if not args.no_pdf:
        check_fpdf()
    file, output = args.facts or args.folder / FACTS, args.output_dir or args.folder
    facts = Facts.from_yaml(file) if args.facts or file.exists() else Facts()
    dossier = Dossier.from_folder(args.folder, facts)
    check_writable(output)
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


if __name__ == "__main__":
    raise SystemExit(main())
