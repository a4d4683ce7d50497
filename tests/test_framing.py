"""How images that are not square, or transparent, become squares: a table of shapes, and where it is asked for."""

import itertools
import logging

import pytest
import torch
from conftest import RESOLUTION, adapter_folder, images_of, small_report, tiny_trainer
from datasets import Dataset
from PIL import Image

from memcontrol_hf import audit_memorization
from memcontrol_hf.audit import AuditSettings
from memcontrol_hf.cli import main
from memcontrol_hf.data import cropped_shares, encode, warn_of_crops
from memcontrol_hf.families import family_of
from memcontrol_hf.flags import ScriptArguments, settings
from memcontrol_hf.from_flags import audit_settings, training_arguments
from memcontrol_hf.images import Framing, to_pixels

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def striped(size: tuple[int, int]) -> Image.Image:
    """Green, with a red first quarter and a blue last quarter along the longer side."""
    image, (width, height) = Image.new("RGB", size, GREEN), size
    if width >= height:
        image.paste(RED, (0, 0, width // 4, height))
        image.paste(BLUE, (width - width // 4, 0, width, height))
    else:
        image.paste(RED, (0, 0, width, height // 4))
        image.paste(BLUE, (0, height - height // 4, width, height))
    return image


def clear(size: tuple[int, int]) -> Image.Image:
    """Nothing but transparency, over black."""
    return Image.new("RGBA", size, (0, 0, 0, 0))


TABLE = [
    # image, framing, colours along the middle column from the top, along the middle row from the left
    (striped((64, 32)), Framing(), (GREEN, GREEN, GREEN), (GREEN, GREEN, GREEN)),
    (striped((32, 64)), Framing(), (GREEN, GREEN, GREEN), (GREEN, GREEN, GREEN)),
    (striped((64, 32)), Framing("pad"), (WHITE, GREEN, WHITE), (RED, GREEN, BLUE)),
    (striped((32, 64)), Framing("pad", "black"), (RED, GREEN, BLUE), (BLACK, GREEN, BLACK)),
    (striped((64, 32)), Framing("pad", "#0000ff"), (BLUE, GREEN, BLUE), (RED, GREEN, BLUE)),
    (striped((32, 32)), Framing("pad", "black"), (GREEN, GREEN, GREEN), (RED, GREEN, BLUE)),
    (Image.new("L", (64, 32), 0), Framing("pad"), (WHITE, BLACK, WHITE), (BLACK, BLACK, BLACK)),
    (Image.new("I;16", (64, 32), 0), Framing("pad", "white"), (WHITE, BLACK, WHITE), (BLACK, BLACK, BLACK)),
    (clear((32, 32)), Framing(), (WHITE, WHITE, WHITE), (WHITE, WHITE, WHITE)),
    (clear((32, 32)), Framing(background="black"), (BLACK, BLACK, BLACK), (BLACK, BLACK, BLACK)),
    (clear((64, 32)), Framing("pad", "red"), (RED, RED, RED), (RED, RED, RED)),
]


@pytest.mark.parametrize(("image", "framing", "down", "across"), TABLE)
def test_an_image_becomes_this_square(image, framing, down, across):
    pixels = (255 * to_pixels([image], 32, framing)[0]).byte()
    assert pixels.shape == (3, 32, 32)
    assert [tuple(pixels[:, y, 16].tolist()) for y in (1, 16, 30)] == list(down)
    assert [tuple(pixels[:, 16, x].tolist()) for x in (1, 16, 30)] == list(across)


def wide(count: int = 10) -> Dataset:
    """Images of twice the width, whose left and right ends are coloured tiles and whose middle is grey."""
    tiles = images_of(count, seed=4)
    images = []
    for tile in tiles["image"]:
        image = Image.new("RGB", (4 * RESOLUTION, 2 * RESOLUTION), (128,) * 3)
        image.paste(tile, (0, 0))
        images.append(image)
    return Dataset.from_dict({"image": images, "text": tiles["text"][:]})


def test_another_framing_is_encoded_anew_and_each_is_found_again(pipeline):
    data, family = wide(), family_of(pipeline)
    framings, latents = (Framing(), Framing("pad"), Framing("pad", "black")), []
    for framing in framings:
        latents.append(encode(data, family, RESOLUTION, framing=framing)["latents"][:])
        expected = family.encode_images(to_pixels(data["image"], RESOLUTION, framing))
        torch.testing.assert_close(latents[-1], expected, atol=1e-5, rtol=1e-4)
    assert not any(torch.allclose(*pair) for pair in itertools.combinations(latents, 2))
    family.encode_images = lambda images: torch.zeros(len(images), 4, 8, 8)  # what is found again is not computed
    for framing, before in zip(framings, latents):
        assert torch.equal(encode(data, family, RESOLUTION, framing=framing)["latents"][:], before)


def test_how_much_a_crop_cuts_away_is_said(tmp_path, caplog):
    assert cropped_shares(wide(3)) == [0.5] * 3 and cropped_shares(images_of(3)) == [0.0] * 3
    with caplog.at_level(logging.WARNING):
        tiny_trainer(tmp_path, train=wide())
    assert "10 of 10 training images are not square" in caplog.text and "up to 50% of an image" in caplog.text
    caplog.clear()
    warn_of_crops(wide(), Framing("pad"), "training")
    warn_of_crops(images_of(3), Framing(), "training")
    assert caplog.text == ""


def test_trainer_and_audit_see_padded_images(tmp_path):
    trainer = tiny_trainer(tmp_path, train=wide(), fit="pad", background="black")
    seen = trainer.train_dataset.select([0]).pixels([0])
    assert torch.equal(seen, to_pixels(wide()["image"][:1], RESOLUTION, Framing("pad", "black")))
    assert (seen[:, :, :4] == 0).all()
    amounts = {"num_prompts": 3, "images_per_prompt": 3, "inference_steps": 1, "num_timesteps": 2}
    padded = AuditSettings(resolution=RESOLUTION, fit="pad", near_duplicates=0, **amounts)
    sets = {"held_out": images_of(12, seed=2), "encoder": torch.nn.Flatten(), "control": False}
    report = audit_memorization(wide(), generated=wide(), settings=padded, **sets)
    assert report.audit["measures"]["copy_share"]["model"]["value"] == 1
    assert report.audit["settings"]["fit"] == "pad" and report.audit["settings"]["background"] == "white"
    report.to_json(tmp_path / "report.json")


def test_flags_are_the_runs_framing_and_part_of_a_studys_identity():
    args = ScriptArguments(fit="pad", background="black")
    assert training_arguments(args).framing == audit_settings(args).framing == Framing("pad", "black")
    assert settings(args)["fit"] == "pad" and settings(args)["background"] == "black"
    assert not {"fit", "background"} & settings(ScriptArguments()).keys(), "studies of before can be gone on with"


@pytest.mark.parametrize("arguments", [{"fit": "stretch"}, {"background": "whitish"}, {"background": "12"}])
def test_another_fit_or_colour_is_refused(arguments, tmp_path):
    (name, value) = next(iter(arguments.items()))
    for make in (Framing, AuditSettings, lambda **given: tiny_trainer(tmp_path, **given)):
        with pytest.raises(ValueError, match=rf"{name} must be .*'{value}'"):
            make(**arguments)


def test_the_audits_command_takes_them_and_refuses_a_wrong_colour_first(tmp_path, capsys):
    sets = ["--pipeline", "nowhere", "--train", "nowhere", "--held_out", "nowhere", "--encoder", "demo"]
    assert main(["audit", *sets, "--background", "whitish", "--output_dir", str(tmp_path)]) == 2
    assert "background must be a colour" in capsys.readouterr().err


def test_an_adapter_is_attacked_with_images_as_it_was_trained_on(tmp_path, capsys, caplog):
    report = small_report()
    report.training |= {"fit": "pad", "background": "black"}
    folder = adapter_folder(tmp_path / "adapter", report=report)
    command = ["audit", "--adapter", str(folder), *("--pipeline", "x", "--train", "x", "--held_out", "x")]
    command += ["--encoder", "demo", "--output_dir", str(tmp_path / "out")]
    assert main(command) == 2
    assert "trained with images of --fit pad --background black" in capsys.readouterr().err
    assert main([*command, "--fit", "pad", "--background", "black"]) == 2
    assert "trained with" not in capsys.readouterr().err
    assert main([*command, "--fit", "pad", "--background", "black", "--resolution", "64"]) == 2
    assert "--resolution 64: the adapter was trained at 16 pixels" in capsys.readouterr().err
    command[2] = str(folder / "pytorch_lora_weights.safetensors")
    (folder / "pytorch_lora_weights.safetensors").touch()
    assert main(command) == 2
    assert "trained with images of --fit pad --background black" in capsys.readouterr().err
    command[2] = str(tmp_path)
    assert main([*command, "--resolution", "0"]) == 2
    assert "resolution must be at least 1, but is 0" in capsys.readouterr().err
    assert main(command) == 2
    assert "no memorization_report.json says how" in caplog.text


def test_an_adapter_is_attacked_on_its_base_in_the_precision_and_variant_of_its_training(tmp_path, monkeypatch):
    report = small_report()
    report.training |= {"base_weights": "bfloat16:0"}
    report.card["base_variant"] = "fp16"
    folder = adapter_folder(tmp_path / "adapter", report=report)
    asked = []
    monkeypatch.setattr("memcontrol_hf.families.load_pipeline", lambda *given, **more: asked.append(more) or [][0])
    sets = ["--pipeline", "demo", "--train", "demo", "--held_out", "demo", "--output_dir", str(tmp_path / "out")]
    assert main(["audit", *sets, "--adapter", str(folder)]) == 1
    assert asked == [{"dtype": "bfloat16", "variant": "fp16"}]
