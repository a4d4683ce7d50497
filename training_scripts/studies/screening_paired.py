"""The mask that a screening suggests, against all blocks and against random masks of its size, paired by seed.

    python training_scripts/studies/screening_paired.py              # an hour on one core
    python training_scripts/studies/screening_paired.py --fid 1000   # then fid of so many images: half an hour more
    python training_scripts/studies/screening_paired.py --collect    # run nothing: judge what is finished

With each seed, one screening on the demo's validation images suggests a mask: the knee of its front, by the rule with
which a search selects a run (`screened/choice.py`). This mask, all blocks, and random masks are fine-tuned with the
same learning rate, number of steps and seed, and measured on the held-out images, which neither screening nor training
saw. The screening has a seed of its own, so that its training is none of those that are compared.

The random masks of the first kind have the same number of parameters as the suggested mask, within an eighth: that is
the size that the adapter has, and the size by which the paper compares subsets. Masks with as many blocks, the second
kind, have about two and a half times as many parameters, because the suggested blocks are small.

Each finished piece is a file in `--output_dir`, so the same command goes on where it stopped. Writes
docs/results/screening_paired.json, .md and .png.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import logging as transformers_logging

from common.pages import publish_results, read_results
from common.pieces import Job, Pieces, add_piece_flags, exit_if_missing, open_pieces
from common.trainers import demo_trainer
from memcontrol_hf import demo_dataset
from memcontrol_hf.flags import ScriptArguments
from memcontrol_hf.from_flags import training_arguments
from memcontrol_hf.screening import Screening
from memcontrol_hf.search import suggested_mask
from screened.choice import Mask, random_masks
from screened.fine_tunes import fid, fine_tune, measure
from screened.paired_page import COMMAND, plot, render
from screened.verdicts import ALL, BASE, RANDOM, SAME, SEEDS, SUGGESTED, random_names, verdicts

METHOD, RATE, STEPS = "attention", 3e-4, 80  # as in the trial table
SETTINGS = {"method": METHOD, "learning_rate": RATE, "steps": STEPS}
SCREENING_SEED = 1000  # of the first screening: no fine-tune has it
FID = ((SUGGESTED, ALL, f"{SAME[0]}1"), (BASE,))  # seed by seed, then the base


class Study:
    """The pieces of the study: screenings, fine-tunes and fids.

    Args:
        pieces: The pieces; their folder also holds the adapters that fid is measured of.
    """

    def __init__(self, pieces: Pieces) -> None:
        self.folder, self.pieces = pieces.folder, pieces

    def jobs(self, seeds: list[int], same: list[str], images: int | None) -> list[Job]:
        """All jobs: the first kind of random masks with all seeds, then the second kind, then fid."""
        self.data = demo_dataset()
        script = ScriptArguments(output_dir=str(self.folder / "runs"), method=METHOD, max_train_steps=STEPS)
        self.trainer = demo_trainer(self.data, METHOD, training_arguments(script))
        jobs = []
        for kind in same:
            for seed in seeds:
                jobs.append(Job(f"screenings/{seed}", f"screening, seed {seed}", partial(self.screen, seed)))
                names = [BASE, ALL, SUGGESTED, *random_names(kind)]
                jobs += [self._job("fine_tunes", name, seed, self.fine_tune) for name in names]
        if images is not None:
            make = partial(self.fid, images)
            jobs += [self._job("fid", name, seed, make) for names in FID for seed in seeds for name in names]
        return list({job.piece: job for job in jobs}.values())

    def _job(self, folder: str, name: str, seed: int, make: Callable[[str, int], dict[str, Any]]) -> Job:
        piece = f"{folder}/{name}-{seed}"
        return Job(piece, piece, partial(make, name, seed), (f"screenings/{seed}",))

    def screen(self, seed: int) -> dict[str, Any]:
        """The screening that suggests the mask of a seed."""
        self.trainer.args.seed = SCREENING_SEED + seed
        return self.trainer.screen(STEPS, learning_rate=RATE).to_dict()

    def mask(self, name: str, seed: int) -> Mask:
        """The mask of a fine-tune."""
        screening = Screening.from_dict(self.pieces.read(f"screenings/{seed}"))
        if name in (BASE, ALL):
            return dict.fromkeys(screening.learns, name == ALL)
        mask = suggested_mask(screening)
        if name == SUGGESTED:
            return mask
        same = next(kind for kind in SAME if name in random_names(kind))
        return random_masks(mask, screening.parameters, same, RANDOM, seed)[random_names(same).index(name)]

    def adapter(self, name: str, seed: int) -> Path:
        """The folder of the adapter of a fine-tune."""
        return self.folder / "adapters" / f"{name}-{seed}"

    def fine_tune(self, name: str, seed: int) -> dict[str, Any]:
        """Fine-tune and measure a mask with a seed."""
        mask = self.mask(name, seed)
        fine_tune(self.trainer, mask, RATE, seed, self.adapter(name, seed))
        return {"mask": [block for block, on in mask.items() if on], **measure(self.trainer, self.data, seed)}

    def fid(self, images: int, name: str, seed: int) -> dict[str, Any]:
        """fid of a fine-tune, which is made again where its adapter is not at hand."""
        mask, adapter = self.mask(name, seed), self.adapter(name, seed)
        if any(mask.values()) and not adapter.exists():
            fine_tune(self.trainer, mask, RATE, seed, adapter)
        else:
            self.trainer.args.seed = seed
            self.trainer.set_mask(mask)
            self.trainer.adapters.load(adapter)
        return fid(self.trainer, self.data, images)

    def other_images(self, images: int) -> str:
        """The numbers of images of the finished fids that were not measured with `--fid images`."""
        captions = len(demo_dataset()["held_out"])  # `fid` makes equally many images of each
        stored = {self.pieces.read(name)["images"] for name in self.pieces.names("fid")}
        return ", ".join(map(str, sorted(stored - {-(-images // captions) * captions})))


def collect(pieces: Pieces, file: Path) -> None:
    """Judge the finished pieces; write results, page and picture."""
    names = [name for folder in ("screenings", "fine_tunes", "fid") for name in pieces.names(folder)]
    content: dict[str, Any] = {
        "command": COMMAND,
        "settings": SETTINGS,
        "pieces": {name: pieces.read(name) for name in names},
    }
    content["verdicts"] = verdicts(content["pieces"])
    publish_results(file, content, render)
    plot(content["pieces"], file.with_suffix(".png"))


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, nargs="+", default=list(range(SEEDS)), help="seeds (default: 0 to 9)")
    parser.add_argument("--same", choices=SAME, nargs="+", default=list(SAME), help="kinds of random masks")
    parser.add_argument("--fid", type=int, metavar="IMAGES", help="measure fid of so many generated images, too")
    add_piece_flags(parser, "screening_paired")
    args = parser.parse_args(argv)
    study = Study(open_pieces(parser, args.output_dir, SETTINGS))
    file, failed = args.docs_dir / "screening_paired.json", []
    study.pieces.restore(read_results(file).get("pieces", {}))
    if args.fid is not None and (other := study.other_images(args.fid)):
        parser.error(f"--fid {args.fid} does not go on with the finished fids of {other} images")
    if not args.collect:
        transformers_logging.set_verbosity_error()
        failed = study.pieces.work(study.jobs(args.seed, args.same, args.fid))
    collect(study.pieces, file)
    exit_if_missing(failed)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
