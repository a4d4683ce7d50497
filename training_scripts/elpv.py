"""Real grayscale images with splits: solar cells in electroluminescence (ELPV), which resemble X-ray images.

    pip install elpv-dataset==1.0.0.post1
    python training_scripts/elpv.py --output_dir data/elpv
    accelerate launch training_scripts/train_memcontrol.py --train_data_dir data/elpv --encoder demo

Writes `data/elpv/{train,validation,held_out}/*.png`, 64 pixels a side, and a `metadata.jsonl` for each split. The
splits have the sizes of the demo's data set: 80 training images occur once and 12 four times (these may be memorized),
192 images are for validation and 256 are held out. Cells look alike: 1,194 of the 2,624 images are a near-duplicate of
another image, so near-duplicates are left out. The images are licensed CC-BY-NC-SA-4.0 (Buerhop-Lutz et al. 2018,
Deitsch et al. 2019) and are no part of this repository.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from memcontrol_hf.data import SPLITS
from memcontrol_hf.images import near_duplicates, thumbnails
from memcontrol_hf.randomness import seeded_generator
from memcontrol_hf.whole_files import is_new_or_empty

RESOLUTION = 64
ONCE, CANARIES, REPEATS = 80, 12, 4
SIZES = {"train": ONCE + CANARIES, "validation": 192, "held_out": 256}
NEAR_DUPLICATES = 0.05
INSTALL = "pip install elpv-dataset==1.0.0.post1"


def elpv_dataset(seed: int = 0) -> DatasetDict:
    """The splits, in the form of [`~memcontrol_hf.demo_dataset`]: columns `image` and `text`.

    No two different images are near-duplicates (see [`~memcontrol_hf.images.near_duplicates`]), neither within a split
    nor across splits: images are drawn in a seeded order, and an image that resembles an earlier one is left out.

    Args:
        seed: Random seed of the order.

    Raises:
        ImportError: The package with the images is missing; the message says how to install it.
    """
    try:
        from elpv_dataset.utils import load_dataset
    except ImportError:
        raise ImportError(f"the ELPV images come with a package: {INSTALL}") from None
    cells = [
        {
            "image": PILImage.fromarray(image).resize((RESOLUTION, RESOLUTION), PILImage.Resampling.LANCZOS),
            "text": caption(kind, probability),
        }
        for image, probability, kind in zip(*load_dataset(), strict=True)
    ]
    features = Features({"image": Image(), "text": Value("string")})
    drawn = distinct(Dataset.from_list(cells, features=features), sum(SIZES.values()), seed)
    rows, start = {}, 0
    for name, size in SIZES.items():
        rows[name], start = drawn[start : start + size], start + size
    rows["train"] = rows["train"][:ONCE] + rows["train"][ONCE:] * REPEATS
    return DatasetDict(
        {name: Dataset.from_list([cells[row] for row in rows[name]], features=features) for name in SPLITS}
    )


def caption(kind: str, probability: float) -> str:
    """One of eight captions. A caption has 14 tokens, which is the most that the demo's text encoder reads.

    Args:
        kind: `mono` or `poly`.
        probability: Probability of a defect.
    """
    return f"{kind} solar cell, defect {probability:.2f}"


def distinct(images: Dataset, count: int, seed: int) -> list[int]:
    """The first `count` rows, in a seeded order, of which no two are near-duplicates.

    Raises:
        ValueError: There are fewer such rows.
    """
    like: dict[int, set[int]] = {row: set() for row in range(len(images))}
    for one, other in near_duplicates(thumbnails(images, range(len(images))), None, NEAR_DUPLICATES):
        like[one].add(other)
        like[other].add(one)
    taken: list[int] = []
    left_out: set[int] = set()
    for row in torch.randperm(len(images), generator=seeded_generator(seed)).tolist():
        if row not in left_out:
            taken.append(row)
            left_out |= like[row]
    if len(taken) < count:
        raise ValueError(f"{len(taken)} of {len(images)} images are different enough, but {count} are needed")
    return taken[:count]


def write(data: DatasetDict, output_dir: Path) -> None:
    """Write a folder for each split, with a file for each row, as `load_images(train_data_dir=...)` reads it."""
    for name, images in data.items():
        folder = output_dir / name
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for number, row in enumerate(images):
            row["image"].save(folder / f"{number:04}.png")
            lines.append(json.dumps({"file_name": f"{number:04}.png", "text": row["text"]}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("data/elpv"), help="folder of the images")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the splits (default: 0)")
    args = parser.parse_args(argv)
    if not is_new_or_empty(args.output_dir):
        print(f"error: {args.output_dir} is no empty folder: give another --output_dir, or remove it", file=sys.stderr)
        raise SystemExit(2)
    try:
        data = elpv_dataset(args.seed)
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    write(data, args.output_dir)
    print(f"{args.output_dir}: " + ", ".join(f"{len(images)} rows of {name}" for name, images in data.items()))


if __name__ == "__main__":
    main()
