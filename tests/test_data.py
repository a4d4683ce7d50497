import json
import logging
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import RESOLUTION, images_of, tiny_pipeline
from datasets import Dataset, DatasetDict
from datasets.fingerprint import Hasher
from PIL import Image

from memcontrol_hf.data import (
    EncodedImages,
    check_near_duplicates,
    encode,
    load_image_folder,
    load_images,
    plant_canaries,
    split,
    weights_digest,
)
from memcontrol_hf.families import family_of
from memcontrol_hf.images import pixel_digest, to_pixels
from memcontrol_hf.sampling import generate


@pytest.fixture
def folder(tmp_path):
    """Twenty images with captions and patients, as `imagefolder` reads them."""
    lines = []
    for i, row in enumerate(images_of(20, seed=3)):
        row["image"].save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": row["text"], "patient": f"p{i // 2}"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_a_folder_becomes_three_splits(folder):
    data = load_images(train_data_dir=str(folder))
    assert {name: len(s) for name, s in data.items()} == {"train": 12, "validation": 4, "held_out": 4}
    assert data["train"].column_names == ["image", "text"]


def test_the_split_depends_on_the_seed_alone(folder):
    texts = [load_images(train_data_dir=str(folder), seed=seed)["train"]["text"][:] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_folders_named_as_the_splits_are_the_splits(tmp_path):
    for i, name in enumerate(("train", "validation", "held_out")):
        (tmp_path / name).mkdir()
        images = images_of(3 + i, seed=i)
        for number, row in enumerate(images):
            row["image"].save(tmp_path / name / f"{number}.png")
        lines = [
            json.dumps({"file_name": f"{number}.png", "text": text}) for number, text in enumerate(images["text"])
        ]
        (tmp_path / name / "metadata.jsonl").write_text("\n".join(lines))
    data = load_images(train_data_dir=str(tmp_path))
    assert {name: len(split) for name, split in data.items()} == {"train": 3, "validation": 4, "held_out": 5}


def test_groups_stay_together(folder):
    data = load_images(train_data_dir=str(folder), group_column="patient")
    groups = [set(s["group"]) for s in data.values()]
    assert sum(len(g) for g in groups) == len(set.union(*groups)) == 10


def test_copies_of_an_image_go_to_one_split():
    images = images_of(8)
    repeated = Dataset.from_list([row for row in images for _ in range(3)])
    data = split(DatasetDict(train=repeated))
    pixels = [{row["image"].tobytes() for row in s} for s in data.values()]
    assert sum(len(p) for p in pixels) == 8


def test_given_splits_are_kept_and_missing_ones_come_out_of_train():
    data = split(DatasetDict(train=images_of(20, 1), validation=images_of(5, 2)))
    assert {name: len(s) for name, s in data.items()} == {"train": 16, "validation": 5, "held_out": 4}


def test_the_same_picture_saved_once_more_in_another_split_is_refused():
    train, held_out = images_of(9, 1), images_of(6, 2)
    check_near_duplicates(DatasetDict(train=train, held_out=held_out))
    brighter = train[4]["image"].point(lambda value: min(255, round(1.05 * value)))
    copy = {"image": brighter, "text": "a"}
    bad = DatasetDict(train=train, held_out=Dataset.from_list([*held_out, copy]))
    with pytest.raises(ValueError, match="1 images of held_out are near-duplicates of images of train: rows 4 and 6"):
        check_near_duplicates(bad)
    check_near_duplicates(bad, threshold=0)
    mirrored = train[4]["image"].transpose(Image.Transpose.FLIP_LEFT_RIGHT).point(lambda value: value // 2)
    bad = DatasetDict(train=train, held_out=Dataset.from_list([*held_out, {"image": mirrored, "text": "a"}]))
    with pytest.raises(ValueError, match="1 images of held_out are near-duplicates of images of train: rows 4 and 6"):
        check_near_duplicates(bad)


def test_canaries_are_repeated_and_nothing_else_changes():
    train = images_of(10, 1)
    planted = plant_canaries(train, 3, 4, seed=5)
    counts = Counter(image.tobytes() for image in planted["image"])
    assert len(planted) == 19 and sorted(counts.values()) == [1] * 7 + [4] * 3
    assert planted["text"][:10] == train["text"][:]
    assert planted["text"][:] == plant_canaries(train, 3, 4, seed=5)["text"][:]
    assert planted["text"][:] != plant_canaries(train, 3, 4, seed=6)["text"][:]
    assert plant_canaries(train, 0, 4) is train
    for count, repeats, message in ((11, 4, "between 0 and 10"), (-1, 4, "between 0 and 10"), (2, 1, "at least 2")):
        with pytest.raises(ValueError, match=message):
            plant_canaries(train, count, repeats)


def test_an_image_in_two_splits_is_refused():
    with pytest.raises(ValueError, match="an image is in the train and in the held_out split"):
        split(DatasetDict(train=images_of(9, 1), held_out=images_of(3, 1), validation=images_of(3, 2)))


def test_a_group_in_two_splits_is_refused():
    train, held_out, validation = images_of(9, 1), images_of(3, 2), images_of(3, 3)
    train = train.add_column("group", list("aabbccddd"))
    held_out, validation = held_out.add_column("group", list("efd")), validation.add_column("group", list("ghi"))
    with pytest.raises(ValueError, match="an image or a group is in the train and in the held_out split"):
        split(DatasetDict(train=train, held_out=held_out, validation=validation))


def test_groups_of_some_splits_alone_are_refused():
    train, held_out = images_of(12), images_of(4, seed=1)
    data = DatasetDict(train=train.add_column("group", [f"p{row // 2}" for row in range(12)]), held_out=held_out)
    with pytest.raises(ValueError, match="'group' is in train, but not in held_out: give all splits one"):
        split(data)


def test_copies_of_an_image_join_their_groups():
    images = images_of(8)
    rows = [{**row, "group": f"{i}{copy}"} for i, row in enumerate(images) for copy in range(2)]
    data = split(DatasetDict(train=Dataset.from_list(rows)))
    pixels = [{row["image"].tobytes() for row in s} for s in data.values()]
    assert sum(len(p) for p in pixels) == 8


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="4 different images or groups in train are too few"):
        split(DatasetDict(train=images_of(4)))


def test_an_unreadable_image_is_named(folder):
    (folder / "7.png").write_bytes((folder / "7.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"cannot read the image 7\.png"):
        load_images(train_data_dir=str(folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"caption_column": "caption"}, "has no column 'caption'; it has: image, text, patient"),
        ({"image_column": "picture"}, "has no column 'picture'"),
        ({"group_column": "subject"}, "has no column 'subject'"),
    ],
)
def test_a_missing_column_is_named_with_those_that_exist(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_images(train_data_dir=str(folder), **arguments)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        load_images(train_data_dir=str(tmp_path / "none"))


def test_an_empty_split_is_refused():
    with pytest.raises(ValueError, match="the validation split is empty"):
        split(DatasetDict(train=images_of(9, 1), validation=images_of(3, 2).select([])))


def test_a_caption_that_is_no_text_is_refused():
    data = images_of(9).remove_columns("text").add_column("text", [None] * 9)
    with pytest.raises(ValueError, match="caption of row 0 of the train split is no text"):
        split(DatasetDict(train=data))


def test_grayscale_and_transparent_images_become_rgb_of_one_size():
    images = [Image.new("L", (40, 20), 255), Image.new("RGBA", (10, 30), (255, 0, 0, 255))]
    pixels = to_pixels(images, RESOLUTION)
    assert pixels.shape == (2, 3, RESOLUTION, RESOLUTION)
    assert pixels.min() >= 0 and pixels.max() <= 1
    assert (pixels[0] == 1).all() and (pixels[1][0] == 1).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "RGB"])
def test_what_is_transparent_lies_over_white(mode, tmp_path):
    """A black picture whose left half is transparent: black beneath, white to the eye."""
    image = Image.new("RGBA", (RESOLUTION, RESOLUTION), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, RESOLUTION // 2, RESOLUTION))
    if mode == "RGB":  # PNG names one transparent colour
        image = Image.new("RGB", (RESOLUTION, RESOLUTION), (0, 0, 0))
        image.paste((9, 9, 9), (0, 0, RESOLUTION // 2, RESOLUTION))
        image.info["transparency"] = (9, 9, 9)
    elif mode == "P":
        image = Image.new("P", (RESOLUTION, RESOLUTION), 0)
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.paste(1, (0, 0, RESOLUTION // 2, RESOLUTION))
        image.info["transparency"] = 1
    else:
        image = image.convert(mode)
    if mode != "PA":  # which PNG has not
        image.save(tmp_path / "a.png")
        image = Image.open(tmp_path / "a.png")
    pixels = to_pixels([image], RESOLUTION)[0]
    half = RESOLUTION // 2
    assert (pixels[..., :half] == 1).all() and (pixels[..., half:] == 0).all()


def test_images_of_16_bits_are_scaled_and_told_apart(tmp_path):
    ramp = np.linspace(0, 65535, RESOLUTION**2).astype(np.uint16).reshape(RESOLUTION, RESOLUTION)
    for number in range(9):
        Image.fromarray(np.roll(ramp, number)).save(tmp_path / f"{number}.png")
    (tmp_path / "metadata.jsonl").write_text("".join(f'{{"file_name": "{n}.png", "text": ""}}\n' for n in range(9)))
    data = load_images(train_data_dir=str(tmp_path))
    assert sum(map(len, data.values())) == 9
    pixels = to_pixels([Image.fromarray(ramp)], RESOLUTION)[0, 0]
    assert (pixels * 65535 - torch.from_numpy(ramp.astype(np.float32))).abs().max() <= 256
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "0.tiff")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.tiff", "text": ""}\n')
    with pytest.raises(ValueError, match=r"cannot read the image 0\.tiff .*mode I says no range of values"):
        load_images(train_data_dir=str(tmp_path))


def test_names_of_files_are_no_splits(tmp_path):
    lines = []
    for number, name in enumerate(("train_1", "scan_test_2", "eval-3", "dev-4", *map(str, range(8)))):
        Image.new("RGB", (8, 8), (number * 9, 0, 0)).save(tmp_path / f"{name}.png")
        lines.append(json.dumps({"file_name": f"{name}.png", "text": name}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    data = load_images(train_data_dir=str(tmp_path))
    assert sum(map(len, data.values())) == 12
    assert len(load_image_folder(str(tmp_path), "train", "text")) == 12


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"cannot load the images of '{tmp_path}'"):
        load_images(train_data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="cannot load the images of 'no/such'"):
        load_images("no/such")


def test_latents_and_embeddings_are_encoded_once(pipeline, train_images, monkeypatch):
    family = family_of(pipeline)
    first = encode(train_images, family, RESOLUTION)
    calls = []
    monkeypatch.setattr(pipeline.vae, "encode", lambda *a, **k: calls.append(1))
    monkeypatch.setattr(family, "encode_images", lambda pixels: calls.append(len(pixels)) or torch.zeros(1, 4, 8, 8))
    encode_prompts = family.encode_prompts
    monkeypatch.setattr(family, "encode_prompts", lambda texts: calls.append(texts) or encode_prompts(texts))
    second = encode(train_images, family, RESOLUTION)
    assert calls == [1, train_images["text"][:1]], "only the probe of the shapes"
    assert all(torch.equal(first[:][name], second[:][name]) for name in ("latents", "prompt_embeds"))
    expected = family_of(tiny_pipeline()).encode_images(to_pixels(train_images["image"], RESOLUTION))
    torch.testing.assert_close(first[:]["latents"], expected)


def test_other_weights_are_encoded_anew(pipeline, train_images):
    first = encode(train_images, family_of(pipeline), RESOLUTION)
    with torch.no_grad():
        pipeline.vae.quant_conv.weight.add_(0.1)
    second = encode(train_images, family_of(pipeline), RESOLUTION)
    assert not torch.equal(first[:]["latents"], second[:]["latents"])


def test_images_of_other_sizes_with_the_same_bytes_are_no_copies():
    wide, square = (Image.new("RGB", size) for size in ((8, 2), (4, 4)))
    assert pixel_digest(wide) != pixel_digest(square) == pixel_digest(Image.new("RGB", (4, 4)))


def test_the_cache_of_an_earlier_version_is_named_and_not_read(pipeline, train_images, caplog, tmp_path, monkeypatch):
    """Version 1 kept the same latents under a fingerprint without a version."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    family = family_of(pipeline)
    weights = [weights_digest(module) for module in family.encoder_modules]
    key = [train_images._fingerprint, *weights, *family.cache_key(), RESOLUTION]
    earlier = tmp_path / "memcontrol_hf" / f"{Hasher.hash(key)}.arrow"
    earlier.parent.mkdir()
    earlier.write_bytes(b"of version 1")
    encoded = encode(train_images, family, RESOLUTION)
    assert f"{earlier} was cached by an earlier version" in caplog.text
    assert len(encoded[0]["digest"]) == 32 and earlier.read_bytes() == b"of version 1"


def test_repeats_count_once(pipeline, train_images):
    repeated = Dataset.from_list([row for row in train_images for _ in range(2)])
    images = EncodedImages(repeated, RESOLUTION).encoded_by(family_of(pipeline))
    assert images.distinct == list(range(0, 20, 2))


def test_the_ends_of_long_captions_are_not_logged(pipeline, caplog, capfd):
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    secret = "abc " * 20 + "zzzsecret"
    try:
        family_of(pipeline).encode_prompts([secret])
        generate(pipeline, [secret], [(0,)], RESOLUTION, num_inference_steps=1)
        quiet = caplog.text + "".join(capfd.readouterr())
        pipeline.encode_prompt(secret, "cpu", 1, False)
    finally:
        logger.removeHandler(caplog.handler)
    assert "secret" not in quiet.replace(" ", "")
    assert "zzzsecret" in caplog.text.replace(" ", ""), "the pipeline itself does print it"


def test_a_class_is_read_by_its_name_and_no_caption_column_gives_empty_ones(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i, image in enumerate(images_of(4, seed=len(list(tmp_path.rglob("*.png"))))["image"]):
            image.save(tmp_path / name / f"{i}.png")
    named = load_images(train_data_dir=str(tmp_path), caption_column="label")
    assert {text for split in named.values() for text in split["text"]} == {"cat", "dog"}
    empty = load_images(train_data_dir=str(tmp_path), caption_column="")
    assert {text for split in empty.values() for text in split["text"]} == {""}
