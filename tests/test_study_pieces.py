"""Pieces of work on disk, the share of a machine, and intervals: what the studies have in common."""

import ast
import itertools
import json
import statistics
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from common.audits import best_attack, canaries_caught
from common.intervals import bootstrap_median, paired_difference, rank_correlation, t_interval, t_test
from common.memory import peak_memory
from common.pieces import Job, Part, Pieces, add_part_flag, exit_if_missing

STUDIES = Path(__file__).parents[1] / "training_scripts" / "studies"


def test_two_processes_never_work_on_the_same_piece(tmp_path):
    pieces = Pieces(tmp_path)
    with pieces.claim("a") as first, pieces.claim("a") as second:
        assert first and not second
    with pieces.claim("a") as again:
        assert again


def test_a_lock_ends_with_the_process_that_holds_it(tmp_path):
    code = """
import os
from pathlib import Path
from common.memory import peak_memory
from common.pieces import Pieces
with Pieces(Path()).claim("a") as mine:
    os._exit(7 + mine)
"""
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(STUDIES)}).returncode == 8
    with Pieces(tmp_path).claim("a") as mine:
        assert mine


def test_finished_pieces_are_not_done_again(tmp_path, capsys):
    done = []
    jobs = [Job(name, name, lambda name=name: done.append(name) or {"name": name}) for name in ("kind/a", "kind/b")]
    Pieces(tmp_path).write("kind/a", {"name": "of before"})
    assert Pieces(tmp_path).work(jobs) == [] and done == ["kind/b"]
    assert Pieces(tmp_path).names("kind") == ["kind/a", "kind/b"]
    assert Pieces(tmp_path).read("kind/a") == {"name": "of before"}
    assert capsys.readouterr().out == "2 of 2: kind/b, 0 s\n"


def test_a_job_that_needs_a_failed_one_is_skipped_and_both_are_named(tmp_path, capsys):
    def fail():
        raise RuntimeError("out of paper")

    jobs = [Job("b", "second", dict, ("a",)), Job("a", "first", fail), Job("c", "third", dict)]
    pieces = Pieces(tmp_path)
    failed = pieces.work(jobs)
    assert [job.title for job in failed] == ["second", "first"] and "c" in pieces
    with pytest.raises(SystemExit) as stopped:
        exit_if_missing(failed)
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and "out of paper" in error and error.endswith("see above: second; first\n")


def test_a_folder_of_other_settings_is_refused(tmp_path):
    Pieces(tmp_path, {"steps": 2, "seed": 0})
    Pieces(tmp_path, {"steps": 2, "seed": 0})
    with pytest.raises(ValueError, match=r"steps was 2 and is 3\. Give another --output_dir"):
        Pieces(tmp_path, {"steps": 3, "seed": 0})


def test_restoring_leaves_finished_pieces_alone(tmp_path):
    pieces = Pieces(tmp_path)
    pieces.write("a", {"value": 1})
    pieces.restore({"a": {"value": 2}, "b": {"value": float("nan")}})
    assert pieces.read("a") == {"value": 1} and json.dumps(pieces.read("b")) == '{"value": NaN}'


def test_the_parts_of_all_machines_make_up_the_whole():
    items = list(range(7))
    parts = [Part.parse(f"{number}/3").of(items) for number in (1, 2, 3)]
    assert sorted(itertools.chain(*parts)) == items and parts[0] == [0, 3, 6]


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/2/3"])
def test_a_part_that_is_none_is_refused(text, capsys):
    parser = ArgumentParser()
    add_part_flag(parser)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--part", text])
    assert stopped.value.code == 2 and "must be like 1/2, the first of two" in capsys.readouterr().err


def test_the_interval_is_students():
    values = [1.0, 2.0, 4.0]
    interval = t_interval(values)
    assert interval.mean == pytest.approx(7 / 3) and interval.seeds == 3
    assert interval.half == pytest.approx(4.302653 * statistics.stdev(values) / 3**0.5, rel=1e-6)
    assert t_interval([1.0]) is None


def test_a_difference_is_of_the_seeds_that_have_both_values():
    paired = paired_difference({0: 1.0, 1: 2.0, 2: 9.0, 3: None}, {3: 1.0, 1: 1.0, 0: 3.0})
    assert paired.seeds == 2 and paired.mean == -0.5
    assert str(paired) == "-0.5 (-19.6 to +18.6)"


def test_an_interval_of_nan_is_refused():
    for interval in (t_interval, t_test):
        with pytest.raises(ValueError, match="1 of 3 values are NaN"):
            interval([1.0, float("nan"), 2.0])


def test_only_values_that_are_all_zero_show_no_difference():
    assert t_test([0.0, 0.0, 0.0])[1] == 1
    assert t_test([1.0, 2.0, 4.0])[1] == pytest.approx(0.1181, abs=1e-4)


def test_the_median_of_few_values_has_a_range_instead_of_an_interval():
    assert bootstrap_median(np.array([3.0, 1.0])) == {"median": 2.0, "low": 1.0, "high": 3.0}
    many = bootstrap_median(np.arange(20.0))
    assert 0 < many["low"] < many["median"] == 9.5 < many["high"] < 19


def test_a_rank_correlation_has_an_interval_even_where_a_draw_has_one_value_only():
    x, y = np.array([0.0, 0.0, 0.0, 1.0]), np.array([1.0, 3.0, 2.0, 4.0])
    found = rank_correlation(x, y)
    assert found["rho"] == pytest.approx(spearmanr(x, y).statistic) and -1 <= found["low"] <= found["high"] <= 1
    assert rank_correlation(np.zeros(4), y) is None and rank_correlation(x, np.ones(4)) is None


def test_attacks_that_joined_the_audit_later_catch_no_canaries_in_the_tables():
    caught = {"membership_loss": {"caught": 1, "of": 4}, "partial_copy": {"caught": 4, "of": 4}}
    audit = {"canaries": {"caught": caught}}
    assert canaries_caught(audit) == {"canaries_membership_loss": 1} and best_attack(audit) == 25


def test_a_study_runs_by_its_path_from_any_folder(tmp_path):
    command = [sys.executable, STUDIES / "reproduce_table.py", "--help"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0 and "--images_per_prompt" in shown.stdout


@pytest.mark.parametrize("script", sorted(STUDIES.glob("*.py")), ids=lambda script: script.name)
def test_each_study_names_its_command(script):
    assert f"python training_scripts/studies/{script.name}" in ast.get_docstring(ast.parse(script.read_text()))


def test_peak_memory_is_that_of_the_work_alone():
    size = 64
    before, peak = peak_memory(lambda: bytes(bytearray(size * 2**20)))  # twice at a time
    assert 2 * size - 2 < peak - before < 2 * size + 32
    before, peak = peak_memory(lambda: None)
    assert peak - before < 2
