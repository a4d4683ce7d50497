"""The study of the claims: masks, curves, matched quality, intervals, verdicts and pages."""

import math
from dataclasses import asdict
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import rankdata

from claimed import runs as claimed_runs
from claimed.judged import (
    CLAIMS,
    CONFIRMED,
    NONE,
    REFUTED,
    UNDECIDED,
    UNMATCHED,
    Images,
    Tested,
    changed_without,
    compare,
    interpolation_errors,
    judge,
    matched,
    place,
    reward,
    seeds_of,
    value,
    verdict,
)
from claimed.page import deciding, pictures, plot, render
from claimed.results import finished, read_runs, restore, write_runs
from claimed.rows import ALL, BASE, FOUND, OWN_RATE, RANDOMS, RATE_SEED, ROWS, SEEDS, SHARES, STEPS, WORST, piece_of
from claimed.runs import SETTINGS, Study, mask_from, max_norm, train_along
from claimed.summary import render_summary
from common.intervals import t_interval
from common.pages import read_results
from common.pieces import Pieces
from memcontrol_hf import metrics
from memcontrol_hf.checkpoints import Diverged
from memcontrol_hf.screening import Screening
from memcontrol_hf.search import suggested_mask
from paper_table.data_sets import images
from screened.choice import masks_of_size, worst_mask

DOCS = Path(__file__).parents[1] / "docs"


def screening() -> Screening:
    """Eight blocks: the first half learns, the second half memorizes."""
    names = [f"block{number}" for number in range(8)]
    learns = dict(zip(names, [0.4, 0.3, 0.2, 0.1, 0.05, 0.05, 0.05, 0.05]))
    memorizes = dict(zip(names, [0.01, 0.01, 0.01, 0.01, 0.5, 0.4, 0.3, 0.2]))
    unknown = dict.fromkeys(names, math.nan)
    return Screening(learns, memorizes, unknown, unknown, dict.fromkeys(names, 10))


# ---- masks ----


def test_masks_of_a_size_are_all_that_fit_and_the_tolerance_grows_until_there_are_enough():
    parameters = {"a": 10, "b": 10, "c": 20, "d": 100}
    found = ["".join(name for name, on in mask.items() if on) for mask in masks_of_size(parameters, 20)]
    assert found == ["c", "ab"]
    assert len(masks_of_size(parameters, 100)) == 3
    assert 4 <= len(masks_of_size(parameters, 100, least=4)) < 15
    assert len(masks_of_size(parameters, 100, least=99)) == 15  # there are no more


def test_the_worst_mask_memorizes_most_of_its_size():
    found = suggested_mask(screening())
    assert worst_mask(found, screening()) == {name: name in ("block4", "block5", "block6", "block7") for name in found}


def test_every_row_of_a_seed_has_a_mask_of_its_size():
    masks = {row: mask_from(screening(), row, seed=3) for row in (FOUND, WORST, *RANDOMS, *SHARES)}
    assert masks[FOUND] == suggested_mask(screening())
    size = sum(masks[FOUND].values())
    assert {sum(masks[row].values()) for row in RANDOMS} == {size}
    assert [sum(masks[row].values()) for row in SHARES] == [2, 4, 6]
    assert len({tuple(masks[row].values()) for row in (FOUND, *RANDOMS)}) == 6


# ---- curves ----


def run(losses: list[float], aucs: list[float] | None = None, parameters: int = 10) -> dict:
    """A run whose curve has these losses, and these AUCs in both attacks."""
    points = {
        str(step): {"loss": loss, "auc_loss": auc, "auc_clid": auc, "auc_pia": auc, "max_norm": 1.0}
        for step, loss, auc in zip(STEPS, losses, aucs or losses)
    }
    return {"mask": ["a"], "learning_rate": 0.1, "parameters": parameters, "points": points}


def test_a_loss_is_placed_where_the_curve_first_falls_to_it():
    curve = run([0.5, 0.4, 0.3, 0.2, 0.35])
    assert place(curve, 0.5) == {10: 1.0}
    assert place(curve, 0.3) == pytest.approx({20: 0.0, 40: 1.0})
    assert place(curve, 0.225) == pytest.approx({40: 0.25, 80: 0.75})
    assert place(curve, 0.2) == pytest.approx({40: 0.0, 80: 1.0})


def test_two_runs_are_compared_at_the_lowest_loss_that_both_reach():
    curves = {
        "one": run([0.5, 0.4, 0.3, 0.2, 0.1], [0.50, 0.52, 0.54, 0.56, 0.58]),
        "other": run([0.45, 0.35, 0.25, 0.30, 0.4], [0.50, 0.60, 0.70, 0.80, 0.90]),
    }
    weights = matched(curves, "one", "other")
    assert weights == pytest.approx({("one", 40): 0.5, ("one", 80): 0.5, ("other", 20): 0.0, ("other", 40): -1.0})
    assert value(curves, weights, "auc_loss") == pytest.approx(0.55 - 0.70)


def test_a_little_above_the_lowest_common_loss_a_run_is_taken_before_its_last_steps():
    curves = {
        "one": run([0.5, 0.4, 0.3, 0.2, 0.199], [0.5, 0.5, 0.5, 0.6, 0.9]),
        "other": run([0.5, 0.4, 0.3, 0.2, 0.1], [0.5, 0.5, 0.5, 0.5, 0.5]),
    }
    at = [value(curves, matched(curves, "one", "other", above), "auc_loss") for above in (0.0, 0.001, 0.002)]
    assert at[0] == pytest.approx(0.4) and at[1] == pytest.approx(0.1) and 0.09 < at[2] < 0.1
    assert matched(curves, "one", "other", 0.302) is None


def test_interpolation_is_compared_with_steps_that_were_measured_as_long_as_the_loss_falls():
    curve = run([0.5, 0.4, 0.3, 0.2, 0.3], [0.5, 0.52, 0.58, 0.7, 0.9])  # bent, as curves of memorization are
    runs = {piece_of("runs", "demo", "attention", row, seed): curve for row in ROWS for seed in range(2)}
    found = interpolation_errors(runs, "demo", "attention", range(2))
    assert found["auc_loss"].mean == pytest.approx(((0.5 + 0.58) / 2 - 0.52 + (0.52 + 0.7) / 2 - 0.58) / 2)
    assert found["auc_clid"].half == pytest.approx(0)


def test_runs_without_a_common_quality_are_not_matched():
    curves = {"one": run([0.5, 0.4, 0.35, 0.3, 0.2]), "other": run([0.9, 0.8, 0.7, 0.6, 0.55])}
    assert matched(curves, "one", "other") is None and matched(curves, "other", "one") is None


# ---- intervals over images ----


def scored(members: np.ndarray, others: np.ndarray) -> dict:
    """A point with the ranks and the AUC of these scores."""
    ranks = (2 * rankdata(np.concatenate([members, others]))).astype(int).tolist()
    auc = metrics.membership(torch.from_numpy(members), torch.from_numpy(others)).auc
    return {
        "loss": 0.1,
        "auc_loss": auc,
        "auc_clid": auc,
        "members": len(members),
        "ranks_loss": ranks,
        "ranks_clid": ranks,
    }


def test_drawn_images_spread_around_the_auc_of_all_and_more_than_seeds_alone():
    generator = np.random.default_rng(0)
    members, others = generator.normal(1, 1, 60), generator.normal(0, 1, 80)
    others[:5] = members[:5]  # shared ranks
    pieces = {f"runs/demo-x/{seed}": {"points": {"80": scored(members, others)}} for seed in range(3)}
    drawn = Images(pieces, draws=4000)
    aucs = drawn.auc("runs/demo-x/0", 80, "auc_loss")
    expected = pieces["runs/demo-x/0"]["points"]["80"]["auc_loss"]
    assert aucs.mean() == pytest.approx(expected, abs=0.003)
    standard_error = math.sqrt(expected * (1 - expected) / 60)  # about Hanley and McNeil's
    assert 0.5 * standard_error < aucs.std() < 1.5 * standard_error
    low, high = drawn.interval([{(piece, 80): 1.0} for piece in pieces], "auc_loss")  # seeds do not differ at all
    assert (low + high) / 2 == pytest.approx(expected) and (high - low) / 2 == pytest.approx(1.96 * aucs.std())


def test_the_interval_over_seeds_and_images_covers_the_truth_and_is_never_narrower_than_that_over_seeds():
    generator, inside, trials = np.random.default_rng(5), 0, 200
    for _ in range(trials):
        effects, seeds = (generator.normal(0, 1, 30), generator.normal(0, 1, 40)), 4
        pieces = {}
        for seed in range(seeds):
            shift = 0.5 + generator.normal(0, 0.3)
            point = scored(
                effects[0] + shift + generator.normal(0, 0.3, 30), effects[1] + generator.normal(0, 0.3, 40)
            )
            pieces[f"runs/demo-x/{seed}"] = {"points": {"80": point}}
        by_seed = [{(piece, 80): 1.0} for piece in pieces]
        low, high = Images(pieces, draws=100).interval(by_seed, "auc_loss")
        over_seeds = t_interval([run["points"]["80"]["auc_loss"] for run in pieces.values()])
        assert high - low >= over_seeds.high - over_seeds.low
        inside += low < NormalDist().cdf(0.5 / math.sqrt(2 * (1 + 0.3**2) + 0.3**2)) < high
    assert inside >= 0.93 * trials


def test_equal_runs_do_not_differ_whatever_images_are_drawn():
    generator = np.random.default_rng(1)
    point = scored(generator.normal(1, 1, 20), generator.normal(0, 1, 30))
    pieces = {f"runs/demo-x/{name}": {"points": {"80": point}} for name in "ab"}
    weights = {("runs/demo-x/a", 80): 1.0, ("runs/demo-x/b", 80): -1.0}
    assert Images(pieces, draws=50).interval([weights, weights], "auc_loss") == (0.0, 0.0)


# ---- verdicts ----


def a_test(mean: float, half: float, p: float) -> Tested:
    return Tested("auc_loss", mean, mean - half, mean + half, 10, p, p)


@pytest.mark.parametrize(
    ("tests", "expected"),
    [
        ([a_test(-0.1, 0.02, 0.001), a_test(-0.2, 0.02, 0.001)], CONFIRMED),
        ([a_test(-0.1, 0.02, 0.001), a_test(0.2, 0.02, 0.001)], REFUTED),
        ([a_test(-0.1, 0.02, 0.001), a_test(-0.1, 0.11, 0.2)], UNDECIDED),
        ([a_test(-0.01, 0.01, 0.2), a_test(0.01, 0.015, 0.3)], NONE),
        ([a_test(-0.01, 0.03, 0.2), a_test(0.01, 0.01, 0.3)], UNDECIDED),
    ],
    ids=["confirmed", "refuted", "one attack decides nothing", "no difference", "too wide"],
)
def test_the_verdict_follows_from_both_attacks(tests, expected):
    assert verdict(tests) == expected


def made_up(seeds: int) -> dict[str, dict]:
    """Runs of all rows: the found mask leaks a little, all blocks much, DP-SGD nothing, and it learns nothing."""
    generator, runs = np.random.default_rng(0), {}
    for seed in range(seeds):
        for row in ROWS:
            leak = {FOUND: 0.05, OWN_RATE: 0.05, BASE: 0.0, "all+dp_sgd": 0.0}.get(row, 0.3)
            points = {}
            for step in (0,) if row == BASE else STEPS:
                shift = 6 * leak * step / 120
                point = scored(generator.normal(shift, 1, 40), generator.normal(0, 1, 60))
                loss = 0.23 if row == "all+dp_sgd" else 0.15 + 0.09 * math.exp(-step / 20)
                points[str(step)] = point | {"loss": loss, "auc_pia": 0.5, "max_norm": 1.0, "loss_train": loss}
            parameters = {BASE: 0, "full": 300, ALL: 100}.get(row, 10)
            made = {"mask": ["a"], "learning_rate": 0.1, "parameters": parameters, "points": points}
            runs[piece_of("runs", "demo", "attention", row, seed)] = made
    return runs


def test_claims_are_judged_at_matched_quality_and_corrected_within_their_family():
    judged = {row["claim"]: row for row in judge(made_up(4), "demo", "attention", range(4))}
    assert len(judged) == len(CLAIMS) + 1
    found = judged["The found mask beats all blocks, stopped early or not"]
    assert found["verdict"] == CONFIRMED and found["left_out"] == 0 and found["pairs"] == 4
    test = found["tests"][0]
    assert test["high"] < 0 and test["image_low"] < test["mean"] < test["image_high"] < 0
    assert test["p"] <= test["p_holm"] <= 1
    private = judged["The found mask beats DP-SGD in all blocks"]
    assert private["verdict"] == f"{UNMATCHED}: learns more" and private["left_out"] == 4
    assert [test["figure"] for test in private["tests"]] == ["loss"]
    randoms = judged["The found mask beats random masks of its size"]
    assert randoms["pairs"] == 20 and randoms["tests"][0]["seeds"] == 4
    assert [test["figure"] for test in found["equal"]] == ["loss", "auc_loss", "auc_clid"]
    assert {row["verdict"] for row in judged.values()} > {CONFIRMED, UNDECIDED}


def test_the_reward_is_ranked_beside_what_was_learned_and_what_was_memorized():
    runs = made_up(3)
    for number, row in enumerate(ROWS):
        for seed in range(3):
            for point in runs[piece_of("runs", "demo", "attention", row, seed)]["points"].values():
                point |= {"max_norm": number, "loss": 0.1 * number, "auc_loss": -number, "auc_clid": (-1) ** number}
    found = reward(runs, "demo", "attention", range(3))
    assert (found["loss"].mean, found["auc_loss"].mean, found["loss"].seeds) == pytest.approx((1, -1, 3))
    assert abs(found["auc_clid"].mean) < 0.2
    del runs[piece_of("runs", "demo", "attention", WORST, 1)]
    assert reward(runs, "demo", "attention", range(3))["loss"].seeds == 2
    assert reward(runs, "demo", "attention", range(2)) == {}


def test_runs_that_are_tested_twice_make_the_others_in_their_family_harder_to_confirm():
    def line(claim: str, one: str, p: float) -> dict:
        tests = [asdict(a_test(-0.1, 0.05, p)) for _ in range(2)]
        return {"claim": claim, "one": one, "second": True, "kind": "matched", "verdict": UNDECIDED, "tests": tests}

    judged = [line("on top", "found+rwa", 0.01), line("the other's", "transferred", 0.9), line("copy", OWN_RATE, 0.9)]
    assert changed_without(judged, OWN_RATE) == {"on top": CONFIRMED}
    assert changed_without([row for row in judged if row["one"] != OWN_RATE], "none") == {"on top": CONFIRMED}


def test_one_seed_decides_nothing():
    assert judge(made_up(1), "demo", "attention", range(10)) == []


def test_a_row_that_is_not_finished_leaves_its_seed_out():
    runs = made_up(3)
    del runs[piece_of("runs", "demo", "attention", RANDOMS[2], 1)]
    (asked,) = (claim for claim in CLAIMS if claim.others == RANDOMS and claim.one == FOUND)
    assert compare(runs, Images(runs), "demo", "attention", asked, range(3))["pairs"] == 10


# ---- files ----


def test_runs_are_read_as_they_were_written(tmp_path):
    runs = made_up(2)
    write_runs(runs, tmp_path / "claims.parquet")
    assert read_runs(tmp_path / "claims.parquet") == runs
    assert read_runs(tmp_path / "none.parquet") == {}


def test_the_committed_results_are_taken_up_and_judged_alike(tmp_path):
    pieces = Pieces(tmp_path, SETTINGS)
    restore(pieces, DOCS / "results")
    runs, content = finished(pieces, "runs"), read_results(DOCS / "results" / "claims.json")
    for name, verdicts in content["verdicts"].items():
        seeds = seeds_of(runs, *name.split("-"), ROWS, range(SEEDS))  # those of which all rows are finished
        # Another processor may round the last digits of a mean otherwise.
        assert in_few_digits(judge(runs, *name.split("-"), seeds)) == in_few_digits(verdicts)
        judged = {row["claim"]: row for row in judge(runs, *name.split("-"), seeds, above=0.001)}
        for row in content["above"][name]["0.001"]:
            assert in_few_digits(row) == in_few_digits({part: judged[row["claim"]][part] for part in row})


def in_few_digits(value):
    """The same with floats in nine significant digits."""
    if isinstance(value, dict):
        return {name: in_few_digits(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [in_few_digits(part) for part in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def test_the_picture_has_a_row_of_panels_for_each_data_set(tmp_path):
    point = {
        figure: [mean, mean - 0.5, mean + 0.5]
        for figure, mean in (("loss", 0.2), ("auc_loss", 0.6), ("auc_clid", 0.7))
    }
    curves = {row: {"points": {"10": point, "80": point | {"loss": [0.1, 0.0, 0.2]}}} for row in (FOUND, *RANDOMS)}
    heights = []
    for sets in (["demo"], ["demo", "elpv"]):
        names = [f"{data}-attention" for data in sets]
        content = {"seeds": dict.fromkeys(names, 3), "curves": dict.fromkeys(names, curves)}
        plot(content, names, tmp_path / "claims.png")
        heights.append(Image.open(tmp_path / "claims.png").height)
    assert heights[1] > 1.8 * heights[0]


def test_each_method_has_a_picture_of_the_data_sets_that_are_shown():
    seeds = {"demo-attention": 10, "elpv-attention": 3, "demo-svdiff": 4, "elpv-svdiff": 2, "demo-lora": 2}
    assert pictures({"seeds": seeds}) == {
        "claims.png": ["demo-attention", "elpv-attention"],
        "claims_svdiff.png": ["demo-svdiff"],
    }


def test_a_refuted_claim_is_shown_by_a_test_that_refutes_it():
    test = {"low": 0, "high": 0, "seeds": 10}
    mixed = [
        {"figure": "auc_loss", "mean": -0.12, "p_holm": 1e-5, **test},
        {"figure": "auc_clid", "mean": 0.05, "p_holm": 0.02, **test},
    ]
    assert deciding({"verdict": REFUTED, "kind": "matched", "tests": mixed}).startswith("CLiD +0.050")
    assert deciding({"verdict": REFUTED, "kind": "correlation", "tests": mixed}).startswith("correlation with member")


def test_the_page_counts_over_all_that_is_shown():
    committed = read_results(DOCS / "results" / "claims.json")
    one, names = (
        "demo-attention",
        [f"{data}-{method}" for data in ("demo", "elpv") for method in ("attention", "lora")],
    )
    rates = {
        f"rates/{name}/{row}-{RATE_SEED}": {"learning_rate": 0.1} for name in names[1:] for row in (ALL, OWN_RATE)
    }
    content = {
        "seeds": dict.fromkeys(names, 10),
        "verdicts": dict.fromkeys(names, committed["verdicts"][one]),
        "above": dict.fromkeys(names, committed["above"][one]),
        "curves": dict.fromkeys(names, committed["curves"][one]),
        "pieces": rates,
    }
    page = render_summary(content)
    assert "memorize less: in 4 of 4 columns." in page and "less than all blocks of the method in 4 of 4." in page
    assert "or both in none of 4; less than random masks of its size in none of 4." in page
    assert "leak less than the mask in 4 of 4, and RWA on top of the mask helps in 4 of 4." in page
    assert page.count("2.8 times (") == 4 and page.count("25 of 50 (") == 4
    cells = next(line for line in page.splitlines() if "at its own rate" in line).split("|")[2:-1]
    assert ["its rate is that of all blocks" in cell for cell in cells] == [False, True, True, True]


def test_both_pages_are_rendered_from_the_committed_figures():
    content = read_results(DOCS / "results" / "claims.json")
    for page, rendered in (("results.md", render_summary(content)), ("results/claims.md", render(content))):
        assert (DOCS / page).read_text(encoding="utf-8") == rendered
    assert all((DOCS / "results" / file).is_file() for file in pictures(content))


# ---- real runs, with next to no steps ----


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claimed_runs, "STEPS", (1, 2))
        patch.setattr(claimed_runs, "images", lambda name, count: images(name, 8))
        yield Study(Pieces(tmp_path_factory.mktemp("claims"), SETTINGS))


def test_a_rate_is_judged_by_the_lowest_validation_loss_on_its_way(study):
    trainer = study.trainer("demo", "lora", ())
    loss = study._lowest_validation_loss(trainer, trainer.search_space.mask(True), 1e-3)
    watched = train_along(trainer, lambda: trainer.evaluate_mid_training(["loss"])["eval_loss"])  # the same run again
    assert list(watched) == [1, 2] and loss == min(watched.values())


def test_a_rate_at_which_the_training_diverges_is_the_worst(study, monkeypatch):
    def diverge():
        raise Diverged("a trained parameter", 1, 1.0)

    trainer = study.trainer("demo", "lora", ())
    monkeypatch.setattr(trainer, "train", diverge)
    assert study._lowest_validation_loss(trainer, trainer.search_space.mask(True), 1.0) == math.inf


@pytest.mark.parametrize(("lowest", "tried"), [(-6, 3), (-3, 6), (9, 8)], ids=["inside", "extended", "out of reach"])
def test_rates_are_tried_until_the_best_is_inside_or_there_are_enough(study, monkeypatch, lowest, tried):
    monkeypatch.setattr(
        Study, "_lowest_validation_loss", lambda self, trainer, mask, rate: (2 * math.log10(rate) - lowest) ** 2
    )
    found = study.choose_rate("demo", "lora", ALL)
    assert len(found["rates"]) == tried
    if tried < 8:
        assert found["learning_rate"] == pytest.approx(10 ** (lowest / 2))


def test_a_run_is_measured_along_its_training_which_the_measurement_does_not_change(study):
    study.pieces.write(piece_of("rates", "demo", "lora", ALL, RATE_SEED), {"learning_rate": 1e-3})
    first = study.run("demo", "lora", ALL, 0)
    assert list(first["points"]) == [1, 2] and first["parameters"] > 0
    trainer = study.trainer("demo", "lora", ())
    watched = [parameter.detach().clone() for parameter in trainer.model.parameters() if parameter.requires_grad]
    trainer.args.seed = 0
    trainer.apply_hyperparameters({"mask": trainer.search_space.mask(True), "learning_rate": 1e-3})
    trainer.train()
    alone = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert all(torch.equal(one, other) for one, other in zip(watched, alone))
    last = claimed_runs.point(trainer, "demo", 0)
    assert last == first["points"][2]
    ranks = np.array(last["ranks_clid"])
    members, others = torch.tensor(ranks[: last["members"]]), torch.tensor(ranks[last["members"] :])
    assert metrics.membership(members, others).auc == pytest.approx(last["auc_clid"])
    validation = trainer.encode(trainer.eval_dataset)
    assert max_norm(trainer, validation, 0) == last["max_norm"] != max_norm(trainer, validation, 1)


def test_the_frozen_base_has_one_point(study):
    run = study.run("demo", "lora", BASE, 0)
    assert run["mask"] == [] and run["parameters"] == 0 and list(run["points"]) == [0]


def test_the_jobs_of_a_seed_are_all_rows_after_what_they_need(study):
    jobs = study.jobs("demo", "svdiff", [0, 1])
    places = {job.piece: place for place, job in enumerate(jobs)}
    assert all(places[need] < places[job.piece] for job in jobs for need in job.needs)
    runs = [job.piece for job in jobs if job.piece.startswith("runs/")]
    assert len(runs) == 2 * len(ROWS) and all(piece.endswith("-0") for piece in runs[: len(ROWS)])
    assert "screenings/elpv-svdiff/1" in places  # for the mask that is transferred
