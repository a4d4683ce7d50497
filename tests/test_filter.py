"""A filtered adapter: a smaller effect, or fewer blocks, and nothing else."""

import json

import peft
import pytest
import torch
from conftest import adapter_folder, tiny_pipeline, tiny_unet
from peft import PeftModel
from safetensors.torch import load_file

from memcontrol_hf import MemControlConfig
from memcontrol_hf.adapters import load_adapter
from memcontrol_hf.cli import main
from memcontrol_hf.publish.export import export
from memcontrol_hf.publish.filter import filter_adapter
from memcontrol_hf.publish.spectral import PRINCIPAL_ENERGY
from memcontrol_hf.screening import Screening

MID, UP = "mid_block.attentions.0", "up_blocks.0.attentions.0"
LAST = "up_blocks.1.attentions.1"


def merged(folder) -> dict[str, torch.Tensor]:
    """The weights of the tiny UNet with an adapter, by name."""
    return PeftModel.from_pretrained(tiny_unet(), str(folder)).merge_and_unload().state_dict()


def blocks_of(unet) -> list[str]:
    return sorted({name for name, _ in unet.named_modules() if name.endswith("attentions.0")})


@pytest.mark.parametrize(
    "config",
    [*(MemControlConfig(method=method) for method in ("weights", "bias", "norm")), peft.LoraConfig(r=2)],
    ids=["weights", "bias", "norm", "lora"],
)
def test_half_the_effect_is_half_the_change_of_the_weights(tmp_path, config):
    folder = adapter_folder(tmp_path / "adapter", config)
    filter_adapter(folder, tmp_path / "half", shrink=0.5)
    base, whole, half = tiny_unet().state_dict(), merged(folder), merged(tmp_path / "half")
    assert any(not torch.equal(base[name], whole[name]) for name in base)
    for name, weight in base.items():
        torch.testing.assert_close(half[name] - weight, (whole[name] - weight) / 2, atol=1e-5, rtol=1e-4)


def test_half_the_effect_of_sv_diff_is_half_the_shift(tmp_path):
    folder = adapter_folder(tmp_path / "adapter")
    filter_adapter(folder, tmp_path / "half", shrink=0.5)
    whole, half = (peft.utils.load_peft_weights(str(path), device="cpu") for path in (folder, tmp_path / "half"))
    assert whole.keys() == half.keys() and all(torch.equal(half[name], whole[name] / 2) for name in whole)
    assert sorted(file.name for file in (tmp_path / "half").iterdir()) == [
        *("adapter_config.json", "adapter_model.safetensors")
    ], "no report and no card: what they say is not of this adapter"


@pytest.mark.parametrize("config", [MemControlConfig(method="svdiff"), peft.LoraConfig(r=2)], ids=["svdiff", "lora"])
def test_a_block_that_is_left_out_is_the_bases_again(tmp_path, config):
    first, second, *_ = blocks_of(tiny_unet())
    folder = adapter_folder(tmp_path / "adapter", config, mask={first: True, second: True})
    filter_adapter(folder, tmp_path / "less", drop=[first])
    base, whole, less = tiny_unet().state_dict(), merged(folder), merged(tmp_path / "less")
    for name, weight in base.items():
        torch.testing.assert_close(less[name], weight if name.startswith(first) else whole[name])
    assert any(not torch.equal(less[name], weight) for name, weight in base.items())
    pipeline = tiny_pipeline()
    load_adapter(pipeline, tmp_path / "less")  # the audit loads it whole


def test_a_screening_says_which_blocks_are_left_out(tmp_path):
    first, second, *_ = blocks_of(tiny_unet())
    folder = adapter_folder(tmp_path / "adapter", mask={first: True, second: True})
    zeros = {first: 0.0, second: 0.0}
    Screening({first: 1.0, second: -1.0}, {first: 0.1, second: 5.0}, zeros, zeros, {first: 9, second: 9}).to_json(
        tmp_path / "screening.json"
    )
    said = filter_adapter(folder, tmp_path / "less", screening=tmp_path / "screening.json")
    assert f"without {second}" in said
    names = peft.utils.load_peft_weights(str(tmp_path / "less"), device="cpu")
    assert names and all(first in name for name in names)


def changes(folder) -> dict[str, torch.Tensor]:
    """The changes of the weights of the tiny UNet by an adapter, `[out, in * kernel]`, by the name of the weight."""
    base, whole = tiny_unet().state_dict(), merged(folder)
    found = {
        name: (whole[name].double() - weight.double()).flatten(1) for name, weight in base.items() if weight.ndim > 1
    }
    return {name: change for name, change in found.items() if change.abs().max() > 1e-5}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """The folder of the base of the adapters."""
    tiny_pipeline().save_pretrained(folder := tmp_path_factory.mktemp("base"))
    return str(folder)


@pytest.mark.parametrize("config", [MemControlConfig(method="weights"), peft.LoraConfig(r=4)], ids=["weights", "lora"])
def test_channels_far_from_the_principal_directions_of_the_base_are_removed(tmp_path, base, config):
    folder = adapter_folder(tmp_path / "adapter", config)
    filter_adapter(folder, tmp_path / "less", spectral=0.5, pipeline=base)
    whole, less, weights = changes(folder), changes(tmp_path / "less"), tiny_unet().state_dict()
    assert whole.keys() == less.keys()
    for name, change in whole.items():
        u, s, vh = torch.linalg.svd(weights[name].double().flatten(1))
        k = 1 + next(k for k in range(len(s)) if (s[: k + 1] ** 2).sum() >= PRINCIPAL_ENERGY * (s**2).sum())
        left, sizes, right = torch.linalg.svd(change, full_matrices=False)
        count = 4 if isinstance(config, peft.LoraConfig) else len(sizes)
        channels = [sizes[i] * torch.outer(left[:, i], right[i]) for i in range(count)]
        aligned = [
            sum((u[:, j] @ left[:, i]) ** 2 for j in range(k)) * sum((vh[j] @ right[i]) ** 2 for j in range(k))
            for i in range(count)
        ]
        best = sorted(range(count), key=lambda i: aligned[i])[round(count / 2) :]
        torch.testing.assert_close(less[name], sum(channels[i] for i in best), atol=1e-5, rtol=1e-4)
    shapes = [
        {n: t.shape for n, t in load_file(f / "adapter_model.safetensors").items()}
        for f in (folder, tmp_path / "less")
    ]
    assert shapes[0] == shapes[1], "the rank of the configuration still holds"
    load_adapter(tiny_pipeline(), tmp_path / "less")  # the audit loads it whole


def test_the_channels_of_sv_diff_are_those_of_the_base(tmp_path):
    folder = adapter_folder(tmp_path / "adapter")
    filter_adapter(folder, tmp_path / "less", spectral=0.25)  # no base is read
    whole, less = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "less"))
    for name, shifts in whole.items():
        kept = len(shifts) - round(len(shifts) / 4)
        assert torch.equal(less[name][:kept], shifts[:kept]) and not less[name][kept:].any() and shifts[kept:].any()


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (MemControlConfig(method="bias"), {"pipeline": "demo"}, "changes no matrix"),
        (MemControlConfig(method="norm"), {"pipeline": "demo"}, "changes no matrix"),
        (peft.LoraConfig(r=1), {}, "of the channels of each matrix is less than one"),
        (peft.LoraConfig(r=2), {"pipeline": "demo"}, "give the adapter's own base with --pipeline"),
        (peft.LoraConfig(r=2, use_dora=True), {}, "of which no channels are known"),
        (peft.LoraConfig(r=2), {"pipeline": None}, "nothing names here: give --pipeline"),
    ],
    ids=["bias", "norm", "rank 1", "other base", "dora", "no base"],
)
def test_what_has_no_channels_to_filter_is_said_and_writes_nothing(tmp_path, base, config, arguments, message):
    folder = adapter_folder(tmp_path / "adapter", config)
    if arguments.get("pipeline", base) is None:
        (folder / "memorization_report.json").unlink()
    with pytest.raises(ValueError, match=message):
        filter_adapter(folder, tmp_path / "out", spectral=0.4, **{"pipeline": base, **arguments})
    assert not (tmp_path / "out").exists()


def test_selected_singular_values_of_a_block_go_with_it(tmp_path):
    modules = [f"{block}.transformer_blocks.0.attn1.to_q" for block in (MID, LAST)]
    config = MemControlConfig(method="svdiff", singular_values={name: [0, 1] for name in modules})
    folder = adapter_folder(tmp_path / "adapter", config, mask={MID: True, LAST: True})
    filter_adapter(folder, tmp_path / "out", drop=[LAST])
    left = PeftModel.from_pretrained(tiny_unet(), str(tmp_path / "out")).peft_config["default"]
    assert left.singular_values == {modules[0]: [0, 1]} and left.mask[LAST] is False


def made_up_screening(folder, learns: dict[str, float], memorizes: float) -> str:
    unknown = dict.fromkeys(learns, 0.1)
    screening = Screening(learns, dict.fromkeys(learns, memorizes), unknown, unknown, dict.fromkeys(learns, 8))
    screening.to_json(folder / "screening.json")
    return str(folder / "screening.json")


@pytest.mark.parametrize(
    ("learns", "message"),
    [
        ({"transformer_blocks.0": 0.5}, "tunes nothing in any block .* such as transformer_blocks.0: that is"),
        ({MID: 0.5, UP: 0.5}, "has all blocks on in which the adapter tunes something, so nothing would be left out"),
    ],
)
def test_a_screening_that_leaves_nothing_out_is_no_remedy(tmp_path, learns, message):
    folder, screening = adapter_folder(tmp_path / "adapter"), made_up_screening(tmp_path, learns, 0.1)
    with pytest.raises(ValueError, match=message):
        filter_adapter(folder, tmp_path / "out", screening=screening)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["[1]", '{"peft_type": "LO'])
def test_a_configuration_that_is_none_is_named(tmp_path, content):
    folder = adapter_folder(tmp_path / "adapter")
    (folder / "adapter_config.json").write_text(content)
    for write in (
        lambda: filter_adapter(folder, tmp_path / "out", shrink=0.5),
        lambda: export(folder, tmp_path / "out", "merged"),
    ):
        with pytest.raises(ValueError, match=r"adapter_config\.json' (cannot be read|holds no configuration)"):
            write()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_cannot_be_read_is_named(tmp_path, name):
    folder = adapter_folder(tmp_path / "adapter")
    (folder / name).write_text("{")
    with pytest.raises(ValueError, match=r"adapter.* cannot be read: "):
        filter_adapter(folder, tmp_path / "out", shrink=0.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to do: give --shrink, --drop, --screening or --spectral"),
        (["--shrink", "1"], "--shrink must lie between 0 and 1, but is 1"),
        (["--spectral", "0"], "--spectral must lie between 0 and 1, but is 0"),
        (["--shrink", "0.5", "--pipeline", "demo"], "--pipeline 'demo' is for --spectral alone"),
        (["--drop", "up_blocks.9"], "tunes nothing in a block 'up_blocks.9'"),
        (["--drop", "mid_block"], "nothing would be left of the adapter"),
    ],
)
def test_what_cannot_be_filtered_is_said_and_writes_nothing(tmp_path, capsys, words, message):
    folder = adapter_folder(tmp_path / "adapter")
    assert main(["filter", str(folder), "--output_dir", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_command_says_that_the_report_does_not_hold_any_more(tmp_path, capsys):
    folder = adapter_folder(tmp_path / "adapter")
    words = ["filter", str(folder), "--output_dir", str(tmp_path / "out"), "--shrink", "0.5"]
    assert main(words) == 0
    assert "it was not audited" in (said := capsys.readouterr().out) and f"--adapter {tmp_path / 'out'}" in said
    assert main(words) == 2 and "not empty" in capsys.readouterr().err
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "OFT"}))
    assert main([*words[:3], str(tmp_path / "other"), *words[4:]]) == 2
    assert "is a OFT, of which this command knows no filter" in capsys.readouterr().err
