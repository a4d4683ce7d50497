"""The committed comparison is what its committed runs say."""

import json
from pathlib import Path

import pytest

import compare_mitigations
from memcontrol_hf.mitigations import MITIGATIONS, parse_mitigations

RESULTS = Path(__file__).parents[1] / "docs" / "mitigations_comparison.json"


def test_each_committed_row_has_three_seeds():
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"]
    assert all(len(by_seed) == 3 for by_seed in runs.values())


def test_finished_runs_are_taken_up_and_the_same_results_are_written(tmp_path):
    results = tmp_path / "results.json"
    results.write_bytes(RESULTS.read_bytes())
    command = ["--mask_from", str(RESULTS.with_name("demo_mask.json")), "--output_dir", str(tmp_path / "out")]
    compare_mitigations.main([*command, "--results", str(results)])
    assert results.read_bytes() == RESULTS.read_bytes()
    assert results.with_suffix(".md").read_bytes() == RESULTS.with_suffix(".md").read_bytes()


def test_results_of_other_settings_are_not_mixed_in(tmp_path, capsys):
    report = {"mask": {"mid_block.attentions.0": True}, "training": {"learning_rate": 0.01}}
    (tmp_path / "memorization_report.json").write_text(json.dumps(report))
    (tmp_path / "results.json").write_text(json.dumps({"settings": {"max_train_steps": 7}, "runs": {}}))
    with pytest.raises(SystemExit) as stopped:
        compare_mitigations.main(["--mask_from", str(tmp_path), "--results", str(tmp_path / "results.json")])
    assert stopped.value.code == 2
    assert "was made with other settings" in capsys.readouterr().err


@pytest.fixture
def rows(tmp_path):
    """The rows of the table, with a mask that was found."""
    report = {"mask": {"mid_block.attentions.0": True}, "training": {"learning_rate": 0.01}}
    (tmp_path / "memorization_report.json").write_text(json.dumps(report))
    return compare_mitigations.rows(tmp_path, weights_rate=1e-3)


def test_each_mitigation_has_a_row_beside_none_full_and_the_selected_mask(rows):
    assert list(rows)[:3] == ["SV-DIFF, all blocks", "full fine-tune", "SV-DIFF, selected mask"]
    first, *others = rows.values()
    assert [row.mask for row in (first, *others[:2])] == [None, None, {"mid_block.attentions.0": True}]
    later = {"timestep_range", "skip_low_loss"}  # docs/mitigations.md says that they are not in the comparison
    assert set(parse_mitigations(row.mitigation[0] for row in others[2:])) == set(MITIGATIONS) - later
    assert all(row._replace(mitigation=()) == first for row in others[2:])


def test_the_table_of_mitigations_has_its_columns(rows):
    figures = {"fid": 4.0, "amd": 0.1, "membership_auc": 0.6, "canaries_caught": 50.0, "seconds_per_step": 1.5}
    runs = {name: {"0": figures, "1": figures} for name in rows}
    settings = {"max_train_steps": 200, "weights_rate": 1e-3, "rate": 0.01, "seeds": [0, 1]}
    text = compare_mitigations.render({"settings": settings, "runs": runs})
    assert "|  | fid ↓ | amd ↑ | membership AUC ↓ | canaries caught, % ↓ | CPU seconds a step |" in text
    assert "| all blocks, rwa | 4 ± 0 | 0.1 ± 0 | 0.6 ± 0 | 50 ± 0 | 1.5 ± 0 |" in text
    assert "| all blocks, rwa | +0 (+0 to +0) | +0 (+0 to +0) | +0 (+0 to +0) | +0 (+0 to +0) |" in text


def test_one_seed_is_shown_without_an_interval(rows):
    figures = {"fid": 4.0, "amd": 0.1, "membership_auc": 0.6, "canaries_caught": 50.0, "seconds_per_step": 1.5}
    settings = {"max_train_steps": 200, "weights_rate": 1e-3, "rate": 0.01, "seeds": [0]}
    text = compare_mitigations.render({"settings": settings, "runs": {name: {"0": figures} for name in rows}})
    assert "| full fine-tune | 4 | 0.1 | 0.6 | 50 | 1.5 |" in text and "| full fine-tune | – | – | – | – |" in text
