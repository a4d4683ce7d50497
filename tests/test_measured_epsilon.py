"""The lower bound of epsilon that coins of canaries prove, and where it stands in data, audit, report and command."""

import dataclasses
import json
import math

import jsonschema
import numpy as np
import pytest
import torch
from conftest import RESOLUTION, images_of, small_report, tiny_pipeline, tiny_trainer
from datasets import DatasetDict
from scipy.stats import binom, norm
from tiny_families import ddpm

from memcontrol_hf import audit_memorization, metrics
from memcontrol_hf.audit import AuditSettings, write_split
from memcontrol_hf.audit.coins import canary_losses, epsilon_from_coins
from memcontrol_hf.cli import main
from memcontrol_hf.data import flip_canaries
from memcontrol_hf.flags import ScriptArguments
from memcontrol_hf.from_flags import check
from memcontrol_hf.metrics.measured_epsilon import chance_of_guesses
from memcontrol_hf.report import REPORT_SCHEMA
from memcontrol_hf.report.audit_card import AuditCard
from memcontrol_hf.sampling import denoiser_in_place

SITE = "mid_block.attentions.0"
SETTINGS = AuditSettings(
    resolution=RESOLUTION, num_prompts=3, images_per_prompt=3, inference_steps=2, num_timesteps=2, num_quality_images=4
)


def test_the_chance_of_right_guesses_is_that_of_the_theorem():
    assert chance_of_guesses(10, 10, 10, 0.0, 0.0) == pytest.approx(2**-10)
    assert chance_of_guesses(10, 8, 6, 1.0, 0.0) == pytest.approx(binom.sf(5, 8, 1 / (1 + math.exp(-1))))
    accuracy, delta = 1 / (1 + math.exp(-0.5)), 1e-3
    terms = [(binom.cdf(6, 8, accuracy) - binom.cdf(6 - i, 8, accuracy)) / i for i in range(1, 8)]
    expected = binom.sf(6, 8, accuracy) + 2 * 12 * delta * max(terms)
    assert chance_of_guesses(12, 8, 7, 0.5, delta) == pytest.approx(expected)


def test_perfect_scores_prove_as_much_as_the_canaries_allow_and_no_more():
    coins = [True] * 50 + [False] * 50
    found = metrics.measured_epsilon(torch.tensor(coins).double(), coins)
    assert (found.guesses, found.correct, found.included) == (100, 100, 50)
    accuracy = (0.05 / 3) ** (1 / 100)
    assert found.lower == pytest.approx(math.log(accuracy / (1 - accuracy)), abs=1e-3)
    assert found.lower < math.log(100 / 4)
    assert metrics.measured_epsilon(torch.tensor(coins).double(), coins, delta=1e-2).lower < found.lower
    assert metrics.measured_epsilon(-torch.tensor(coins).double(), coins).lower == 0


def test_the_bound_stays_below_the_epsilon_of_randomized_response():
    epsilon, rng, above = 1.0, np.random.default_rng(0), 0
    for _ in range(200):
        coins = rng.random(200) < 0.5
        answers = np.where(rng.random(200) < 1 / (1 + math.exp(-epsilon)), coins, ~coins)
        scores = torch.from_numpy(answers + 0.01 * rng.random(200))
        above += metrics.measured_epsilon(scores, coins).lower > epsilon
    assert above <= 200 * 0.05


def test_without_privacy_or_with_a_mu_of_zero_the_chance_is_that_of_coins():
    """All guesses right: the recursion of the theorem is exact, a chance of 2^-m."""
    assert metrics.refuted_mu(10, 10, 10, 2**-10 * 1.01) > 0
    assert metrics.refuted_mu(10, 10, 10, 2**-10 * 0.99) == 0
    assert metrics.refuted_mu(40, 40, 40, 0.05) > metrics.refuted_mu(40, 40, 39, 0.05) > 0
    assert metrics.refuted_mu(40, 40, 20, 0.05) == 0


def test_one_canary_is_an_ordinary_test_of_two_distributions():
    """A guess at one coin is right with a probability of at most Φ(µ / 2)."""
    for error in (0.6, 0.8, 0.95):
        assert metrics.refuted_mu(1, 1, 1, error) == pytest.approx(2 * norm.ppf(error), abs=2e-3)


def test_the_epsilon_of_a_mu_is_that_of_its_trade_off():
    for mu in (0.3, 1.0, 2.5):
        epsilon = metrics.epsilon_of_mu(mu, 1e-3)
        noise = np.linspace(-12, 12, 200_001)  # delta is the mass of one density above e^epsilon times the other
        excess = norm.pdf(noise, mu) - math.exp(epsilon) * norm.pdf(noise)
        assert np.clip(excess, 0, None).sum() * (noise[1] - noise[0]) == pytest.approx(1e-3, rel=1e-3)
    assert metrics.epsilon_of_mu(0, 0) == 0 and metrics.epsilon_of_mu(1, 0) is None


def test_the_bound_of_mu_stays_below_the_mu_of_a_gaussian_mechanism():
    mu, rng, above, estimates = 1.0, np.random.default_rng(0), 0, []
    for _ in range(100):
        coins = rng.random(100) < 0.5
        found = metrics.measured_mu(torch.from_numpy(coins * mu + rng.normal(size=100)), coins, delta=1e-3)
        above += found.lower > mu
        estimates.append(found.estimate)
    assert above <= 100 * 0.05 and np.mean(estimates) == pytest.approx(mu, abs=0.1)
    perfect = metrics.measured_mu(torch.from_numpy(coins).double(), coins, delta=1e-3)
    assert perfect.lower > 1 and math.isfinite(perfect.estimate)
    assert perfect.epsilon > metrics.measured_epsilon(torch.from_numpy(coins).double(), coins, delta=1e-3).lower
    assert metrics.measured_mu(torch.tensor([1.0, 2.0]), [True, True]).estimate == 0


@pytest.mark.parametrize(
    ("scores", "coins", "arguments", "message"),
    [
        ([1.0], [True], {}, "m > 1"),
        ([1.0, 2.0], [True], {}, "as many coins"),
        ([1.0, math.nan], [True, False], {}, "finite scores"),
        ([1.0, 2.0], [True, False], {"delta": 1.0}, "delta must lie"),
    ],
)
def test_scores_that_prove_nothing_are_refused(scores, coins, arguments, message):
    with pytest.raises(ValueError, match=message):
        metrics.measured_epsilon(torch.tensor(scores), coins, **arguments)
    with pytest.raises(ValueError, match=message):
        metrics.measured_mu(torch.tensor(scores), coins, **arguments)


def test_a_coin_decides_which_canaries_are_trained_on():
    images = images_of(40, seed=1)
    train, canaries = flip_canaries(images, 30, 2, seed=5)
    texts = {
        coin: set(canaries.filter(lambda c, coin=coin: c == coin, input_columns="included")["text"])
        for coin in (True, False)
    }
    assert len(canaries) == 30 and 5 < len(texts[True]) < 25
    assert not texts[False] & set(train["text"]), "kept out"
    assert all(train["text"][:].count(text) == 2 for text in texts[True])
    assert len(train) == 40 - len(texts[False]) + len(texts[True])
    assert flip_canaries(images, 30, 2, seed=5)[1]["included"][:] == canaries["included"][:]
    assert len(flip_canaries(images, 30, 1, seed=5)[0]) == 40 - len(texts[False])
    for count, repeats, message in ((41, 2, "between 0 and 40"), (30, 0, "at least 1")):
        with pytest.raises(ValueError, match=message):
            flip_canaries(images, count, repeats)


def test_the_measured_epsilon_is_below_that_of_dp_sgd_at_three_noise_levels(tmp_path, monkeypatch):
    monkeypatch.setattr("memcontrol_hf.mitigations.dp_sgd.secrets.randbits", lambda bits: 1)  # one outcome of the test
    train, canaries = flip_canaries(images_of(60, seed=1), 40, 1, seed=2)
    settings = AuditSettings(resolution=RESOLUTION)
    perfect = epsilon_from_coins(-torch.tensor(canaries["included"][:]).double(), None, canaries, 1e-4)
    for noise in (8.0, 2.0, 1.0):
        dp_sgd = f"dp_sgd:noise_multiplier={noise},delta=1e-4,max_grad_norm=1"
        trainer = tiny_trainer(tmp_path, train=train, mitigations=[dp_sgd], mask={SITE: True}, max_steps=3)
        trainer.train()
        images = trainer.encode(canaries)
        base = canary_losses(tiny_pipeline(), images, settings)
        with denoiser_in_place(trainer.pipeline, trainer.model):
            losses = canary_losses(trainer.pipeline, images, settings)
        assert not torch.equal(base, losses), "the adapter is what is measured"
        measured = epsilon_from_coins(losses, base, canaries, 1e-4)
        guaranteed = trainer.privacy["epsilon"]
        assert min(perfect["lower"], perfect["mu"]["epsilon"]) > guaranteed, "losses that tell all would exceed it"
        assert max(measured["lower"], measured["mu"]["epsilon"]) <= guaranteed


def test_the_frozen_base_tells_how_hard_an_image_is():
    canaries = flip_canaries(images_of(40, seed=1), 40, 1, seed=0)[1]
    hardness = torch.linspace(1, 9, 40)
    losses = hardness - 0.1 * torch.tensor(canaries["included"][:])
    assert epsilon_from_coins(losses, hardness, canaries, 0.0)["lower"] > 1.4
    assert epsilon_from_coins(losses, None, canaries, 0.0)["lower"] < 0.5


def test_canaries_of_a_model_without_captions_need_none():
    train, canaries = flip_canaries(images_of(20, seed=1).select_columns(["image"]), 12, 1, seed=0)
    report = audit_memorization(
        train, images_of(12, seed=2), ddpm(), encoder=torch.nn.Flatten(), settings=SETTINGS, canaries=canaries,
        control=False,
    )  # fmt: skip
    assert report.audit["epsilon"]["canaries"] == 12


@pytest.mark.parametrize("rows", [[0], [0, 0, 1]])
def test_canaries_that_no_coins_can_be_guessed_of_are_refused_before_the_attacks(rows, monkeypatch):
    train, canaries = flip_canaries(images_of(20, seed=1), 12, 1, seed=0)
    monkeypatch.setattr("memcontrol_hf.audit.audit.attack_pipeline", lambda *_, **__: pytest.fail("attacked"))
    arguments = {"train": train, "held_out": images_of(12, seed=2), "encoder": torch.nn.Flatten()}
    with pytest.raises(ValueError, match=f"{len(rows)} canaries with {len(set(rows))} different images"):
        audit_memorization(**arguments, pipeline=tiny_pipeline(), settings=SETTINGS, canaries=canaries.select(rows))


def test_the_audit_reports_it_beside_the_bound_of_dp_sgd(tmp_path):
    train, canaries = flip_canaries(images_of(20, seed=1), 12, 1, seed=0)
    arguments = {"train": train, "held_out": images_of(12, seed=2), "encoder": torch.nn.Flatten()}
    report = audit_memorization(
        **arguments, pipeline=tiny_pipeline(), settings=SETTINGS, canaries=canaries, delta=1e-4, control=False
    )
    epsilon = report.audit["epsilon"]
    assert epsilon["canaries"] == 12 and epsilon["score"] == "loss" and epsilon["delta"] == 1e-4
    jsonschema.validate(dataclasses.asdict(report), json.loads(REPORT_SCHEMA.read_text()))
    assert "**Measured epsilon:** at least 0" in AuditCard(report, "name", False).render()
    for wrong, message in (
        ({"train": images_of(20, seed=3)}, "whose coin says trained on are not among the training images"),
        ({"train": images_of(20, seed=1)}, "kept out are in train or held_out"),
        ({"canaries": canaries.remove_columns("included")}, "no column 'included'"),
        ({"pipeline": None, "generated": images_of(6, seed=4)}, "give a pipeline, not generated images"),
    ):
        with pytest.raises(ValueError, match=message):
            audit_memorization(
                **{**arguments, "pipeline": tiny_pipeline(), "canaries": canaries, "settings": SETTINGS, **wrong}
            )


def test_the_report_says_what_neither_bound_covers():
    epsilon = {"lower": 0.5, "confidence": 0.95, "delta": 1e-4, "canaries": 40, "included": 19, "guesses": 20}
    report = small_report()
    assert report.measured_epsilon() is None
    report.audit["epsilon"] = {**epsilon, "correct": 16, "score": "loss"}
    report.training |= {
        "canary_repeats": 2,
        "dp_sgd": {"epsilon": 3.0, "delta": 1e-4, "says_something": False}
        | {
            "accountant": "",
            "noise_multiplier": 1,
            "max_grad_norm": 1,
            "sample_rate": 0.1,
            "steps": 1,
            "epsilon_limit": 10,
        },
    }
    assert "µ of" not in report.measured_epsilon(), "in reports of before"
    report.audit["epsilon"]["mu"] = {"lower": 0.2, "epsilon": 0.61, "estimate": 0.9, "guesses": 40, "correct": 30}
    said = report.measured_epsilon()
    assert "is at least 0.20, which is an epsilon of 0.61 if the training" in said
    assert "at least 0.50 (delta 0.0001, confidence 95%)" in said and "each in 2 rows" in said
    assert "The upper bound by DP-SGD is 3.00." in said and "LOWER" not in said
    assert "search's own choice of blocks and learning rate" in said and said in report.summary()
    report.training["dp_sgd"]["epsilon"], report.search = 0.1, None
    said = report.measured_epsilon()
    assert "THE LOWER BOUND IS ABOVE IT" in said and "search" not in said


def test_the_coins_of_a_training_are_kept_for_a_later_audit(tmp_path, capsys):
    train, canaries = flip_canaries(images_of(20, seed=1), 12, 1, seed=0)
    write_split(DatasetDict(train=train, held_out=images_of(12, seed=2), canaries=canaries), tmp_path)
    split, pipeline = tmp_path / "private" / "split", tmp_path / "pipeline"
    tiny_pipeline().save_pretrained(pipeline)
    words = ["audit", "--pipeline", pipeline, "--train", split / "train", "--held_out", split / "held_out"]
    words += ["--encoder", "demo", "--resolution", RESOLUTION, "--num_prompts", 2, "--images_per_prompt", 3]
    words += ["--num_quality_images", 2, "--inference_steps", 2, "--output_dir", tmp_path / "out", "--canaries"]
    assert main([*map(str, words), str(split / "canaries")]) == 3
    assert "Measured epsilon: at least" in capsys.readouterr().out
    assert main([*map(str, words), str(split / "train")]) == 2
    assert "private/split/canaries of a training with --flip_canaries" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"flip_canaries": True}, "--flip_canaries flips coins for --canaries, of which there are 0"),
        ({"flip_canaries": True, "canaries": 9, "mitigation": ["dp_sgd"]}, "give --canary_repeats 1"),
    ],
)
def test_coins_that_prove_nothing_are_refused_before_anything_is_loaded(flags, message):
    with pytest.raises(ValueError, match=message):
        check(ScriptArguments(**flags))
