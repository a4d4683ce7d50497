"""The committed comparison is what its committed runs say."""

import importlib.util
import json
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("compare_on_demo", ROOT / "training_scripts" / "compare_on_demo.py")
compare_on_demo = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(compare_on_demo)


def test_the_table_is_rendered_from_the_runs():
    content = json.loads((ROOT / "docs" / "demo_comparison.json").read_text(encoding="utf-8"))
    assert all(len(of_seed) == 3 for of_seed in content["runs"].values())
    assert (ROOT / "docs" / "demo_comparison.md").read_text(encoding="utf-8") == compare_on_demo.render(content)


def test_the_interval_is_students():
    values = [1.0, 2.0, 4.0]
    mean, half = compare_on_demo.interval(values)
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(4.302653 * statistics.stdev(values) / 3**0.5, rel=1e-6)


def test_results_of_other_settings_are_not_mixed_in(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"mask": {"mid_block.attentions.0": True}}))
    (tmp_path / "memorization_report.json").write_text(json.dumps({"training": {"learning_rate": 0.01}}))
    (tmp_path / "results.json").write_text(json.dumps({"settings": {"max_train_steps": 7}, "runs": {}}))
    with pytest.raises(SystemExit) as stopped:
        compare_on_demo.main(["--mask_from", str(tmp_path), "--results", str(tmp_path / "results.json")])
    assert stopped.value.code == 2
    assert "was made with other settings" in capsys.readouterr().err
