"""The table of the paper: what is rendered follows from the runs, and the runs go on where they stopped."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
from made_up_trials import made_up_trials
from PIL import Image as PILImage
from scipy.stats import t as student

import reproduce_table
from common.intervals import Interval
from common.pieces import Part, Pieces
from memcontrol_hf.report import MemorizationReport
from paper_table import runs as paper_runs
from paper_table.claims import (
    CAPACITY,
    COMPARED,
    CONFIRMED,
    NOT_CONFIRMED,
    NOT_RUN,
    UNDECIDED,
    Limit,
    difference,
    judge,
    outlook,
    verdict,
)
from paper_table.data_sets import DATA
from paper_table.masks import random_mask
from paper_table.page import ATTACKS, CARD_ROWS, COST, EXTRACTED, over_seeds, render
from paper_table.plots import plot
from paper_table.rows import MAIN, ROWS
from paper_table.sweep import sweep_of
from paper_table.tasks import Settings, Task, plan

ROOT = Path(__file__).parent.parent
TINY = ["--max_train_steps", "2", "--eval_num_images", "8", "--num_prompts", "2", "--images_per_prompt", "3",
        "--max_images", "12", "--data", "demo", "--rows", "svdiff", "--seed", "0"]  # fmt: skip
AUC = {"full": 0.9, "svdiff": 0.7, "memcontrol-svdiff": 0.6, "random-svdiff": 0.65, "transfer-mask": 0.62}


def results(aucs=None, fids=None, noise=0.01, data=("demo", "elpv"), clid=None):
    """Made-up runs of three seeds; the membership AUC and fid of a row, with a little of each seed's own."""
    aucs, fids = AUC if aucs is None else aucs, fids or {}
    runs = [
        {
            "data": name,
            "row": row,
            "seed": seed,
            "trainable_percent": 100 * auc**4,
            "adapter_bytes": 1000,
            "fid": fids.get(row, 4.0) + noise * ((seed + len(row)) % 3),
            "amd": 0.1,
            "audit_membership_auc_loss": auc + noise * ((seed * len(row)) % 3),
            "audit_membership_auc_clid": (clid or {}).get(row, auc) + noise * ((seed * len(row)) % 3),
            "audit_extraction_rate": 0.25,
            "audit_extraction_rate_calibrated": None,
            "canaries_best": 50.0,
            "prompts": 24,
            "seconds": 60.0,
        }
        for name in data
        for row, auc in aucs.items()
        for seed in (0, 1, 2)
    ]
    return {
        "settings": asdict(Settings()),
        "environment": "a machine",
        "rates": [],
        "searches": [],
        "runs": runs,
        "sweep": None,
        "pictures": ["real", "svdiff"],
    }


def verdict_on(content, text, data="demo"):
    return judge(content)[text][data].verdict


def test_the_committed_table_has_all_committed_runs():
    content = json.loads((ROOT / "docs" / "results" / "paper_table.json").read_text(encoding="utf-8"))
    table = pd.read_parquet(ROOT / "docs" / "results" / "paper_table.parquet")
    pd.testing.assert_frame_equal(table, pd.DataFrame(content["runs"]))


@pytest.mark.parametrize("data", DATA)
def test_the_published_cards_show_the_committed_runs(data):
    content = json.loads((ROOT / "docs" / "results" / "paper_table.json").read_text(encoding="utf-8"))
    report = MemorizationReport.from_json(ROOT / "model_cards" / f"{data}-svdiff" / "memorization_report.json")
    assert report.card.get("over_seeds") == over_seeds(content, data)


def test_the_findings_show_the_committed_runs_and_verdicts():
    content = json.loads((ROOT / "docs" / "results" / "paper_table.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    for row in over_seeds(content, "demo")["table"]:
        assert f"| {' | '.join(row)} |" in text
    for claim, judged in judge(content).items():
        assert f"| {claim} | {' | '.join(of_data.verdict for of_data in judged.values())} |" in text


def test_a_card_gets_the_rows_of_its_data_set_once_all_have_several_seeds(tmp_path):
    rows = dict.fromkeys(CARD_ROWS, 0.6)
    assert over_seeds(results(dict.fromkeys(CARD_ROWS[1:], 0.6)), "demo") is None
    folder = tmp_path / "model_cards" / "demo-svdiff"
    shutil.copytree(ROOT / "model_cards" / "demo-svdiff", folder)
    docs = tmp_path / "docs" / "results"
    content = results(rows, noise=0.0)
    for run in content["runs"]:
        file = tmp_path / "out" / "run" / f"{run['data']}-{run['row']}-{run['seed']}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(run))
    reproduce_table.main(["--collect", "--output_dir", str(tmp_path / "out"), "--docs_dir", str(docs)])
    card = (folder / "README.md").read_text()
    assert "with 3 seeds and 200 steps" in card
    assert "| full fine-tune | 13 | 4.000 ± 0.000 | 0.1000 ± 0.0000 | – | 0.600 ± 0.000 | 0.600 ± 0.000 |" in card


def test_a_row_shows_its_mean_and_interval_and_a_missing_one_that_it_is_not_run():
    text = render(results(noise=0.0))
    assert "| SV-DIFF | 3 | 24 | 1000 | 4.000 ± 0.000 | – | 0.1000 ± 0.0000 |" in text
    assert "| DiffFit | 0 | not run yet |" in text
    assert "| 18 of 72 (16 to 37 %) | – |" in text


@pytest.mark.parametrize(
    ("searched", "clid", "fid", "noise", "verdict"),
    [
        (0.6, 0.6, 4.0, 0.001, CONFIRMED),
        (0.6, 0.6, 4.3, 0.001, CONFIRMED),  # fid is worse by less than a tenth
        (0.8, 0.6, 4.0, 0.001, NOT_CONFIRMED),  # memorizes more
        (0.6, 0.8, 4.0, 0.001, NOT_CONFIRMED),  # more by the attack that the search did not see
        (0.6, 0.6, 6.0, 0.001, NOT_CONFIRMED),  # memorizes less, at the price of worse images
        (0.6, 0.6, 4.0, 0.5, UNDECIDED),
    ],
)
def test_a_searched_mask_is_held_against_a_random_one(searched, clid, fid, noise, verdict):
    aucs = {"memcontrol-svdiff": searched, "random-svdiff": 0.7}
    content = results(aucs, {"memcontrol-svdiff": fid}, noise, clid={"memcontrol-svdiff": clid})
    assert verdict_on(content, "A searched mask beats a random one of its size") == verdict


def limits(fid, below_fid):
    """Two attacks that say less, and what fid says."""
    below = Interval(-0.04, -0.06, -0.01, 3)
    return [Limit(below, 0.0), Limit(below, 0.0), Limit(fid and Interval(*fid, 3), below_fid)]


def test_a_fid_that_varies_too_much_to_tell_decides_nothing():
    assert verdict(limits((3.0, -0.1, 6.1), 0.4)) == UNDECIDED
    assert verdict(limits((0.2, 0.1, 0.3), 0.4)) == CONFIRMED
    assert verdict(limits(None, 0.4)) == NOT_RUN


@pytest.mark.parametrize(
    ("fid", "says"),
    [
        ((0.2, 0.1, 0.3), "–"),
        ((0.2, -0.2, 0.6), f"5: {CONFIRMED}"),
        ((0.6, 0.2, 1.0), f"5: {NOT_CONFIRMED}"),
        ((0.4, -0.2, 1.0), "more than 1000"),
    ],
)
def test_what_is_undecided_says_how_many_seeds_would_decide_it(fid, says):
    assert outlook(limits(fid, 0.4)) == says
    spread = 0.4 * 3**0.5 / student.ppf(0.975, 2)
    assert student.ppf(0.975, 4) * spread / 5**0.5 < 0.2 <= student.ppf(0.975, 3) * spread / 4**0.5


def test_differences_are_paired_by_seed():
    runs = {"a": {0: {"fid": 1.0}, 1: {"fid": 2.0}, 2: {"fid": 9.0}}, "b": {1: {"fid": 1.0}, 0: {"fid": 3.0}}}
    paired = difference(runs, "a", "b", "fid")
    assert paired.seeds == 2 and paired.mean == -0.5 and paired.half == pytest.approx(1.5 * 12.7062, rel=1e-4)


def test_a_claim_needs_all_of_its_comparisons():
    text = "A mask carries over to another data set"
    aucs = {"transfer-mask": 0.6, "svdiff": 0.7, "transfer-random": 0.8}
    assert verdict_on(results(aucs, noise=0.001), text) == CONFIRMED
    assert verdict_on(results(aucs | {"transfer-random": 0.5}, noise=0.001), text) == NOT_CONFIRMED
    del aucs["transfer-random"]
    assert verdict_on(results(aucs, noise=0.001), text) == NOT_RUN


def test_capacity_is_the_rank_correlation_over_rows():
    content = results(noise=0.0)
    assert verdict_on(content, CAPACITY) == CONFIRMED
    for run in content["runs"]:
        run["trainable_percent"] = -run["trainable_percent"]
    assert verdict_on(content, CAPACITY) == NOT_CONFIRMED


def test_the_size_sweep_is_read_from_the_table_of_trials_and_left_out_without(tmp_path):
    file = tmp_path / "trial_table.parquet"
    assert sweep_of(file) is None and "not run yet: it is read from the table" in render(results())
    made_up_trials().to_parquet(file)
    content = results() | {"sweep": sweep_of(file)}
    ranked = content["sweep"]["correlations"]["audit_membership_auc_loss"]
    assert content["sweep"]["runs"] == 14 and 0 < ranked["low"] <= ranked["rho"] <= ranked["high"] <= 1
    assert "14 runs of [the table of real trials](../trial_table.parquet)" in render(content)
    plot(content, file, tmp_path)
    assert {plot.name for plot in tmp_path.glob("*.png")} == {
        "paper_table_demo.png",
        "paper_table_elpv.png",
        "paper_table_sweep.png",
    }


def test_pictures_are_shown_where_the_licence_lets_them():
    text = render(results())
    assert (
        "| real images | ![](paper_table_samples/real.png) |\n| SV-DIFF | ![](paper_table_samples/svdiff.png) |"
        in text
    )
    assert text.count("The command writes them to `samples/elpv`.") == 1


def test_one_seed_decides_nothing():
    content = results(noise=0.0)
    content["runs"] = [run for run in content["runs"] if run["seed"] == 0]
    assert {verdict_on(content, text) for text in judge(content)} == {NOT_RUN}
    assert "| SV-DIFF | 1 | 24 | 1000 | 4.000 |" in render(content)


def test_a_random_mask_has_the_size_of_the_one_it_stands_for():
    sizes = {f"block {i}": 10 * (i + 1) for i in range(16)}
    like = {name: name in ("block 3", "block 7", "block 12") for name in sizes}
    masks = [random_mask(sizes, like, seed) for seed in (0, 0, 1)]
    assert masks[0] == masks[1] != masks[2]
    for mask in masks:
        assert mask != like
        assert sum(sizes[name] for name, on in mask.items() if on) == pytest.approx(250, rel=0.05)


def test_a_run_comes_after_what_it_needs_and_each_part_has_its_own():
    tasks = plan(["elpv"], ["transfer-mask", "transfer-own"], [0], Part())
    assert [(task.kind, task.data, task.name) for task in tasks] == [
        ("rate", "elpv", "svdiff"),
        ("search", "demo", "svdiff"),
        ("run", "elpv", "transfer-mask"),
        ("search", "elpv", "svdiff"),
        ("run", "elpv", "transfer-own"),
    ]
    parts = [plan(list(DATA), MAIN, [0, 1], Part(number, 2)) for number in (1, 2)]
    runs = [{task for task in part if task.kind == "run"} for part in parts]
    assert not runs[0] & runs[1] and len(runs[0] | runs[1]) == 2 * 2 * len(MAIN)


def test_a_search_begins_without_a_screening_as_the_committed_ones_did(tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    def asked(self, **given):
        raise Asked(given["screen"])

    monkeypatch.setattr(paper_runs.MemControlTrainer, "hyperparameter_search", asked)
    settings = Settings(max_train_steps=2, max_images=12)
    with pytest.raises(Asked, match="False"):
        paper_runs.search(Task("search", "demo", "svdiff", 0), settings, Pieces(tmp_path))


def test_an_unknown_row_is_refused_with_the_names_of_all(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        reproduce_table.main(["--rows", "svdif", "--output_dir", str(tmp_path)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "unknown row(s) svdif" in error and all(name in error for name in ("transfer", *ROWS))


def test_what_fails_is_told_and_left_out_while_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    def work(task, settings, pieces):
        if (task.kind, task.data) == ("rate", "demo"):
            raise RuntimeError("no learning rate is finite")
        run = results(data=[task.data])["runs"][0]
        return {name: figure for name, figure in run.items() if name not in ("data", "row", "seed")}

    monkeypatch.setattr(paper_runs, "WORK", dict.fromkeys(paper_runs.WORK, work))
    with pytest.raises(SystemExit) as stopped:
        command = ["--rows", "base", "svdiff", "--seed", "0", "--output_dir", str(tmp_path / "out")]
        reproduce_table.main([*command, "--docs_dir", str(tmp_path / "docs")])
    error = capsys.readouterr().err
    assert stopped.value.code == 1
    assert "no learning rate is finite" in error
    assert "missing, see above: rate demo svdiff 1000; run demo svdiff 0" in error
    runs = json.loads((tmp_path / "docs" / "paper_table.json").read_text(encoding="utf-8"))["runs"]
    assert [(run["data"], run["row"]) for run in runs] == [("demo", "base"), ("elpv", "base"), ("elpv", "svdiff")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One row, for real, with next to no steps."""
    folder = tmp_path_factory.mktemp("table")
    reproduce_table.main([*TINY, "--output_dir", str(folder / "out"), "--docs_dir", str(folder / "docs")])
    return folder


def test_a_row_is_trained_attacked_and_collected(finished):
    content = json.loads((finished / "docs" / "paper_table.json").read_text(encoding="utf-8"))
    (run,) = content["runs"]
    assert run["learning_rate"] == content["rates"][0]["learning_rate"]
    assert run["trainable_parameters"] > 0 and run["adapter_bytes"] > 4 * run["trainable_parameters"]
    columns = {*COST, *ATTACKS, *EXTRACTED, *COMPARED} - {"canaries_best"}
    assert columns <= run.keys()
    assert (finished / "docs" / "paper_table.md").read_text(encoding="utf-8") == render(content)
    assert (finished / "docs" / "paper_table_demo.png").stat().st_size > 0
    real, drawn = (
        PILImage.open(finished / "docs" / "paper_table_samples" / f"{name}.png") for name in ("real", "svdiff")
    )
    assert real.size == drawn.size and real.tobytes() != drawn.tobytes()


@pytest.mark.parametrize("folder", ["out", "another"])  # on a new machine only the results are there
def test_a_second_call_runs_nothing_and_writes_the_same(finished, capsys, folder):
    page = (finished / "docs" / "paper_table.md").read_text(encoding="utf-8")
    reproduce_table.main([*TINY, "--output_dir", str(finished / folder), "--docs_dir", str(finished / "docs")])
    assert capsys.readouterr().out.splitlines() == [f"1 runs: {finished / 'docs' / 'paper_table.md'}"]
    assert (finished / "docs" / "paper_table.md").read_text(encoding="utf-8") == page


def test_results_of_other_settings_are_not_mixed_in(finished, capsys):
    with pytest.raises(SystemExit) as stopped:
        reproduce_table.main([*TINY, "--max_train_steps", "3", "--output_dir", str(finished / "out")])
    assert stopped.value.code == 2
    assert "max_train_steps was 2 and is 3" in capsys.readouterr().err
