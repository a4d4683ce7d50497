"""The solar cells of ELPV, which come with a package of the test extra."""

import sys
from collections import Counter

import pytest

import elpv
from memcontrol_hf import demo_pipeline
from memcontrol_hf.data import check_near_duplicates, load_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("elpv_dataset", reason=elpv.INSTALL)
    folder = tmp_path_factory.mktemp("data") / "elpv"
    elpv.main(["--output_dir", str(folder)])
    return folder


def test_the_folder_is_read_with_its_three_splits_and_has_no_near_duplicates(folder):
    data = load_images(train_data_dir=str(folder))
    assert {name: len(images) for name, images in data.items()} == {"train": 128, "validation": 192, "held_out": 256}
    check_near_duplicates(data)


def test_twelve_training_images_occur_four_times_and_all_others_once(folder):
    data = load_images(train_data_dir=str(folder))
    counts = Counter(image.tobytes() for split in data.values() for image in split["image"])
    assert Counter(counts.values()) == {1: 80 + 192 + 256, 4: 12}
    assert {image.size for split in data.values() for image in split["image"]} == {(64, 64)}


def test_a_folder_that_is_there_already_is_not_mixed_with(folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        elpv.main(["--output_dir", str(folder)])
    assert stopped.value.code == 2
    assert "is no empty folder" in capsys.readouterr().err


def test_the_eight_captions_fit_the_demos_vocabulary():
    captions = [elpv.caption(kind, share) for kind in ("mono", "poly") for share in (0, 1 / 3, 2 / 3, 1)]
    tokenizer = demo_pipeline().tokenizer
    read = {tuple(tokenizer(text, truncation=True).input_ids) for text in captions}
    assert len(read) == 8 and all(len(tokens) <= tokenizer.model_max_length for tokens in read)


def test_without_the_package_one_line_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "elpv_dataset", None)
    monkeypatch.setitem(sys.modules, "elpv_dataset.utils", None)
    with pytest.raises(SystemExit) as stopped:
        elpv.main(["--output_dir", str(tmp_path / "elpv")])
    error = capsys.readouterr().err
    assert stopped.value.code == 1
    assert error.count("\n") == 1 and "pip install elpv-dataset==1.0.0.post1" in error
