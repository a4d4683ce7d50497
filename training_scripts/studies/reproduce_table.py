"""The paper's table, small, with error bars: what is tuned and how, on two data sets, over several seeds.

    pip install elpv-dataset==1.0.0.post1
    python training_scripts/studies/reproduce_table.py                   # the whole table, in a night on two cores
    python training_scripts/studies/reproduce_table.py --rows transfer   # masks of one data set on the other
    python training_scripts/studies/reproduce_table.py --collect         # runs nothing: writes what is finished

Each finished piece of work is a file in `--output_dir`, so the same command goes on where it stopped. Processes with
one output folder share the work: start the command once for each core, with `OMP_NUM_THREADS=1`. On machines that
share no folder, `--part 1/2` and `--part 2/2` do half of the rows each; copy their folders into one afterwards.

`paper_table.json` and `paper_table.parquet` in docs/results hold all finished pieces. `paper_table.md`, the plots and
the tables over seeds on the cards in `model_cards/` are rendered from them. On a new machine the command takes up the
finished pieces from `paper_table.json`.

How a row is made:

- The learning rate of a row is chosen once for each data set. Three rates, evenly spread on a logarithmic scale over
  the method's range, train for half the steps each, with one seed that no other run has. The rate with the lowest
  denoising loss on the validation images wins.
- A searched row has a search of its own for each seed, over the mask and the learning rate together, as in
  train_memcontrol.py: the objectives are fid and the membership AUC on the validation images, and the knee of the
  front is chosen. A random mask of the same size, and a mitigation that is added to a found mask, have the learning
  rate of that search.
- In the transfer table all masks have the learning rate of all blocks.
- The fine-tune that is measured has a seed that no search saw. The seed and the number of images are the same for all
  rows.
"""

import argparse
import dataclasses
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import logging as transformers_logging

from common.pages import read_results, write_results
from common.pieces import Pieces, add_part_flag, exit_if_missing, open_pieces
from memcontrol_hf.adapter_folder import REPORT
from memcontrol_hf.report import MemorizationReport
from memcontrol_hf.report.card import write_card
from paper_table.data_sets import DATA
from paper_table.page import over_seeds, render
from paper_table.plots import plot
from paper_table.rows import GROUPS, ROWS
from paper_table.runs import jobs
from paper_table.sweep import sweep_of
from paper_table.tasks import Settings, Task, plan

KINDS = {"rate": "rates", "search": "searches", "run": "runs"}  # kind of a task -> its name in paper_table.json


def restore(pieces: Pieces, settings: Settings, docs: Path) -> None:
    """Take up the pieces that `paper_table.json` holds, if it was made with the same settings."""
    results = read_results(docs / "paper_table.json")
    if results.get("settings") == dataclasses.asdict(settings):
        for kind, name in KINDS.items():
            tasks = {Task(kind, piece["data"], piece["row"], piece["seed"]): piece for piece in results[name]}
            pieces.restore({task.piece: piece for task, piece in tasks.items()})


def environment() -> str:
    """The versions and the machine, for the page."""
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "peft", "optuna")
    )
    machine = f"{platform.machine()} with {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return f"Python {platform.python_version()}, {packages}, {machine}"


def collect(pieces: Pieces, settings: Settings, docs: Path, trials: Path) -> None:
    """Write the results, the page, the plots and the cards of all finished pieces, whatever rows were asked for."""
    found = {name: [pieces.read(piece) for piece in pieces.names(kind)] for kind, name in KINDS.items()}
    if not found["runs"]:
        print(f"no run is finished in {pieces.folder}: nothing is written")
        return
    found["runs"].sort(key=lambda run: (list(DATA).index(run["data"]), list(ROWS).index(run["row"]), run["seed"]))
    pictures = docs / "paper_table_samples"
    pictures.mkdir(parents=True, exist_ok=True)
    for name in [name for name, data in DATA.items() if data.public]:
        for file in (pieces.folder / "samples" / name).glob("*.png"):
            shutil.copy(file, pictures)
    results = {
        "settings": dataclasses.asdict(settings),
        "environment": environment(),
        **found,
        "sweep": sweep_of(trials),
        "pictures": sorted(file.stem for file in pictures.glob("*.png")),
    }
    write_results(docs / "paper_table.json", results, render(results))
    pd.DataFrame(results["runs"]).to_parquet(docs / "paper_table.parquet", index=False)
    plot(results, trials, docs)
    write_cards(results, docs.parents[1] / "model_cards")
    print(f"{len(results['runs'])} runs: {docs / 'paper_table.md'}")


def write_cards(results: dict[str, Any], folder: Path) -> None:
    """Put the table over seeds on the card of each data set's SV-DIFF adapter."""
    for data in DATA:
        card, shown = folder / f"{data}-svdiff", over_seeds(results, data)
        if shown and card.is_dir():
            report = MemorizationReport.from_json(card / REPORT)
            report.card["over_seeds"] = shown
            report.to_json(card / REPORT)
            write_card(card)


def row_names(names: list[str]) -> list[str]:
    """The rows that are meant by names of rows and of groups.

    Raises:
        ValueError: A name is unknown.
    """
    unknown = [name for name in names if name not in ROWS and name not in GROUPS]
    if unknown:
        raise ValueError(f"unknown row(s) {', '.join(unknown)}: use some of {', '.join((*GROUPS, *ROWS))}")
    return list(dict.fromkeys(row for name in names for row in GROUPS.get(name, [name])))


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="data sets (default: both)")
    parser.add_argument(
        "--rows", nargs="+", default=["transfer", "main"], help="rows, or the groups main and transfer (default: both)"
    )
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2], help="seeds of each row (default: 0 1 2)")
    add_part_flag(parser)
    parser.add_argument("--collect", action="store_true", help="run nothing: write what is finished")
    for field in dataclasses.fields(Settings):
        default = "" if field.default is None else f" (default: {field.default})"
        parser.add_argument(
            f"--{field.name}", type=int, default=field.default, help=f"{field.metadata['help']}{default}"
        )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs/reproduce_table"), help="folder of the finished pieces"
    )
    parser.add_argument(
        "--docs_dir", type=Path, default=Path("docs/results"), help="folder of the results and the page"
    )
    parser.add_argument(
        "--trials", type=Path, default=Path("docs/trial_table.parquet"), help="table that trial_table.py wrote"
    )
    args = parser.parse_args(argv)
    settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
    try:
        rows = row_names(args.rows)
    except ValueError as error:
        parser.error(str(error))
    pieces = open_pieces(parser, args.output_dir, dataclasses.asdict(settings))
    restore(pieces, settings, args.docs_dir)
    failed = []
    if not args.collect:
        transformers_logging.set_verbosity_error()
        failed = pieces.work(jobs(plan(args.data, rows, args.seed, args.part), settings, pieces))
    collect(pieces, settings, args.docs_dir, args.trials)
    exit_if_missing(failed)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
