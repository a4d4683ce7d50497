"""The analysis of the table of real trials, on a table that is made up."""

import json
from pathlib import Path

import numpy as np
import pytest
from made_up_trials import made_up_trials
from scipy.stats import spearmanr

import analyze_trials
from memcontrol_hf.search import SAMPLERS
from trials.columns import read
from trials.pruning import pruned, pruning
from trials.replay import PLAIN, SCREENED, Table, first_to_reach, hypervolumes, replay, summary
from trials.rewards import correlations

DOCS = Path(__file__).parents[1] / "docs"


def test_hypervolume_is_the_share_of_a_grid_that_is_dominated():
    points = np.random.default_rng(1).random((12, 2))
    areas = hypervolumes(points, np.array([1.0, 0.9]))
    x, y = np.meshgrid((np.arange(1000) + 0.5) / 1000, (np.arange(900) + 0.5) / 1000)
    for count in (1, 5, 12):
        dominated = ((x[..., None] >= points[:count, 0]) & (y[..., None] >= points[:count, 1])).any(-1)
        assert areas[count - 1] == pytest.approx(dominated.sum() / 1e6, abs=2e-3)


def test_rewards_are_ranked_as_scipy_ranks_them(tmp_path):
    made_up_trials().to_parquet(tmp_path / "t.parquet")
    runs = read(tmp_path / "t.parquet")
    trained = runs[runs["trainable_parameters"] > 0]
    found = correlations(runs, within_rates=False)["noise_norm_500_auc"]["audit_membership_auc_clid"]
    expected = spearmanr(trained["noise_norm_500_auc"], trained["audit_membership_auc_clid"]).statistic
    assert found["rho"] == pytest.approx(expected) and found["low"] < expected < found["high"]
    for within_rates in (False, True):
        found = correlations(runs, within_rates)
        assert found["membership_auc"]["audit_membership_auc_clid"]["rho"] == pytest.approx(1)
        assert found["noise_norm"]["audit_membership_auc_clid"]["rho"] == pytest.approx(-1)
        assert found["stage0_membership_auc"]["audit_membership_auc_clid"] is None  # the same in all runs
        assert found["membership_auc"]["audit_copy_share"] is None
    by_size = [correlations(runs, w)["trainable_parameters"]["audit_nearest_share"]["rho"] for w in (True, False)]
    assert by_size[0] > by_size[1]  # the rate hides what the mask does


def test_a_search_that_tries_all_finds_the_whole_front():
    table = Table(made_up_trials())
    assert table.missing == 0
    for name in (PLAIN, *SAMPLERS):
        shares = replay(table, name, 9, seed=1)
        assert shares.shape == (9,) and (np.diff(shares) >= 0).all() and shares[-1] <= 1 + 1e-12
        np.testing.assert_array_equal(shares, replay(table, name, 9, seed=1))
    # Repeats are free: 15 different runs are all that there are.
    assert replay(table, "random", 15, seed=1)[-1] == pytest.approx(1)
    assert replay(table, PLAIN, 15, seed=1)[-1] < 1


def test_a_trial_is_stopped_when_so_many_earlier_ones_dominate_it():
    values = np.array([[3, 3], [2, 2], [1, 4], [2.5, 2.5], [4, 5], [2, 2]])
    # The third is nobody's inferior; the last equals the second, which is no domination.
    assert pruned(values, 1).tolist() == [False, False, False, True, True, False]
    assert pruned(values, 4).tolist() == [False, False, False, False, True, False]


def test_pruning_that_sees_nothing_stops_nothing_and_costs_the_looks():
    runs = made_up_trials()
    runs["stage0_fid"] = runs["stage1_fid"] = 8.0  # and the AUC is the same in all runs
    rows = [row for row in pruning(runs, 8, 3) if row["quality"] == "fid"]
    for row in rows:
        assert row["stopped"] == row["wrong"] == 0 and row["hypervolume"] == 1
        assert row["seconds"] == pytest.approx((20 + 10 + 10) / (20 + 10))  # 40 s hold two looks of 10
    assert pruning(runs, 99, 3) == []


def test_pruning_by_what_ranks_runs_as_the_end_does_loses_nothing():
    runs = made_up_trials()
    for stage in (0, 1):
        runs[f"stage{stage}_fid"], runs[f"stage{stage}_membership_auc"] = runs["fid"], runs["membership_auc"]
    for row in pruning(runs, 12, 3):
        if row["quality"] == "fid":
            assert row["wrong"] == 0 and row["hypervolume"] == pytest.approx(1)


def test_the_committed_result_is_of_the_committed_table():
    result = json.loads((DOCS / "trials.json").read_text(encoding="utf-8"))
    runs = read(DOCS / "trial_table.parquet")
    assert result["runs"] == len(runs)
    for outcome, figures in correlations(runs, False, ["membership_auc"])["membership_auc"].items():
        assert figures == pytest.approx(result["correlations"]["all"]["membership_auc"][outcome])


def test_trials_to_a_goal():
    shares = np.array([[0.1, 0.5, 0.9], [0.6, 0.6, 0.6], [0.1, 0.1, 0.2]])
    assert first_to_reach(shares, 0.5).tolist() == [2, 1, 4]


@pytest.mark.filterwarnings("ignore:.*degenerate.*")
def test_the_page_says_what_was_found_and_a_table_with_holes_is_not_replayed(tmp_path, capsys):
    runs = made_up_trials()
    runs.to_parquet(tmp_path / "all.parquet")
    runs[:9].to_parquet(tmp_path / "some.parquet")
    arguments = ["--seeds", "3", "--trials", "9", "--workers", "1"]
    analyze_trials.main(["--table", str(tmp_path / "all.parquet"), "--output_dir", str(tmp_path / "all"), *arguments])
    result = json.loads((tmp_path / "all" / "trials.json").read_text())
    page = (tmp_path / "all" / "trials.md").read_text()
    assert result["runs"] == result["runs_in_all"] == 15
    assert (tmp_path / "all" / "trials_replay.png").stat().st_size > 10_000
    for name, found in result["replay"]["samplers"].items():
        assert f"| {name} | {found['searches']} | {found['share']['4']['median']:.3f} (" in page
    assert "search after 9 trials (10: not reached)" in page
    analyze_trials.main(
        ["--table", str(tmp_path / "some.parquet"), "--output_dir", str(tmp_path / "some"), *arguments]
    )
    assert "6 runs are missing" in capsys.readouterr().out
    assert "Which sampler" not in (tmp_path / "some" / "trials.md").read_text()
    with pytest.raises(SystemExit):
        analyze_trials.main(["--table", str(tmp_path / "none.parquet")])


def test_too_few_trials_are_refused(tmp_path, capsys):
    made_up_trials().to_parquet(tmp_path / "t.parquet")
    with pytest.raises(SystemExit):
        analyze_trials.main(["--table", str(tmp_path / "t.parquet"), "--trials", "3"])
    assert "--trials must be at least 4, but is 3" in capsys.readouterr().err


def test_the_canaries_of_all_rows_are_counted_by_the_same_attacks(tmp_path):
    runs = made_up_trials()
    runs["canaries_copy"], runs["canaries_partial_copy"] = 1, [12.0, *[float("nan")] * (len(runs) - 1)]
    runs.to_parquet(tmp_path / "t.parquet")
    assert set(read(tmp_path / "t.parquet")["canaries"]) == {1}


def test_the_first_trials_of_a_screened_search_are_reported_by_screening():
    name = f"{SCREENED}tpe"
    shares = {PLAIN: np.tile([0.1, 0.2], (40, 1)), name: np.tile([[0.1, 0.5], [0.3, 0.6]], (20, 1))}
    found = summary(shares, [1, 2], screenings=2, screened_trials=1)["samplers"][name]["share"]
    assert found["1"] == {"median": 0.2, "low": 0.1, "high": 0.3}
    assert found["2"]["median"] == pytest.approx(0.55)
