"""Which altered copies the scan of the splits finds, and which different pictures it takes for copies.

    pip install elpv-dataset==1.0.0.post1
    python training_scripts/studies/duplicate_scan.py    # one minute on one core

The scan compares the splits before any training: see `memcontrol_hf.data.check_near_duplicates`. A copy is a training
image that was altered in one of the ways of `copy_detection.py`; it is found when it is a near-duplicate of its
original. An image that stands in a split several times counts once. False alarms are counted over all pairs of images
of two splits, which hold no picture twice. Writes docs/results/duplicate_scan.json and .md.
"""

import argparse
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from common.pages import publish_results, table
from copy_detection import COPIES, share_cell
from memcontrol_hf.data import first_rows
from memcontrol_hf.images import near_duplicates, pixel_digest, thumbnails, to_pixels, to_rgb
from memcontrol_hf.metrics import clopper_pearson
from memcontrol_hf.randomness import seeded_generator
from paper_table.data_sets import DATA

COMMAND = "python training_scripts/studies/duplicate_scan.py"
SCANS = {"as they are": False, "altered": True}


def distinct(images: Dataset) -> list[int]:
    """The first row of each image."""
    return first_rows(pixel_digest(image) for image in images["image"])


def measure(data: DatasetDict, altered: bool, seed: int = 0) -> dict[str, Any]:
    """The share of each kind of copy that the scan finds, with 95 % intervals, and its false alarms."""
    data = {name: images.select(distinct(images)) for name, images in data.items()}
    small = {name: thumbnails(images, range(len(images))) for name, images in data.items()}
    originals = [to_rgb(image) for image in data["train"]["image"]]
    kinds = {}
    for number, (name, copy) in enumerate(COPIES.items()):
        copies = [copy(image, seeded_generator(seed, number, i)) for i, image in enumerate(originals)]
        pairs = near_duplicates(to_pixels(copies, 32), small["train"], altered=altered)
        found = sum(i == j for i, j in pairs)
        low, high = clopper_pearson(found, len(originals))
        kinds[name] = {"share": found / len(originals), "low": low, "high": high}
    alarms = {
        f"{one}, {other}": {
            "pairs": len(small[one]) * len(small[other]),
            "taken for copies": len(near_duplicates(small[one], small[other], altered=altered)),
        }
        for one, other in combinations(small, 2)
    }
    return {"copies": kinds, "false_alarms": alarms}


def render(content: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# Which copies the scan of the splits finds",
        "",
        f"`{content['command']}`",
        "",
        "Share of the altered copies of training images that the scan before a training takes for the same picture, "
        "with Clopper and Pearson's 95 % interval over the images, at the default `--near_duplicates .05`. An image "
        "that a split holds several times counts once. *As they are* compares thumbnails; *altered*, which the splits "
        "are scanned with, compares them also mirrored, and at the same mean and contrast. The last row counts the "
        "pairs of images of two splits, all of which are different pictures, that the scan takes for copies. The "
        "limit of *altered* was chosen on these pairs.",
        "",
    ]
    for data, scans in content["data"].items():
        rows = [
            [name, *(share_cell(scan["copies"][name]) for scan in scans.values())]
            for name in next(iter(scans.values()))["copies"]
        ]
        counts = [list(scan["false_alarms"].values()) for scan in scans.values()]
        alarms = (f"{sum(a['taken for copies'] for a in c)} of {sum(a['pairs'] for a in c)} pairs" for c in counts)
        lines += [f"## {DATA[data].title}", "", *table(["copy", *scans], [*rows, ["no copy: false alarms", *alarms]])]
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="data sets (default: all)")
    parser.add_argument("--docs_dir", type=Path, default=Path("docs/results"), help="folder of the results")
    args = parser.parse_args(argv)
    try:
        data = {name: DATA[name].load() for name in args.data}
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    content: dict[str, Any] = {
        "command": COMMAND,
        "data": {
            name: {scan: measure(images, altered) for scan, altered in SCANS.items()} for name, images in data.items()
        },
    }
    publish_results(args.docs_dir / "duplicate_scan.json", content, render)


if __name__ == "__main__":
    main()
