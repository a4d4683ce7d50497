"""The demo in the package is complete, small, readable by the stock loaders, and its splits do not touch."""

import hashlib
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from demo_base import emoji
from memcontrol_hf.demo import DEMO_ENCODER, DEMO_PIPELINE, demo_dataset, demo_pipeline

DEMO = Path(DEMO_PIPELINE).parent
ROUND_TRIP_BOUND = 0.032  # mean absolute error in [0, 1]; the demo has about 0.026, a blur of 8x8 pixels 0.08


@pytest.fixture(scope="module")
def pipe():
    pipe = demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def data():
    return demo_dataset()


def to_pixels(images: list[Image.Image]) -> torch.Tensor:
    """[N, 3, 64, 64] in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1


def pixel_hashes(split) -> list[str]:
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in split["image"]]


def test_folder_is_small_and_holds_no_pickles():
    files = [path for path in DEMO.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 15e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    assert (DEMO / "README.md").is_file()
    assert (DEMO / "training_log.json").is_file()


def test_pipeline_has_the_sixteen_attention_sites_of_stable_diffusion(pipe):
    assert len([name for name, _ in pipe.unet.named_modules() if name.split(".")[-2:-1] == ["attentions"]]) == 16
    assert type(pipe.tokenizer).__name__ == "CLIPTokenizer"
    assert {p.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()} == {torch.float32}


def test_pipeline_makes_the_same_image_of_the_same_seed(pipe):
    def generate(seed):
        generator = torch.Generator().manual_seed(seed)
        images = pipe("red apple", num_inference_steps=4, generator=generator, output_type="np").images
        return images[0]

    first = generate(1)
    assert first.shape == (64, 64, 3)
    assert np.array_equal(first, generate(1))
    assert not np.array_equal(first, generate(2))


def test_any_text_is_tokenized_without_unknown_tokens(pipe):
    ids = pipe.tokenizer("Café 日本!").input_ids
    assert ids.count(pipe.tokenizer.unk_token_id) == 1  # the closing token has the same id, as in CLIP
    assert pipe.tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "café日本!"


def test_splits_have_the_stated_rows(data):
    assert {name: len(split) for name, split in data.items()} == {"train": 128, "validation": 192, "held_out": 256}
    for split in data.values():
        assert split.column_names == ["image", "text"]
        assert {(image.size, image.mode) for image in split["image"]} == {((64, 64), "RGB")}
        assert all(split["text"])


def test_splits_are_disjoint_and_only_train_repeats(data):
    hashes = {name: Counter(pixel_hashes(split)) for name, split in data.items()}
    assert sum((Counter(set(counts)) for counts in hashes.values()), Counter()).most_common(1)[0][1] == 1
    assert Counter(hashes["train"].values()) == {1: 80, 4: 12}
    assert set(hashes["validation"].values()) == set(hashes["held_out"].values()) == {1}


def test_families_of_look_alikes_are_dealt_whole():
    rows = [{"category": "AB"[i // 2 % 2]} for i in range(1200)]
    families = [rows[i : i + 2] for i in range(0, len(rows), 2)]
    parts = emoji.deal(families, random.Random(0))
    assert {name: len(parts[name]) for name in emoji.SPLITS} == emoji.SPLITS and sum(map(len, parts.values())) == 1200
    placed = [{id(row) for row in part} for part in parts.values()]
    assert all(any({id(row) for row in family} <= part for part in placed) for family in families)


def test_repeated_images_have_one_caption(data):
    pairs = Counter(zip(pixel_hashes(data["train"]), data["train"]["text"]))
    assert Counter(pairs.values()) == {1: 80, 4: 12}


@torch.no_grad()
def test_autoencoder_returns_the_held_out_images(pipe, data):
    pixels = to_pixels(list(data["held_out"]["image"])[:64])
    decoded = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    assert (decoded - pixels).abs().mean() / 2 < ROUND_TRIP_BOUND


@torch.no_grad()
def test_latents_have_unit_scale(pipe, data):
    latents = pipe.vae.encode(to_pixels(list(data["held_out"]["image"])[:64])).latent_dist.mean
    assert latents.shape[1:] == (12, 8, 8)
    assert abs((latents * pipe.vae.config.scaling_factor).std() - 1) < 0.15


@torch.no_grad()
def test_encoder_finds_the_original_of_a_damaged_copy(data):
    from transformers import AutoImageProcessor, AutoModel

    encoder, processor = (
        AutoModel.from_pretrained(DEMO_ENCODER).eval(),
        AutoImageProcessor.from_pretrained(DEMO_ENCODER),
    )
    images = list(data["held_out"]["image"])[:32]
    copies = [image.resize((24, 24)).resize((64, 64)) for image in images]

    def features(images):
        out = encoder(**processor(images, return_tensors="pt")).pooler_output.flatten(1)
        return torch.nn.functional.normalize(out, dim=1)

    assert features(images).shape == (32, 128)
    nearest = (features(copies) @ features(images).T).argmax(1)
    assert (nearest == torch.arange(32)).float().mean() > 0.9
