"""How many trials a screening saves in real searches: each trial is a training, none is looked up.

    python training_scripts/studies/real_searches.py                         # three hours on one core
    python training_scripts/studies/real_searches.py --granularity module    # each linear layer is a block
    python training_scripts/studies/real_searches.py --collect               # run nothing: judge what is finished

Each search is `MemControlTrainer.hyperparameter_search` on the demo with the attention weights, its default range of
learning rates and the objectives loss and membership AUC, both against the validation images. Plain random search
says how far 64 trials get. The others begin with all blocks on and all blocks off; a screened search goes on with the
masks of its screening, which counts as what it costs.

Each finished search is a file in `--output_dir`, and the study of one that is not finished is there, too, so the same
command goes on where it stopped. Writes docs/results/real_searches.json and .md.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import logging as transformers_logging

from common.intervals import FEW, bootstrap_median
from common.pages import publish_results, read_results, table
from common.pieces import Job, add_piece_flags, exit_if_missing, open_pieces
from common.trainers import demo_trainer
from memcontrol_hf import demo_dataset
from memcontrol_hf.flags import ScriptArguments
from memcontrol_hf.from_flags import METHODS, training_arguments
from memcontrol_hf.search.sampler import known_masks, middle_rate
from memcontrol_hf.search.screened import SCREENED_MASKS
from trials.replay import first_to_reach, hypervolumes

COMMAND = "python training_scripts/studies/real_searches.py"
METHOD, STEPS = "attention", 40
GRANULARITIES = ("block", "module")
SCREENING_TRIALS = 1.5
"""What a screening costs, in trials (docs/results/benchmark_screening.md)."""


class Kind(NamedTuple):
    """A kind of search.

    Args:
        sampler: Name of the sampler.
        trials: Number of trials.
        seeds: Number of searches.
    """

    sampler: str
    trials: int
    seeds: int


RANDOM, MASKS = "random", "masks"
KINDS = {RANDOM: Kind("random", 64, 2), MASKS: Kind("tpe", 10, 10), "tpe": Kind("tpe", 12, 10)}
"""`masks` are all blocks on, all off, and four masks of a screening, the largest first, at two learning rates."""
ORDERS = {
    "screened": (4, 8, 5, 7),
    "screened, four masks at the middle rate": (3, 4, 2, 5),
    "screened, four masks at the higher rate": (7, 8, 6, 9),
}
"""Orders in which a search can try the trials of `masks`; the first is that of `screened_trials`."""
COUNTS = (2, 3, 4, 5, 6, 12, 32, 64)

Figures = dict[str, Any]


def search(folder: Path, granularity: str, name: str, seed: int) -> Figures:
    """One search: for each trial its number of blocks, its rate and its objectives."""
    kind, (low, high) = KINDS[name], METHODS[METHOD][1]
    script = ScriptArguments(output_dir=str(folder), method=METHOD, max_train_steps=STEPS, seed=seed)
    trainer = demo_trainer(demo_dataset(), METHOD, training_arguments(script), granularity)
    trainer.args.objectives = ["loss", "membership_auc"]
    known = None if name != RANDOM else []
    if name == MASKS:
        middle = middle_rate(low, high)
        masks = trainer.screen(learning_rate=middle).masks(SCREENED_MASKS)
        known = known_masks(trainer.search_space, low, high, masks)
        known += [trial | {"learning_rate": middle_rate(middle, high)} for trial in known[2:]]
    runs = trainer.hyperparameter_search(
        n_trials=len(known) if name == MASKS else kind.trials,
        direction=["minimize", "minimize"],
        learning_rate_range=(low, high),
        sampler=kind.sampler,
        screen=False,
        enqueue=known,
    )
    found = [
        {
            "blocks": sum(trial.user_attrs["hyperparameters"]["mask"].values()),
            "percent": trial.user_attrs["trainable_percent"],
            "learning_rate": trial.user_attrs["hyperparameters"]["learning_rate"],
            "values": trial.values,
        }
        for trial in runs[0].run_summary.get_trials(deepcopy=False)
        if trial.values is not None and "same_as" not in trial.user_attrs
    ]
    return {"trials": found}


def shares(pieces: dict[str, Figures], granularity: str) -> dict[str, np.ndarray]:
    """The hypervolume after each trial as a share of that of all trials: search or order -> `[seeds, trials]`."""
    searches: dict[str, list[np.ndarray]] = {}
    for piece, content in pieces.items():
        folder, _, rest = piece.partition("/")
        if folder == granularity:
            values = np.array([trial["values"] for trial in content["trials"]])
            searches.setdefault(rest.rsplit("-", 1)[0], []).append(values)
    if not searches:
        return {}
    together = np.concatenate([values for found in searches.values() for values in found])
    reference = together.max(0)
    whole = hypervolumes(together, reference)[-1]
    whole_screenings = [values for values in searches.pop(MASKS, []) if len(values) == KINDS[MASKS].trials]
    for title, order in ORDERS.items():
        searches[title] = [values[[0, 1, *order]] for values in whole_screenings]
    return {
        name: np.array([hypervolumes(values[: min(map(len, found))], reference) / whole for values in found])
        for name, found in searches.items()
        if found
    }


def random_goal(found: dict[str, np.ndarray]) -> float:
    """The share that plain random search has after its last trial: the median over its searches."""
    return float(np.median(found[RANDOM][:, -1]))


def trials_needed(found: dict[str, np.ndarray], name: str, goal: float) -> tuple[np.ndarray, np.ndarray]:
    """Trials until each search of a kind or order reaches the goal, the screening counted, and whether it does.

    A search that never reaches the goal counts as one trial longer than it was. Both are `[seeds]`.
    """
    needed = first_to_reach(found[name], goal)
    return needed + SCREENING_TRIALS * (name in ORDERS), needed <= found[name].shape[1]


def render(content: Figures) -> str:
    """The page."""
    low, high = METHODS[METHOD][1]
    lines = [
        "# How many trials a screening saves, in real searches",
        "",
        f"`{content['command']}`",
        "",
        f"Searches of the demo by the loss and the membership AUC on validation images, attention weights, {STEPS} "
        f"steps a trial, learning rates from {low:g} to {high:g}. The figures are the share of the hypervolume of all "
        "trials of the table that a search has found after so many trials: median over searches with its 95 % "
        "bootstrap interval. All searches but plain random search begin with all blocks on and all blocks off. The "
        f"masks of a screening are compared in several orders; a screening costs {SCREENING_TRIALS:g} trials, which "
        "are not counted in the columns.",
        "",
        f"Fewer than {FEW} searches have no interval: their brackets show the lowest and the highest search. Where at "
        "most half of the searches reach the goal, more trials (>) are needed than a search had, the screening "
        "counted.",
        "",
    ]
    for granularity in GRANULARITIES:
        if not (found := shares(content["pieces"], granularity)):
            continue
        goal = random_goal(found) if RANDOM in found else None
        longest = max(share.shape[1] for share in found.values())
        counts, rows = [count for count in COUNTS if count <= longest], []
        for name, share in found.items():
            cells = [_interval(share[:, count - 1]) if count <= share.shape[1] else "" for count in counts]
            if goal is not None:
                needed, reached = trials_needed(found, name, goal)
                length = share.shape[1] + SCREENING_TRIALS * (name in ORDERS)
                median = f"{np.median(needed):.3g}" if reached.mean() > 0.5 else f"> {length:g}"
                cells += [median, f"{reached.sum()} of {len(share)}"]
            rows.append([name, str(len(share)), *cells])
        lines += [f"## Granularity {granularity}", ""]
        head = ["search", "searches", *map(str, counts)]
        if goal is not None:
            head += [f"trials to {goal:.3f}, the screening counted", "searches that reached it"]
            lines += [f"Plain random search has {goal:.3f} after its last trial.", ""]
        lines += table(head, rows, numbers=True)
    return "\n".join(lines).rstrip() + "\n"


def _interval(values: np.ndarray) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}"
    found = bootstrap_median(values)
    return f"{found['median']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--granularity", choices=GRANULARITIES, default="block", help="blocks of the masks")
    parser.add_argument("--kind", choices=list(KINDS), nargs="+", default=list(KINDS), help="kinds of searches")
    add_piece_flags(parser, "real_searches")
    args = parser.parse_args(argv)
    file, failed = args.docs_dir / "real_searches.json", []
    pieces = open_pieces(parser, args.output_dir, {"method": METHOD, "steps": STEPS})
    pieces.restore(read_results(file).get("pieces", {}))
    if not args.collect:
        transformers_logging.set_verbosity_error()
        jobs = [
            Job(piece, piece, partial(search, args.output_dir / "studies" / piece, args.granularity, name, seed))
            for name in args.kind
            for seed in range(KINDS[name].seeds)
            for piece in (f"{args.granularity}/{name}-{seed}",)
        ]
        failed = pieces.work(jobs)
    finished = {name: pieces.read(name) for granularity in GRANULARITIES for name in pieces.names(granularity)}
    content = {"command": COMMAND, "pieces": finished}
    publish_results(file, content, render)
    exit_if_missing(failed)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
