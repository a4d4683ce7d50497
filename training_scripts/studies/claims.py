"""The claims of the paper again, by the design in docs/results/design.md: curves of memorization against quality.

    pip install elpv-dataset==1.0.0.post1                                  # for the solar cells
    python training_scripts/studies/claims.py --data demo --method attention    # seven hours, see below
    python training_scripts/studies/claims.py                                   # all of it: some forty hours
    python training_scripts/studies/claims.py --collect                         # run nothing: judge what is finished

Each finished piece is a file in `--output_dir`, so the same command goes on where it stopped. Processes with one
output folder share the work: start the command once for each core, with `OMP_NUM_THREADS=1`. On a new machine the
command takes up the finished pieces from the committed results.

A run took 94 to 103 CPU seconds on an AVX2 machine, beside another process on the second core.

A piece that is run again has the same figures, with one exception: the noise of DP-SGD depends on a secret key from
the operating system, never on the seed.

Writes docs/results/claims.json (rates, screenings and verdicts) and claims.parquet (every measured point of every
run), and what is rendered from them: docs/results.md, docs/results/claims.md and the pictures.
"""

import argparse

import torch
from transformers import logging as transformers_logging

from claimed.results import collect, restore
from claimed.rows import METHODS, SEEDS
from claimed.runs import SETTINGS, Study
from common.pieces import add_piece_flags, exit_if_missing, open_pieces
from paper_table.data_sets import DATA


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="data sets (default: both)")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS), help="methods (default: all)")
    seeds = range(SEEDS)  # no other seed is judged
    parser.add_argument("--seed", type=int, nargs="+", choices=seeds, default=[*seeds], help="seeds (default: all)")
    add_piece_flags(parser, "claims")
    args = parser.parse_args(argv)
    pieces, failed = open_pieces(parser, args.output_dir, SETTINGS), []
    restore(pieces, args.docs_dir)
    if not args.collect:
        transformers_logging.set_verbosity_error()
        study = Study(pieces)
        jobs = {
            job.piece: job
            for method in args.method
            for data in args.data
            for job in study.jobs(data, method, args.seed)
        }
        failed = pieces.work(list(jobs.values()))
    collect(pieces, args.docs_dir)
    exit_if_missing(failed)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
