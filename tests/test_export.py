"""Every export is read back by the stock loaders and draws what the adapter draws."""

import copy
import re
import shutil

import pytest
import torch
from conftest import adapter_folder, small_report, tiny_pipeline
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from peft import LoHaConfig, LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file

from memcontrol_hf import MemControlConfig, MemorizationReport, cli
from memcontrol_hf.adapter_checks import base_weights, check_base
from memcontrol_hf.publish.export import export
from memcontrol_hf.report.card import render_card

MASK = {"mid_block.attentions.0": True, "up_blocks.1.attentions.0": True}
LORA = LoraConfig(r=3, lora_alpha=5, rank_pattern={"to_q": 2}, target_modules=["to_q", "to_v"])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tiny-sd"
    tiny_pipeline().save_pretrained(folder)
    return folder


def adapter_of(tmp_path, config):
    method = getattr(config, "method", config.peft_type.value.lower())
    card = {"hub_model_id": "tester/x", "denoiser": "unet"}
    report = small_report(base_model="tiny-sd", method=method, mask=MASK, card=card)
    return adapter_folder(tmp_path / "adapter", config=config, mask=MASK, report=report)


def draw(pipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    pipe.set_progress_bar_config(disable=True)
    images = pipe("abc", num_inference_steps=2, generator=generator, output_type="latent", height=16, width=16).images
    return images.detach()


def with_adapter(base, folder) -> torch.Tensor:
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.unet = PeftModel.from_pretrained(pipe.unet, folder)
    return draw(pipe)


@pytest.mark.parametrize(
    "config",
    [LORA, LoHaConfig(r=2, target_modules=["to_q"])]
    + [MemControlConfig(method=m) for m in ("svdiff", "difffit", "weights", "norm", "bias")],
    ids=lambda config: getattr(config, "method", config.peft_type.value),
)
def test_a_merged_pipeline_draws_what_the_adapter_draws(base, tmp_path, config):
    folder = adapter_of(tmp_path, config)
    assert cli.main([*command(folder, tmp_path / "out", "merged"), "--pipeline", str(base)]) == 0
    merged = draw(StableDiffusionPipeline.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(merged, with_adapter(base, folder), atol=2e-4, rtol=1e-4)
    assert (merged - draw(StableDiffusionPipeline.from_pretrained(base))).abs().max() > 1e-3
    for file in (tmp_path / "out").rglob("*.json"):
        assert str(base.parent) not in file.read_text(), file
    text = ModelCard.load(tmp_path / "out" / "README.md").text
    assert 'DiffusionPipeline.from_pretrained("out")' in text
    assert "This is a whole pipeline: **tiny-sd** with a small addition" in text
    assert "adapter for" not in text and "addition to" not in text


@pytest.mark.parametrize("config", [LORA, MemControlConfig(method="svdiff")], ids=["lora", "svdiff"])
def test_what_the_card_says_of_load_lora_weights_is_what_diffusers_says(base, tmp_path, config, caplog):
    folder = adapter_of(tmp_path, config)
    pipe = StableDiffusionPipeline.from_pretrained(base)
    before, said = draw(pipe), re.search(r'does not read this adapter \("(.*?)"', render_card(folder))[1]
    try:
        pipe.load_lora_weights(folder)
    except ValueError as error:
        assert said in str(error)
    else:
        assert said in caplog.text
    assert torch.equal(draw(pipe), before)


def command(folder, output_dir, to) -> list[str]:
    return ["export", str(folder), "--to", to, "--output_dir", str(output_dir)]


def test_a_lora_exports_exactly_to_load_lora_weights(base, tmp_path, capsys):
    folder = adapter_of(tmp_path, LORA)
    assert cli.main([*command(folder, tmp_path / "out", "lora"), "--pipeline", str(base)]) == 0
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.load_lora_weights(tmp_path / "out")
    torch.testing.assert_close(draw(pipe), with_adapter(base, folder), atol=1e-5, rtol=1e-5)
    assert float(re.search("relative error of the change of the weights: (.*)", capsys.readouterr().out)[1]) < 1e-6
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert 'pipe.load_lora_weights("out")' in card.text and "converted" not in card.text
    assert "memcontrol_hf  # registers" not in card.text and card.data.library_name == "diffusers"


def test_another_method_exports_to_a_truncated_svd_whose_error_is_stated(base, tmp_path):
    folder = adapter_of(tmp_path, MemControlConfig(method="svdiff"))
    errors = {}
    for rank in (1, 3, 64):
        out = tmp_path / f"rank{rank}"
        export(folder, out, "lora", pipeline=str(base), rank=rank)
        facts = MemorizationReport.from_json(out / "memorization_report.json").card["export"]
        errors[rank] = facts["relative_error"]
        assert errors[rank] == pytest.approx(error_of(base, folder, out), rel=1e-3, abs=1e-6)
    assert 1 > errors[1] > errors[3] > errors[64] and errors[64] < 1e-5, "of full rank it is exact"
    stated = f"up to a relative error of {errors[1]:.2g}"
    assert stated in ModelCard.load(tmp_path / "rank1" / "README.md").text
    assert "exact up to rounding" in ModelCard.load(tmp_path / "rank64" / "README.md").text
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.load_lora_weights(tmp_path / "rank64")
    torch.testing.assert_close(draw(pipe), with_adapter(base, folder), atol=2e-4, rtol=1e-4)


def error_of(base, folder, lora) -> float:
    """The error of the change, on the outputs of the linear maps themselves: another way to the same number."""
    weights = {}
    for name in ("base", "adapter", "lora"):
        pipe = StableDiffusionPipeline.from_pretrained(base)
        if name == "adapter":
            pipe.unet = PeftModel.from_pretrained(pipe.unet, folder).merge_and_unload()
        if name == "lora":
            pipe.load_lora_weights(lora)
            for module in pipe.unet.modules():
                if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer"):
                    module.base_layer.weight.data += module.get_delta_weight("default_0")
        state = copy.deepcopy(pipe.unet.state_dict())
        state = {key.replace(".base_layer", ""): value for key, value in state.items() if "lora_" not in key}
        weights[name] = torch.cat([state[key].flatten() for key in sorted(state)])
    return ((weights["lora"] - weights["adapter"]).norm() / (weights["base"] - weights["adapter"]).norm()).item()


def test_what_a_lora_cannot_hold_counts_as_error(base, tmp_path):
    folder = adapter_of(tmp_path, MemControlConfig(method="difffit"))
    export(folder, tmp_path / "out", "lora", pipeline=str(base))
    error = MemorizationReport.from_json(tmp_path / "out" / "memorization_report.json").card["export"][
        "relative_error"
    ]
    assert 0.1 < error < 1, "norms and biases are lost"


def test_a_plain_peft_adapter_needs_nothing_of_this_package(base, tmp_path):
    folder = adapter_of(tmp_path, LORA)
    export(folder, tmp_path / "out", "peft")
    assert type(PeftConfig.from_pretrained(tmp_path / "out")) is LoraConfig
    torch.testing.assert_close(with_adapter(base, tmp_path / "out"), with_adapter(base, folder))
    text = ModelCard.load(tmp_path / "out" / "README.md").text
    assert "memcontrol_hf  #" not in text
    assert 'PeftModel.from_pretrained(pipe.unet, "out")' in text


@pytest.mark.parametrize(
    ("method", "to", "message"),
    [
        ("svdiff", "peft", "PEFT alone cannot read the method 'svdiff': export it to merged or lora"),
        ("norm", "lora", "changes biases and norms but no weight matrix"),
        ("svdiff", "merged", "cannot load the pipeline 'tiny-sd'.*with --pipeline"),
    ],
)
def test_what_cannot_be_exported_is_said(base, tmp_path, capsys, method, to, message):
    folder = adapter_of(tmp_path, MemControlConfig(method=method))
    more = ["--pipeline", str(base)] if to == "lora" else []
    assert cli.main([*command(folder, tmp_path / "out", to), *more]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_weights_that_no_digest_binds_to_their_audit_are_not_exported(tmp_path, capsys):
    folder = adapter_of(tmp_path, LORA)
    report = MemorizationReport.from_json(folder / "memorization_report.json")
    report.weights = {}
    report.to_json(folder / "memorization_report.json")
    assert cli.main(command(folder, tmp_path / "out", "peft")) == 2
    said = capsys.readouterr().err
    assert "adapter_model.safetensors in " in said and "not what memorization_report.json was measured on" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [MemControlConfig(method=m) for m in ("svdiff", "norm", "bias")])
def test_the_export_that_a_card_names_is_one_that_can_be_made(base, tmp_path, config):
    folder = adapter_of(tmp_path, config)
    words = re.search(r"`memcontrol export FOLDER --to (\w+) ", render_card(folder))
    assert words[1] == ("lora" if config.method == "svdiff" else "merged")
    assert cli.main([*command(folder, tmp_path / "out", words[1]), "--pipeline", str(base)]) == 0


def test_the_card_names_no_lora_for_text_encoders_and_for_pipelines_that_read_none(tmp_path):
    folder = adapter_of(tmp_path, LORA)
    assert "--to lora" in render_card(folder)
    report = MemorizationReport.from_json(folder / "memorization_report.json")
    report.card["without_lora"] = True
    report.to_json(folder / "memorization_report.json")
    text = render_card(folder)
    assert "--to merged" in text and "--to lora" not in text and "load_lora_weights" not in text
    report.card = {}
    report.to_json(folder / "memorization_report.json")
    (folder / "text_encoder").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(folder / name, folder / "text_encoder" / name)
    text = render_card(folder)
    assert "a LoRA file cannot hold it" in text and "--to merged" in text and "--to lora" not in text


def test_another_base_than_the_one_that_was_measured_is_refused(base, tmp_path, capsys):
    folder = adapter_of(tmp_path, MemControlConfig(method="svdiff"))
    report = MemorizationReport.from_json(folder / "memorization_report.json")
    report.training["base_weights"] = base_weights(StableDiffusionPipeline.from_pretrained(base).unet)
    report.to_json(folder / "memorization_report.json")
    other = StableDiffusionPipeline.from_pretrained(base)
    with torch.no_grad():
        other.unet.conv_in.bias += 0.01
    other.save_pretrained(tmp_path / "other")
    assert cli.main([*command(folder, tmp_path / "out", "merged"), "--pipeline", str(tmp_path / "other")]) == 2
    assert "is not the base that this adapter was trained on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main([*command(folder, tmp_path / "out", "merged"), "--pipeline", str(base)]) == 0


def test_a_base_is_known_again_in_another_precision(base):
    unet = StableDiffusionPipeline.from_pretrained(base).unet
    trained = {"base_weights": base_weights(copy.deepcopy(unet).bfloat16())}
    check_base(trained, unet, "base")
    check_base({}, unet, "a report of before")
    unet.conv_in.weight.data[0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match="'other' is not the base"):
        check_base(trained, unet, "other")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", [MemControlConfig(method="svdiff"), LORA], ids=["svdiff", "lora"])
def test_an_export_adds_to_the_base_in_the_precision_of_the_training(base, tmp_path, dtype, config):
    folder = adapter_of(tmp_path, config)
    low = StableDiffusionPipeline.from_pretrained(base, dtype=dtype)
    report = MemorizationReport.from_json(folder / "memorization_report.json")
    report.training["base_weights"] = base_weights(low.unet)
    report.to_json(folder / "memorization_report.json")
    measured = PeftModel.from_pretrained(low.unet, folder).merge_and_unload().state_dict()
    export(folder, tmp_path / "merged", "merged", pipeline=str(base))
    merged = load_file(tmp_path / "merged" / "unet" / "diffusion_pytorch_model.safetensors")
    assert merged.keys() == measured.keys()
    assert all(torch.equal(merged[name], measured[name]) for name in measured)
    said = export(folder, tmp_path / "lora", "lora", pipeline=str(base))
    assert float(said.rpartition(" ")[2]) < (0.02 if config is not LORA else 1e-6), "of full rank"


def test_an_export_takes_the_variant_of_the_base_that_was_trained_on(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "base")
    pipe = tiny_pipeline()
    pipe.unet.conv_in.bias.data += 1
    pipe.save_pretrained(tmp_path / "base", variant="fp16")
    folder = adapter_of(tmp_path, LORA)
    report = MemorizationReport.from_json(folder / "memorization_report.json")
    report.card["base_variant"] = "fp16"
    report.to_json(folder / "memorization_report.json")
    export(folder, tmp_path / "out", "merged", pipeline=str(tmp_path / "base"))
    merged = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(merged["conv_in.bias"], pipe.unet.conv_in.bias)


def test_nothing_is_overwritten_and_no_other_folder_taken(tmp_path, capsys):
    folder = adapter_of(tmp_path, LORA)
    assert cli.main(command(folder, folder, "peft")) == 2
    assert "is there and not empty" in capsys.readouterr().err
    assert cli.main(command(tmp_path, tmp_path / "out", "peft")) == 2
    assert "holds no adapter_model.safetensors" in capsys.readouterr().err
