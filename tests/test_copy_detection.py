"""The study of copies: the copies are what their names say, and the committed shares are what the study finds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import copy_detection
from common.pages import read_results
from copy_detection import COPIES, DETECTORS, measure
from memcontrol_hf import demo_dataset
from memcontrol_hf.randomness import seeded_generator

COMMITTED = Path(__file__).parents[1] / "docs" / "results" / "copy_detection.json"


@pytest.mark.parametrize("name", [name for name in COPIES if name != "unchanged"])
def test_a_copy_is_another_image_of_the_same_size_and_always_the_same(name):
    image = demo_dataset()["train"][0]["image"].convert("RGB")
    once, twice = (COPIES[name](image, seeded_generator(0)) for _ in range(2))
    assert once.size == image.size and once.mode == "RGB" and np.array_equal(once, twice)
    assert not np.array_equal(once, image)


def test_a_crop_cuts_all_sides_and_noise_has_the_given_deviation():
    framed = Image.new("RGB", (64, 64), "black")
    framed.paste("white", (3, 3, 61, 61))
    assert np.array(COPIES["crop of 3 of 64 pixels a side"](framed, seeded_generator(0))).min() == 255
    grey = Image.new("RGB", (64, 64), (128,) * 3)
    noisy = np.array(COPIES["noise of 5 %"](grey, seeded_generator(0)), dtype=float)
    assert noisy.std() / 255 == pytest.approx(0.05, rel=0.05)


def test_the_committed_shares_are_found_again():
    committed = read_results(COMMITTED)["data"]["demo"]
    found = measure(demo_dataset(), DETECTORS["demo"]())
    assert found["images"] == committed["demo"]["images"]
    for kind, share in committed["demo"]["copies"].items():
        assert found["copies"][kind]["share"] == pytest.approx(share["share"], abs=0.05), kind
    assert found["false_alarms"]["share"] == pytest.approx(committed["demo"]["false_alarms"]["share"], abs=0.02)


def test_a_share_of_one_keeps_a_width():
    above, innocent = np.full(20, 0.9), torch.linspace(0, 0.5, 200).double().numpy()
    assert copy_detection.interval(above, innocent, (0.83, 1.0)) == (0.83, 1.0)
