r"""Search the parameters to tune, fine-tune them, measure what was memorized, and save the adapter with its report.

With no flags it runs the demo that ships in the package:

    memcontrol train

Your own images, in a folder with a `metadata.jsonl` (`{"file_name": "1.png", "text": "a caption"}` a line):

    memcontrol train \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --train_data_dir my_images --encoder facebook/dinov2-small --output_dir my_adapter

The same flags from a file: `memcontrol train --config my_run.yaml`. Several GPUs, mixed precision and whatever else
`accelerate config` sets: `accelerate launch -m memcontrol_hf.train`. The same command goes on where it was
interrupted.

Exit codes: 0 done, 3 the gate refused the push, 2 wrong use, 1 an error.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from .adapter_folder import ADAPTER, CARD, PLOT, REPORT
from .command_line import ERROR, GATE_FAILED, WRONG_USE
from .error_lines import first_line
from .flag_parser import FlagParser
from .flags import ScriptArguments, on_demo_data
from .progress import quiet_log

OF_THE_MACHINE = (OSError, MemoryError, SafetensorError)
"""Errors that are no fault of the flags: a disk that is full or gone, an image that was deleted, too little memory.

`torch.OutOfMemoryError` is one, too, and is named where torch is loaded.
"""

FAILURES = (ValueError, RuntimeError, *OF_THE_MACHINE)
"""Errors of the long work that are said in one line."""

if TYPE_CHECKING:
    from .report import MemorizationReport


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    """Train by the flags: see [`start`]."""
    start(run, __doc__, argv, prog)


def start(
    run: Callable[[ScriptArguments], None], description: str, argv: list[str] | None = None, prog: str | None = None
) -> None:
    """Parse the flags, then run. The libraries that compute are loaded after the flags, so that the help is quick.

    Args:
        run (`Callable`): what the command does with its flags.
        description (`str`): text of the help above the flags.
        argv (list of `str`, *optional*): arguments; those of the process by default.
        prog (`str`, *optional*): name of the command in its help.

    Raises:
        SystemExit: with an exit code, after one line that says what is wrong.
    """
    args = FlagParser(description, prog).script_arguments(argv)
    with quiet_log():
        import torch

        torch.set_float32_matmul_precision("high")
        run(args)


def run(args: ScriptArguments) -> None:
    """Load, search, choose, fine-tune, save, audit, render the card, push."""
    import torch

    from . import workflow
    from .audit import write_split
    from .from_flags import (
        audit_settings,
        checkpoint_to_resume,
        dry_run,
        fixed_rate,
        make_trainer,
        search_options,
    )
    from .public_facts import report_facts
    from .report import DEFAULT_GATE
    from .search import public_address, said_in_one_line

    with exit_code(WRONG_USE, ValueError), exit_code(ERROR, (*OF_THE_MACHINE, torch.OutOfMemoryError)):
        if args.singular_values is not None:
            raise ValueError(
                "--singular_values is a flag of memcontrol screen, which writes a file for --peft_config: make that "
                "first, then train with it"
            )
        if args.dry_run:
            print(dry_run(args))
            return
        trainer, data, rates, mask = make_trainer(args)
        if (args.flip_canaries or not on_demo_data(args)) and trainer.is_world_process_zero():
            write_split(data, Path(args.output_dir))

    if args.n_trials:
        kept = public_address(args.storage) if args.storage else args.output_dir
        with exit_code(ERROR, FAILURES, f". The trials are kept in {kept}"), said_in_one_line(kept):
            choice = workflow.search(trainer, **search_options(args, trainer, rates, mask))
    else:
        choice = workflow.Choice({"mask": trainer.mask, "learning_rate": fixed_rate(args, rates)})
    if choice is None:  # another process of this study does the rest
        return

    checkpoint = checkpoint_to_resume(args)
    if checkpoint:
        with exit_code(WRONG_USE, ValueError):
            workflow.check_resumes(trainer, choice, checkpoint)
    with exit_code(ERROR, FAILURES, f". What was finished is kept in {args.output_dir}"):
        tuned = workflow.fine_tune(trainer, choice, data["held_out"], checkpoint, args.study_name)
    if not trainer.is_world_process_zero():
        return

    with exit_code(ERROR, FAILURES, f". What was finished is kept in {args.output_dir}"):
        report = workflow.save(trainer, choice, tuned, data, **report_facts(args, trainer))
        if args.log_images:
            workflow.show_images(trainer, data["held_out"], args.validation_prompt, args.log_images)
        workflow.audit(trainer, report, data, audit_settings(args), args.gate or DEFAULT_GATE)
        workflow.write_card(trainer, report, choice)
    print(f"\n{report.summary()}\n\n{last_words(report, Path(args.output_dir))}")
    if args.push_to_hub:
        push_folder(args)


def last_words(report: "MemorizationReport", folder: Path) -> str:
    """The end of what is printed: the verdict, where things are, and what to do next."""
    failures = report.gate["failures"]
    if report.gate["passed"]:
        verdict, following = "passed", f"memcontrol push {folder} --hub_model_id YOUR_NAME/YOUR_ADAPTER"
    elif report.audit is None:
        verdict = "FAILED, since the adapter could not be attacked"
        following = "train with more images, or choose an --encoder that tells them apart"
    else:
        verdict = f"FAILED, {len(failures)} limit{'s are' if len(failures) > 1 else ' is'} not kept"
        following = "train with a mitigation, such as --mitigation rwa:n=4 (docs/mitigations.md)"
        if set(report.gate.get("kinds", {}).values()) == {"unmeasured"}:
            following = "measure with more images (the verdict says how many), or " + following
    places = {"adapter": ADAPTER, "card": CARD, "report": REPORT, "plot": PLOT, "search": "study.journal"}
    lines = [f"{name}: {folder / file}" for name, file in places.items() if (folder / file).exists()]
    lines += [f"to look through, on this machine only: {file}" for file in folder.glob("private/*.html")]
    if not report.gate["passed"]:
        lines += [f"to push nevertheless: memcontrol push {folder} --allow_failed_gate"]
    return "\n".join([f"verdict: {verdict}", *lines, f"next: {following}"])


def push_folder(args: ScriptArguments) -> None:
    """Push the public files of the output folder; a failed push ends with its exit code, and loses nothing."""
    from .publish.hub import GateFailed, push
    from .tracking import log_push

    with exit_code(GATE_FAILED, GateFailed), exit_code(ERROR, (ValueError, RuntimeError), but_not=GateFailed):
        address = push(
            args.output_dir,
            args.hub_model_id,
            revision=args.hub_revision,
            public=args.hub_public,
            allow_failed_gate=args.allow_failed_gate,
        )
        print("pushed:", address)
        log_push(address)


@contextmanager
def exit_code(code: int, errors: type | tuple[type, ...], note: str = "", but_not: tuple = ()) -> Iterator[None]:
    """End the script with a code, and one line, where an error is raised."""
    try:
        yield
    except errors as error:
        if isinstance(error, but_not):
            raise
        print(f"error: {_in_words(error)}{note}", file=sys.stderr)
        raise SystemExit(code) from None


def _in_words(error: BaseException) -> str:
    """An error in a sentence that says what to do."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's is a RuntimeError
        return (
            f"{first_line(str(error) or 'no memory left').rstrip('.')}. Lower --train_batch_size (and raise "
            "--gradient_accumulation_steps) or --eval_batch_size, or give --gradient_checkpointing, --mixed_precision "
            "bf16 or --quantization"
        )
    if isinstance(error, OF_THE_MACHINE):
        return f"{first_line(error)}. When that is mended, the same command goes on"
    return str(error)


if __name__ == "__main__":
    main()
