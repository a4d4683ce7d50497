"""Image encoders: which one judges whose images, and how an encoder sees an image."""

import pytest
import torch
from conftest import images_of, tiny_trainer
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from memcontrol_hf import audit_memorization, demo_dataset
from memcontrol_hf.encoders import load_encoder, named_encoder
from memcontrol_hf.images import to_pixels


def test_images_of_ones_own_need_an_encoder_that_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"need an encoder=.*dinov2-small for photographs.*owkin/phikon"):
        audit_memorization(images_of(9, seed=1), images_of(9, seed=2), generated=images_of(9, seed=3))
    with pytest.raises(ValueError, match=r"need an encoder=.* encoder=\"demo\" takes the demo's"):
        tiny_trainer(tmp_path, encoder=None, objectives=["fid", "membership_auc"])


def test_a_trainer_without_an_encoder_measures_what_needs_none(tmp_path):
    trainer = tiny_trainer(tmp_path, encoder=None)
    assert "eval_membership_auc" in trainer.evaluate()
    with pytest.raises(ValueError, match="need an encoder="):
        trainer.evaluate(metrics=["fid"])


def test_the_demos_encoder_judges_the_demos_images_alone():
    data = demo_dataset()
    assert named_encoder(None, data["train"].select([0]), data["held_out"].select([0])) == "demo"
    assert named_encoder("demo", images_of(1)) == "demo"
    with pytest.raises(ValueError, match="need an encoder="):
        named_encoder(None, data["train"].select([0]), images_of(1))


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessorPil(size={"height": 32, "width": 32}),
        BitImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),  # as DINOv2's
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=0.875),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_an_encoder_sees_images_as_its_own_processor_makes_them(tmp_path, processor):
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    model = ViTModel(config).eval()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    images = [image.resize((side, side)) for image, side in zip(images_of(4)["image"], (16, 32, 40, 64))]
    for image in images:
        with torch.no_grad():
            expected = model(**processor([image], return_tensors="pt")).pooler_output
        torch.testing.assert_close(encoder(to_pixels([image], image.width)), expected, atol=1e-6, rtol=1e-5)


def test_images_that_have_the_encoders_size_are_not_rounded_to_8_bits():
    encoder, images = load_encoder("demo"), torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = encoder.model((images - 0.5) / 0.5).pooler_output.flatten(1)
    assert torch.equal(encoder(images), expected)
    assert not torch.equal(encoder((images * 255).round() / 255), expected)
