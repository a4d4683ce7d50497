"""Folders as people have them: one table of what is read, with the right values, and one of what is refused."""

import csv
import io
import json
import logging
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import RESOLUTION, images_of
from datasets import Dataset, DatasetDict

from memcontrol_hf.data import encode, load_image_folder, load_images, read_folder
from memcontrol_hf.data.cache import cache_folder
from memcontrol_hf.data.split_names import split_of_name
from memcontrol_hf.families import family_of

IMAGES = images_of(12, seed=5)
ROWS = {"train": range(6), "validation": range(6, 9), "held_out": range(9, 12)}


def save(folder, rows, lines=True, **columns):
    """Some images as 0.png, 1.png, ... with their captions in a metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        IMAGES[row]["image"].save(folder / f"{row}.png")
    if lines:
        table = [{"file_name": f"{row}.png", "text": IMAGES[row]["text"],
                  **{name: values[row] for name, values in columns.items()}} for row in rows]  # fmt: skip
        (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in table))


def three(root, *names, **options):
    for name, rows in zip(names, ROWS.values()):
        save(root / name, rows, **options)


def in_one(suffix):
    def make(root):
        save(root, range(12), lines=False)
        table = [{"file_name": f"{row}.png", "text": IMAGES[row]["text"]} for row in range(12)]
        if suffix == "csv":
            with open(root / "metadata.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, table[0])
                writer.writeheader()
                writer.writerows(table)
        else:
            Dataset.from_list(table).to_parquet(root / "metadata.parquet")

    return make


def side_files(root):
    save(root, range(12), lines=False)
    for row in range(12):
        (root / f"{row}.txt").write_text(IMAGES[row]["text"] + "\n")


def tars(root):
    root.mkdir(exist_ok=True)
    for name, rows in ROWS.items():
        with tarfile.open(root / f"scans-{name}-0000.tar", "w") as tar:
            for row in rows:
                buffer = io.BytesIO()
                IMAGES[row]["image"].save(buffer, "PNG")
                for suffix, content in (("png", buffer.getvalue()), ("txt", IMAGES[row]["text"].encode())):
                    member = tarfile.TarInfo(f"{row}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def parquet(root):
    root.mkdir(exist_ok=True)
    for name, rows in zip(("train", "val", "test"), ROWS.values()):
        IMAGES.select(rows).to_parquet(root / f"{name}-00000-of-00001.parquet")


def links(root):
    three(root.parent / "elsewhere", "a", "b", "c")
    root.mkdir(exist_ok=True)
    for name, target in zip(ROWS, "abc"):
        os.symlink(root.parent / "elsewhere" / target, root / name)


SPLIT = {
    **{
        f"{a}, {b}, {c}": lambda root, names=(a, b, c): three(root, *names)
        for a, b, c in [
            ("train", "validation", "held_out"),
            ("Train", "Val", "Test"),
            ("TRAINING", "dev", "testing"),
            ("train_images", "valid_images", "test_images"),
            ("trainset", "valset", "test-data"),
            ("images/train", "images/val", "images/test"),
            ("train", "validation", "held-out"),
            ("train/images", "Validation/images", "holdout/images"),
            ("train", "val", "Hold out"),
            ("trainImages", "valImages", "testImages"),
            ("1_train", "2_val", "3_test"),
        ]
    },
    "links to folders": links,
    "WebDataset archives": tars,
    "Parquet files": parquet,
    "save_to_disk": lambda root: DatasetDict({n: IMAGES.select(r) for n, r in ROWS.items()}).save_to_disk(root),
}
WHOLE = {
    "save_to_disk": lambda root: IMAGES.save_to_disk(root),
    "metadata.jsonl": lambda root: save(root, range(12)),
    "metadata.csv": in_one("csv"),
    "metadata.parquet": in_one("parquet"),
    "captions in .txt": side_files,
}


@pytest.mark.parametrize(
    ("make", "rows", "sizes"),
    [
        *(pytest.param(make, ROWS, (6, 3, 3), id=f"{name}, split") for name, make in SPLIT.items()),
        *(pytest.param(make, {"train": range(12)}, (8, 2, 2), id=name) for name, make in WHOLE.items()),
    ],
)
def test_each_layout_gives_these_images_with_these_captions(tmp_path, make, rows, sizes):
    root = tmp_path / "data"
    make(root)
    data = read_folder(root)
    assert list(data) == list(rows)
    for name, of_split in rows.items():
        found = sorted((row["text"], row["image"].convert("RGB").tobytes()) for row in data[name])
        assert found == sorted((IMAGES[row]["text"], IMAGES[row]["image"].tobytes()) for row in of_split), name
    assert len(load_image_folder(str(root), "train", "text")) == 12
    for source in ({"train_data_dir": str(root)}, {"dataset_name": str(root)}):
        assert tuple(map(len, load_images(**source).values())) == sizes


REFUSED = {
    "a name that may be a split": (
        lambda root: three(root, "train", "val", "bullet_train"),
        "'bullet_train' may be the",
    ),
    "eval": (lambda root: three(root, "train", "eval", "test"), "'eval' may be the name of a split or not: rename it"),
    "an unnamed rest": (lambda root: three(root, "train", "more", "test"), "3 files .* lie outside .*in 'more'"),
    "files beside the splits": (
        lambda root: (save(root, range(6)), save(root / "Test", range(6, 9))),
        "6 files .*outside",
    ),
    "no train": (lambda root: (save(root / "val", range(6)), save(root / "Test", range(6, 9))), "has no folder train"),
    "a split in a split": (
        lambda root: save(root / "train" / "test", range(6)),
        "'test' of held_out lies in a folder of train",
    ),
    "nothing": (lambda root: root.mkdir(), "holds no images, only these files: none"),
    "volumes": (lambda root: (root.mkdir(), (root / "a.nii.gz").touch()), r"only these files: 1 \.gz"),
    "two layouts": (lambda root: (save(root, range(3)), parquet(root)), "3 files of images, 3 files of parquet"),
    "a file that is not there": (
        lambda root: (save(root, range(6)), (root / "3.png").unlink()),
        "1 files that are no images: 3.png",
    ),
    "no file_name": (
        lambda root: (save(root, range(6)), (root / "metadata.jsonl").write_text('{"file": "1"}')),
        "needs a file_name",
    ),
    "a caption in Latin-1": (
        lambda root: (save(root, range(6), lines=False), (root / "1.txt").write_bytes("é".encode("latin-1"))),
        "the caption 1.txt is no text in UTF-8",
    ),
    "no JSON": (
        lambda root: (save(root, range(6)), (root / "metadata.jsonl").write_text("{")),
        "cannot read metadata.jsonl",
    ),
}


def bytes_in_parquet(root, kind):
    """Parquet files as pandas writes them: the bytes of PNG files, alone or beside their paths."""
    root.mkdir()
    pictures = []
    for row in range(12):
        IMAGES[row]["image"].save(file := io.BytesIO(), "PNG")
        pictures.append(file.getvalue() if kind == "bytes" else {"bytes": file.getvalue(), "path": f"{row}.png"})
    pq.write_table(pa.table({"image": pictures, "text": IMAGES["text"]}), root / "a.parquet")


@pytest.mark.parametrize("kind", ["bytes", "bytes and paths"])
def test_the_bytes_of_images_in_parquet_files_are_images(tmp_path, kind):
    bytes_in_parquet(tmp_path / "data", kind)
    expected = sorted(row["image"].tobytes() for row in IMAGES)
    splits = load_images(train_data_dir=str(tmp_path / "data"))
    assert sorted(row["image"].convert("RGB").tobytes() for split in splits.values() for row in split) == expected
    audited = load_image_folder(str(tmp_path / "data"), "train", "text")
    assert sorted(row["image"].convert("RGB").tobytes() for row in audited) == expected


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": [b"", b""]}, "the train split has no column 'image'; it has: picture, text"),
        ({"image": [1, 2]}, "the column of the images of the train split holds no images but Value"),
        ({"image": [None, None]}, "row 0 of the train split has no image"),
    ],
)
def test_parquet_files_without_images_are_refused(tmp_path, columns, message):
    pq.write_table(pa.table({**columns, "text": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        load_image_folder(str(tmp_path), "train", "text")


def test_classes_are_captions_of_an_audit_too(tmp_path):
    for name in "ab":
        save(tmp_path / name, range(6), lines=False)
    assert sorted(set(load_image_folder(str(tmp_path), "train", "label")["text"])) == ["a", "b"]
    save(tmp_path / "more", range(6))
    (tmp_path / "more" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "x"}\n{"file_name": "1.png"}')
    with pytest.raises(ValueError, match="the caption of row 1 of the train split is no text but NoneType"):
        load_image_folder(str(tmp_path / "more"), "train", "text")


def test_no_message_repeats_a_caption_or_an_id(tmp_path):
    save(tmp_path, range(12), patient_id=[*range(11), "Doe^Jane 1953-02-01"])
    with pytest.raises(ValueError, match=r"mix kinds of values in a column \('patient_id'\)") as raised:
        load_images(train_data_dir=str(tmp_path), group_column="patient_id")
    assert "Doe" not in str(raised.value)


def test_lines_of_metadata_may_hold_any_separator_and_a_column_named_image(tmp_path):
    save(tmp_path, range(6), lines=False)
    rows = [{"file_name": f"{row}.png", "text": f"two\u2028lines\x85{row}", "image": f"id{row}"} for row in range(6)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "metadata.jsonl").write_text(lines, encoding="utf-8")
    data = load_image_folder(str(tmp_path), "train", "text")
    assert data["text"][:] == [row["text"] for row in rows]
    assert data[3]["image"].convert("RGB").tobytes() == IMAGES[3]["image"].tobytes()


@pytest.mark.parametrize("layout", REFUSED)
def test_what_may_mix_images_or_lose_some_is_refused(tmp_path, layout):
    make, message = REFUSED[layout]
    make(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        load_images(train_data_dir=str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("name", "split"),
    [("latest", None), ("contest", None), ("protest", None), ("cat", None), ("trainee", None), ("patient_7", None),
     ("train2017", "train"), ("Testing", "held_out"), ("heldout", "held_out"), ("VALIDATION", "validation")],
)  # fmt: skip
def test_a_name_means_a_split_or_not(name, split):
    assert split_of_name(name) == split


def test_images_without_a_line_are_counted_and_left_out(tmp_path, caplog):
    save(tmp_path, range(12))
    lines = (tmp_path / "metadata.jsonl").read_text().splitlines()
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines[:9]))
    with caplog.at_level(logging.WARNING):
        assert sum(map(len, load_images(train_data_dir=str(tmp_path)).values())) == 9
    assert "3 of 12 images have no line in the metadata" in caplog.text and ".png" not in caplog.text


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["P1", "p1", "p2"] * 4, "1 groups are spelt in several ways.*row 0 of train and row 1 of train"),
        (["p1", "p1 ", "p 2"] * 4, "1 groups are spelt.*row 0 of train and row 1 of train"),
        (["7", "7.0", "8"] * 4, "1 groups are spelt in several ways.*row 0 of train and row 1 of train"),
        (["p1", None, "p2"] * 4, r"4 rows have no group: row 1 of train, row 4 of train"),
        (["p1", " ", "p2"] * 4, "4 rows have no group"),
    ],
)
def test_groups_that_are_spelt_twice_or_missing_are_named_by_their_rows(tmp_path, groups, message):
    save(tmp_path, range(12), patient=groups)
    with pytest.raises(ValueError, match=message) as raised:
        load_images(train_data_dir=str(tmp_path), group_column="patient")
    assert not re.search("p1|'7", str(raised.value), re.IGNORECASE), "a person's id is in no log"
    assert load_images(train_data_dir=str(tmp_path))["train"]


def test_a_number_is_the_same_person_in_a_table_that_made_floats_of_it(tmp_path):
    for name, ids in (("train", [0, 1, 2, 3]), ("test", [0.0, 4.0, 5.0, 6.0])):
        rows = IMAGES.select(ROWS["train"][:4] if name == "train" else range(8, 12))
        rows.add_column("patient", ids).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match="group is in the train and in the held_out split"):
        load_images(train_data_dir=str(tmp_path), group_column="patient")


def test_copies_that_are_made_of_archives_are_for_their_owner_alone(tmp_path):
    parquet(tmp_path / "a")
    data = load_images(train_data_dir=str(tmp_path / "a"))
    kept = Path(data["train"].cache_files[0]["filename"])
    assert cache_folder() in kept.parents and cache_folder().stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(("name", "options"), [("a.tiff", {}), ("a.gif", {}), ("a.webp", {"lossless": True})])
def test_pages_and_frames_are_not_left_out_in_silence(tmp_path, name, options):
    pages = [IMAGES[row]["image"] for row in range(3)]
    pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:], **options)
    with pytest.raises(ValueError, match="it holds 3 pages or frames: save those that you need"):
        load_images(train_data_dir=str(tmp_path), caption_column="")


def test_the_preview_in_a_photograph_is_no_second_page(tmp_path):
    photos = [IMAGES[row]["image"] for row in range(2)]
    for row in range(12):
        IMAGES[row]["image"].save(tmp_path / f"{row}.jpg", format="MPO", save_all=True, append_images=photos[:1])
    assert sum(map(len, load_images(train_data_dir=str(tmp_path), caption_column="").values())) == 12


def test_ids_of_a_csv_stay_texts(tmp_path):
    save(tmp_path, range(12), lines=False)
    lines = [f"{row}.png,{IMAGES[row]['text']},{row // 2:03}" for row in range(12)]
    (tmp_path / "metadata.csv").write_text("file_name,text,patient\n" + "\n".join(lines))
    data = load_images(train_data_dir=str(tmp_path), group_column="patient")
    assert {g for split in data.values() for g in split["group"]} == {f"{n:03}" for n in range(6)}


def test_a_file_replaced_behind_a_linked_folder_is_encoded_anew(tmp_path, pipeline):
    links(tmp_path / "data")
    path = str(tmp_path / "data")
    first = encode(read_folder(path)["train"], family_of(pipeline), RESOLUTION)
    IMAGES[11]["image"].save(tmp_path / "elsewhere" / "a" / "0.png")
    second = encode(read_folder(path)["train"], family_of(pipeline), RESOLUTION)
    assert (first[0]["latents"] != second[0]["latents"]).any() and (first[1]["latents"] == second[1]["latents"]).all()


def dicom_file(path, stored, photometric, bits, **elements):
    from pydicom.dataset import Dataset as Dicom
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    dicom = Dicom()
    dicom.file_meta = FileMetaDataset()
    dicom.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dicom.file_meta.MediaStorageSOPClassUID = dicom.SOPClassUID = SecondaryCaptureImageStorage
    dicom.file_meta.MediaStorageSOPInstanceUID = dicom.SOPInstanceUID = generate_uid()
    dicom.Rows, dicom.Columns = stored.shape[:2]
    dicom.SamplesPerPixel, dicom.PixelRepresentation = 1, 0
    dicom.PhotometricInterpretation = photometric
    dicom.BitsAllocated, dicom.BitsStored, dicom.HighBit = 8 * stored.dtype.itemsize, bits, bits - 1
    for name, value in elements.items():
        setattr(dicom, name, value)
    dicom.PixelData = stored.tobytes()
    dicom.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize(
    ("photometric", "bits", "elements", "expected"),
    [
        ("MONOCHROME2", 12, {}, lambda v: (v - v.min()) / (v.max() - v.min())),
        ("MONOCHROME1", 12, {}, lambda v: (v.max() - v) / (v.max() - v.min())),
        # PS3.3, C.11.2.1.2: a window of 1001 around 2000 maps 1500 to 0 and 2500 to 1
        ("MONOCHROME2", 12, {"WindowCenter": 2000.5, "WindowWidth": 1001}, lambda v: np.clip((v - 1500) / 1000, 0, 1)),
        (
            "MONOCHROME1",
            12,
            {"WindowCenter": 2000.5, "WindowWidth": 1001},
            lambda v: 1 - np.clip((v - 1500) / 1000, 0, 1),
        ),
        ("MONOCHROME2", 16, {}, lambda v: (v - v.min()) / (v.max() - v.min())),
    ],
)
def test_a_dicom_file_is_shown_as_a_viewer_shows_it(tmp_path, photometric, bits, elements, expected):
    pytest.importorskip("pydicom", reason="pip install 'memcontrol_hf[dicom]'")
    high = 2**bits - 1
    ramp = np.linspace(0, high, 64).astype(np.uint16).reshape(8, 8)
    for number in range(9):
        dicom_file(tmp_path / f"{number}.dcm", np.roll(ramp, number), photometric, bits, **elements)
    data = read_folder(tmp_path)["train"]
    assert len(data) == 9 and data[0]["image"].mode == "I;16"
    shown = np.asarray(data[0]["image"]) / 65535
    np.testing.assert_allclose(shown, expected(ramp.astype(float)), atol=2e-3)
    sizes = {
        name: len(images) for name, images in load_images(train_data_dir=str(tmp_path), caption_column="").items()
    }
    assert sizes == {"train": 5, "validation": 2, "held_out": 2}


COLORS = np.tile(np.array([[200, 30, 30], [20, 40, 220]], np.uint8), (8, 4, 1))


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL", "PALETTE COLOR"])
def test_a_dicom_file_of_colours_has_these_colours(tmp_path, photometric):
    pixels = pytest.importorskip("pydicom.pixels", reason="pip install 'memcontrol_hf[dicom]'")
    if photometric == "PALETTE COLOR":
        tables = {
            name: table
            for channel, color in enumerate(("Red", "Green", "Blue"))
            for name, table in (
                (f"{color}PaletteColorLookupTableDescriptor", [2, 0, 16]),
                (f"{color}PaletteColorLookupTableData", (COLORS[0, :2, channel].astype(np.uint16) * 257).tobytes()),
            )
        }
        stored = np.tile(np.array([0, 1], np.uint8), (8, 4))
        dicom_file(tmp_path / "a.dcm", stored, photometric, 8, **tables)
    else:
        stored = COLORS if photometric == "RGB" else pixels.convert_color_space(COLORS, "RGB", photometric)
        dicom_file(tmp_path / "a.dcm", stored, photometric, 8, SamplesPerPixel=3, PlanarConfiguration=0)
    shown = np.asarray(read_folder(tmp_path)["train"][0]["image"].convert("RGB"))
    np.testing.assert_allclose(shown.astype(int), COLORS.astype(int), atol=3)


def test_a_dicom_file_with_several_frames_and_a_missing_pydicom_are_named(tmp_path, monkeypatch):
    pytest.importorskip("pydicom", reason="pip install 'memcontrol_hf[dicom]'")
    stored = np.arange(64, dtype=np.uint16).reshape(8, 8)
    dicom_file(tmp_path / "a.dcm", stored, "MONOCHROME2", 12, NumberOfFrames=2)
    with pytest.raises(ValueError, match=r"cannot read the image a\.dcm .*holds 2 frames"):
        load_images(train_data_dir=str(tmp_path), caption_column="")
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(ValueError, match=re.escape("a DICOM file needs pydicom: pip install 'memcontrol_hf[dicom]'")):
        load_images(train_data_dir=str(tmp_path), caption_column="")
