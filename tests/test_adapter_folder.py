"""The folder that a fine-tune leaves: which of its files hold the mask."""

import json

import pytest
from conftest import adapter_folder

from memcontrol_hf.adapter_folder import CONFIG, MASK, REPORT, read_mask


def test_the_mask_is_read_from_a_folder_whichever_of_its_files_are_there(tmp_path):
    folder = adapter_folder(tmp_path / "adapter")
    mask = json.loads((folder / REPORT).read_text())["mask"]
    assert read_mask(folder) == mask and any(mask.values())
    (folder / REPORT).unlink()
    assert read_mask(str(folder)) == json.loads((folder / CONFIG).read_text())["mask"]
    (folder / MASK).write_text('{"mask": {"a shared mask": true}}')
    assert read_mask(folder) == {"a shared mask": True}
    (tmp_path / "bare.json").write_text('{"one": true, "two": false}')
    assert read_mask(tmp_path / "bare.json") == {"one": True, "two": False}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read: Expecting property name"),
        ("[1, 0, 1]", "holds no mask, which is an object of block names and booleans"),
        ('{"mask": {"block": 1}}', "holds no mask"),
        ('{"block": false}', "selects no block: the frozen base has nothing to train"),
    ],
)
def test_a_file_without_a_usable_mask_is_refused(tmp_path, content, message):
    (tmp_path / "mask.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_mask(tmp_path / "mask.json")


@pytest.mark.parametrize("source", ["/nowhere/mask.json", "no name/of a repository"])
def test_a_source_that_is_neither_file_nor_repository_is_named(source):
    with pytest.raises(ValueError, match=f"'{source}' cannot be read"):
        read_mask(source)
