"""The mitigations: what each does in a training, combined, resumed, inside a search, and how wrong use is named."""

import gc
import json
import math

import optuna
import pytest
import torch
from conftest import RESOLUTION, adapter_of, images_of, tiny_pipeline, tiny_trainer, tiny_unet
from safetensors.torch import load_file
from test_train_memcontrol import assets, flags, script  # noqa: F401  (fixtures)
from test_trainer import equal
from transformers import TrainerCallback

from memcontrol_hf import (
    MemControlConfig,
    MemControlTrainer,
    MemControlTrainingArguments,
    MemorizationReport,
    SearchSpace,
)
from memcontrol_hf.flags import ScriptArguments, settings
from memcontrol_hf.metrics import steering_norms
from memcontrol_hf.mitigations import MITIGATIONS, EarlyStopCallback, parse_mitigations
from memcontrol_hf.public_facts import public_flags
from memcontrol_hf.search import open_storage

SITE = "mid_block.attentions.0"
LETTERS = set("abcdefghijklmnopqrstuvwxyz")


@pytest.fixture(scope="module", autouse=True)
def imports_stay_uncollected():
    """Each training begins with a garbage collection, most of whose time goes to what was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def short_memory(monkeypatch):
    """The mean of `skip_low_loss` is that of the step before, of all timesteps: rows are left out from step 2 on."""
    monkeypatch.setattr("memcontrol_hf.mitigations.skip_low_loss.BINS", 1)
    monkeypatch.setattr("memcontrol_hf.mitigations.skip_low_loss.DECAY", 0.0)


def several_captions(count: int = 8):
    """Images with three captions each, which say their row: `a b`, `a c`, `a d` for the first."""
    images = images_of(count)
    captions = [[f"{chr(97 + row)} {letter}" for letter in "bcd"] for row in range(count)]
    return images.add_column("captions", captions)


def read_captions(trainer) -> list[list[str]]:
    """Train, and return the captions that the text encoder was given in each step."""
    read, encode_prompts = [], trainer.family.encode_prompts
    trainer.family.encode_prompts = lambda prompts: read.append(list(prompts)) or encode_prompts(prompts)
    trainer.train()
    trainer.family.encode_prompts = encode_prompts
    return read


def by_epoch(read: list[list[str]], size: int = 8) -> list[list[str]]:
    """The captions of each epoch, sorted, since the batch size decides on the order of reading."""
    flat = [caption for batch in read for caption in batch]
    return [sorted(flat[start : start + size]) for start in range(0, len(flat), size)]


def batch_of(trainer, rows=range(4)) -> dict[str, torch.Tensor]:
    return trainer.data_collator(trainer.train_dataset.__getitems__(list(rows)))


def trained(folder, **arguments) -> dict[str, torch.Tensor]:
    trainer = tiny_trainer(folder, **{"max_steps": 3, **arguments})
    trainer.train()
    return adapter_of(trainer.model)


# ---- what each does ----


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, torch.Tensor]:
    """The adapter that a training without a mitigation ends with."""
    return trained(tmp_path_factory.mktemp("plain"), train=several_captions())


@pytest.mark.parametrize(
    "mitigation", ["rwa", "multiple_captions", "gaussian_noise", "timestep_range:high=0.5", "threshold"]
)
def test_it_changes_the_training(plain, tmp_path, mitigation):
    changed = trained(tmp_path, train=several_captions(), mitigations=[mitigation])
    assert any(not torch.equal(plain[name], changed[name]) for name in plain)


def test_without_a_mitigation_no_caption_is_encoded_again(tmp_path):
    assert read_captions(tiny_trainer(tmp_path)) == []
    assert read_captions(tiny_trainer(tmp_path, mitigations=["gaussian_noise", "threshold", "caption_dropout"])) == []


@pytest.mark.parametrize(("mitigation", "n"), [("rwa", 4), ("rwa:2", 2), ("rwa:n=1", 1)])
def test_random_words_are_added_to_the_words_of_the_caption(tmp_path, mitigation, n):
    train = images_of(8).map(lambda row, i: {"text": f"{chr(97 + i)} q z"}, with_indices=True)
    trainer = tiny_trainer(tmp_path, train=train, mitigations=[mitigation])
    captions = trainer._loss.conditions.captions(range(8), (0, 6, 0))
    places = set()
    for row, caption in enumerate(captions):
        words = caption.split()
        assert len(words) == 3 + n and set(words) <= LETTERS, "tokens that are text, and no special ones"
        rest = iter(enumerate(words))
        places.add(tuple(next(i for i, word in rest if word == own) for own in train[row]["text"].split()))
    assert len(places) > 1, "at random places"
    assert len(set(captions)) == 8


@pytest.mark.parametrize("mitigation", ["rwa", "multiple_captions"])
def test_captions_are_drawn_afresh_at_each_read_and_alike_at_any_batch_size(tmp_path, mitigation):
    read = {}
    for size, accumulation in ((4, 1), (1, 4)):
        trainer = tiny_trainer(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            train=several_captions(), max_steps=4, mitigations=[mitigation],
        )  # fmt: skip
        batches = read_captions(trainer)
        assert [len(batch) for batch in batches] == [size] * (16 // size)
        read[size] = by_epoch(batches)
    assert len(read[4]) == 2 and read[4] == read[1]
    assert read[4][0] != read[4][1], "the second epoch has draws of its own"
    for epoch in range(2):
        alike = trainer._loss.conditions.captions(range(8), (trainer.args.seed, 6, epoch))
        other = trainer._loss.conditions.captions(range(8), (trainer.args.seed + 1, 6, epoch))
        assert sorted(alike) == read[4][epoch] != sorted(other)


def test_one_of_a_rows_own_captions_is_read(tmp_path):
    train = several_captions()
    trainer = tiny_trainer(tmp_path, train=train, mitigations=["multiple_captions"])
    drawn = [trainer._loss.conditions.captions(range(8), (0, 6, epoch)) for epoch in range(20)]
    for row in range(8):
        assert {captions[row] for captions in drawn} == set(train[row]["captions"])


@pytest.mark.parametrize(
    "mitigations",
    [
        ["multiple_captions", "rwa", "gaussian_noise", "timestep_range:high=0.5"],
        ["threshold:2.0"],
        ["skip_low_loss:0.99"],
    ],
)
def test_one_batch_and_its_parts_train_the_same(tmp_path, mitigations, short_memory):
    runs = [
        trained(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            train=several_captions(), mitigations=mitigations,
        )
        for size, accumulation in ((4, 1), (1, 4))
    ]  # fmt: skip
    equal(*runs, atol=2e-4, rtol=1e-3)


def test_the_name_sets_the_caption_dropout(tmp_path):
    named = tiny_trainer(tmp_path, mitigations=["caption_dropout:0.4"], max_steps=3)
    assert named.args.caption_dropout == 0.4
    named.train()
    equal(adapter_of(named.model), trained(tmp_path, caption_dropout=0.4))


def test_noise_on_text_embeddings_has_its_standard_deviation_and_is_drawn_afresh(tmp_path):
    trainer = tiny_trainer(tmp_path, mitigations=["gaussian_noise:std=0.5"])
    embeds, rows = batch_of(trainer, range(10))["prompt_embeds"], list(range(10))

    def noise_on(embeds, rows, epoch):
        return trainer._loss.conditions({"prompt_embeds": embeds}, rows, (0, 6, epoch))["prompt_embeds"] - embeds

    noise = [noise_on(embeds, rows, epoch) for epoch in range(40)]
    assert torch.stack(noise).std().item() == pytest.approx(0.5, rel=0.02)
    assert torch.stack(noise).mean().item() == pytest.approx(0, abs=0.02)
    assert not torch.equal(noise[0], noise[1]) and not torch.equal(noise[0][0], noise[0][1])
    alone = noise_on(embeds[3:4], [3], 0)
    assert torch.equal(alone[0], noise[0][3])


def test_a_dropped_caption_stays_the_null_condition_under_noise(tmp_path):
    """With every caption dropped, noise on the captions' embeddings plays no part."""
    noisy = trained(tmp_path, mitigations=["gaussian_noise:std=3", "caption_dropout:1"])
    equal(noisy, trained(tmp_path, caption_dropout=1.0))


def gradients(trainer, batch) -> dict[str, torch.Tensor]:
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, batch).backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def norms_of(trainer, batch) -> torch.Tensor:
    """The noise norms of a batch with the timesteps and the noise of its training step, from two passes of our own."""
    calls = []
    hook = trainer.model.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((args, kwargs, output[0].detach())), with_kwargs=True
    )
    with torch.no_grad():
        trainer.compute_loss(trainer.model, batch)
    hook.remove()
    (noisy, timesteps), _, conditional = calls[0]
    with torch.no_grad():
        null = trainer._null()["prompt_embeds"].expand(len(noisy), -1, -1)
        unconditional = trainer.model(noisy, timesteps, encoder_hidden_states=null).sample
    return steering_norms(conditional, unconditional)


def test_samples_above_a_fixed_norm_give_no_gradient(tmp_path):
    plain = tiny_trainer(tmp_path)
    batch = batch_of(plain)
    norms = norms_of(plain, batch)
    value = norms.sort().values[1:3].mean().item()  # between the second and the third
    kept = [row for row in range(4) if norms[row] < value]
    assert len(kept) == 2
    expected = gradients(plain, batch_of(plain, kept))
    trainer = tiny_trainer(tmp_path, mitigations=[f"threshold:{value}"])
    found = gradients(trainer, batch)
    equal(found, {name: gradient / 2 for name, gradient in expected.items()}, atol=1e-6, rtol=1e-4)
    assert any(gradient.abs().max() > 1e-4 for gradient in found.values())
    assert int(trainer._mitigations["threshold"].dropped) == 2


def test_a_batch_above_the_norm_gives_no_gradient_at_all(tmp_path):
    trainer = tiny_trainer(tmp_path, mitigations=["threshold:1e-9"])
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(trainer, batch_of(trainer)).values())


def test_a_step_whose_rows_are_all_left_out_changes_nothing(tmp_path):
    """Not even by the momentum of earlier steps and by weight decay."""
    decay = {"weight_decay": 0.5, "learning_rate": 0.1}
    trainer = tiny_trainer(tmp_path, config=MemControlConfig(method="weights"), mitigations=["threshold:1e9"], **decay)
    states = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            states.append(adapter_of(model))
            if state.global_step == 3:
                trainer._mitigations["threshold"].value = 1e-9

    trainer.add_callback(Watch)
    trainer.train()
    assert len(states) == 6 and all(not torch.equal(states[1][name], states[2][name]) for name in states[0])
    for later in states[3:]:
        equal(later, states[2], atol=0, rtol=0)


@pytest.mark.parametrize(("q", "count"), [(0.9, 1), (0.5, 4), (0.01, 7)])
def test_the_top_quantile_of_a_batch_is_left_out(tmp_path, q, count):
    plain = tiny_trainer(tmp_path)
    batch = batch_of(plain, range(8))
    kept = norms_of(plain, batch).argsort()[: 8 - count].tolist()
    expected = gradients(plain, batch_of(plain, sorted(kept)))
    trainer = tiny_trainer(tmp_path, mitigations=[f"threshold:q={q}"])
    found = gradients(trainer, batch)
    equal(found, {n: g * (8 - count) / 8 for n, g in expected.items()}, atol=1e-6, rtol=1e-4)
    assert int(trainer._mitigations["threshold"].dropped) == count


def test_the_threshold_costs_one_forward_pass_more(tmp_path):
    passes = []
    for mitigations in ([], ["threshold"]):
        trainer = tiny_trainer(tmp_path, mitigations=mitigations)
        count = []
        trainer.model.register_forward_hook(lambda *_, count=count: count.append(torch.is_grad_enabled()))
        trainer.compute_loss(trainer.model, batch_of(trainer))
        passes.append(count)
    assert passes == [[True], [True, False]]


def test_dropped_samples_are_counted_and_logged(tmp_path):
    trainer = tiny_trainer(tmp_path, train=images_of(8), max_steps=5, logging_steps=2, mitigations=["threshold:q=0.5"])
    trainer.train()
    logs = [log for log in trainer.state.log_history if "dropped_samples" in log]
    assert [(log["step"], log["dropped_samples"]) for log in logs] == [(2, 4), (4, 4), (5, 2)]  # 2 of each batch of 4


@pytest.mark.parametrize(
    ("arguments", "low", "high"), [(":high=0.5", 0, 500), (":0.2,0.3", 200, 300), (":low=0.9,high=1", 900, 1000)]
)
def test_timesteps_are_drawn_from_all_of_the_range_and_nowhere_else(tmp_path, arguments, low, high):
    trainer = tiny_trainer(tmp_path, mitigations=[f"timestep_range{arguments}"])
    drawn = [
        trainer._loss.draw(batch_of(trainer, range(8)), trainer.args.seed, epoch, trainer._null)["timesteps"]
        for epoch in range(60)
    ]
    timesteps = torch.cat(drawn).float()
    assert low <= timesteps.min() < low + (high - low) / 20 and high - (high - low) / 20 < timesteps.max() < high
    assert timesteps.mean().item() == pytest.approx((low + high) / 2, abs=(high - low) / 12)
    alone = trainer._loss.draw(batch_of(trainer, [3]), trainer.args.seed, 0, trainer._null)["timesteps"]
    assert alone == drawn[0][3], "a row draws by itself"


def test_samples_with_a_low_loss_give_no_gradient(tmp_path):
    plain = tiny_trainer(tmp_path)
    batch = batch_of(plain)
    drawn = plain._draws(batch)
    losses = plain._loss(plain.model, drawn, plain._null).detach()
    trainer = tiny_trainer(tmp_path, mitigations=["skip_low_loss:0.5"])
    mitigation = trainer._mitigations["skip_low_loss"]
    mitigation.begin(None)
    equal(gradients(trainer, batch), gradients(plain, batch))  # nothing is known yet
    assert int(mitigation.counts()["low_loss_samples"]) == 0
    bins = (drawn["timesteps"] * 50 / 1000).long()
    assert len(set(bins.tolist())) == 4
    means = torch.zeros(50)
    means[bins] = losses * torch.tensor([1.9, 2.1, 1.9, 2.1])
    mitigation.begin(means.tolist())
    expected = gradients(plain, batch_of(plain, [0, 2]))
    equal(gradients(trainer, batch), {name: g / 2 for name, g in expected.items()}, atol=1e-6, rtol=1e-4)
    assert int(mitigation.counts()["low_loss_samples"]) == 2
    mitigation.end_step(losses.device)
    means[bins] = 0.8 * means[bins] + 0.2 * losses
    torch.testing.assert_close(mitigation.means, means)


@pytest.mark.parametrize("metric", ["membership_auc", "amd"])
def test_training_stops_when_the_metric_passes_the_limit(tmp_path, metric):
    worse = 1e9 if metric == "amd" else 0.0
    for limit, steps in ((worse, 2), (1e9 - worse, 4)):
        trainer = tiny_trainer(
            tmp_path, mitigations=[f"early_stop:metric={metric},limit={limit},every=2"], logging_steps=2, max_steps=4
        )
        trainer.train()
        assert trainer.state.global_step == steps
        looks = [log["step"] for log in trainer.state.log_history if f"eval_{metric}" in log]
        assert looks == list(range(2, steps + 1, 2))
        assert [log["step"] for log in trainer.state.log_history if "loss" in log] == looks, "the loss is still logged"


def test_what_the_metric_needs_is_asked_for_before_the_training(tmp_path):
    amd = {"mitigations": ["early_stop:metric=amd,limit=0.1,every=2"]}
    with pytest.raises(ValueError, match="encoder"):
        tiny_trainer(tmp_path, encoder=None, objectives=["loss"], **amd)
    trainer = tiny_trainer(tmp_path)
    arguments = MemControlTrainingArguments(output_dir=str(tmp_path), resolution=RESOLUTION, max_steps=30, **amd)
    with pytest.raises(ValueError, match="a mitigation measures amd with validation images"):
        MemControlTrainer(tiny_pipeline(), trainer.peft_config, arguments, images_of(10, seed=1), None)


def test_a_screening_after_a_training_leaves_no_row_out(tmp_path):
    trainer = tiny_trainer(tmp_path, mitigations=["skip_low_loss:0.99"], max_steps=8)
    fresh = trainer.screen(8).to_dict()
    trainer.train()
    assert trainer.screen(8).to_dict() == fresh


def test_looking_at_the_metric_changes_no_weight(tmp_path):
    looked = trained(tmp_path, mitigations=["early_stop:limit=1,every=1"], caption_dropout=0.3)
    equal(looked, trained(tmp_path, caption_dropout=0.3))


# ---- combined, resumed, searched ----

ALL = [
    "early_stop:limit=1,every=3", "threshold:q=0.5", "caption_dropout:0.3", "gaussian_noise:0.2", "rwa:1",
    "multiple_captions", "skip_low_loss", "timestep_range:high=0.5",
]  # fmt: skip


def test_all_of_them_combine_with_a_mask_whatever_their_order(tmp_path):
    elsewhere = {"dp_sgd", "prompt_embedding", "anti_memorization_guidance"}  # test_dp_sgd, test_sampling_mitigations
    assert {text.partition(":")[0] for text in ALL} == set(MITIGATIONS) - elsewhere
    runs = []
    for mitigations in (ALL, ALL[::-1]):
        trainer = tiny_trainer(tmp_path, train=several_captions(), mitigations=mitigations, mask={SITE: True})
        start = adapter_of(trainer.model)
        captions = by_epoch(read_captions(trainer))[0]
        assert all(len(caption.split()) == 3 for caption in captions), "one word more than each of the several"
        assert all(SITE in name for name in adapter_of(trainer.model))
        runs.append(adapter_of(trainer.model))
        assert any(not torch.equal(start[name], runs[-1][name]) for name in start)
        logs = trainer.state.log_history
        assert any("eval_membership_auc" in log for log in logs)
        dropped = sum(log.get("dropped_samples", 0) for log in logs)
        assert 6 < dropped <= 6 * 2, "half of each batch, less where ties of dropped captions have the norm 0"
    equal(*runs)


@pytest.mark.parametrize(
    "mitigations", [ALL[2:], ["threshold"], ["early_stop:limit=1,every=3"], ["skip_low_loss:0.99"], ALL]
)
def test_an_interrupted_and_resumed_run_ends_with_the_same_weights(tmp_path, mitigations, short_memory):
    settings = {
        "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "mitigations": mitigations,
        "train": several_captions(10), "logging_steps": 1,
    }  # fmt: skip
    whole = tiny_trainer(tmp_path / "whole", **settings)
    whole.train()
    if mitigations == ["skip_low_loss:0.99"]:
        skipped = [log["low_loss_samples"] for log in whole.state.log_history if "low_loss_samples" in log]
        assert skipped[0] == 0 < skipped[2], "by the mean in the checkpoint"
    resumed = tiny_trainer(tmp_path / "resumed", **settings)
    torch.manual_seed(123)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == whole.state.global_step == 4
    equal(adapter_of(whole.model), adapter_of(resumed.model))


def test_a_run_that_stopped_early_stops_at_the_same_step_when_resumed(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "mitigations": ["early_stop:limit=0,every=3"]}
    whole = tiny_trainer(tmp_path, **settings)
    whole.train()
    assert whole.state.global_step == 3
    for checkpoint in (str(tmp_path / "checkpoint-2"), str(tmp_path / "checkpoint-3"), True):
        resumed = tiny_trainer(tmp_path, **settings)
        resumed.train(resume_from_checkpoint=checkpoint)
        assert resumed.state.global_step == 3
        equal(adapter_of(whole.model), adapter_of(resumed.model))


def test_they_are_on_inside_a_searchs_trials(tmp_path):
    """A trial has the figures of the same training alone, and other ones than without the mitigations."""
    mitigations = ["rwa", "threshold:q=0.5", "early_stop:limit=0,every=3"]
    trainer = tiny_trainer(tmp_path, mitigations=mitigations, search_max_steps=5)
    dropped, read, log, encode_prompts = [], [], trainer.log, trainer.family.encode_prompts
    trainer.log = lambda logs, *rest: (log(logs, *rest), dropped.append(logs.get("dropped_samples", 0)))
    trainer.family.encode_prompts = lambda prompts: read.append(list(prompts)) or encode_prompts(prompts)
    trainer.hyperparameter_search(n_trials=3, learning_rate_range=(1e-2, 1e-2), screen=False)
    study = optuna.load_study(study_name="memcontrol", storage=open_storage(str(tmp_path / "study.journal")))
    trials = [trial for trial in study.trials if any(trial.user_attrs["hyperparameters"]["mask"].values())]
    assert len(trials) == 2
    assert trainer.state.global_step == 3, "stopped early"
    assert sum(dropped) == 2 * (2 + 2 + 1), "half of the batches of 4, 4 and 2 in each trial"
    steps = [batch for batch in read if all(len(caption.split()) == 5 for caption in batch)]
    assert [len(batch) for batch in steps] == 2 * [4, 4, 2], "four words more than the one that each caption has"
    hyperparameters = trials[-1].user_attrs["hyperparameters"]
    values = []
    for active in (mitigations, []):
        alone = tiny_trainer(tmp_path / "alone", mitigations=active, search_max_steps=5)
        alone.apply_hyperparameters(hyperparameters)
        figures = alone.train_and_evaluate()
        values.append([figures["eval_loss"], figures["eval_membership_auc"]])
    assert values[0] == pytest.approx(trials[-1].values, rel=1e-5)
    assert values[1] != pytest.approx(trials[-1].values, rel=1e-5)


def test_a_trainer_has_one_early_stop_however_often_it_trains(tmp_path):
    trainer = tiny_trainer(tmp_path, mitigations=["early_stop:limit=1,every=2"], max_steps=2)
    trainer.train()
    trainer.train()
    callbacks = [c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyStopCallback)]
    assert len(callbacks) == 1
    assert len([log for log in trainer.state.log_history if "eval_membership_auc" in log]) == 1


# ---- wrong use ----


@pytest.mark.parametrize(
    ("mitigations", "message"),
    [
        (["blur"], "unknown mitigation 'blur': use some of multiple_captions, rwa, "),
        (["rwa", "rwa:2"], "the mitigation 'rwa' is given twice"),
        (["rwa:0"], "mitigation 'rwa:0': n is 0; use rwa.*at least 1"),
        (["rwa:n=1.5"], "n is '1.5', no whole number; use rwa"),
        (["rwa:words=4"], "cannot take 'words=4'; use rwa"),
        (["rwa:4,5"], "cannot take '5'; use rwa"),
        (["rwa:4,n=5"], "cannot take 'n=5'; use rwa"),
        (["gaussian_noise:-1"], "std is -1.0; use gaussian_noise"),
        (["gaussian_noise:nan"], "std is nan; use gaussian_noise"),
        (["caption_dropout:1.5"], "p is 1.5; use caption_dropout.*above 0 and at most 1"),
        (["caption_dropout:0"], "p is 0.0; use caption_dropout.*above 0"),
        (["timestep_range:0.5,0.2"], "low is 0.5 and high is 0.2; use timestep_range.*low below high"),
        (["timestep_range:high=1.5"], "low is 0.0 and high is 1.5; use timestep_range"),
        (["timestep_range"], "which is the whole schedule; use timestep_range"),
        (["skip_low_loss:1"], "ratio is 1.0; use skip_low_loss.*between 0 and 1"),
        (["skip_low_loss:nan"], "ratio is nan; use skip_low_loss"),
        (["threshold:q=1.5"], "'threshold:q=1.5': q is 1.5; use threshold.*quantile between 0 and 1"),
        (["threshold:q=1"], "q is 1.0; use threshold"),
        (["threshold:q=0"], "q is 0.0; use threshold"),
        (["threshold:q=high"], "q is 'high', no number"),
        (["threshold:-3"], "value is -3.0; use threshold"),
        (["threshold:3,q=0.9"], "value is 3.0 and q is 0.9; use threshold.*not both"),
        (["multiple_captions:column="], "cannot take 'column='; use multiple_captions"),
        (["early_stop:metric=fid"], "metric is fid; use early_stop.*membership_auc, noise_norm or amd"),
        (["early_stop:metric=amd"], "limit is None; use early_stop.*to be given for noise_norm and amd"),
        (["early_stop:limit=inf"], "limit is inf; use early_stop"),
        (["early_stop:every=0"], "every is 0; use early_stop"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_loaded(tmp_path, mitigations, message):
    with pytest.raises(ValueError, match=message) as raised:
        MemControlTrainingArguments(output_dir=str(tmp_path), mitigations=mitigations)
    assert "\n" not in str(raised.value)


def test_defaults_and_ways_to_write_the_arguments():
    assert [vars(m) for m in parse_mitigations(["threshold", "rwa"]).values()] == [
        {"n": 4},
        {"value": None, "q": 0.9, "dropped": 0},
    ]
    stop = parse_mitigations(["early_stop:membership_auc,0.55,every=10"])["early_stop"]
    assert (stop.metric, stop.limit, stop.every) == ("membership_auc", 0.55, 10)
    assert [stop.passed(value) for value in (0.54, 0.55, 0.56)] == [False, False, True]
    assert parse_mitigations(["early_stop"])["early_stop"].limit == 0.6
    assert math.isclose(parse_mitigations(["threshold:2.5"])["threshold"].value, 2.5)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (images_of(8), "the training images have no column 'captions', only image, text"),
        (several_captions().map(lambda row: {"captions": []}), "row 0 of the column 'captions' holds no list"),
        (images_of(8).add_column("captions", ["a"] * 8), "row 0 of the column 'captions' holds no list"),
    ],
)
def test_a_column_without_lists_of_captions_is_named(tmp_path, train, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, train=train, mitigations=["multiple_captions"])


def test_mitigations_are_no_hyperparameter_of_a_trial(tmp_path):
    with pytest.raises(ValueError, match="mitigations is no hyperparameter"):
        tiny_trainer(tmp_path).apply_hyperparameters({"mitigations": ["rwa"]})


# ---- the script ----


@pytest.fixture(scope="module")
def own_images(assets, tmp_path_factory):  # noqa: F811
    """The images of the script's tests, with a list of captions each."""
    folder = tmp_path_factory.mktemp("several")
    lines = []
    for file in sorted((assets / "images").glob("*.png")):
        (folder / file.name).write_bytes(file.read_bytes())
        lines.append(json.dumps({"file_name": file.name, "text": "a", "short": ["b", "c"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_the_script_takes_them_names_them_and_refuses_to_go_on_without(script, assets, own_images, tmp_path, capsys):  # noqa: F811
    names = ["multiple_captions:short", "rwa:n=2", "threshold:q=0.5", "early_stop:limit=0,every=2"]
    given = ["--mitigation", *names[:2], "--mitigation", *names[2:]]
    plain = flags(assets, tmp_path / "out", train_data_dir=own_images, objectives=["loss", "amd"], n_trials=3)
    script.main([*plain, *given])
    report = MemorizationReport.from_json(tmp_path / "out" / "memorization_report.json")
    assert report.training["stopped_at_step"] == {"all blocks": 2, "selected mask": 2}
    shown = ["multiple_captions:column=YOUR_COLUMN", *names[1:]]  # the names of columns may tell of persons
    assert report.training["mitigations"] == shown
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"--mitigation {' '.join(shown)}" in card
    assert f"Mitigations of memorization: `{'` `'.join(shown)}`." in card
    assert "Stopped early: all blocks after step 2." in card and "Stopped early: selected mask after step 2." in card
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")
    study = optuna.load_study(study_name="memcontrol", storage=open_storage(str(tmp_path / "out" / "study.journal")))
    assert study.user_attrs["settings"]["mitigation"] == sorted(names)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        script.main(plain)
    assert stopped.value.code == 2
    assert f"mitigation was {sorted(names)}" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_the_card_names_the_epsilon_and_what_protects_no_published_weights(script, assets, tmp_path):  # noqa: F811
    names = ["dp_sgd:noise_multiplier=0.2,delta=0.01", "prompt_embedding:iterations=1", "anti_memorization_guidance"]
    mask = tmp_path / "mask.json"
    mask.write_text(json.dumps(SearchSpace.from_model(tiny_unet()).mask(True)))
    script.main([*flags(assets, tmp_path / "out", mask_from=mask, max_train_steps=2), "--mitigation", *names])
    report = MemorizationReport.from_json(tmp_path / "out" / "memorization_report.json")
    assert report.training["mitigations"] == names[:1] and report.training["sampling_mitigations"] == names[1:]
    assert report.training["dp_sgd"]["steps"] == 2 and report.training["dp_sgd"]["epsilon"] > 10
    card = (tmp_path / "out" / "README.md").read_text().replace("\\", "")
    assert report.privacy() in card and "Too little noise" in card
    assert "**No formal guarantee:**" in card
    sampling = f"In sampling the images for fid and amd: `{'` `'.join(names[1:])}`, which does not protect the weights"
    assert sampling in card


@pytest.mark.parametrize("given", ["multiple_captions:mrs_smith", "multiple_captions:column=mrs_smith"])
def test_neither_the_command_nor_trackers_name_a_column(tmp_path, given):
    args = ScriptArguments(output_dir=str(tmp_path), train_data_dir="images", mitigation=[given, "rwa:n=2"])
    assert "--mitigation multiple_captions:column=YOUR_COLUMN rwa:n=2" in public_flags(args)
    logged = MemControlTrainingArguments(output_dir=str(tmp_path), mitigations=[given, "rwa:n=2"]).to_sanitized_dict()
    assert "YOUR_COLUMN" in str(logged) and "smith" not in public_flags(args) + str(logged)


def test_the_settings_of_a_study_without_mitigations_are_as_before(script, tmp_path):  # noqa: F811
    assert "mitigation" not in settings(ScriptArguments(output_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("mitigation", "message"),
    [
        ("threshold:q=2", "mitigation 'threshold:q=2': q is 2.0; use threshold"),
        ("multiple_captions:long", "the train split has no column 'long'; it has: image, text, short"),
        ("multiple_captions:text", "the column 'text' cannot hold lists of captions and be another column, too"),
    ],
)
def test_wrong_use_of_the_script_is_one_line(script, assets, own_images, tmp_path, capsys, mitigation, message):  # noqa: F811
    with pytest.raises(SystemExit) as stopped:
        script.main([*flags(assets, tmp_path / "out", train_data_dir=own_images), "--mitigation", mitigation])
    assert stopped.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and message in errors[0]
