r"""Tell what each block of a model learns and what it memorizes on a data set, by one training with all blocks on.

    memcontrol screen --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --train_data_dir my_images --method lora --output_dir my_screening

It takes the flags of `memcontrol train`, and reads those of the model, the images, what is tuned and the training. The
folder gets `screening.json` (see `memcontrol_hf.Screening`), which holds no image and no caption, `screening.png`, and
`mask.json`, the mask that the screening suggests: `memcontrol train --mask_from my_screening` trains it.
With `--method svdiff --singular_values 2000` it also gets `singular_values.json`: the configuration of the 2,000
single singular values that memorize least for what they learn. `memcontrol train` searches among these alone with
`--peft_config my_screening/singular_values.json`.

Several GPUs: `accelerate launch -m memcontrol_hf.screen`.

Exit codes: 0 done, 2 wrong use, 1 an error.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .adapter_folder import MASK
from .command_line import ERROR, WRONG_USE
from .flags import ScriptArguments
from .train import FAILURES, OF_THE_MACHINE, exit_code, start
from .whole_files import write_whole

if TYPE_CHECKING:
    from .screening import Screening

logger = logging.getLogger(__name__)

FILE, PLOT, SINGULAR_VALUES = "screening.json", "screening.png", "singular_values.json"
"""What the command writes into the output folder."""


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    """Screen by the flags: see [`~memcontrol_hf.train.start`]."""
    start(run, __doc__, argv, prog)


def run(args: ScriptArguments) -> None:
    """Load, screen, write what was found, and print it."""
    import torch

    from .from_flags import fixed_rate, make_trainer
    from .report.plots import plot_screening
    from .report.report import aligned
    from .search import suggested_mask

    with exit_code(WRONG_USE, ValueError), exit_code(ERROR, (*OF_THE_MACHINE, torch.OutOfMemoryError)):
        if args.dry_run:
            raise ValueError("--dry_run is a flag of memcontrol train, whose plan has the screening as a stage")
        trainer, _, rates, mask = make_trainer(args, screens=True)
        single, total = args.singular_values, trainer.trainable_parameters
        if obstacle := trainer.obstacle_to_screening(args.screen_steps, single is not None):
            raise ValueError(obstacle)
        if single is not None and mask is None and single > total:
            raise ValueError(f"--singular_values {single}: the blocks have {total} singular values, take fewer")
    folder = Path(args.output_dir)
    steps = args.screen_steps or trainer.args.search_max_steps or trainer.args.max_steps
    times = f"{args.screen_seeds} times " if args.screen_seeds > 1 else ""
    logger.info(f"screening: {times}{steps} steps with all {len(trainer.mask)} blocks on")
    with exit_code(ERROR, FAILURES):
        rate = fixed_rate(args, rates)
        options = {"learning_rate": rate, "seeds": args.screen_seeds, "singular_values": single is not None}
        screening = trainer.screen(args.screen_steps, **options)
    if not trainer.is_world_process_zero():
        return
    folder.mkdir(parents=True, exist_ok=True)
    screening.to_json(folder / FILE)
    plot_screening(screening.to_dict(), folder / PLOT)
    print(aligned(screening.table()))
    over = "probes, or over the seeds if that is larger" if args.screen_seeds > 1 else "probes"
    print(f"\nfall of the loss that is owed to each block, ± one standard error over the {over}")
    (folder / MASK).unlink(missing_ok=True)  # of an earlier screening
    if not (masks := screening.masks(4)):
        print("\nno block lowers the loss on validation images: screen with more steps, or at another --learning_rate")
    else:
        mask = suggested_mask(screening)
        write_whole(folder / MASK, json.dumps({"mask": mask}, indent=2) + "\n")
        print(f"\nsuggested, the knee of the trade-off; train these blocks with --mask_from {folder}:")
        _show(screening, mask)
        print(f"\nmasks along the trade-off, by memcontrol_hf.Screening.from_json({str(folder / FILE)!r}).masks(4):")
    for mask in masks:
        _show(screening, mask)
    if single is not None:
        front = screening.singular_value_front(8)
        print("\nsingle singular values, the lowest price first, and what they learn and memorize of all:\n")
        rows = [[f"{number:,}", f"{learns:.0%}", f"{memorizes:.0%}"] for number, learns, memorizes in front]
        print(aligned([["number", "learns", "memorizes"], *rows]))
        with exit_code(WRONG_USE, ValueError, f". The screening is kept in {folder / FILE}"):
            chosen = screening.cheapest_singular_values(single)
        config = replace(trainer.peft_config, singular_values=chosen)
        write_whole(folder / SINGULAR_VALUES, json.dumps(config.to_dict()) + "\n")
        print(f"\n{single:,} of them, in {len(chosen)} modules: train with --peft_config {folder / SINGULAR_VALUES}")


def _show(screening: "Screening", mask: Mapping[str, bool]) -> None:
    """Print a mask: how large it is, what it learns and memorizes, and what other trainers take for it."""
    from .screening import other_trainers

    everything = screening.predict(dict.fromkeys(mask, True))
    shares = [f"{one / whole:.0%}" if whole > 0 else "none" for one, whole in zip(screening.predict(mask), everything)]
    parameters = sum(screening.parameters[name] for name, on in mask.items() if on)
    print(f"  {', '.join(name for name, on in mask.items() if on)}")
    print(
        f"    {sum(mask.values())} of {len(mask)} blocks, {parameters:,} parameters; learns {shares[0]} and memorizes "
        f"{shares[1]} of what all blocks do"
    )
    for trainer, flags in other_trainers(mask).items():
        print(f"    {trainer}: {flags}")


if __name__ == "__main__":
    main()
