"""The committed results: every measured point of every run in a table, and all else in a JSON file."""

import itertools
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from common.pages import publish_results, read_results
from common.pieces import Pieces
from paper_table.data_sets import DATA

from .judged import ABOVE, interpolation_errors, judge, mean_points, parameters_of, reward, seeds_of
from .page import COMMAND, pictures, plot, render
from .rows import METHODS, ROWS, SEEDS
from .runs import SETTINGS
from .summary import render_summary

Run = dict[str, Any]
KINDS = ("rates", "screenings")
"""Kinds of pieces that the JSON file holds; the runs are in the table."""


def write_runs(runs: dict[str, Run], file: Path) -> None:
    """Write a line for each measured point of each run; the ranks of the images' scores are lists."""
    lines = [
        {"piece": piece, **{name: run[name] for name in run if name != "points"}, "step": int(step), **figures}
        for piece, run in sorted(runs.items())
        for step, figures in run["points"].items()
    ]
    ranks = {name: pa.list_(pa.uint16()) for name in lines[0] if name.startswith("ranks_")} if lines else {}
    table = pa.Table.from_pylist(lines)
    schema = pa.schema([pa.field(field.name, ranks.get(field.name, field.type)) for field in table.schema])
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.cast(schema), file, compression="zstd")


def read_runs(file: Path) -> dict[str, Run]:
    """The runs by their piece, as they were written; none when there is no such file."""
    runs: dict[str, Run] = {}
    for line in pq.read_table(file).to_pylist() if file.exists() else []:
        of_run = {name: line.pop(name) for name in ("mask", "learning_rate", "parameters")}
        run = runs.setdefault(line.pop("piece"), {**of_run, "points": {}})
        run["points"][str(line.pop("step"))] = line
    return runs


def restore(pieces: Pieces, docs: Path) -> None:
    """Take up the finished pieces from the committed results, if they were made with the same settings."""
    committed = read_results(docs / "claims.json")
    if committed.get("settings") == SETTINGS:
        pieces.restore(committed["pieces"])
        pieces.restore(read_runs(docs / "claims.parquet"))


def finished(pieces: Pieces, kind: str) -> dict[str, Run]:
    """The finished pieces of a kind."""
    folders = sorted(folder.name for folder in (pieces.folder / kind).glob("*") if folder.is_dir())
    names = [name for folder in folders for name in pieces.names(f"{kind}/{folder}")]
    return {name: pieces.read(name) for name in names}


def collect(pieces: Pieces, docs: Path) -> None:
    """Judge what is finished; write the results, both pages and the picture.

    Args:
        pieces: The finished pieces.
        docs: Folder of the results; the page of one screen is written beside this folder.
    """
    runs = finished(pieces, "runs")
    content: dict[str, Any] = {
        "command": COMMAND,
        "settings": SETTINGS,
        "pieces": {name: piece for kind in KINDS for name, piece in finished(pieces, kind).items()},
        "seeds": {},
        "verdicts": {},
        "above": {},
        "interpolation": {},
        "rewards": {},
        "curves": {},
    }
    for data, method in itertools.product(DATA, METHODS):
        name = f"{data}-{method}"
        seeds = seeds_of(runs, data, method, ROWS, range(SEEDS))  # a balanced sample: all rows have the same seeds
        content["seeds"][name] = len(seeds)
        content["verdicts"][name] = judge(runs, data, method, seeds)
        content["above"][name] = {
            str(above): [
                {part: row[part] for part in ("claim", "kind", "verdict", "left_out", "tests")}
                for row in judge(runs, data, method, seeds, above)
            ]
            for above in ABOVE
        }
        content["interpolation"][name] = interpolation_errors(runs, data, method, seeds)
        content["rewards"][name] = reward(runs, data, method, seeds)
        content["curves"][name] = {
            row: {"parameters": parameters_of(runs, data, method, row, seeds), "points": points}
            for row in ROWS
            if (points := mean_points(runs, data, method, row, seeds))
        }
    write_runs(runs, docs / "claims.parquet")
    publish_results(docs / "claims.json", content, render)
    (docs.parent / "results.md").write_text(render_summary(content), encoding="utf-8")
    for file, names in pictures(content).items():
        plot(content, names, docs / file)
