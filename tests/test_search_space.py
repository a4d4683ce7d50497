import peft
import pytest
import torch
from conftest import tiny_unet
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from peft import get_peft_model
from transformers import CLIPTextConfig, CLIPTextModel

from memcontrol_hf import MemControlConfig, SearchSpace
from memcontrol_hf.flags import ScriptArguments
from memcontrol_hf.from_flags import granularity_of
from memcontrol_hf.masks import granularity_of_names

SITES = [
    "down_blocks.0.attentions.0",
    "mid_block.attentions.0",
    "up_blocks.1.attentions.0",
    "up_blocks.1.attentions.1",
]
PEFT_CONFIGS = {
    "lora": peft.LoraConfig(target_modules=["to_q", "to_v"]),
    "loha": peft.LoHaConfig(target_modules=["to_q", "to_v"]),
    "ia3": peft.IA3Config(target_modules=["to_k", "ff.net.2"], feedforward_modules=["ff.net.2"]),
    "ln_tuning": peft.LNTuningConfig(target_modules=["norm1", "norm2", "norm3"]),
    "oft": peft.OFTConfig(target_modules=["to_q"], oft_block_size=4),
}


def moving(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_stable_diffusion_has_sixteen_attention_sites():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    space = SearchSpace.from_model(unet)
    assert len(space.blocks) == 16
    assert len(SearchSpace.from_model(unet, "site").blocks) == 48
    assert len(SearchSpace.from_model(unet, "module").blocks) == 192
    assert sum("down_blocks" in name for name in space.blocks) == 6
    assert sum("up_blocks" in name for name in space.blocks) == 9
    assert "mid_block.attentions.0" in space.blocks


def test_blocks_stand_in_the_way_of_the_data(unet):
    assert list(SearchSpace.from_model(unet).blocks) == SITES


def test_a_block_of_a_transformer_is_a_transformer_block():
    model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=4, in_channels=4, num_layers=3,
                                  sample_size=8, num_embeds_ada_norm=10, norm_num_groups=4)  # fmt: skip
    assert list(SearchSpace.from_model(model).blocks) == [f"transformer_blocks.{i}" for i in range(3)]


@pytest.mark.parametrize("method", ["svdiff", "weights", "lora"])
def test_each_linear_layer_and_convolution_is_a_module_in_the_order_of_the_blocks(unet, method):
    blocks, modules = SearchSpace.from_model(unet), SearchSpace.from_model(unet, "module")
    maps = (torch.nn.Linear, torch.nn.Conv2d)
    expected = [name for inside in blocks.blocks.values() for name in inside
                if isinstance(unet.get_submodule(name), maps)]  # fmt: skip
    assert modules.blocks == {name: [name] for name in expected} and len(expected) > 40
    config = peft.LoraConfig() if method == "lora" else MemControlConfig(method=method)
    chosen = expected[3:5]
    assert modules.apply(config, dict.fromkeys(chosen, True)).target_modules == chosen


def test_expressions_make_blocks_of_their_own(unet):
    space = SearchSpace.from_model(unet, [r"attn2\.to_k$", r"attn2\.to_v$"])
    assert {name: len(modules) for name, modules in space.blocks.items()} == {r"attn2\.to_k$": 4, r"attn2\.to_v$": 4}


@pytest.mark.parametrize(
    ("granularity", "message"),
    [
        ("layer", "unknown granularity 'layer'"),
        (["("], "is no regular expression"),
        (["nothing_like_this"], "matches no module"),
        (["attn1", r"attn1\.to_q"], "matched by both 'attn1' and"),
    ],
)
def test_a_wrong_granularity_is_named(unet, granularity, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        SearchSpace.from_model(unet, granularity)


def test_a_model_without_attention_is_refused():
    with pytest.raises(ValueError, match="Sequential has no attention blocks"):
        SearchSpace.from_model(torch.nn.Sequential(torch.nn.Linear(2, 2)))


@pytest.mark.parametrize("method", ["svdiff", "difffit", "weights", "norm", "bias", *PEFT_CONFIGS])
def test_only_the_parameters_of_selected_blocks_move(unet, method):
    space = SearchSpace.from_model(unet)
    config = PEFT_CONFIGS.get(method) or MemControlConfig(method=method)
    before = config.target_modules
    model = get_peft_model(unet, space.apply(config, {SITES[1]: True, SITES[3]: True}))
    names = moving(model)
    assert names and all(SITES[1] in name or SITES[3] in name for name in names)
    assert all(any(site in name for name in names) for site in (SITES[1], SITES[3]))
    assert config.target_modules == before, "the config that was given is left as it is"


def test_target_modules_of_a_config_are_narrowed_and_not_widened(unet):
    config = SearchSpace.from_model(unet).apply(MemControlConfig(target_modules=["to_k"]), {SITES[0]: True})
    assert config.target_modules == [f"{SITES[0]}.transformer_blocks.0.attn{i}.to_k" for i in (1, 2)]


def test_a_lora_under_a_mask_loads_without_this_package(unet, tmp_path):
    config = SearchSpace.from_model(unet).apply(PEFT_CONFIGS["lora"], {SITES[0]: True})
    get_peft_model(unet, config).save_pretrained(tmp_path)
    assert '"peft_type": "LORA"' in (tmp_path / "adapter_config.json").read_text()
    assert moving(peft.PeftModel.from_pretrained(tiny_unet(), tmp_path, is_trainable=True))


def test_the_mask_is_recorded_in_the_config(unet):
    config = SearchSpace.from_model(unet).apply(MemControlConfig(), {SITES[2]: True})
    assert config.mask == {site: site == SITES[2] for site in SITES}


def test_selected_singular_values_are_those_of_selected_blocks(unet):
    text = CLIPTextModel(CLIPTextConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, vocab_size=9))
    space = SearchSpace.from_model(unet, text_encoders={"text_encoder": text})
    inside = [f"{SITES[0]}.transformer_blocks.0.attn1.to_q", f"{SITES[1]}.transformer_blocks.0.attn1.to_q"]
    layer = next(name for name in space.tunable["svdiff"] if name.startswith("text_encoder.") and "q_proj" in name)
    config = MemControlConfig(singular_values={inside[0]: [0, 2], inside[1]: [1], layer: [3]})
    mask = {SITES[0]: True} | {name: True for name in space.blocks if name.startswith("text_encoder")}
    adapted = get_peft_model(unet, space.apply(config, mask))
    assert adapted.peft_config["default"].singular_values == {inside[0]: [0, 2]}
    assert adapted.get_submodule(f"base_model.model.{inside[0]}").memcontrol_delta["default"].shape == (2,)
    in_text = space.apply(config, mask, "text_encoder")
    assert in_text.singular_values == {layer.removeprefix("text_encoder."): [3]}
    get_peft_model(text, in_text)
    assert config.singular_values.keys() == {*inside, layer}  # the config itself is left as it was
    narrowed = space.narrowed(config)
    assert list(narrowed.blocks) == [*SITES[:2], layer.partition(".self_attn")[0]]
    assert space.narrowed(MemControlConfig()) == space


def test_the_all_off_mask_selects_nothing(unet):
    space = SearchSpace.from_model(unet)
    assert space.apply(MemControlConfig(), space.mask(False)).target_modules == []


def test_unknown_blocks_of_a_mask_are_listed(unet):
    with pytest.raises(ValueError, match=r"names 2 block.*lacks: a, b; it has: down_blocks"):
        SearchSpace.from_model(unet).apply(MemControlConfig(), {"a": True, "b": False, SITES[0]: True})


@pytest.mark.parametrize("granularity", ["block", "site", "module", ["to_q$", "to_k$"]])
def test_the_names_of_a_mask_tell_its_granularity(unet, granularity):
    text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
                                                num_attention_heads=2))  # fmt: skip
    for encoders in ({}, {"text_encoder": text_encoder}):
        space = SearchSpace.from_model(unet, granularity, encoders)
        assert granularity_of_names(space.blocks) == (granularity if isinstance(granularity, str) else None)


def test_a_mask_of_another_granularity_is_known_by_its_names(unet):
    sites = SearchSpace.from_model(unet, "site").mask(True)
    with pytest.raises(ValueError, match=r"\(by its names, it is a mask of --granularity site\)$"):
        SearchSpace.from_model(unet).check(sites)


def test_a_mask_holds_booleans(unet):
    with pytest.raises(ValueError, match="a mask holds booleans"):
        SearchSpace.from_model(unet).check({SITES[0]: "yes"})


def test_blocks_without_anything_to_tune_are_an_error(unet):
    space = SearchSpace.from_model(unet, ["to_q$", "norm"])
    with pytest.raises(ValueError, match=r"MemControlConfig \(norm\) finds no module to tune in the blocks to_q"):
        space.apply(MemControlConfig(method="norm"), {"to_q$": True})


def test_a_method_without_target_modules_is_refused(unet):
    with pytest.raises(ValueError, match="PromptTuningConfig has no `target_modules`"):
        SearchSpace.from_model(unet).apply(peft.PromptTuningConfig(num_virtual_tokens=2), {})


def test_a_granularity_is_a_name_or_a_list_of_expressions():
    for granularity, expected in (
        (["module"], "module"),
        (["site"], "site"),
        (["module", "to_q"], ["module", "to_q"]),
    ):
        assert granularity_of(ScriptArguments(granularity=granularity)) == expected
    with pytest.raises(ValueError, match="unknown granularity 'blocks': use block, site, module, or regular"):
        granularity_of(ScriptArguments(granularity=["blocks"]))
