"""Every method of the tuner, on every kind of model, must pass the same checks as PEFT's own methods."""

import copy
import gc
import io
import json
import re
import warnings
import weakref
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache

import numpy as np
import peft.mapping
import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.checkpoint import checkpoint

from memcontrol_hf.tuners import (
    METHODS,
    MemControlConfig,
    MemControlLayer,
    MemControlModel,
    register,
    svd,
    tunable_modules,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class MLP(nn.Module):
    """An embedding, a norm and two linear layers, the last one named as an attention's output."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 12)
        self.to_out = nn.Sequential(nn.Linear(12, 5))
        self.gradient_checkpointing = False

    def forward(self, ids):
        x = self.fc(self.norm(self.emb(ids))).tanh()
        if self.gradient_checkpointing:
            return checkpoint(self.to_out, x, use_reentrant=False)
        return self.to_out(x)


class ConvNet(nn.Module):
    """Convolutions in one and two dimensions with group norms."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.conv_out = nn.Conv2d(8, 4, 3, stride=2, padding=1, groups=2)
        self.conv1d = nn.Conv1d(4, 3, 2, bias=False)
        self.gradient_checkpointing = False

    def body(self, x):
        return self.conv_out(self.norm(x).tanh()).flatten(2)

    def forward(self, x):
        x = self.conv_in(x)
        x = checkpoint(self.body, x, use_reentrant=False) if self.gradient_checkpointing else self.body(x)
        return self.conv1d(x)


def tiny_unet():
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def tiny_dit():
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


MODELS = {
    # name: class, prefix of the tuned block
    "mlp": (MLP, ""),
    "conv": (ConvNet, ""),
    "unet": (tiny_unet, "down_blocks.0.attentions.0"),
    "dit": (tiny_dit, "transformer_blocks.0"),
}


@cache
def pretrained(name):
    """A base model with no parameter left at the zeros and ones of its initialization."""
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@dataclass
class Case:
    method: str
    model: str

    def base(self, dtype=torch.float32):
        model = copy.deepcopy(pretrained(self.model))
        return model if dtype == torch.float32 else model.to(dtype)

    def targets(self):
        return tunable_modules(pretrained(self.model), self.method, MODELS[self.model][1])

    def config(self, **kwargs):
        return MemControlConfig(**{"method": self.method, "target_modules": self.targets(), **kwargs})

    def adapted(self, dtype=torch.float32, seed=1, **kwargs):
        """The base model with an adapter that was moved away from its start."""
        model = get_peft_model(self.base(dtype), self.config(**kwargs))
        disturb(model, "default", seed)
        return model.eval()

    def run(self, model, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        noise = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
        if self.model == "mlp":
            return model(torch.arange(10).view(2, 5))
        if self.model == "conv":
            return model(noise(2, 3, 6, 6))
        if self.model == "unet":
            return model(noise(1, 4, 8, 8), torch.tensor([7]), encoder_hidden_states=noise(1, 3, 8)).sample
        return model(noise(1, 4, 8, 8), noise(1, 3, 8), noise(1, 8), torch.tensor([7])).sample

    def base_output(self):
        return base_output(self.model)

    def kinds(self):
        """For each target module, the parameters that the method should train in it."""
        for name in self.targets():
            module = pretrained(self.model).get_submodule(name)
            is_norm = "Norm" in type(module).__name__
            has_bias = getattr(module, "bias", None) is not None
            if self.method == "svdiff":
                yield name, module, ["delta"]
            elif self.method == "bias":
                yield name, module, ["bias"]
            elif self.method in ("weights", "norm") or is_norm:
                yield name, module, ["weight"] + has_bias * ["bias"]
            else:
                scaled = name.endswith(("to_out.0", "ff.net.2", "to_add_out", "ff_context.net.2"))
                yield name, module, scaled * ["gamma"] + has_bias * ["bias"]


@cache
def base_output(name):
    return Case("svdiff", name).run(pretrained(name))


def disturb(model, adapter, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(f".{adapter}") and "memcontrol_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def base_bytes(model):
    return {
        name.replace(".base_layer", ""): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "memcontrol_" not in name
    }


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name


def applies(method, model):
    return bool(tunable_modules(pretrained(model), method, MODELS[model][1]))


CASES = [Case(method, model) for model in MODELS for method in METHODS if applies(method, model)]
all_cases = pytest.mark.parametrize("case", CASES, ids=[f"{case.method}-{case.model}" for case in CASES])


def test_the_table_holds_every_method_on_every_model():
    assert len(CASES) == len(METHODS) * len(MODELS)


# Training


@all_cases
def test_a_new_adapter_changes_no_bit_of_the_output(case):
    expected = case.base_output()
    assert torch.equal(case.run(get_peft_model(case.base(), case.config())), expected)


@all_cases
def test_only_the_adapter_learns_and_one_step_changes_the_output(case):
    model = get_peft_model(case.base(), case.config())
    before, bytes_before = case.run(model), base_bytes(model)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all("memcontrol_" in name for name in trainable)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    case.run(model).square().sum().backward()
    assert all(parameter.grad is not None for parameter in trainable.values())
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in trainable)
    optimizer.step()

    assert not torch.equal(case.run(model), before)
    assert_same_tensors(base_bytes(model), bytes_before)


@all_cases
def test_the_parameters_are_those_of_the_method_and_are_counted(case):
    model = get_peft_model(case.base(), case.config())
    expected = {}
    for name, module, kinds in case.kinds():
        sizes = {
            "delta": lambda m=module: min(m.weight.shape[0], m.weight[0].numel()),
            "gamma": lambda m=module: m.out_features,
            "weight": lambda m=module: m.weight.numel(),
            "bias": lambda m=module: m.bias.numel(),
        }
        expected.update({f"base_model.model.{name}.memcontrol_{kind}": sizes[kind]() for kind in kinds})
    actual = {name: tensor.numel() for name, tensor in get_peft_model_state_dict(model).items()}
    assert actual == expected

    base_size = sum(parameter.numel() for parameter in case.base().parameters())
    assert model.get_nb_trainable_parameters() == (sum(expected.values()), base_size + sum(expected.values()))
    with redirect_stdout(io.StringIO()) as printed:
        model.print_trainable_parameters()
    assert f"trainable params: {sum(expected.values()):,} ||" in printed.getvalue()


@all_cases
def test_gradient_checkpointing_gives_the_same_gradients(case):
    def gradients(gradient_checkpointing):
        model = case.adapted()
        base = model.get_base_model()
        if case.model in ("mlp", "conv"):
            base.gradient_checkpointing = gradient_checkpointing
        elif gradient_checkpointing:
            base.enable_gradient_checkpointing()
        model.train()
        case.run(model).square().mean().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert_same_tensors(gradients(True), gradients(False))


@all_cases
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_base_takes_a_float32_adapter(case, dtype):
    base = case.base(dtype)
    expected = case.run(base, dtype)
    model = get_peft_model(base, case.config())
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trainable} == {torch.float32}
    assert torch.equal(case.run(model, dtype), expected)

    disturb(model, "default")
    output = case.run(model, dtype)
    assert output.dtype == dtype and output.isfinite().all() and not torch.equal(output, expected)
    output.float().square().mean().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in trainable)
    bytes_before = base_bytes(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert_same_tensors(base_bytes(model), bytes_before)


# Saving and loading


@all_cases
def test_a_saved_adapter_holds_the_selected_tensors_only_and_comes_back_the_same(case, tmp_path):
    model = case.adapted(mask={"block": True}, search={"sampler": "tpe", "trials": 8})
    expected = case.run(model)
    model.save_pretrained(tmp_path)

    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
    }
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == {
        f"base_model.model.{name}.memcontrol_{kind}" for name, _, kinds in case.kinds() for kind in kinds
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "MEMCONTROL" and config["method"] == case.method
    assert config["mask"] == {"block": True} and config["search"] == {"sampler": "tpe", "trials": 8}
    assert config["target_modules"] == case.targets()

    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    assert torch.equal(case.run(loaded), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    trainable = PeftModel.from_pretrained(case.base(), tmp_path, is_trainable=True)
    assert {name for name, parameter in trainable.named_parameters() if parameter.requires_grad} == {
        name for name, _ in trainable.named_parameters() if "memcontrol_" in name
    }


@all_cases
def test_loading_through_the_meta_device_gives_the_same_model(case, tmp_path):
    model = case.adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(case.run(loaded), case.run(model))


@all_cases
def test_injecting_into_a_model_works_as_wrapping_it(case):
    wrapped = case.adapted()
    model = case.base()
    if hasattr(model, "add_adapter"):
        model.add_adapter(case.config())
    else:
        inject_adapter_in_model(case.config(), model)
    result = set_peft_model_state_dict(model, get_peft_model_state_dict(wrapped))
    assert not result.unexpected_keys
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(case.run(model), case.run(wrapped))
    if hasattr(model, "disable_adapters"):
        model.disable_adapters()
        assert torch.equal(case.run(model), case.base_output())


@all_cases
def test_a_copy_is_a_model_of_its_own(case):
    model = case.adapted()
    expected = case.run(model)
    copied = copy.deepcopy(model)
    disturb(copied, "default", seed=9)
    assert torch.equal(case.run(model), expected)
    assert not torch.equal(case.run(copied), expected)


# Merging


@all_cases
def test_merging_keeps_the_output_and_unmerging_restores_every_byte(case):
    model = case.adapted()
    expected, bytes_before = case.run(model), base_bytes(model)
    model.merge_adapter()
    # DiffFit scales outputs before, weights after the merge; the others compute the very same.
    torch.testing.assert_close(case.run(model), expected, rtol=0, atol=1e-5 if case.method == "difffit" else 0)
    model.unmerge_adapter()
    assert_same_tensors(base_bytes(model), bytes_before)
    assert torch.equal(case.run(model), expected)


@all_cases
def test_an_adapter_that_diverged_leaves_the_base_as_it_was(case):
    model = case.adapted()
    bytes_before = base_bytes(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(float("nan"))
    model.merge_adapter()
    model.unmerge_adapter()
    assert_same_tensors(base_bytes(model), bytes_before)


@all_cases
def test_merge_and_unload_leaves_a_plain_model(case):
    model = case.adapted()
    expected = case.run(model)
    plain = model.merge_and_unload(safe_merge=True)
    assert plain.state_dict().keys() == pretrained(case.model).state_dict().keys()
    assert not any(isinstance(module, MemControlLayer) for module in plain.modules())
    torch.testing.assert_close(case.run(plain), expected, rtol=0, atol=1e-5 if case.method == "difffit" else 0)


@all_cases
@pytest.mark.parametrize("merged", [False, True])
def test_unload_gives_the_base_model_back(case, merged):
    model = case.adapted()
    if merged:
        model.merge_adapter()
    plain = model.unload()
    assert_same_tensors(base_bytes(plain), base_bytes(case.base()))
    assert torch.equal(case.run(plain), case.base_output())


@all_cases
def test_a_safe_merge_refuses_nan_and_leaves_the_layer_as_it_was(case):
    model = case.adapted()
    layer = next(module for module in model.modules() if isinstance(module, MemControlLayer))
    bytes_before = base_bytes(layer)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="adapter default seems broken"):
        model.merge_adapter(safe_merge=True)
    assert_same_tensors(base_bytes(layer), bytes_before)
    assert not layer.merged


# Several adapters


@all_cases
@pytest.mark.parametrize("merged", [False, True])
def test_a_disabled_adapter_leaves_the_base_model(case, merged):
    model = case.adapted()
    if merged:
        model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(case.run(model), case.base_output())
    assert not torch.equal(case.run(model), case.base_output())


@all_cases
def test_adapters_are_switched_and_deleted(case):
    model = case.adapted()
    first = case.run(model)
    model.add_adapter("second", case.config())
    assert torch.equal(case.run(model), first)
    disturb(model, "second", seed=2)
    model.set_adapter("second")
    second = case.run(model)
    assert not torch.equal(second, first)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and all(name.endswith(".second") for name in trainable)

    model.set_adapter("default")
    assert torch.equal(case.run(model), first)
    model.delete_adapter("default")
    assert not any(name.endswith(".default") for name, _ in model.named_parameters())
    model.set_adapter("second")
    assert torch.equal(case.run(model), second)
    model.delete_adapter("second")
    assert not any("memcontrol_" in name for name, _ in model.named_parameters())
    assert torch.equal(case.run(model.base_model.model), case.base_output())


@all_cases
def test_active_adapters_add_up_and_merge_in_any_order(case):
    model = case.adapted()
    model.add_adapter("second", case.config())
    disturb(model, "second", seed=2)
    bytes_before = base_bytes(model)
    model.base_model.set_adapter(["default", "second"])
    both = case.run(model)
    for alone in ("default", "second"):
        model.set_adapter(alone)
        assert not torch.equal(case.run(model), both)
    model.merge_adapter(["second"])
    model.merge_adapter(["default"])
    torch.testing.assert_close(case.run(model), both, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert_same_tensors(base_bytes(model), bytes_before)


@all_cases
def test_the_status_tells_what_is_on(case):
    model = case.adapted()
    status = model.get_model_status()
    assert status.peft_types == {"default": "MEMCONTROL"} and status.adapter_model_type == "MemControlModel"
    assert status.num_adapter_layers == len(case.targets())
    assert status.enabled is True and status.active_adapters == ["default"] and status.merged_adapters == []
    assert status.requires_grad == {"default": True} and status.available_adapters == ["default"]
    assert status.trainable_params == model.get_nb_trainable_parameters()[0]
    model.merge_adapter()
    layers = model.get_layer_status()
    assert [layer.name.removeprefix("model.") for layer in layers] == case.targets()
    assert all(layer.merged_adapters == ["default"] for layer in layers)
    assert all(layer.module_type == "memcontrol.MemControlLayer" for layer in layers)


# SV-DIFF


@pytest.fixture
def svd_calls(monkeypatch):
    """The sizes of the matrices that were decomposed."""
    calls = []
    svd = torch.linalg.svd

    def counted(matrix, **kwargs):
        calls.append(matrix.numel())
        return svd(matrix, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", counted)
    return calls


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Linear(6, 9), (2, 6)),
        (nn.Linear(9, 6), (2, 9)),
        (nn.Conv2d(4, 5, 3), (2, 4, 5, 5)),
        (nn.Conv1d(3, 8, 2), (2, 3, 5)),
    ],
    ids=["tall", "wide", "conv2d", "conv1d"],
)
def test_svdiff_is_the_formula_of_its_paper(layer, size, scale):
    weight = layer.weight.detach().double().numpy()
    u, s, vh = np.linalg.svd(weight.reshape(weight.shape[0], -1), full_matrices=False)
    delta = np.linspace(-2, 1, len(s)) * s.max()  # some singular values would fall below 0
    expected = (u * np.maximum(s + scale * delta, 0)) @ vh

    model = get_peft_model(nn.Sequential(layer), MemControlConfig(target_modules=["0"], scale=scale))
    wrapped = model.base_model.model[0]
    wrapped.memcontrol_delta["default"].data.copy_(torch.from_numpy(delta))
    x = torch.randn(size)
    output = model(x)
    model.merge_adapter()
    np.testing.assert_allclose(wrapped.weight.detach().numpy().reshape(expected.shape), expected, atol=1e-5)
    torch.testing.assert_close(model(x), output)


def test_selected_singular_values_are_shifted_and_the_others_stay(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 9), nn.Conv2d(4, 5, 3))
    whole = get_peft_model(copy.deepcopy(base), MemControlConfig(target_modules=["0", "1"], scale=0.5))
    chosen = {"0": [1, 4]}
    config = MemControlConfig(target_modules=["0", "1"], scale=0.5, singular_values=chosen)
    some = get_peft_model(copy.deepcopy(base), config)
    assert [p.numel() for p in some.parameters() if p.requires_grad] == [2, 5]  # all of a module that is not named
    layers = whole.base_model.model[0], some.base_model.model[0]
    layers[0].memcontrol_delta["default"].data[[1, 4]] = torch.tensor([0.3, -9.0])
    layers[1].memcontrol_delta["default"].data[:] = torch.tensor([0.3, -9.0])
    x = torch.randn(2, 6)
    torch.testing.assert_close(layers[1](x), layers[0](x))
    layers[1](x).sum().backward()
    assert layers[1].memcontrol_delta["default"].grad.shape == (2,)
    output = layers[1](x)
    some.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert loaded.peft_config["default"].singular_values == chosen
    assert torch.equal(loaded.base_model.model[0](x), output)
    loaded.merge_adapter()
    torch.testing.assert_close(loaded.base_model.model[0](x), output)
    loaded.unmerge_adapter()
    loaded.add_adapter("other", MemControlConfig(target_modules=["0"]))
    loaded.delete_adapter("default")
    assert not loaded.base_model.model[0].memcontrol_selected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"singular_values": {"0": [0, 6]}}, "names number 6, but there are 6, from 0"),
        ({"singular_values": {"0": []}}, "at least one, but is []; leave a module without any out"),
        ({"singular_values": {"0": [2, 1]}}, "in ascending order, at least one, but is [2, 1]"),
        ({"singular_values": {"0": [1, 1]}}, "ascending order"),
        ({"singular_values": {"0": [-1]}}, "whole numbers from 0"),
        ({"singular_values": {"0": [0.5]}}, "whole numbers from 0"),
        ({"singular_values": {"00": [0]}}, "names modules that target_modules does not match: 00"),
        ({"singular_values": {"0": [0]}, "method": "bias"}, "are tuned by method='svdiff', not by 'bias'"),
    ],
    ids=["too large", "none", "not ascending", "twice", "negative", "no whole number", "no target", "another method"],
)
def test_singular_values_that_a_module_lacks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        get_peft_model(nn.Sequential(nn.Linear(6, 9)), MemControlConfig(target_modules=["0"], **arguments))


def test_the_factors_of_a_weight_are_computed_once_and_shared_by_adapters_copies_and_trials(svd_calls):
    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
    reloaded = copy.deepcopy(base)
    x = torch.randn(2, 6)
    for _trial in range(2):
        model = get_peft_model(base, MemControlConfig(target_modules=["0", "1"]))
        model(x)
        model(x)
        model.add_adapter("second", MemControlConfig(target_modules=["0", "1"]))
        model.base_model.set_adapter(["default", "second"])
        model(x)
        model.merge_adapter()
        model.unmerge_adapter()
        copy.deepcopy(model)(x)
        base = model.unload()
    get_peft_model(reloaded, MemControlConfig(target_modules=["0", "1"]))(x)
    assert svd_calls == [6 * 5, 5 * 4]  # and never for the third layer, which is not selected


@pytest.mark.parametrize("kernel", [1, 3])
def test_svdiff_tunes_weights_that_lie_channels_last(kernel):
    layer = nn.Conv2d(4, 6, kernel)
    x = torch.randn(2, 4, 5, 5)
    expected = layer(x)
    model = get_peft_model(
        nn.Sequential(layer.to(memory_format=torch.channels_last)), MemControlConfig(target_modules=["0"])
    )
    torch.testing.assert_close(model(x), expected)


def test_no_method_but_svdiff_needs_an_svd(svd_calls):
    for method in METHODS[1:]:
        case = Case(method, "mlp")
        case.run(case.adapted())
    assert svd_calls == []


def test_nothing_is_computed_for_a_layer_before_it_runs(svd_calls):
    get_peft_model(nn.Sequential(nn.Linear(6, 5)), MemControlConfig(target_modules=["0"]))
    assert svd_calls == []


def test_the_content_of_a_weight_is_read_once_for_an_adapter(monkeypatch):
    reads = []
    sha256 = svd.hashlib.sha256
    monkeypatch.setattr(svd.hashlib, "sha256", lambda data: reads.append(1) or sha256(data))
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), MemControlConfig(target_modules=["0"]))
    for _ in range(3):
        model(torch.randn(2, 6))
    model.merge_adapter()
    model.unmerge_adapter()
    model(torch.randn(2, 6))
    assert len(reads) == 1


@pytest.mark.parametrize("through_data", [False, True])
def test_a_changed_base_weight_gets_new_factors(svd_calls, through_data):
    torch.manual_seed(4)
    base = nn.Sequential(nn.Linear(6, 5))
    x = torch.randn(2, 6)
    base = get_peft_model(base, MemControlConfig(target_modules=["0"])).eval()
    base(x)
    if through_data:  # as PEFT merges a LoRA: torch does not count this change
        base = base.unload()
        base[0].weight.data += 1
        base = get_peft_model(base, MemControlConfig(target_modules=["0"]))
    else:
        base.load_state_dict({name: tensor + 1 for name, tensor in base.state_dict().items()})
        base.base_model.model[0].memcontrol_delta["default"].data.zero_()
    base(x)
    assert len(svd_calls) == 2


def test_factors_live_as_long_as_their_weight():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), MemControlConfig(target_modules=["0"]))
    model(torch.randn(2, 6))
    factors = weakref.ref(model.base_model.model[0]._svd[1])
    base = model.unload()
    del model
    gc.collect()
    assert factors() is not None
    del base
    gc.collect()
    assert factors() is None


def test_factors_computed_in_inference_mode_can_be_trained_with():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), MemControlConfig(target_modules=["0"]))
    with torch.inference_mode():
        model(torch.randn(2, 6))
    model(torch.randn(2, 6)).sum().backward()
    assert model.base_model.model[0].memcontrol_delta["default"].grad is not None


def test_factors_are_float32_for_a_half_precision_weight_and_under_autocast():
    torch.manual_seed(5)
    layer = nn.Linear(32, 32)
    case = nn.Sequential(copy.deepcopy(layer)).bfloat16()
    model = get_peft_model(case, MemControlConfig(target_modules=["0"]))
    disturb(model, "default")
    wrapped = model.base_model.model[0]
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 32))
        tuned = wrapped._tuned("weight", ["default"])
    factors = svd.svd_factors(wrapped.base_layer.weight)
    assert {factors.u.dtype, factors.s.dtype, factors.vh.dtype, tuned.dtype} == {torch.float32}
    direct = wrapped.weight.float() + factors.difference(wrapped.memcontrol_delta["default"], 1.0)
    assert torch.equal(tuned, direct)


# DiffFit and the rest


def test_difffit_scales_the_outputs_that_its_rule_names():
    model = get_peft_model(pretrained_copy("unet"), Case("difffit", "unet").config())
    scaled = [name for name, module in model.named_modules() if getattr(module, "memcontrol_gamma", None)]
    block = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0"
    assert scaled == [f"{block}.attn1.to_out.0", f"{block}.attn2.to_out.0", f"{block}.ff.net.2"]

    own_rule = MemControlConfig(method="difffit", target_modules=["fc", "to_out.0"], scale_modules=["fc"])
    model = get_peft_model(MLP(), own_rule)
    model.base_model.model.fc.memcontrol_gamma["default"].data.fill_(3)
    x = torch.randn(2, 8)
    torch.testing.assert_close(model.base_model.model.fc(x), 3 * model.base_model.model.fc.base_layer(x))
    assert not model.base_model.model.to_out[0].memcontrol_gamma


def pretrained_copy(name):
    return copy.deepcopy(pretrained(name))


def test_whole_weights_learn_what_plain_fine_tuning_learns():
    plain = pretrained_copy("conv").train()
    names = tunable_modules(plain, "weights")
    tuned = get_peft_model(pretrained_copy("conv"), MemControlConfig(method="weights", target_modules=names))
    case = Case("weights", "conv")
    for model in (plain, tuned):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            case.run(model).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(case.run(tuned), case.run(plain))


def test_adapters_of_different_methods_work_on_one_layer():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), MemControlConfig(target_modules=["0"]))
    model.add_adapter("bias", MemControlConfig(method="bias", target_modules=["0"]))
    disturb(model, "default")
    disturb(model, "bias")
    x = torch.randn(2, 6)
    base = model.base_model.model[0].base_layer(x)
    outputs = {}
    for name in ("default", "bias"):
        model.set_adapter(name)
        outputs[name] = model(x) - base
    model.base_model.set_adapter(["default", "bias"])
    torch.testing.assert_close(model(x) - base, outputs["default"] + outputs["bias"])


def test_modules_to_save_are_trained_and_saved_with_the_adapter(tmp_path):
    config = MemControlConfig(target_modules=["fc"], modules_to_save=["to_out"])
    model = get_peft_model(pretrained_copy("mlp"), config)
    case = Case("svdiff", "mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    case.run(model).square().sum().backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    assert torch.equal(case.run(PeftModel.from_pretrained(pretrained_copy("mlp"), tmp_path)), case.run(model))


def test_without_autocasting_the_adapter_takes_the_dtype_of_the_base():
    case = Case("weights", "conv")
    model = get_peft_model(case.base(torch.bfloat16), case.config(), autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    case.run(model, torch.bfloat16).float().sum().backward()


def test_a_float32_adapter_keeps_its_digits_when_loaded_onto_half_precision(tmp_path):
    case = Case("svdiff", "mlp")
    model = case.adapted()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(case.base(torch.bfloat16), tmp_path, low_cpu_mem_usage=True)
    assert_same_tensors(get_peft_model_state_dict(loaded), saved)


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", METHODS)
def test_distributed_training_needs_no_search_for_unused_parameters(process_group, method):
    case = Case(method, "mlp")
    model = nn.parallel.DistributedDataParallel(get_peft_model(case.base(), case.config()))
    for _ in range(2):  # the second pass fails if the first left a parameter without a gradient
        case.run(model).sum().backward()


@pytest.mark.parametrize("method", METHODS)
def test_a_sharded_model_computes_learns_and_saves_the_same(process_group, method):
    case = Case(method, "mlp")
    model = case.adapted()
    expected, state = case.run(model), get_peft_model_state_dict(model)
    expected.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    model = FullyShardedDataParallel(case.adapted(), use_orig_params=True, device_id=torch.device("cpu"))
    output = case.run(model)
    output.sum().backward()
    assert torch.equal(output, expected)
    sharded = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(torch.equal(*pair) for pair in zip(sharded, gradients, strict=True))
    assert_same_tensors(get_peft_model_state_dict(model), state)


def test_a_compiled_model_computes_the_same():
    case = Case("svdiff", "mlp")
    model = case.adapted()
    torch.testing.assert_close(case.run(torch.compile(model, backend="aot_eager")), case.run(model))
    torch._dynamo.reset()


# Selecting


def test_tunable_modules_are_listed_in_the_order_of_the_model():
    model = pretrained("mlp")
    assert tunable_modules(model, "svdiff") == ["fc", "to_out.0"]
    assert tunable_modules(model, "difffit") == ["norm", "fc", "to_out.0"]
    assert tunable_modules(model, "weights") == ["emb", "norm", "fc", "to_out.0"]
    assert tunable_modules(model, "norm") == ["norm"]
    assert tunable_modules(model, "bias") == ["norm", "fc", "to_out.0"]
    assert tunable_modules(model, "weights", prefix="to_out") == ["to_out.0"]
    assert tunable_modules(model, "weights", prefix="to_out.0") == ["to_out.0"]
    assert tunable_modules(model, "weights", prefix="to") == []


def test_difffit_lists_a_linear_without_bias_only_if_it_is_scaled():
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    assert tunable_modules(model, "difffit") == []
    assert tunable_modules(model, "difffit", scale_modules=["b"]) == ["b"]


def test_rms_norms_and_layers_inside_multihead_attention_are_told_apart():
    model = nn.ModuleDict({"norm": nn.RMSNorm(8), "attention": nn.MultiheadAttention(8, 2)})
    assert tunable_modules(model, "norm") == ["norm"]
    assert tunable_modules(model, "weights") == ["norm"]  # an adapter on attention.out_proj would never be called


def test_a_list_of_many_names_is_saved_as_it_was_given():
    base = nn.Sequential(*[nn.ModuleDict({"tuned": nn.Linear(2, 2), "frozen": nn.Linear(2, 2)}) for _ in range(30)])
    names = [f"{index}.tuned" for index in range(30)]  # PEFT alone would save "tuned"
    model = get_peft_model(base, MemControlConfig(target_modules=names))
    assert model.peft_config["default"].target_modules == names
    assert model.base_model.targeted_module_names == names


def test_a_module_that_the_method_cannot_tune_is_named_and_the_model_left_alone():
    model = pretrained_copy("mlp")
    with pytest.raises(ValueError, match=r"'fc', a Linear, which method='norm' cannot tune: it takes GroupNorm"):
        get_peft_model(model, MemControlConfig(method="norm", target_modules=["norm", "fc"]))
    assert not any(isinstance(module, MemControlLayer) for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "lora"}, "method='lora' is unknown, it must be one of: svdiff, difffit, weights, norm, bias"),
        ({"scale": 0.0}, "scale=0.0 must be above 0"),
        ({"search": {"front": {1, 2}}}, "mask and search are saved as JSON"),
    ],
)
def test_a_wrong_config_is_refused_with_the_value_and_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        MemControlConfig(**arguments)


def test_an_unknown_method_has_no_tunable_modules():
    with pytest.raises(ValueError, match="method='lora' is unknown"):
        tunable_modules(pretrained("mlp"), "lora")


def test_no_target_modules_is_an_error_that_says_how_to_find_them():
    with pytest.raises(ValueError, match=r"tunable_modules\(model, 'norm'\)"):
        get_peft_model(pretrained_copy("mlp"), MemControlConfig(method="norm"))


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    model = Case("svdiff", "mlp").adapted()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: torch.zeros(len(tensor) + 1) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(pretrained_copy("mlp"), tmp_path)


# PEFT


def test_a_config_comes_back_as_it_was_saved(tmp_path):
    config = MemControlConfig(
        method="difffit",
        target_modules=["a.b", "c"],
        exclude_modules=["d"],
        scale=0.5,
        scale_modules=["c"],
        mask={"a": True, "d": False},
        search={"sampler": "tpe", "values": [0.1, 2]},
        modules_to_save=["e"],
    )
    config.save_pretrained(tmp_path)
    assert MemControlConfig.from_pretrained(tmp_path) == config
    assert PeftConfig.from_pretrained(tmp_path) == config
    assert config.peft_type == "MEMCONTROL" and config.peft_type.value == "MEMCONTROL"


def test_registering_again_changes_nothing_and_no_other_method():
    tables = [peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING]
    before = [dict(table) for table in tables]
    register()
    assert [dict(table) for table in tables] == before
    assert tables[0]["MEMCONTROL"] is MemControlConfig and tables[1]["MEMCONTROL"] is MemControlModel
    assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING["MEMCONTROL"] == "memcontrol_"


def test_a_peft_without_the_tables_is_refused_by_name(monkeypatch):
    monkeypatch.delattr(peft.mapping, "PEFT_TYPE_TO_PREFIX_MAPPING")
    with pytest.raises(ImportError, match=f"peft {peft.__version__}, which lacks PEFT_TYPE_TO_PREFIX_MAPPING"):
        register()


def test_the_ordinary_way_through_peft_warns_of_nothing(tmp_path):
    case = Case("svdiff", "mlp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = case.adapted()
        case.run(model)
        model.merge_adapter()
        model.unmerge_adapter()
        model.save_pretrained(tmp_path)
        PeftModel.from_pretrained(case.base(), tmp_path)
