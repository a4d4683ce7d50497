"""What the tests of PEFT, diffusers, transformers' Trainer and Optuna ask of a guest, beside what they all run.

Each test is a kind of fault that those projects' own tests found here; training_scripts/README.md says how they are
run over this package.
"""

import dataclasses
from functools import cache

import accelerate
import numpy as np
import optuna
import pytest
import torch
from conftest import adapter_of, images_of, tiny_pipeline, tiny_trainer, tiny_unet
from diffusers.utils import convert_state_dict_to_diffusers
from optuna.trial import TrialState
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import DebertaConfig, DebertaModel, T5Config, T5EncoderModel

from memcontrol_hf import MemControlConfig, MemControlTrainingArguments
from memcontrol_hf.search import claim_final, open_storage
from memcontrol_hf.search.study import SharedStudy
from memcontrol_hf.search.suggestions import all_suggested
from memcontrol_hf.tuners import METHODS, MemControlLayer, MemControlModel, tunable_modules

# ---- the Trainer: every field of the arguments as a hyperparameter ----

OTHER_VALUES = {
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "lr_scheduler_kwargs": {"num_cycles": 3},
    "warmup_steps": 4,
    "optim": "sgd",
    "weight_decay": 0.9,
    "adam_beta1": 0.1,
    "adam_beta2": 0.1,
    "adam_epsilon": 1.0,
    "max_grad_norm": 1e-4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "num_train_epochs": 1,
    "search_max_steps": 2,
    "search_fraction": 0.4,
    "caption_dropout": 1.0,
    "snr_gamma": 0.1,
}


@pytest.fixture(scope="module")
def trained_with(tmp_path_factory):
    """Function from hyperparameters to the adapter that a trial trains with them."""
    trainers = {}

    def train(hyperparameters, **arguments):
        key = str(arguments)
        if key not in trainers:
            arguments = {"max_steps": 4, "lr_scheduler_type": "cosine_with_restarts", **arguments}
            trainers[key] = tiny_trainer(tmp_path_factory.mktemp("run"), **arguments)
            trainers[key].evaluate = dict
        trainers[key].apply_hyperparameters(hyperparameters)
        trainers[key].train_and_evaluate()
        return adapter_of(trainers[key].model)

    return train


@pytest.fixture(scope="module")
def usual(trained_with):
    return cache(lambda **arguments: trained_with({}, **arguments))


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_a_hyperparameter_changes_the_training(trained_with, usual, name):
    epochs = {"max_steps": -1, "num_train_epochs": 2} if name in ("max_steps", "num_train_epochs") else {}
    before, after = usual(**epochs), trained_with({name: OTHER_VALUES[name]}, **epochs)
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_nothing_of_a_hyperparameter_is_left_for_the_next_run(trained_with, usual):
    before = usual()
    apart = {name: OTHER_VALUES[name] for name in ("lr_scheduler_type", "max_steps")}  # which exclude others
    trained_with({name: OTHER_VALUES[name] for name in OTHER_VALUES.keys() - {*apart, "num_train_epochs"}})
    trained_with(apart)
    after = trained_with({})
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_every_other_argument_is_refused_as_a_hyperparameter_by_its_name(trained_with):
    for name in {f.name for f in dataclasses.fields(MemControlTrainingArguments)} - OTHER_VALUES.keys():
        with pytest.raises(ValueError, match=f"^{name} is no hyperparameter"):
            trained_with({name: None})


@pytest.mark.parametrize(
    ("hyperparameters", "message"),
    [
        ({"caption_dropout": 5.0}, "caption_dropout must be a share between 0 and 1, but got 5.0"),
        ({"learning_rate": -1.0}, "learning_rate must be at least 0, but got -1.0"),
        ({"learning_rate": "high"}, "learning_rate must be a number, but got 'high'"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, but got 0"),
        ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps must be a whole number, but got 1.5"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, but got -0.1"),
        ({"lr_scheduler_type": "steep"}, "steep is not a valid SchedulerType"),
        ({"num_train_epochs": 2}, "num_train_epochs has no effect beside max_steps=4: search max_steps instead"),
    ],
)
def test_a_hyperparameter_out_of_its_range_is_refused_before_the_training(trained_with, hyperparameters, message):
    with pytest.raises(ValueError, match=message):
        trained_with(hyperparameters)


def test_the_batch_size_that_a_trial_falls_to_is_its_own(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, auto_find_batch_size=True, max_steps=1)
    sizes, step = [], trainer.training_step

    def out_of_memory_once(model, inputs, *rest):
        sizes.append(len(inputs["row"]))
        if len(sizes) == 1:
            raise RuntimeError("CUDA out of memory.")
        return step(model, inputs, *rest)

    monkeypatch.setattr(trainer, "training_step", out_of_memory_once)
    trainer.train()
    trainer.train()
    assert sizes[0] > sizes[1] and sizes[2] == sizes[0]


# ---- Optuna: exhausted samplers, and exceptions where a trial is asked for and stored ----


def search(trainer, **arguments):
    """A search whose figures cost nothing: a trial's `eval_loss` is its learning rate."""
    trainer.train_and_evaluate = lambda: {"eval_loss": trainer.args.learning_rate, "eval_fid": 1.0}
    arguments = {"enqueue": [], "direction": "minimize", "compute_objective": lambda f: f["eval_loss"], **arguments}
    return trainer.hyperparameter_search(**arguments)


def study_of(folder):
    return optuna.load_study(study_name="memcontrol", storage=open_storage(str(folder / "study.journal")))


def rate(trial):
    return {"learning_rate": trial.suggest_categorical("learning_rate", [0.1, 0.2, 0.3])}


@pytest.mark.parametrize(
    ("sampler", "at_most"),
    [
        (lambda: optuna.samplers.GridSampler({"learning_rate": [0.1, 0.2, 0.3]}, seed=0), 3),
        (lambda: optuna.samplers.BruteForceSampler(seed=0), 3),
        (lambda: "random", 30),  # which draws one of three values until it has drawn all, and one of them again
        (lambda: "tpe", 30),
    ],
    ids=["grid", "brute force", "random", "tpe"],
)
def test_a_space_that_is_used_up_ends_the_search_with_its_best_run(tmp_path, sampler, at_most):
    trainer = tiny_trainer(tmp_path)
    for call in range(2):
        run = search(trainer, hp_space=rate, sampler=sampler(), n_trials=100)
        assert run.objective == 0.1
        trials = run.run_summary.trials
        assert all(trial.state == TrialState.COMPLETE for trial in trials)
        assert len([trial for trial in trials if "same_as" not in trial.user_attrs]) == 3
        assert len(trials) <= at_most + call


def test_a_tree_of_suggestions_is_used_up_when_all_of_its_leaves_are_there():
    def trials(space):
        study = optuna.create_study(sampler=optuna.samplers.BruteForceSampler(seed=0))
        study.optimize(lambda trial: space(trial) or 0.0, n_trials=100)
        return study.trials

    def tree(trial):
        if trial.suggest_categorical("text", [True, False]):
            trial.suggest_float("share", 0.1, 0.5, step=0.1)
        trial.suggest_int("rank", 1, 5, step=2)

    all_trials = trials(tree)
    assert len(all_trials) == 5 * 3 + 3 and all_suggested(all_trials)
    assert not any(all_suggested(all_trials[:i] + all_trials[i + 1 :]) for i in range(len(all_trials)))
    continuous = optuna.create_study()
    continuous.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    assert not all_suggested(continuous.trials) and not all_suggested([])


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (optuna.TrialPruned("too small"), TrialState.PRUNED),
        (KeyError("no such block"), TrialState.FAIL),
        (None, TrialState.FAIL),  # an object that no study can keep
    ],
    ids=["pruned", "error", "object"],
)
def test_a_trial_without_hyperparameters_ends_and_the_search_goes_on(tmp_path, error, state):
    def hp_space(trial):
        if trial.number == 1:
            if error is None:
                return {"learning_rate": object()}
            raise error
        return {"learning_rate": trial.suggest_float("learning_rate", 0.1, 0.2)}

    trainer = tiny_trainer(tmp_path)
    run = search(trainer, hp_space=hp_space, n_trials=3)
    trials = run.run_summary.trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE, state, TrialState.COMPLETE]
    assert trials[1].user_attrs["failure"].startswith("no hyperparameters were suggested: ")
    assert claim_final(trainer, run, poll_seconds=0.01), "no trial is left running"


def test_an_interrupt_in_hp_space_queues_the_trial_again(tmp_path):
    def interrupted(trial):
        trial.suggest_float("learning_rate", 0.1, 0.2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(tiny_trainer(tmp_path), hp_space=interrupted, n_trials=1)
    states = [trial.state for trial in study_of(tmp_path).trials]
    assert states == [TrialState.FAIL, TrialState.WAITING]


def test_numbers_of_numpy_and_torch_are_numbers(tmp_path):
    trainer = tiny_trainer(tmp_path)

    def hp_space(trial):
        mask = {name: np.bool_(True) for name in trainer.search_space.blocks}
        return {"learning_rate": np.float32(0.5), "per_device_train_batch_size": np.int64(2), "mask": mask}

    for objective in (np.float32, np.float64, torch.tensor, lambda value: [torch.tensor(value)]):
        run = search(
            trainer,
            hp_space=hp_space,
            compute_objective=lambda figures, objective=objective: objective(figures["eval_loss"]),
            study_name=str(objective),
            storage=str(tmp_path / "studies.journal"),
            n_trials=1,
        )
        assert run.objective == 0.5
        assert run.hyperparameters["per_device_train_batch_size"] == 2 and all(run.hyperparameters["mask"].values())


def test_a_trial_that_cannot_be_stored_has_failed(tmp_path, monkeypatch):
    def no_space_left(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(SharedStudy, "_finish", no_space_left)
    with pytest.raises(OSError, match="No space left"):
        search(tiny_trainer(tmp_path), hp_space=rate, n_trials=2)
    (trial,) = study_of(tmp_path).trials
    assert trial.state == TrialState.FAIL and "could not be recorded: OSError" in trial.user_attrs["failure"]


def test_a_sampler_of_one_objective_is_refused_for_two_before_the_first_trial(tmp_path):
    arguments = {"direction": ["minimize"] * 2, "compute_objective": lambda figures: [1.0, 2.0], "n_trials": 2}
    with pytest.raises(ValueError, match="CmaEsSampler knows one objective, not 2"):
        search(tiny_trainer(tmp_path), hp_space=rate, sampler=optuna.samplers.CmaEsSampler(), **arguments)


@pytest.mark.parametrize(
    ("direction", "value", "counts"),
    [(["minimize"] * 2, 1.0, "1 value.* 2 d"), ("minimize", [1.0, 2.0], "2 value.* 1 d")],
)
def test_another_number_of_values_than_directions_ends_the_search_at_the_first_trial(
    tmp_path, direction, value, counts
):
    trainer, calls = tiny_trainer(tmp_path), []

    def compute_objective(figures):
        calls.append(figures)
        return value

    with pytest.raises(ValueError, match=f"compute_objective returned {counts}"):
        search(trainer, hp_space=rate, direction=direction, compute_objective=compute_objective, n_trials=5)
    assert len(calls) == 1
    assert not [trial for trial in study_of(tmp_path).trials if trial.state == TrialState.RUNNING]


# ---- diffusers and accelerate: hooks that move and cast the weights ----


def tuned_unet(method, unet=None, scale=0.3):
    """A UNet of diffusers with an adapter that is away from its start in each module that the method can tune."""
    unet = tiny_unet() if unet is None else unet
    unet.add_adapter(MemControlConfig(method=method, target_modules=tunable_modules(unet, method)))
    disturb(unet, scale)
    return unet.eval()


def disturb(model, scale=0.3, names="memcontrol_"):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if names in name:
                parameter += (scale * torch.randn(parameter.shape, generator=generator)).to(parameter)


def run(unet, **kwargs):
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 3, 8, generator=generator)
    with torch.no_grad():
        return unet(latents, torch.tensor([7, 300]), encoder_hidden_states=text, **kwargs).sample


CPU = torch.device("cpu")
OFFLOADING = {
    "accelerate to memory": lambda unet, folder: accelerate.cpu_offload(unet, CPU),
    "accelerate to disk": lambda unet, folder: accelerate.disk_offload(unet, folder, CPU),
    "leaf level to memory": lambda unet, folder: unet.enable_group_offload(CPU, CPU, "leaf_level"),
    "leaf level to disk": lambda unet, folder: unet.enable_group_offload(
        CPU, CPU, "leaf_level", offload_to_disk_path=str(folder)
    ),
    "block level to disk": lambda unet, folder: unet.enable_group_offload(
        CPU, CPU, "block_level", num_blocks_per_group=1, offload_to_disk_path=str(folder)
    ),
}


@pytest.mark.parametrize("method", ["svdiff", "difffit"])  # together they have parameters of every kind
@pytest.mark.parametrize("adapter_first", [True, False])
@pytest.mark.parametrize("kind", OFFLOADING)
def test_an_offloaded_model_computes_the_same(tmp_path, kind, adapter_first, method):
    expected = run(tuned_unet(method))
    if adapter_first:
        unet = tuned_unet(method)
        OFFLOADING[kind](unet, tmp_path)
    else:
        unet = tiny_unet()
        OFFLOADING[kind](unet, tmp_path)
        tuned_unet(method, unet)
    assert torch.equal(run(unet), expected)
    assert torch.equal(run(unet), expected), "again, with what was kept from the first time"


@pytest.mark.parametrize("method", ["svdiff", "difffit"])  # together they have parameters of every kind
@pytest.mark.parametrize("adapter_first", [True, False])
def test_weights_that_are_stored_in_fewer_bits_are_tuned_as_they_are_computed_with(method, adapter_first):
    def cast(unet):
        unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        return unet

    rounded = tiny_unet()
    rounded.load_state_dict({name: tensor.float() for name, tensor in cast(tiny_unet()).state_dict().items()})
    unet = cast(tuned_unet(method)) if adapter_first else tuned_unet(method, cast(tiny_unet()))
    assert torch.equal(run(unet), run(tuned_unet(method, rounded)))


def test_nothing_is_merged_into_weights_that_hooks_move():
    unet = tuned_unet("svdiff")
    accelerate.cpu_offload(unet, CPU)
    with pytest.raises(
        ValueError, match=r"hooks move or cast the weights of the base model .* merge the adapter before"
    ):
        unet.fuse_lora()


def test_a_model_under_hooks_is_trained_and_measured_without_merging(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.unet.enable_group_offload(CPU, CPU, "leaf_level")
    trainer = tiny_trainer(tmp_path, pipeline, max_steps=1)
    trainer.train()
    assert trainer.evaluate(metrics=["loss"])["eval_loss"] > 0


# ---- PEFT: all-linear, loading twice, failed injections, tied weights, quantized weights ----


class TwoLinears(torch.nn.Module):
    """Two linear layers, whose weights are one parameter if they are tied, and a norm."""

    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.norm(self.first(x)).tanh())


X = torch.linspace(-1, 1, 24).view(3, 8)


def is_bare(model):
    return not any(isinstance(module, MemControlLayer) for module in model.modules())


def test_all_linear_names_the_same_layers_whatever_adapters_there_are(tmp_path):
    model = get_peft_model(TwoLinears(), MemControlConfig(target_modules="all-linear"))
    assert model.peft_config["default"].target_modules == ["first", "second"]
    disturb(model)
    expected = model(X)
    model.add_adapter("again", MemControlConfig(method="bias", target_modules="all-linear"))
    assert model.peft_config["again"].target_modules == ["first", "second"]
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(TwoLinears(), tmp_path)
    loaded.load_adapter(tmp_path, "twice")
    assert torch.equal(loaded(X), expected)
    loaded.set_adapter("twice")
    assert torch.equal(loaded(X), expected)
    mixed = get_peft_model(TwoLinears(), LoraConfig(target_modules=["first"]), mixed=False).unload()
    assert torch.equal(PeftModel.from_pretrained(mixed, tmp_path)(X), expected)


@pytest.mark.parametrize(
    "config",
    [
        MemControlConfig(method="norm", target_modules="all-linear"),
        MemControlConfig(method="norm", target_modules=["norm", "second"]),
        MemControlConfig(target_modules=["nowhere"]),
        MemControlConfig(target_modules=["first"], exclude_modules=["first"]),
    ],
    ids=["all-linear", "second of two", "nothing matches", "all excluded"],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_a_failed_injection_leaves_the_model_as_it_was(config, adapted):
    model = TwoLinears()
    expected = model(X)
    if adapted:
        model = get_peft_model(model, MemControlConfig(method="weights", target_modules=["first", "norm"]))
        disturb(model)
        expected = model(X)
    before = list(model.state_dict())
    with pytest.raises(ValueError):
        model.add_adapter("other", config) if adapted else get_peft_model(model, config)
    assert list(model.state_dict()) == before and torch.equal(model(X), expected)


def test_an_error_in_the_middle_of_an_injection_leaves_the_model_as_it_was(monkeypatch):
    create, calls = MemControlModel._create_and_replace, []

    def fails_at_the_second(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("no memory")
        create(self, *args, **kwargs)

    monkeypatch.setattr(MemControlModel, "_create_and_replace", fails_at_the_second)
    model = TwoLinears()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        get_peft_model(model, MemControlConfig(target_modules="all-linear"))
    assert is_bare(model)


@pytest.mark.parametrize("method", ["svdiff", "weights", "difffit"])
@pytest.mark.parametrize("targets", [["first", "second"], ["first"]])
def test_tied_weights_are_tuned_each_for_itself_and_tied_again_after_a_merge(method, targets):
    config = MemControlConfig(method=method, target_modules=targets, scale_modules=["first", "second"])
    base = TwoLinears(tied=True)
    weight, expected_base = base.first.weight.clone(), base(X)
    model = get_peft_model(base, config)
    disturb(model)
    expected = model(X)
    model.merge_adapter()
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(X), expected)
    base = model.unload()
    assert base.first.weight is base.second.weight and torch.equal(base.first.weight, weight)
    assert torch.equal(base(X), expected_base)


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_torchao_has_quantized_are_refused_by_name_and_the_rest_is_tuned(method):
    torchao = pytest.importorskip("torchao.quantization")
    base = TwoLinears()
    torchao.quantize_(base, torchao.Int8WeightOnlyConfig())
    if method in ("svdiff", "weights"):
        names = ["first", "second"]
        with pytest.raises(ValueError, match=r"'first', whose weight is quantized \(\w+\), which method="):
            get_peft_model(base, MemControlConfig(method=method, target_modules=names))
        assert is_bare(base) and "first" not in tunable_modules(base, method)
        return
    expected = base(X)
    config = MemControlConfig(method=method, target_modules=tunable_modules(base, method, scale_modules=["second"]))
    model = get_peft_model(base, config)
    assert torch.equal(model(X), expected)
    disturb(model)
    output = model(X)
    assert not torch.equal(output, expected) and output.isfinite().all()
    output.sum().backward()
    model.merge_adapter()
    torch.testing.assert_close(model(X), output)
    model.unmerge_adapter()
    assert torch.equal(model(X), output)


def test_a_trainer_refuses_a_denoiser_that_torchao_has_quantized_by_name(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    pipeline = tiny_pipeline()
    torchao.quantize_(pipeline.unet, torchao.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="svdiff cannot be trained on a quantized base"):
        tiny_trainer(tmp_path, pipeline)


@pytest.mark.parametrize("config", [None, LoraConfig()], ids=["svdiff", "lora"])
def test_a_trainer_refuses_weights_that_layerwise_casting_keeps_in_eight_bits_before_the_backward_pass_would(
    tmp_path, config
):
    pipeline = tiny_pipeline()
    pipeline.unet.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"float8_e4m3fn, as by enable_layerwise_casting.* train without it"):
        tiny_trainer(tmp_path, pipeline, config)


# ---- diffusers: a LoRA beside the adapter ----


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory):
    """A LoRA in the format of diffusers, on the attention layers of the tiny pipeline's UNet."""
    folder, pipeline = tmp_path_factory.mktemp("lora"), tiny_pipeline()
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights="gaussian"))
    disturb(pipeline.unet, names="lora_")
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    pipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder


@pytest.fixture(params=["svdiff", "difffit"])
def pair(request, lora_folder):
    """A pipeline with an adapter, and a LoRA beside it; both are active."""
    pipeline = tiny_pipeline()
    tuned_unet(request.param, pipeline.unet)
    pipeline.load_lora_weights(lora_folder)
    names = list(pipeline.unet.peft_config)
    assert names[0] == "default" and len(names) == 2
    pipeline.unet.set_adapters(names)
    return pipeline, names


def test_scales_reach_the_adapter_and_the_lora(pair):
    pipeline, (own, lora) = pair
    unet = pipeline.unet
    outputs = {}
    for scales in ([1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.5, 0.5]):
        pipeline.set_adapters([own, lora], scales)
        outputs[tuple(scales)] = run(unet)
    torch.testing.assert_close(outputs[0.0, 0.0], run(tiny_unet()), rtol=0, atol=1e-5)
    assert len({tuple(output.flatten().tolist()) for output in outputs.values()}) == 5
    pipeline.set_adapters([own, lora])
    assert torch.equal(run(unet), outputs[1.0, 1.0])
    halved = run(unet, cross_attention_kwargs={"scale": 0.5})
    torch.testing.assert_close(halved, outputs[0.5, 0.5], rtol=0, atol=1e-5)
    torch.testing.assert_close(run(unet), outputs[1.0, 1.0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("safe", [False, True])
def test_a_fused_lora_beside_the_adapter_computes_the_same_and_is_unfused_again(pair, safe):
    pipeline, _ = pair
    unet, weights = pipeline.unet, dict(tiny_pipeline().unet.named_parameters())
    expected = run(unet)
    pipeline.fuse_lora(safe_fusing=safe)
    torch.testing.assert_close(run(unet), expected, rtol=1e-4, atol=1e-4)
    pipeline.unfuse_lora()
    for name, parameter in unet.named_parameters():
        if "memcontrol_" not in name and "lora_" not in name:
            original = weights[name.replace(".base_layer", "")]
            torch.testing.assert_close(parameter, original, rtol=0, atol=1e-5, msg=name)
    torch.testing.assert_close(run(unet), expected, rtol=1e-4, atol=1e-4)


# ---- what is not supported says so ----


def test_calls_for_adapters_of_other_kinds_are_refused_in_one_line():
    model = get_peft_model(TwoLinears(), MemControlConfig(target_modules=["first"]))
    model.add_adapter("second", MemControlConfig(target_modules=["first"]))
    with pytest.raises(NotImplementedError, match="activate them together"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both")
    with pytest.raises(ValueError, match="rows of different MEMCONTROL adapters"):
        model(X, adapter_names=["default", "second", "second"])


# ---- the Trainer: what is inherited from it ----


@pytest.mark.parametrize(
    "name",
    ["remove_unused_columns", "bf16_full_eval", "fp16_full_eval", "label_smoothing_factor", "neftune_noise_alpha"],
)
def test_an_argument_that_a_denoiser_has_no_use_for_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}=True is not supported: "):
        MemControlTrainingArguments(str(tmp_path), **{name: True})


def test_several_validation_sets_are_refused_before_the_training(tmp_path):
    with pytest.raises(ValueError, match="must each be one Dataset, but got a dict"):
        tiny_trainer(tmp_path, validation={"one": images_of(4), "two": images_of(4)})


def test_predictions_for_a_data_set_are_refused_in_one_line(tmp_path):
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(NotImplementedError, match=r"measure the model with evaluate\(dataset\)"):
        trainer.predict(images_of(4))
    with pytest.raises(NotImplementedError, match=r"measure the model with evaluate\(dataset\)"):
        trainer.evaluation_loop(trainer.get_train_dataloader(), "Evaluation")


def test_a_card_that_the_trainer_makes_is_the_card_of_the_report(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "memcontrol_hf" in card and (tmp_path / "memorization_report.json").exists()
    with pytest.raises(ValueError, match="it cannot be given license"):
        trainer.create_model_card(license="mit")
    assert (tmp_path / "README.md").read_text() == card


# ---- PyTorch: export, and compilation in one graph ----


@pytest.mark.parametrize("method", ["svdiff", "difffit"])
@pytest.mark.parametrize("trace", ["fullgraph", "export", "strict export"])
def test_an_adapter_is_traced_as_it_computes(method, trace):
    names = ["first", "norm", "second"] if method == "difffit" else "all-linear"
    config = MemControlConfig(method=method, target_modules=names, scale_modules=["second"])
    model = get_peft_model(TwoLinears(), config).eval()
    disturb(model)

    def traced():
        torch._dynamo.reset()
        if trace == "fullgraph":
            return torch.compile(model, backend="aot_eager", fullgraph=True)(X)
        return torch.export.export(model.get_base_model(), (X,), strict=trace == "strict export").module()(X)

    if method == "svdiff":
        with pytest.raises(RuntimeError, match="call the model once, or merge_adapter"):
            traced()
    expected = model(X)
    torch.testing.assert_close(traced(), expected)


def test_the_weight_that_t5_only_shares_is_no_module_to_tune():
    """It holds the weight of `encoder.embed_tokens`, which is what the encoder calls."""
    config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=16)
    names = tunable_modules(T5EncoderModel(config), "weights")
    assert "encoder.embed_tokens" in names and "shared" not in names


def test_norms_of_debertas_own_are_tuned():
    config = DebertaConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=16
    )
    model, tokens = DebertaModel(config).eval(), torch.arange(6)[None]
    names = tunable_modules(model, "norm")
    assert "embeddings.LayerNorm" in names
    with torch.no_grad():
        before = model(tokens).last_hidden_state
        adapted = get_peft_model(model, MemControlConfig(method="norm", target_modules=names))
        assert torch.equal(adapted(tokens).last_hidden_state, before)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.5
        assert not torch.allclose(adapted(tokens).last_hidden_state, before)
