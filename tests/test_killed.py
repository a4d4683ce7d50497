"""The whole command, killed at seven moments, ends as if nobody had killed it; `make faults` has more of them."""

import json
import re
import sys
from pathlib import Path

import pytest
from kill_moments import Matrix, render

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the moments are counted by what Linux shows in /proc")

MOMENTS = [
    ("rename", r"memcontrol_hf/tmp", 0, True),
    ("open", r"study\.journal", 20, True),
    ("step", r"1", 1, False),
    ("open", r"\.unfinished/checkpoint-4/trainer_state\.json", 0, True),
    ("rename", r"\.unfinished/checkpoint-6", 0, False),
    ("rename", r"\.memorization_report\.json", 1, False),
    ("sync", r"\.README\.md", 0, True),
]
"""Moments: the kind of the event, the beginning of the file's name, which of these events, and whether it is torn."""


RESULT = Path(__file__).parents[1] / "docs" / "results" / "kill_moments.json"


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    return Matrix(tmp_path_factory.mktemp("kills"))


@pytest.mark.parametrize(("kind", "file", "which", "torn"), MOMENTS)
def test_a_killed_command_ends_as_if_nobody_had_killed_it(matrix, kind, file, which, torn):
    numbers = [n for n, event in enumerate(matrix.events, 1) if event[0] == kind and re.match(file, event[1])]
    moment = matrix.moment(numbers[which], torn)
    assert moment.outcome == "same", moment
    assert moment.attempts == 1


def test_the_committed_page_is_rendered_from_the_committed_figures():
    assert RESULT.with_suffix(".md").read_text("utf-8") == render(json.loads(RESULT.read_text("utf-8")))
