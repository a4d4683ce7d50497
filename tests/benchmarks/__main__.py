"""Measure what this package costs beside the bare work, and write docs/performance.json and its page.

    make bench                          # all rows
    make bench ROWS=training_step       # some of them, by the names of the modules in tests/benchmarks

A row is replaced when it is measured again on the same machine.
"""

import argparse
import os
import platform
from pathlib import Path

import datasets
import torch
from diffusers.utils import logging as diffusers_logging
from transformers import logging as transformers_logging

from common.pages import read_results, write_results

from . import (
    audit,
    compiled,
    encoding,
    evaluation,
    factors,
    loading,
    memory,
    peers,
    published_order,
    startup,
    training_step,
)
from .page import render

COMMAND = "make bench"
MODULES = {
    "training_step": training_step,
    "compiled": compiled,
    "factors": factors,
    "loading": loading,
    "encoding": encoding,
    "evaluation": evaluation,
    "published_order": published_order,
    "audit": audit,
    "startup": startup,
    "memory": memory,
    "peers": peers,
}


def machine() -> str:
    """The name of what is measured on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores), torch {torch.__version__}"


def main() -> None:
    """Measure, write after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"what to measure (default: all): {', '.join(MODULES)}")
    parser.add_argument("--pairs", type=int, default=30, help="turns of each side (default: 30)")
    parser.add_argument("--docs_dir", type=Path, default=Path("docs"), help="folder of the results")
    args = parser.parse_args()
    if unknown := set(args.rows) - set(MODULES):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(MODULES)}")
    datasets.disable_progress_bars()
    for logging in (transformers_logging, diffusers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    torch.set_num_threads(1)
    file = args.docs_dir / "performance.json"
    content = {"command": COMMAND, "machines": read_results(file).get("machines", {})}
    rows = {row["name"]: row for row in content["machines"].get(machine(), [])}
    for name in args.rows or MODULES:
        for row in MODULES[name].rows(args.pairs):
            rows[row["name"]] = row | {"load": os.getloadavg()[0]}
            print(rows[row["name"]], flush=True)
            content["machines"][machine()] = list(rows.values())
            write_results(file, content, render(content))


if __name__ == "__main__":
    main()
