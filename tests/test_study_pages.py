"""The committed pages of the studies are what their committed figures say."""

from pathlib import Path

import pandas as pd
import pytest

import audit_controls
import screening_paired
import screening_predicts
import trial_table
from common.pages import read_results, table
from render_pages import PAGES

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("name", PAGES)
def test_a_committed_page_is_rendered_from_the_committed_figures(name):
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    assert page == PAGES[name](read_results(DOCS / f"{name}.json"))


def test_the_finished_controls_are_taken_up_and_the_same_results_are_written(tmp_path):
    committed, results = DOCS / "audit_controls.json", tmp_path / "audit_controls.json"
    results.write_bytes(committed.read_bytes())
    audit_controls.main(["--results", str(results), "--output_dir", str(tmp_path / "out")])
    assert results.read_bytes() == committed.read_bytes()
    assert results.with_suffix(".md").read_bytes() == committed.with_suffix(".md").read_bytes()


def test_the_finished_trials_are_taken_up_and_the_same_table_is_written(tmp_path):
    committed, results = DOCS / "trial_table.parquet", tmp_path / "trial_table.parquet"
    results.write_bytes(committed.read_bytes())
    trial_table.main(["--collect", "--results", str(results), "--output_dir", str(tmp_path / "out")])
    pd.testing.assert_frame_equal(pd.read_parquet(results), pd.read_parquet(committed))
    assert len(list((tmp_path / "out").glob("*.json"))) == len(pd.read_parquet(committed))


def test_finished_screenings_are_taken_up_and_judged_alike(tmp_path):
    committed = DOCS / "results" / "screening_demo.json"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / committed.name).write_bytes(committed.read_bytes())
    screening_predicts.main(["--collect", "--docs_dir", str(tmp_path / "docs"), "--output_dir", str(tmp_path / "out")])
    assert (tmp_path / "docs" / committed.name).read_bytes() == committed.read_bytes()


def test_finished_fine_tunes_are_taken_up_and_judged_alike(tmp_path):
    committed, results = DOCS / "results" / "screening_paired.json", tmp_path / "screening_paired.json"
    results.write_bytes(committed.read_bytes())
    screening_paired.main(["--collect", "--docs_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")])
    assert results.read_bytes() == committed.read_bytes()
    assert results.with_suffix(".png").stat().st_size > 10_000


def test_every_generated_figure_has_a_page():
    elsewhere = {
        "demo_mask",  # not figures, but the mask that compare_mitigations.py tunes
        "results/kill_moments",  # by kill_moments.py, beside the tests; see test_killed.py
        "performance",  # by make bench; see test_benchmarks.py
    }
    files = [*DOCS.glob("*.json"), *DOCS.glob("results/*.json")]
    assert {str(file.relative_to(DOCS).with_suffix("")) for file in files} - elsewhere == set(PAGES)


def test_a_table_of_numbers_is_aligned_to_the_right():
    assert table(["work", "seconds"], [["all", "1.5"]], numbers=True) == [
        "| work | seconds |",
        "|---|---:|",
        "| all | 1.5 |",
        "",
    ]
