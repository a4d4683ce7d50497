"""The studies of screened masks: which masks are compared, what is measured of them, and how they are judged."""

import math

import pytest
import torch
from conftest import images_of, tiny_trainer
from datasets import DatasetDict

import screening_smallest
from common.intervals import holm
from memcontrol_hf import metrics
from memcontrol_hf.randomness import Purpose
from memcontrol_hf.screening import Screening
from memcontrol_hf.search import suggested_mask
from screened.choice import random_masks
from screened.fine_tunes import fid, fine_tune, measure
from screened.paired_page import render
from screened.verdicts import ALL, BASE, SUGGESTED, beaten, random_names, verdicts


def screening(learns: list[float], memorizes: list[float]) -> Screening:
    unknown, names = dict.fromkeys("abcd"[: len(learns)], math.nan), "abcd"
    return Screening(
        dict(zip(names, learns)), dict(zip(names, memorizes)), unknown, unknown, dict.fromkeys(unknown, 1)
    )


def test_the_suggested_mask_is_the_knee_of_the_front():
    # a and b learn nine tenths and memorize a tenth; c memorizes the rest; d is not worth a parameter
    found = suggested_mask(screening([0.5, 0.4, 0.1, 0.0], [0.05, 0.05, 0.9, 0.0]))
    assert found == {"a": True, "b": True, "c": False, "d": False}


def test_the_frozen_base_is_never_suggested():
    assert suggested_mask(screening([0.5, 0.5], [0.5, 0.5])) == {"a": True, "b": True}


PARAMETERS = {"a": 10, "b": 10, "c": 11, "d": 21, "e": 40}


@pytest.mark.parametrize(
    ("same", "fitting"),
    [("parameters", "ac bc d"), ("blocks", "ac ad ae bc bd be cd ce de")],
    ids=["parameters", "blocks"],
)
def test_random_masks_have_the_size_of_the_mask_and_are_others(same, fitting):
    mask = {name: name in "ab" for name in PARAMETERS}
    masks = random_masks(mask, PARAMETERS, same, 3, seed=0)
    found = ["".join(name for name, on in drawn.items() if on) for drawn in masks]
    assert set(found) <= set(fitting.split()) and len(set(found)) == 3
    assert masks == random_masks(mask, PARAMETERS, same, 3, seed=0)


def test_the_measured_figures_are_those_of_the_audits_engine(tmp_path):
    trainer = tiny_trainer(tmp_path, report_to="none", disable_tqdm=True)
    data = DatasetDict(held_out=images_of(9, seed=3))
    fine_tune(trainer, trainer.search_space.mask(True), 1e-2, 5, tmp_path / "adapter")
    figures = measure(trainer, data, 5)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    evaluator, held_out = trainer.evaluator(), trainer.encode(data["held_out"])
    with torch.no_grad():
        members = evaluator.membership_scores(trainer.train_dataset, Purpose.AUDIT_MEMBERS)
        others = evaluator.membership_scores(held_out, Purpose.AUDIT_NONMEMBERS)
    for name in ("loss", "clid", "pia"):
        assert figures[f"auc_{name}"] == pytest.approx(metrics.membership(members[name], others[name]).auc, abs=0.02)
    assert figures["loss"] == pytest.approx(-others["loss"].mean().item(), rel=1e-5)
    assert figures["parameters"] == trainer.trainable_parameters
    measured = fid(trainer, data, 10)
    assert measured["images"] == 18 and measured["fid"] > 0


def test_holms_correction_is_that_of_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


def fine_tunes(seeds: int) -> dict[str, dict]:
    """Finished pieces: the suggested mask has a loss .1 below all blocks, and every second random mask beats it."""
    pieces = {}
    for seed in range(seeds):
        pieces[f"screenings/{seed}"] = {}
        losses = {BASE: 0.9, ALL: 0.5, SUGGESTED: 0.4}
        losses |= {name: 0.2 + 0.3 * (number % 2) for number, name in enumerate(random_names("parameters"))}
        for number, (name, loss) in enumerate(losses.items()):
            figures = dict.fromkeys(("loss", "auc_loss", "auc_clid", "auc_pia"), loss + 0.01 * seed * number)
            pieces[f"fine_tunes/{name}-{seed}"] = {"mask": ["a"], "blocks": 1, "parameters": 10, **figures}
    return pieces


def test_differences_are_paired_by_seed_and_corrected():
    pieces = fine_tunes(3)
    found = {(row["other"], row["figure"]): row for row in verdicts(pieces)}
    assert {other for other, _ in found} == {ALL, "parameters"}  # nothing is said of what was not run
    row = found[ALL, "loss"]
    assert row["mean"] == pytest.approx(-0.09) and row["seeds"] == 3
    assert row["high"] == pytest.approx(-0.09 + 4.302653 * 0.01 / 3**0.5, rel=1e-5)
    assert row["p"] == pytest.approx(0.00409, abs=1e-5) and row["p_holm"] == pytest.approx(8 * row["p"])
    assert found["parameters", "auc_clid"]["mean"] == pytest.approx(0.42 - (3 * 0.2 + 2 * 0.5) / 5 - 0.05)


def test_masks_that_beat_the_suggested_one_are_counted():
    assert beaten(fine_tunes(2), "parameters") == {"masks": 10, "loss": 6, "clid": 6, "both": 6}
    assert beaten(fine_tunes(2), "blocks")["masks"] == 0


def test_the_page_says_how_many_seeds_there_are_and_what_they_show():
    pieces = fine_tunes(3)
    settings = {"method": "attention", "learning_rate": 3e-4, "steps": 80}
    page = render({"command": "python", "settings": settings, "pieces": pieces, "verdicts": verdicts(pieces)})
    assert "| all blocks | 3 | 1 | 10 |" in page
    assert "| all blocks | held-out loss | 3 | -0.0900 (-0.1148 to -0.0652) | 0.033 | lower |" in page
    assert "Of 15 random masks of as many parameters, 9 have a lower held-out loss" in page


def test_the_smallest_mask_that_reaches_the_loss_of_all_modules(monkeypatch):
    monkeypatch.setattr(screening_smallest, "MASKS", 3)
    pieces = {
        f"svdiff/{name}-0": {"parameters": parameters, "loss": loss, "loss_validation": validation}
        for name, parameters, loss, validation in [
            ("all", 100, 1.0, 1.0),
            ("1", 50, 0.9, 1.0),
            ("2", 20, 1.02, 1.03),
            ("3", 5, 1.03, 1.04),
        ]
    }
    assert (
        screening_smallest.seeds_of(pieces, "svdiff") == [0] and screening_smallest.seeds_of(pieces, "attention") == []
    )
    assert screening_smallest.smallest(pieces, "svdiff", 0)["parameters"] == 20
    assert screening_smallest.smallest(pieces, "svdiff", 0, "loss_validation")["parameters"] == 50
