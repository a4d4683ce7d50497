"""The committed pages of the studies are what their committed figures say."""

from pathlib import Path

import pandas as pd
import pytest

import audit_controls
import duplicate_scan
import filter_remedy
import power
import real_searches
import screening_paired
import screening_predicts
import search_memory
import trial_table
from common.pages import read_results, table
from memcontrol_hf import demo_dataset
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
    assert len(list((tmp_path / "out").glob("*-*.json"))) == len(pd.read_parquet(committed))


def test_a_part_of_the_trials_leaves_the_others_in_the_table(tmp_path):
    results = tmp_path / "trial_table.parquet"
    whole = pd.read_parquet(DOCS / "trial_table.parquet")
    whole.to_parquet(results)
    command = ["--collect", "--results", str(results), "--output_dir", str(tmp_path / "out")]
    trial_table.main([*command, "--learning_rate", "3e-4"])
    by = ["learning_rate", *(f"mask.{group}" for group in trial_table.GROUPS)]
    written, whole = (table.sort_values(by, ignore_index=True) for table in (pd.read_parquet(results), whole))
    pd.testing.assert_frame_equal(written, whole)


def test_trials_of_another_data_set_are_refused(tmp_path, capsys):
    command = ["--collect", "--results", str(tmp_path / "t.parquet"), "--output_dir", str(tmp_path / "out")]
    trial_table.main(command)
    with pytest.raises(SystemExit):
        trial_table.main([*command, "--data", "elpv"])
    assert "data was demo and is elpv" in capsys.readouterr().err


def test_finished_screenings_are_taken_up_and_judged_alike(tmp_path):
    committed = DOCS / "results" / "screening_demo.json"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / committed.name).write_bytes(committed.read_bytes())
    folders = ["--docs_dir", str(tmp_path / "docs"), "--output_dir", str(tmp_path / "out")]
    screening_predicts.main(["--collect", "--seed", "0", *folders])  # the other seeds are kept
    assert (tmp_path / "docs" / committed.name).read_bytes() == committed.read_bytes()


def test_screenings_of_other_settings_are_not_taken_up(tmp_path):
    committed = DOCS / "results" / "screening_demo.json"
    (tmp_path / committed.name).write_bytes(committed.read_bytes())
    command = ["--collect", "--docs_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    screening_predicts.main([*command, "--steps", "40"])
    assert [file.name for file in (tmp_path / "out").glob("*.json")] == ["settings.json"]


def test_finished_fine_tunes_are_taken_up_and_judged_alike(tmp_path):
    committed, results = DOCS / "results" / "screening_paired.json", tmp_path / "screening_paired.json"
    results.write_bytes(committed.read_bytes())
    screening_paired.main(["--collect", "--docs_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")])
    assert results.read_bytes() == committed.read_bytes()
    assert results.with_suffix(".png").stat().st_size > 10_000


def test_fids_of_another_number_of_images_are_not_mixed_in(tmp_path, capsys):
    committed = DOCS / "results" / "screening_paired.json"
    (tmp_path / committed.name).write_bytes(committed.read_bytes())
    command = ["--collect", "--docs_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        screening_paired.main([*command, "--fid", "2000"])
    assert "--fid 2000 does not go on with the finished fids of 1024 images" in capsys.readouterr().err
    screening_paired.main([*command, "--fid", "1000"])  # 1024 is the next multiple of the 256 captions


def test_searches_that_miss_the_goal_count_as_longer_than_they_were():
    def search(reached: bool, trials: int) -> dict:
        middle = [{"values": [0.5, 0.5]}] * (trials - 1)
        return {"trials": [*middle, {"values": [0.1, 0.1] if reached else [1.0, 1.0]}]}

    pieces = {f"block/random-{seed}": search(True, 8) for seed in range(2)}
    pieces |= {f"block/tpe-{seed}": search(seed == 0, 4) for seed in range(6)}
    page = real_searches.render({"command": "python", "pieces": pieces})
    (row,) = [line for line in page.splitlines() if line.startswith("| tpe |")]
    assert row.endswith("| > 4 | 1 of 6 |")
    assert "Fewer than 6 searches have no interval" in page


def test_a_filter_page_can_be_rendered_before_all_seeds_are_finished():
    content = read_results(DOCS / "results" / "filter_remedy.json")
    for runs in list(content["measured"].values())[1:]:
        del runs["1"], runs["2"]
    page = filter_remedy.render(content)
    assert "| unfiltered | – | – | – | – |" in page and "| `--spectral 0.5` | – | – | – |" in page


def test_too_few_trials_or_seeds_are_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "results").mkdir()
    table = pd.read_parquet(DOCS / "results" / "paper_table.parquet")
    table[table["seed"] == 0].to_parquet(tmp_path / "results" / "paper_table.parquet")
    with pytest.raises(SystemExit):
        power.main(["--docs_dir", str(tmp_path)])
    assert "demo: svdiff minus full, loss, clid: fewer than two seeds are finished" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        search_memory.main(["--trials", "10"])
    assert "--trials must be at least 13, which a slope needs, but is 10" in capsys.readouterr().err


def test_an_image_that_stands_in_a_split_several_times_is_scanned_once():
    splits = {name: images.select(range(8)) for name, images in demo_dataset().items()}
    splits["train"] = splits["train"].select([0, 1, 0, 0, 2])
    repeated, once = (
        duplicate_scan.measure({**splits, "train": splits["train"].select(rows)}, altered=False)
        for rows in (range(5), (0, 1, 4))
    )
    assert repeated == once and repeated["copies"]["unchanged"]["low"] == pytest.approx(0.025 ** (1 / 3))


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
