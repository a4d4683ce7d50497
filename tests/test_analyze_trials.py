"""The analysis of the table of real trials, on a table that is made up."""

import importlib
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

SCRIPTS = Path(__file__).parents[1] / "training_scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("analyze_trials")
    sys.modules.pop("analyze_trials", None)


def made_up(script) -> pd.DataFrame:
    """Three groups, two rates: the more is tuned and the faster, the better the fid and the worse the AUC."""
    rng, rows = np.random.default_rng(0), []
    for mask in itertools.product((False, True), repeat=3):
        for rate in (1e-4, 1e-3) if any(mask) else (1e-4,):
            learnt = np.dot(mask, (3, 2, 1)) * (1 + (rate > 5e-4))
            row = {f"mask.{name}": on for name, on in zip("abc", mask)}
            row |= {"learning_rate": rate, "steps": 5, "seed": 0, "trainable_parameters": sum(mask)}
            row |= {"fid": 8 - learnt + rng.normal(0, 0.1), "membership_auc": 0.5 + learnt / 30, "loss": 0.2}
            row |= {"loss_train": 0.2 - learnt / 100, "audit_amd": rng.random()}
            for stage, share in enumerate((0.25, 0.5)):
                row |= {f"stage{stage}_fid": 8 - share * learnt, f"stage{stage}_loss": 0.3 - share * learnt / 100}
                row[f"stage{stage}_membership_auc"] = 0.5
            row |= {"seconds_train_with_stages": 40.0, "seconds_fid": 8.0}
            row |= {"audit_trajectory_norm_auc": rng.random()}
            row |= {f"noise_norm_{t}_train": 10 - learnt for t in (100, 300, 500, 700, 900)}
            row |= {f"noise_norm_{t}_auc": rng.random() for t in (100, 300, 500, 700, 900)}
            row |= {name: learnt for name in script.OUTCOMES if name.startswith("audit")}
            row |= {"audit_copy_share": 0.0, "canaries_copy": 0, "canaries_extraction": learnt > 6}
            rows.append(row | {"seconds_membership_auc": 2.0, "seconds_noise_norm": 3.0})
    return pd.DataFrame(rows)


def test_hypervolume_is_the_share_of_a_grid_that_is_dominated(script):
    points = np.random.default_rng(1).random((12, 2))
    areas = script.hypervolumes(points, np.array([1.0, 0.9]))
    x, y = np.meshgrid((np.arange(1000) + 0.5) / 1000, (np.arange(900) + 0.5) / 1000)
    for count in (1, 5, 12):
        dominated = ((x[..., None] >= points[:count, 0]) & (y[..., None] >= points[:count, 1])).any(-1)
        assert areas[count - 1] == pytest.approx(dominated.sum() / 1e6, abs=2e-3)


def test_rewards_are_ranked_as_scipy_ranks_them(script, tmp_path):
    made_up(script).to_parquet(tmp_path / "t.parquet")
    runs = script.read(tmp_path / "t.parquet")
    trained = runs[runs["trainable_parameters"] > 0]
    found = script.correlations(runs, within_rates=False)["noise_norm_500_auc"]["audit_membership_auc_clid"]
    expected = spearmanr(trained["noise_norm_500_auc"], trained["audit_membership_auc_clid"]).statistic
    assert found["rho"] == pytest.approx(expected) and found["low"] < expected < found["high"]
    for within_rates in (False, True):
        of = script.correlations(runs, within_rates)
        assert of["membership_auc"]["audit_membership_auc_clid"]["rho"] == pytest.approx(1)
        assert of["noise_norm"]["audit_membership_auc_clid"]["rho"] == pytest.approx(-1)
        assert of["stage0_membership_auc"]["audit_membership_auc_clid"] is None  # the same in all runs
        assert of["membership_auc"]["audit_copy_share"] is None
    by_size = [
        script.correlations(runs, w)["trainable_parameters"]["audit_nearest_share"]["rho"] for w in (True, False)
    ]
    assert by_size[0] > by_size[1]  # the rate hides what the mask does


def test_a_search_that_tries_all_finds_the_whole_front(script):
    table = script.Table(made_up(script))
    assert table.missing == 0
    for name in (script.PLAIN, *script.SAMPLERS):
        shares = script.replay(table, name, 9, seed=1)
        assert shares.shape == (9,) and (np.diff(shares) >= 0).all() and shares[-1] <= 1 + 1e-12
        np.testing.assert_array_equal(shares, script.replay(table, name, 9, seed=1))
    # Repeats are free: 15 different runs are all that there are.
    assert script.replay(table, "random", 15, seed=1)[-1] == pytest.approx(1)
    assert script.replay(table, script.PLAIN, 15, seed=1)[-1] < 1


def test_a_trial_is_stopped_when_so_many_earlier_ones_dominate_it(script):
    values = np.array([[3, 3], [2, 2], [1, 4], [2.5, 2.5], [4, 5], [2, 2]])
    # The third is nobody's inferior; the last equals the second, which is no domination.
    assert script.pruned(values, 1).tolist() == [False, False, False, True, True, False]
    assert script.pruned(values, 4).tolist() == [False, False, False, False, True, False]


def test_pruning_that_sees_nothing_stops_nothing_and_costs_the_looks(script):
    runs = made_up(script)
    runs["stage0_fid"] = runs["stage1_fid"] = 8.0  # and the AUC is the same in all runs
    rows = [row for row in script.pruning(runs, 8, 3) if row["quality"] == "fid"]
    for row in rows:
        assert row["stopped"] == row["wrong"] == 0 and row["hypervolume"] == 1
        assert row["seconds"] == pytest.approx((20 + 10 + 10) / (20 + 10))  # 40 s hold two looks of 10
    assert script.pruning(runs, 99, 3) == []


def test_pruning_by_what_ranks_runs_as_the_end_does_loses_nothing(script):
    runs = made_up(script)
    for stage in (0, 1):
        runs[f"stage{stage}_fid"], runs[f"stage{stage}_membership_auc"] = runs["fid"], runs["membership_auc"]
    for row in script.pruning(runs, 12, 3):
        if row["quality"] == "fid":
            assert row["wrong"] == 0 and row["hypervolume"] == pytest.approx(1)


def test_the_committed_page_is_rendered_from_the_committed_result(script):
    docs = SCRIPTS.parent / "docs"
    result = json.loads((docs / "trials.json").read_text(encoding="utf-8"))
    assert (docs / "trials.md").read_text(encoding="utf-8") == script.as_markdown(result)
    assert result["runs"] == len(pd.read_parquet(docs / "trial_table.parquet"))


def test_trials_to_a_goal(script):
    shares = np.array([[0.1, 0.5, 0.9], [0.6, 0.6, 0.6], [0.1, 0.1, 0.2]])
    assert script.first_to_reach(shares, 0.5).tolist() == [2, 1, 4]


@pytest.mark.filterwarnings("ignore:.*degenerate.*")
def test_the_page_says_what_was_found_and_a_table_with_holes_is_not_replayed(script, tmp_path, capsys):
    runs = made_up(script)
    runs.to_parquet(tmp_path / "all.parquet")
    runs[:9].to_parquet(tmp_path / "some.parquet")
    arguments = ["--seeds", "3", "--trials", "8", "--workers", "1"]
    script.main(["--table", str(tmp_path / "all.parquet"), "--output_dir", str(tmp_path / "all"), *arguments])
    result = json.loads((tmp_path / "all" / "trials.json").read_text())
    page = (tmp_path / "all" / "trials.md").read_text()
    assert result["runs"] == result["runs_in_all"] == 15
    assert (tmp_path / "all" / "trials_replay.png").stat().st_size > 10_000
    for name, of in result["replay"]["samplers"].items():
        assert f"| {name} | {of['searches']} | {of['share']['4']['median']:.3f} (" in page
    script.main(["--table", str(tmp_path / "some.parquet"), "--output_dir", str(tmp_path / "some"), *arguments])
    assert "6 runs are missing" in capsys.readouterr().out
    assert "Which sampler" not in (tmp_path / "some" / "trials.md").read_text()
    with pytest.raises(SystemExit):
        script.main(["--table", str(tmp_path / "none.parquet")])
