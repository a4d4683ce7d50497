"""The committed comparison is what its committed runs say."""

import argparse
import json
import statistics
import sys
from pathlib import Path

import pytest

from memcontrol_hf.mitigations import MITIGATIONS, parse_mitigations

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "training_scripts"))  # as when it is run
import compare_mitigations  # noqa: E402


def test_the_table_is_rendered_from_the_runs():
    results = ROOT / "docs" / "mitigations_comparison.json"
    content = json.loads(results.read_text(encoding="utf-8"))
    assert all(len(of_seed) == 3 for of_seed in content["runs"].values())
    assert results.with_suffix(".md").read_text(encoding="utf-8") == compare_mitigations.render(content)


def test_the_interval_is_students():
    values = [1.0, 2.0, 4.0]
    mean, half = compare_mitigations.interval(values)
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(4.302653 * statistics.stdev(values) / 3**0.5, rel=1e-6)


def test_results_of_other_settings_are_not_mixed_in(tmp_path, capsys):
    report = {"mask": {"mid_block.attentions.0": True}, "training": {"learning_rate": 0.01}}
    (tmp_path / "memorization_report.json").write_text(json.dumps(report))
    (tmp_path / "results.json").write_text(json.dumps({"settings": {"max_train_steps": 7}, "runs": {}}))
    with pytest.raises(SystemExit) as stopped:
        compare_mitigations.main(["--mask_from", str(tmp_path), "--results", str(tmp_path / "results.json")])
    assert stopped.value.code == 2
    assert "was made with other settings" in capsys.readouterr().err


@pytest.fixture
def mitigations(tmp_path):
    """The arguments of the table of mitigations, with a mask that was found."""
    report = {"mask": {"mid_block.attentions.0": True}, "training": {"learning_rate": 0.01}}
    (tmp_path / "memorization_report.json").write_text(json.dumps(report))
    return argparse.Namespace(mask_from=tmp_path, weights_rate=1e-3)


def test_each_mitigation_has_a_row_beside_none_full_and_the_selected_mask(mitigations):
    table = compare_mitigations.rows(mitigations)
    assert list(table)[:3] == ["SV-DIFF, all blocks", "full fine-tune", "SV-DIFF, selected mask"]
    rows = list(table.values())
    assert [row["mask"] for row in rows[:3]] == [True, True, {"mid_block.attentions.0": True}]
    assert set(parse_mitigations(row["mitigation"][0] for row in rows[3:])) == set(MITIGATIONS)
    assert all({**row, "mitigation": None} == {**rows[0], "mitigation": None} for row in rows[3:])


def test_the_table_of_mitigations_has_its_columns(mitigations):
    figures = {"fid": 4.0, "amd": 0.1, "membership_auc": 0.6, "canaries_caught": 50.0, "seconds_per_step": 1.5}
    runs = {name: {"0": figures, "1": figures} for name in compare_mitigations.rows(mitigations)}
    settings = {"max_train_steps": 200, "weights_rate": 1e-3, "rate": 0.01, "seeds": [0, 1]}
    text = compare_mitigations.render({"settings": settings, "runs": runs})
    assert "| | fid ↓ | amd ↑ | membership AUC ↓ | canaries caught, % ↓ | CPU seconds a step |" in text
    row = "| all blocks, rwa | 4 ± 0 | 0.1 ± 0 | 0.6 ± 0 | 50 ± 0 | 1.5 ± 0 |"
    assert (
        row in text and "| all blocks, rwa | +0 (+0 to +0) | +0 (+0 to +0) | +0 (+0 to +0) | +0 (+0 to +0) |" in text
    )
