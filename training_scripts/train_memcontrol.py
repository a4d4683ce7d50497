r"""Search the parameters to tune, fine-tune them, measure what was memorized, and save the adapter with its report.

With no flags it runs the demo that ships in the package:

    accelerate launch training_scripts/train_memcontrol.py

Your own images, in a folder with a `metadata.jsonl` (`{"file_name": "1.png", "text": "a caption"}` a line):

    accelerate launch training_scripts/train_memcontrol.py \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --train_data_dir my_images --method svdiff --n_trials 20 --output_dir my_adapter

The same command goes on where it was interrupted.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import logging as transformers_logging

from memcontrol_hf import workflow
from memcontrol_hf.flags import FlagParser, ScriptArguments
from memcontrol_hf.from_flags import (
    audit_settings,
    checkpoint_to_resume,
    dry_run,
    fixed_rate,
    make_trainer,
    report_facts,
    search_options,
)
from memcontrol_hf.publish.hub import GateFailed, push
from memcontrol_hf.report import DEFAULT_GATE
from memcontrol_hf.search import public_address
from memcontrol_hf.tracking import log_push


def main(argv: list[str] | None = None) -> None:
    """Parse, load, search, choose, fine-tune, save, audit, render the card, push."""
    transformers_logging.set_verbosity_error()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("memcontrol_hf").setLevel(logging.INFO)
    with exit_code(2, ValueError):
        (args,) = FlagParser(__doc__).parse_args_into_dataclasses(argv)
        if args.dry_run:
            print(dry_run(args))
            return
        trainer, data, rates, mask = make_trainer(args)

    if args.n_trials:
        kept = public_address(args.storage) if args.storage else args.output_dir
        with exit_code(1, (ValueError, RuntimeError), f". The trials are kept in {kept}"):
            choice = workflow.search(trainer, **search_options(args, trainer, rates, mask))
    else:
        choice = workflow.Choice({"mask": trainer.mask, "learning_rate": fixed_rate(args, rates)})
    if choice is None:  # another process of this study does the rest
        return

    checkpoint = checkpoint_to_resume(args)
    if checkpoint:
        with exit_code(2, ValueError):
            workflow.check_resumes(trainer, choice, checkpoint)
    tuned = workflow.fine_tune(trainer, choice, data["held_out"], checkpoint, args.study_name)
    if not trainer.is_world_process_zero():
        return

    if args.log_images:
        workflow.show_images(trainer, data["held_out"], args.validation_prompt, args.log_images)
    report = workflow.save(trainer, choice, tuned, data, **report_facts(args, trainer))
    workflow.audit(trainer, report, data, audit_settings(args), args.gate or DEFAULT_GATE)
    workflow.write_card(trainer, report, choice)
    print("\n" + report.summary() + f"\n\nadapter, card and report: {args.output_dir}")
    if args.push_to_hub:
        push_folder(args)


def push_folder(args: ScriptArguments) -> None:
    """Push the public files of the output folder; a failed push ends with its exit code, and loses nothing."""
    with exit_code(3, GateFailed), exit_code(1, (ValueError, RuntimeError), but_not=GateFailed):
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
        print(f"error: {error}{note}", file=sys.stderr)
        raise SystemExit(code) from None


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
