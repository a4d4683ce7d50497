"""The study that compares a screening of the demo with the table of real trials."""

import json
from pathlib import Path

import pytest
from scipy.stats import spearmanr

import screening_demo
from memcontrol_hf import Screening, SearchSpace, demo_pipeline
from trials.columns import masks, read

ROOT = Path(__file__).parents[1]
TABLE, RESULTS = ROOT / "docs" / "trial_table.parquet", ROOT / "docs" / "results" / "screening_demo.json"


def test_the_blocks_of_a_group_are_summed():
    blocks = SearchSpace.from_model(demo_pipeline().unet).blocks
    ones = dict.fromkeys(blocks, 1.0)
    counted = Screening(
        ones, {name: 2.0 if "up" in name else -1.0 for name in ones}, ones, ones, dict.fromkeys(ones, 1)
    )
    runs = screening_demo.predictions(counted, read(TABLE))
    full = runs[runs[masks(runs)].all(axis=1)].iloc[0]
    assert full["predicted_loss"] == -len(blocks) == -16 and full["predicted_memorization"] == 2.0 * 9
    assert runs[~runs[masks(runs)].any(axis=1)].iloc[0]["predicted_loss"] == 0


def test_the_committed_correlations_are_those_of_the_committed_screening():
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    screening = Screening(**results["screening"])
    again = screening_demo.compare(screening, read(TABLE))
    for rate, by_prediction in results["correlations"].items():
        for prediction, by_outcome in by_prediction.items():
            for outcome, figure in by_outcome.items():
                assert again[rate][prediction][outcome] == pytest.approx(figure)
    runs = screening_demo.predictions(screening, read(TABLE))
    runs = runs[(runs["learning_rate"] == 3e-4) & runs[masks(runs)].any(axis=1)]
    for prediction, outcome in (
        ("predicted_loss", "loss"),
        ("predicted_memorization", "audit_membership_auc_loss"),
        ("predicted_memorization", "audit_membership_auc_clid"),
    ):
        rho = results["correlations"]["0.0003"][prediction][outcome]["rho"]
        assert rho == pytest.approx(spearmanr(runs[prediction], runs[outcome]).statistic)
        assert rho > 0.9, f"{prediction} predicts {outcome}"


def test_the_study_screens_and_writes(tmp_path, capsys):
    file = tmp_path / "results.json"
    screening_demo.main(["--steps", "2", "--every", "2", "--results", str(file), "--output_dir", str(tmp_path / "out"),
                         "--table", str(TABLE)])  # fmt: skip
    screening = json.loads(file.read_text())["screening"]
    assert screening["settings"]["steps"] == 2 and len(screening["learns"]) == 16
    assert "predicted_memorization" in capsys.readouterr().out
