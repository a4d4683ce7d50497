"""Turn your own copy of MIMIC-CXR into a folder of images with captions, for train_memcontrol.py.

    python training_scripts/mimic_cxr.py --mimic_dir DIR --output_dir data/mimic_cxr

`DIR` has the layout in which PhysioNet distributes the data. Images are `files/p10/p10000032/s50414267/<dicom_id>.jpg`
(MIMIC-CXR-JPG) or `.dcm` (MIMIC-CXR, needs `pip install pydicom`). Reports are `files/p10/p10000032/s50414267.txt`,
from mimic-cxr-reports.zip; give `--reports_dir` when they are in another folder. Each image is written as a grayscale
PNG, with a line in `metadata.jsonl`: columns `text`, `subject_id` and `study_id`. Train with `--group_column
subject_id`, so that no patient is in two splits. The folder that is written is as confidential as the data.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from PIL import Image

from memcontrol_hf.audit import caption_markers
from memcontrol_hf.images import to_rgb
from memcontrol_hf.whole_files import is_new_or_empty

_STUDY = re.compile(r"^p(?P<subject>\d+)/s(?P<study>\d+)/(?P<image>[^/]+)\.(?:jpg|dcm)$", re.IGNORECASE)
_HEADING = re.compile(r"^[ \t]*([A-Z][A-Z /&,()-]+):", re.MULTILINE)
METADATA = ("mimic-cxr-2.0.0-metadata.csv.gz", "mimic-cxr-2.0.0-metadata.csv")


def sections(report: str) -> dict[str, str]:
    """The sections of a report: heading in lower case -> text in one line. Empty sections are left out.

    A heading that stands there twice, as above an addendum, has both texts.
    """
    headings = list(_HEADING.finditer(report))
    ends = [*(heading.start() for heading in headings), len(report)][1:]
    texts: dict[str, list[str]] = {}
    for heading, end in zip(headings, ends):
        texts.setdefault(heading[1].strip().lower(), []).extend(report[heading.end() : end].split())
    return {name: " ".join(words) for name, words in texts.items() if words}


def caption_of(report: str, wanted: Sequence[str]) -> str | None:
    """The first wanted section that a report has, or `None`.

    Args:
        report: Text of a report.
        wanted: Names of sections; `findings+impression` joins the sections of the two that the report has.
    """
    available = sections(report)
    for choice in wanted:
        if text := " ".join(available[name] for name in choice.split("+") if name in available):
            return text
    return None


def read_image(path: Path) -> Image.Image:
    """A radiograph in gray, as a viewer shows it.

    Raises:
        ImportError: The file is a DICOM file and pydicom is missing; the message says how to install it.
        ValueError: A DICOM file does not hold one image.
    """
    return to_rgb(Image.open(path)).convert("L")


def small(image: Image.Image, resolution: int) -> Image.Image:
    """The image with its shorter side resized; training crops the centre.

    Args:
        image: A radiograph.
        resolution: Shorter side of the result in pixels.
    """
    scale = resolution / min(image.size)
    return image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.LANCZOS)


def studies(mimic_dir: Path, views: Sequence[str]) -> Iterator[tuple[Path, re.Match]]:
    """The images in a fixed order, with the match of each path; of an image in both formats the DICOM file.

    Args:
        mimic_dir: Folder that holds `files/`.
        views: View positions that are wanted; all views when empty.

    Raises:
        ValueError: There is no image in that layout, or no table of the views.
    """
    wanted = None
    if views:
        table = next((mimic_dir / name for name in METADATA if (mimic_dir / name).is_file()), None)
        if table is None:
            raise ValueError(f"--views needs {METADATA[0]} in {mimic_dir}: it comes with MIMIC-CXR-JPG")
        metadata = pd.read_csv(table, usecols=["dicom_id", "ViewPosition"])
        wanted = set(metadata["dicom_id"][metadata["ViewPosition"].isin(views)])
    found = set()
    for path in sorted((mimic_dir / "files").glob("p*/p*/s*/*")):
        match = _STUDY.match("/".join(path.parts[-3:]))
        if match and match["image"] not in found and (wanted is None or match["image"] in wanted):
            found.add(match["image"])
            yield path, match
    if not found:
        raise ValueError(
            f"{mimic_dir} has no image files/p10/p10000032/s50414267/<dicom_id>.jpg or .dcm"
            + (f" of the views {', '.join(views)}" if views else "")
        )


def write(args: argparse.Namespace) -> tuple[list[dict[str, str]], int, int]:
    """Write the images and `metadata.jsonl`.

    Returns:
        The lines of `metadata.jsonl`, the number of images without a report that has a wanted section, and the number
        of images that cannot be read. Which these are is not said: a path holds the ids of patient and study.

    Raises:
        ImportError: There are DICOM files and pydicom is missing.
        ValueError: No image can be read and has such a report.
    """
    lines, without, unreadable = [], 0, 0
    for path, study in studies(args.mimic_dir, args.views):
        subject = f"p{study['subject']}"
        report = (args.reports_dir or args.mimic_dir) / "files" / subject[:3] / subject / f"s{study['study']}.txt"
        text = caption_of(report.read_text("utf-8", errors="replace"), args.sections) if report.is_file() else None
        if text is None:
            without += 1
            continue
        try:
            image = small(read_image(path), args.resolution)
        except (OSError, ValueError):
            unreadable += 1
            continue
        args.output_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        image.save(args.output_dir / f"{study['image']}.png")
        line = {"file_name": f"{study['image']}.png", "text": text}
        lines.append(line | {"subject_id": study["subject"], "study_id": study["study"]})
    if not lines:
        raise ValueError(
            f"no image is left: {without} have no report with one of the sections {', '.join(args.sections)} and "
            f"{unreadable} cannot be read. Unpack mimic-cxr-reports.zip beside the images, or give --reports_dir, "
            "--sections"
        )
    content = "\n".join(json.dumps(line) for line in lines) + "\n"
    (args.output_dir / "metadata.jsonl").write_text(content, encoding="utf-8")
    return lines, without, unreadable


def main(argv: list[str] | None = None) -> None:
    """Write the folder, and warn of traces of de-identification in the captions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mimic_dir", type=Path, required=True, help="folder that holds files/")
    parser.add_argument(
        "--reports_dir", type=Path, help="folder that holds files/ with the reports (default: --mimic_dir)"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the images and of metadata.jsonl")
    parser.add_argument(
        "--resolution", type=int, default=224, help="shorter side of the images in pixels (default: 224)"
    )
    parser.add_argument(
        "--sections",
        nargs="+",
        default=["impression", "findings"],
        help="sections of the report, the first that a report has becomes the caption; findings+impression joins both "
        "(default: impression findings)",
    )
    parser.add_argument(
        "--views",
        nargs="+",
        default=[],
        help=f"view positions that are taken, such as PA AP; needs {METADATA[0]} (default: all)",
    )
    args = parser.parse_args(argv)
    try:
        if not is_new_or_empty(args.output_dir):
            raise ValueError(f"{args.output_dir} is no empty folder: give another --output_dir, or remove it")
        lines, without, unreadable = write(args)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    patients = Counter(line["subject_id"] for line in lines)
    print(
        f"{args.output_dir}: {len(lines)} images of {len(patients)} patients; {without} left out without a caption, "
        f"{unreadable} that cannot be read"
    )
    if markers := caption_markers([line["text"] for line in lines]):
        found = ", ".join(f"{name} in {count}" for name, count in markers.items())
        print(
            f"warning: captions hold traces of de-identification, which are memorized most: {found}", file=sys.stderr
        )


if __name__ == "__main__":
    main()
