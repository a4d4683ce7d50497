"""A mask as the flags of other trainers."""

import pytest

from memcontrol_hf.screening import other_trainers

SD1 = [f"down_blocks.{i}.attentions.{j}" for i in range(3) for j in range(2)] + ["mid_block.attentions.0"]
SD1 += [f"up_blocks.{i}.attentions.{j}" for i in (1, 2, 3) for j in range(3)]
FLUX = [f"transformer_blocks.{i}" for i in range(19)] + [f"single_transformer_blocks.{i}" for i in range(38)]
SD3 = FLUX[:19]


def flags(names: list[str], on: list[str]) -> dict[str, str]:
    return {trainer.split()[0]: text for trainer, text in other_trainers({n: n in on for n in names}).items()}


@pytest.mark.parametrize(
    ("block", "place"),
    [
        ("down_blocks.0.attentions.0", 1),  # IN01, after the first convolution
        ("down_blocks.2.attentions.1", 8),  # IN08
        ("mid_block.attentions.0", 12),
        ("up_blocks.1.attentions.0", 16),  # OUT03, the first of the second level
        ("up_blocks.3.attentions.2", 24),  # OUT11, the last
    ],
)
def test_kohya_counts_25_blocks_of_sd_1(block, place):
    found = flags(SD1, [block])
    dims = found["kohya"].partition("block_dims=")[2].strip('"').split(",")
    assert len(dims) == 25 and [i for i, dim in enumerate(dims) if dim != "0"] == [place]
    assert found["OneTrainer"] == f"{block}."


def test_flux_has_indices_of_double_and_single_blocks():
    on = [*FLUX[:3], "transformer_blocks.18", "single_transformer_blocks.7"]
    found = flags(FLUX, on)
    assert found["kohya"] == '--network_args "train_double_block_indices=0-2,18" "train_single_block_indices=7"'
    assert '"transformer.transformer_blocks.1."' in found["ai-toolkit"] and "OneTrainer" not in found
    assert 'train_single_block_indices=none"' in flags(FLUX, FLUX[:1])["kohya"]


def test_sd_3_has_numbers_of_blocks():
    found = flags(SD3, ["transformer_blocks.1", "transformer_blocks.12"])
    assert found["diffusers"] == "--lora_blocks 1,12"
    assert found["OneTrainer"] == "transformer_blocks.1.,transformer_blocks.12.", "not transformer_blocks.10"


@pytest.mark.parametrize("names", [["mid_block.attentions.0.transformer_blocks.0.attn1"], [".*"], []])
def test_what_is_no_choice_of_blocks_has_no_flags(names):
    assert other_trainers(dict.fromkeys(names, True)) == {}


def test_the_empty_mask_has_no_flags():
    assert other_trainers(dict.fromkeys(SD1, False)) == {}


def test_another_unet_than_that_of_sd_1_has_no_places_of_kohya():
    assert flags(SD1[:5], SD1[:1]).keys() == {"OneTrainer"}
