"""The benchmarks' arithmetic, their committed page, and one run of a row."""

import json
from pathlib import Path

import pytest
from benchmarks import training_step, whole_search
from benchmarks.page import render, verdict
from benchmarks.timing import alternate, compared, ratio
from conftest import tiny_trainer

RESULT = Path(__file__).parents[1] / "docs" / "performance.json"


def test_the_committed_page_is_rendered_from_the_committed_figures():
    assert RESULT.with_suffix(".md").read_text("utf-8") == render(json.loads(RESULT.read_text("utf-8")))


def test_sides_take_turns_and_the_first_turn_is_not_counted():
    calls, ticks = [], iter(range(100))
    seconds = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, lambda: next(ticks))
    assert "".join(calls) == "baabbaab" and seconds == {"a": [1, 1, 1], "b": [1, 1, 1]}


def test_the_ratio_is_that_of_medians_and_what_slows_both_does_not_widen_it():
    slow = [1.0, 9.0, 4.0, 2.0, 7.0, 3.0, 5.0]
    found = ratio([1.1 * second for second in slow], slow)
    assert found == pytest.approx({"ratio": 1.1, "low": 1.1, "high": 1.1})
    noisy = ratio([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [6.0, 1.0, 3.0, 2.0, 5.0, 4.0])
    assert noisy["low"] < noisy["ratio"] == 1 < noisy["high"]


@pytest.mark.parametrize(
    ("low", "high", "found"), [(0.9, 1.0, "kept"), (0.9, 1.2, "within"), (1.0, 1.5, "open"), (1.2, 1.5, "missed")]
)
def test_a_goal_is_kept_or_missed_when_the_whole_interval_says_so(low, high, found):
    assert verdict({"goal": 1.1, "low": low, "high": high, "ratio": (low + high) / 2}) == found


def test_a_row_without_a_goal_has_no_verdict_and_says_when_compiling_pays():
    row = compared("training step with torch_compile, x", None, {"trainer": [1.5, 1.5], "bare loop": [2.0, 2.0]})
    page = render({"command": "make bench", "machines": {"CPU": [row | {"load": 1.0, "start": 100.0}]}})
    assert "| 0.75 (0.75 to 0.75) | none |  |" in page and "took 100 s" in page and "after about 200 steps" in page
    slower = row | {"medians": {"trainer": 2.0, "bare loop": 1.5}, "load": 1.0, "start": 100.0}
    assert "it never pays" in render({"command": "make bench", "machines": {"CPU": [slower]}})


def test_a_whole_search_is_composed_of_its_trials_and_their_seconds():
    assert sorted(whole_search.trials_of_screened_searches()) == [6.5] * 7 + [7.5] * 2 + [float("inf")]
    row = whole_search.composed({"ours": [2.0, 2.0], "theirs": [4.0, 4.0]})
    assert row["ratio"] == row["low"] == 6.5 * 2 / (64 * 4) and row["high"] == 7.5 * 2 / (64 * 4)
    assert row["searches"] == {"all": 10, "never": 1}
    page = render({"command": "make bench", "machines": {"CPU": [row | {"load": 1.0}]}})
    assert "after 6.5 trials" in page and "1 of the searches never came as far" in page


def test_the_trainers_steps_alternate_with_bare_ones(tmp_path):
    trainer = tiny_trainer(tmp_path)
    row = training_step.measure("tiny", trainer, 3, 1.03)
    assert row["pairs"] == 3 and set(row["medians"]) == {"trainer", "bare loop"}
    assert row["low"] <= row["ratio"] <= row["high"] and all(second > 0 for second in row["medians"].values())
    page = render({"command": "make bench", "machines": {"CPU": [row | {"load": 1.0}]}})
    assert "| tiny | trainer: " in page and compared("x", 1, {"a": [1.0, 1.0], "b": [2.0, 2.0]})["ratio"] == 0.5
