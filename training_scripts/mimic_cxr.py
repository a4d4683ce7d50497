"""One's own copy of MIMIC-CXR as a folder of images with captions, for train_memcontrol.py.

    python training_scripts/mimic_cxr.py --mimic_dir DIR --output_dir data/mimic_cxr

`DIR` is laid out as PhysioNet distributes it: images `files/p10/p10000032/s50414267/<dicom_id>.jpg` (MIMIC-CXR-JPG)
or `.dcm` (MIMIC-CXR, needs `pip install pydicom`), and reports `files/p10/p10000032/s50414267.txt`, of
mimic-cxr-reports.zip; where these lie elsewhere, give `--reports_dir`. Each image is written as a grayscale PNG, with
a line in `metadata.jsonl`: columns `text`, `subject_id` and `study_id`. Train with `--group_column subject_id`, so
that no patient is in two splits. What is written is as confidential as what was read.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from memcontrol_hf.audit import caption_markers

_STUDY = re.compile(r"^p(?P<subject>\d+)/s(?P<study>\d+)/(?P<image>[^/]+)\.(?:jpg|dcm)$", re.IGNORECASE)
_HEADING = re.compile(r"^[ \t]*([A-Z][A-Z /&,()-]+):", re.MULTILINE)
METADATA = ("mimic-cxr-2.0.0-metadata.csv.gz", "mimic-cxr-2.0.0-metadata.csv")


def sections(report: str) -> dict[str, str]:
    """The sections of a report by their headings in lower case, their lines joined; empty ones are left out."""
    headings = list(_HEADING.finditer(report))
    ends = [heading.start() for heading in headings[1:]] + [len(report)]
    of = {h[1].strip().lower(): " ".join(report[h.end() : end].split()) for h, end in zip(headings, ends, strict=True)}
    return {name: text for name, text in of.items() if text}


def caption_of(report: str, wanted: Sequence[str]) -> str | None:
    """The first of the wanted sections that a report has; `findings+impression` joins those that it has of two."""
    of = sections(report)
    for choice in wanted:
        if text := " ".join(of[name] for name in choice.split("+") if name in of):
            return text
    return None


def read_image(path: Path) -> Image.Image:
    """A radiograph in gray, as a person is shown it.

    Raises:
        ImportError: says how to install pydicom, for a DICOM file without it.
    """
    if path.suffix.lower() != ".dcm":
        return Image.open(path).convert("L")
    try:
        from pydicom import dcmread
        from pydicom.pixels import apply_modality_lut, apply_presentation_lut, apply_voi_lut
    except ImportError:
        raise ImportError(f"{path.name} is a DICOM file, which needs pydicom: pip install 'pydicom>=3.0'") from None
    dicom = dcmread(path)
    pixels = apply_voi_lut(apply_modality_lut(dicom.pixel_array, dicom), dicom)
    pixels = apply_presentation_lut(pixels, dicom).astype(np.float32)
    told = "PresentationLUTShape" in dicom or "PresentationLUTSequence" in dicom
    if dicom.PhotometricInterpretation == "MONOCHROME1" and not told:  # low values are bright, and nothing inverted it
        pixels = pixels.max() - pixels
    low, high = pixels.min(), pixels.max()
    return Image.fromarray(((pixels - low) / max(high - low, 1e-6) * 255).round().astype(np.uint8))


def small(image: Image.Image, resolution: int) -> Image.Image:
    """The shorter side resized; what is trained on is its centre."""
    scale = resolution / min(image.size)
    return image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.LANCZOS)


def studies(mimic_dir: Path, views: Sequence[str]) -> Iterator[tuple[Path, re.Match]]:
    """The images, in a fixed order; only of some views where wanted.

    Raises:
        ValueError: when there is no image in that layout, or no table that says the views.
    """
    wanted = None
    if views:
        table = next((mimic_dir / name for name in METADATA if (mimic_dir / name).is_file()), None)
        if table is None:
            raise ValueError(f"--views needs {METADATA[0]} in {mimic_dir}: it comes with MIMIC-CXR-JPG")
        of = pd.read_csv(table, usecols=["dicom_id", "ViewPosition"])
        wanted = set(of["dicom_id"][of["ViewPosition"].isin(views)])
    found = False
    for path in sorted((mimic_dir / "files").glob("p*/p*/s*/*")):
        match = _STUDY.match("/".join(path.parts[-3:]))
        if match and (wanted is None or match["image"] in wanted):
            found = True
            yield path, match
    if not found:
        raise ValueError(
            f"{mimic_dir} has no image files/p10/p10000032/s50414267/<dicom_id>.jpg or .dcm"
            + (f" of the views {', '.join(views)}" if views else "")
        )


def write(args: argparse.Namespace) -> tuple[list[dict[str, str]], int]:
    """Images and `metadata.jsonl`: its lines, and how many images had no report with a wanted section."""
    lines, without = [], 0
    for path, study in studies(args.mimic_dir, args.views):
        subject = f"p{study['subject']}"
        report = (args.reports_dir or args.mimic_dir) / "files" / subject[:3] / subject / f"s{study['study']}.txt"
        text = caption_of(report.read_text(encoding="utf-8"), args.sections) if report.is_file() else None
        if text is None:
            without += 1
            continue
        args.output_dir.mkdir(parents=True, exist_ok=True)
        small(read_image(path), args.resolution).save(args.output_dir / f"{study['image']}.png")
        line = {"file_name": f"{study['image']}.png", "text": text}
        lines.append(line | {"subject_id": study["subject"], "study_id": study["study"]})
    if not lines:
        raise ValueError(
            f"none of {without} images has a report with one of the sections {', '.join(args.sections)}: "
            "unpack mimic-cxr-reports.zip beside the images, or give --reports_dir, --sections"
        )
    content = "\n".join(json.dumps(line) for line in lines) + "\n"
    (args.output_dir / "metadata.jsonl").write_text(content, encoding="utf-8")
    return lines, without


def main(argv: list[str] | None = None) -> None:
    """Write the folder, and say what is in the captions that should not be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mimic_dir", type=Path, required=True, help="folder that holds files/")
    parser.add_argument("--reports_dir", type=Path, help="folder that holds files/ with the reports, if another")
    parser.add_argument("--output_dir", type=Path, required=True, help="for the images and metadata.jsonl")
    parser.add_argument("--resolution", type=int, default=224, help="shorter side of the images in pixels")
    parser.add_argument(
        "--sections",
        nargs="+",
        default=["impression", "findings"],
        help="sections of the report: the first that there is becomes the caption; findings+impression joins both",
    )
    parser.add_argument("--views", nargs="+", default=[], help=f"only of these views, PA AP say; needs {METADATA[0]}")
    args = parser.parse_args(argv)
    try:
        if args.output_dir.exists() and any(args.output_dir.iterdir()):
            raise ValueError(f"{args.output_dir} is not empty: give another --output_dir, or remove it")
        lines, without = write(args)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    patients = Counter(line["subject_id"] for line in lines)
    print(f"{args.output_dir}: {len(lines)} images of {len(patients)} patients; {without} left out without a caption")
    if markers := caption_markers([line["text"] for line in lines]):
        found = ", ".join(f"{name} in {count}" for name, count in markers.items())
        print(
            f"warning: captions hold what de-identification leaves, which is memorized most: {found}", file=sys.stderr
        )


if __name__ == "__main__":
    main()
