"""An adapter from elsewhere is loaded whole, or refused before the first attack."""

import json

import peft
import pytest
import torch
from conftest import adapter_folder, images_of, tiny_pipeline
from safetensors.torch import load_file, save_file
from test_audit import audit, folder_of

from memcontrol_hf.adapter_folder import ADAPTER, CONFIG, LORA
from memcontrol_hf.adapters import load_adapter
from memcontrol_hf.cli import main


def lora(folder, init=False):
    """A folder with a LoRA of PEFT, and in it the same LoRA as a file of diffusers."""
    pipeline = tiny_pipeline()
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=init)
    adapted = peft.get_peft_model(pipeline.unet, config)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    state = peft.get_peft_model_state_dict(adapted)
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    pipeline.save_lora_weights(folder / "diffusers", unet_lora_layers=state)
    return folder


def half(tensors):
    return dict(list(tensors.items())[: len(tensors) // 2])


DAMAGES = {
    "another tensor alone": lambda tensors: {"x": torch.zeros(1)},
    "no tensor": lambda tensors: {},
    "foreign prefixes": lambda tensors: {f"other.{name}": tensor for name, tensor in tensors.items()},
    "half of the tensors": half,
    "every second tensor": lambda tensors: dict(list(tensors.items())[::2]),
    "one tensor more": lambda tensors: {**tensors, "unet.elsewhere.lora_A.weight": torch.zeros(2, 8)},
    "a value that is not finite": lambda tensors: {name: tensor / 0 for name, tensor in tensors.items()},
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["ours", "peft", "diffusers"])
def test_an_adapter_that_was_not_loaded_whole_is_refused(tmp_path, kind, damage):
    if kind == "ours":
        file = adapter_folder(tmp_path / "adapter") / ADAPTER
    else:
        file = lora(tmp_path) / (ADAPTER if kind == "peft" else f"diffusers/{LORA}")
    tensors = load_file(file)
    if kind == "diffusers" and damage == "half of the tensors":
        tensors = dict(sorted(tensors.items(), key=lambda item: "lora_B" in item[0]))  # an A without its B
    save_file(DAMAGES[damage](tensors), file)
    pipeline, fresh = tiny_pipeline(), tiny_pipeline()
    with pytest.raises(ValueError, match="cannot load the adapter"):
        load_adapter(pipeline, file.parent)
    after, before = pipeline.unet.state_dict(), fresh.unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("content", [b"", b"\x08" + bytes(7) + b"{}      ", b"\xff" * 64])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path, content):
    (lora(tmp_path) / ADAPTER).write_bytes(content)
    with pytest.raises(ValueError, match="cannot load the adapter"):
        load_adapter(tiny_pipeline(), tmp_path)


def test_weights_that_are_a_pickle_are_not_read(tmp_path, monkeypatch):
    tensors = load_file(lora(tmp_path) / "diffusers" / LORA)
    for name, given in (("folder/pytorch_lora_weights.bin", "folder"), ("lora.bin", "lora.bin")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save(tensors, tmp_path / name)
        monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
        with pytest.raises(ValueError, match=r"cannot load the adapter .*safetensors"):
            load_adapter(tiny_pipeline(), tmp_path / given)


@pytest.mark.parametrize("rank", [10**9, 2**62])
def test_a_rank_that_the_weights_do_not_have_takes_no_memory(tmp_path, rank):
    config = json.loads((lora(tmp_path) / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "r": rank}))
    with pytest.raises(ValueError, match=rf"r is {rank} in adapter_config.json"):
        load_adapter(tiny_pipeline(), tmp_path)


@pytest.mark.parametrize("change", [{"init_lora_weights": "pissa"}, {"bias": "all"}, {"modules_to_save": ["conv_in"]}])
def test_an_adapter_that_changes_the_base_itself_is_refused_and_the_base_is_as_before(tmp_path, change):
    config = json.loads((lora(tmp_path) / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | change))
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match="the base has to stay as it is"):
        load_adapter(pipeline, tmp_path)
    after, before = pipeline.unet.state_dict(), tiny_pipeline().unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_an_adapter_that_changes_nothing_is_named_before_any_attack(tmp_path, monkeypatch):
    monkeypatch.setattr("memcontrol_hf.audit.audit.attack_pipeline", lambda *_, **__: pytest.fail("an attack began"))
    with pytest.raises(
        ValueError, match="changes nothing: with it, the model predicts exactly what its base predicts"
    ):
        audit(pipeline=tiny_pipeline(), adapter=lora(tmp_path, init=True))


def test_the_command_does_not_pass_what_was_never_loaded(tmp_path, capsys):
    save_file({"x": torch.zeros(1)}, adapter_folder(tmp_path / "adapter") / ADAPTER)
    tiny_pipeline().save_pretrained(tmp_path / "base")
    for name, seed in (("train", 1), ("held_out", 2)):
        folder_of(images_of(12, seed=seed), tmp_path / name)
        lines = [json.dumps({"file_name": f"{i}.png", "text": "a scan"}) for i in range(12)]
        (tmp_path / name / "metadata.jsonl").write_text("\n".join(lines))
    sets = [f"--train={tmp_path / 'train'}", f"--held_out={tmp_path / 'held_out'}"]
    model = [
        f"--pipeline={tmp_path / 'base'}",
        f"--adapter={tmp_path / 'adapter'}",
        f"--output_dir={tmp_path / 'out'}",
    ]
    sizes = ["--encoder=demo", "--resolution=16", "--num_prompts=2", "--images_per_prompt=3", "--inference_steps=1"]
    assert main(["audit", *sets, *model, *sizes, "--device=cpu"]) == 2
    assert "cannot load the adapter" in capsys.readouterr().err
