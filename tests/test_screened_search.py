"""A search begins with a screening: one worker makes it, the study keeps it, and its masks are tried first."""

import json
import logging
import math
import re
import threading
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import torch
from conftest import images_of, tiny_pipeline, tiny_trainer
from optuna.samplers import RandomSampler
from test_audit import folder_of

from memcontrol_hf import MemControlConfig, MemControlTrainer, Screening, SearchSpace, cli
from memcontrol_hf.adapter_folder import read_mask
from memcontrol_hf.flags import ScriptArguments, settings
from memcontrol_hf.from_flags import (
    METHODS,
    dry_run,
    make_trainer,
    peft_config_from,
    search_options,
    settings_with_images,
)
from memcontrol_hf.search import SearchSettings, SharedStudy, kept_screening, suggested_mask
from memcontrol_hf.search.claims import SCREENING, Claim
from memcontrol_hf.search.screened import SCREENED_MASKS, screened_trials
from memcontrol_hf.search.worker import this_worker

RATES = {"learning_rate_range": (1e-2, 1e-1)}
CHEAP = {"max_steps": 8, "objectives": ["loss", "membership_auc"]}


def searched(folder, n_trials=3, trainer=None, **options):
    trainer = trainer or tiny_trainer(folder, **CHEAP)
    runs = trainer.hyperparameter_search(n_trials=n_trials, **RATES, **options)
    return runs[0].run_summary


@pytest.fixture(scope="module")
def folder_and_study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("screened")
    return folder, searched(folder, n_trials=2 + SCREENED_MASKS)


def test_the_masks_of_the_screening_come_after_all_on_and_all_off(folder_and_study, tmp_path):
    _, study = folder_and_study
    screening = Screening.from_dict(kept_screening(study))
    assert screening.to_dict() == tiny_trainer(tmp_path, **CHEAP).screen(learning_rate=10**-1.5).to_dict()
    masks = [trial.user_attrs["hyperparameters"]["mask"] for trial in study.trials]
    expected = screening.masks(SCREENED_MASKS)
    larger, middle, smaller = expected
    assert all(masks[0].values()) and not any(masks[1].values())
    assert masks[2:6] == [middle, middle, smaller, larger]
    rates = [math.log10(trial.params["learning_rate"]) for trial in study.trials[:6]]
    assert rates == pytest.approx([-1.5, -1.5, -1.5, -1.25, -1.5, -1.25])


def test_at_a_fixed_rate_the_masks_are_tried_from_the_middle_of_the_trade_off(folder_and_study):
    screening = Screening.from_dict(kept_screening(folder_and_study[1]))
    masks = screening.masks(SCREENED_MASKS)
    tried = [{name.removeprefix("mask."): on for name, on in t.items()} for t in screened_trials(screening, 0.1, 0.1)]
    assert tried == [masks[1], masks[0], masks[2]]


def test_a_search_that_goes_on_makes_no_other_screening(folder_and_study, monkeypatch):
    folder, study = folder_and_study
    monkeypatch.setattr(MemControlTrainer, "screen", lambda *_, **__: pytest.fail("screened again"))
    assert kept_screening(searched(folder, n_trials=3)) == kept_screening(study)


def test_workers_share_one_screening(tmp_path, monkeypatch):
    """The second worker comes while the first one screens, waits, and gets the same masks."""
    first, second = (tiny_trainer(tmp_path / name, **CHEAP) for name in ("one", "two"))
    storage, screened, began = str(tmp_path / "journal"), [], threading.Event()
    screen = MemControlTrainer.screen

    def counted(trainer, *args, **kwargs):
        screened.append(trainer)
        began.set()
        return screen(trainer, *args, **kwargs)

    monkeypatch.setattr(MemControlTrainer, "screen", counted)
    monkeypatch.setattr("memcontrol_hf.search.screened._POLL_SECONDS", 0.05)
    monkeypatch.setattr("memcontrol_hf.search.study.this_worker", lambda: [*this_worker()[:2], threading.get_ident()])
    monkeypatch.setattr("memcontrol_hf.search.study.is_alive", lambda *_: True)
    worker = threading.Thread(target=searched, args=(None, 2, first), kwargs={"storage": storage})
    worker.start()
    began.wait(60)
    study = searched(None, 2, second, storage=storage)
    worker.join()
    assert screened == [first] and kept_screening(study) is not None


def test_a_screening_that_was_killed_is_made_by_the_next_worker(tmp_path, monkeypatch):
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage)
    monkeypatch.setattr("memcontrol_hf.search.claims.this_worker", lambda: [this_worker()[0], 2**22 + 1, 0.0])
    from memcontrol_hf.search.worker import is_alive

    def holds(claim):
        return not claim.state.is_finished() and is_alive(claim)

    assert Claim.make(study, SCREENING, holds) is not None, "its process is not there any more"
    monkeypatch.undo()
    alive = Claim.make(study, SCREENING, holds)
    assert alive is not None and Claim.make(study, SCREENING, holds) is None
    alive.release()
    assert Claim.make(study, SCREENING, holds) is not None


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, {"screen": False}),
        ({"objectives": ["loss"]}, {}),
        ({"objectives": ["membership_auc", "noise_norm"]}, {}),
        ({"max_steps": 2}, {}),
        ({"space": "one"}, {}),
        ({}, {"hp_space": lambda trial: {"mask": {"mid_block.attentions.0": True}}}),
        ({}, {"compute_objective": lambda figures: [figures["eval_loss"], figures["eval_membership_auc"]],
              "direction": ["minimize", "minimize"]}),
        ({"mitigations": ["dp_sgd:delta=0.01"], "objectives": ["loss", "membership_auc"]}, {}),
    ],
)  # fmt: skip
def test_a_screening_is_left_out_where_it_does_not_help(tmp_path, monkeypatch, given, options):
    monkeypatch.setattr(MemControlTrainer, "screen", lambda *_, **__: pytest.fail("screened"))
    monkeypatch.setattr(MemControlTrainer, "train_and_evaluate", lambda self: FIGURES)
    pipeline = tiny_pipeline()
    space = {"space": SearchSpace.from_model(pipeline.unet, ["to_q$"])} if "space" in given else {}
    runs = tiny_trainer(tmp_path, pipeline, **{**CHEAP, **given, **space}).hyperparameter_search(
        n_trials=1, **RATES, **options
    )
    run = runs if not isinstance(runs, list) else runs[0]
    assert kept_screening(run.run_summary) is None


FIGURES = {f"eval_{name}": 0.5 for name in ("loss", "membership_auc", "noise_norm")}


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({"mitigations": ["dp_sgd:delta=0.01"]}, {}, "outside of the account of dp_sgd"),
        ({"max_steps": 3}, {}, "a screening of 3 steps has no probe every 4 steps"),
        ({}, {"screen_steps": 0}, "steps of a screening must be at least 1, but is 0"),
        ({}, {"screen_seeds": 0}, "screen_seeds must be at least 1, but is 0"),
        ({"space": "one"}, {}, "the search space has only one"),
    ],
)
def test_a_screening_that_was_asked_for_and_cannot_be_made_is_an_error(tmp_path, given, options, message):
    pipeline = tiny_pipeline()
    space = {"space": SearchSpace.from_model(pipeline.unet, ["to_q$"])} if "space" in given else {}
    trainer = tiny_trainer(tmp_path, pipeline, **{**CHEAP, **given, **space})
    with pytest.raises(ValueError, match=message):
        trainer.hyperparameter_search(n_trials=1, screen=True, **options)
    assert not (tmp_path / "study.journal").exists()


def test_a_screening_that_diverges_does_not_end_the_search(tmp_path, monkeypatch, caplog):
    trainer = tiny_trainer(tmp_path, config=MemControlConfig(method="weights"), **CHEAP)
    monkeypatch.setattr(MemControlTrainer, "train_and_evaluate", lambda self: FIGURES)
    with caplog.at_level(logging.WARNING, "memcontrol_hf"):
        runs = trainer.hyperparameter_search(n_trials=2, learning_rate_range=(1e30, 1e30))
    study = runs[0].run_summary
    assert "the search goes on without a screening: the losses are not finite in step" in caplog.text
    assert kept_screening(study) is None and "failure" in study.user_attrs["screening"]
    monkeypatch.setattr(MemControlTrainer, "screen", lambda *_, **__: pytest.fail("screened again"))
    trainer.hyperparameter_search(n_trials=3, learning_rate_range=(1e30, 1e30))


def test_a_screening_that_runs_out_of_memory_does_not_end_the_search(tmp_path, monkeypatch, caplog):
    def too_large(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(MemControlTrainer, "screen", too_large)
    monkeypatch.setattr(MemControlTrainer, "train_and_evaluate", lambda self: FIGURES)
    study = searched(tmp_path, n_trials=1)
    assert study.user_attrs["screening"] == {"failure": "out of memory"} and len(study.trials) == 1
    assert "the search goes on without a screening: out of memory" in caplog.text


def test_a_screening_in_which_no_block_learned_anything_does_not_end_the_search(tmp_path, monkeypatch, caplog):
    trainer = tiny_trainer(tmp_path, **CHEAP)
    found = trainer.screen(4)
    nothing = replace(found, learns=dict.fromkeys(found.learns, -0.1))
    monkeypatch.setattr(MemControlTrainer, "screen", lambda *_, **__: nothing)
    monkeypatch.setattr(MemControlTrainer, "train_and_evaluate", lambda self: FIGURES)
    with caplog.at_level(logging.WARNING, "memcontrol_hf"):
        runs = trainer.hyperparameter_search(n_trials=3, **RATES)
    assert (
        "no block of the screening lowers the validation loss" in caplog.text and len(runs[0].run_summary.trials) == 3
    )
    trainer.hyperparameter_search(n_trials=4, **RATES)


def test_a_sampler_of_ones_own_is_queued_the_masks(tmp_path, monkeypatch):
    monkeypatch.setattr(MemControlTrainer, "train_and_evaluate", lambda self: FIGURES)
    study = searched(tmp_path, n_trials=3, sampler=RandomSampler(seed=0))
    first = screened_trials(Screening.from_dict(kept_screening(study)), *RATES["learning_rate_range"])[0]
    assert {name: study.trials[2].params[name] for name in first} == first


def test_more_steps_can_be_screened_than_a_trial_has(tmp_path, monkeypatch):
    monkeypatch.setattr(MemControlTrainer, "train_and_evaluate", lambda self: FIGURES)
    study = searched(tmp_path, n_trials=1, screen_steps=16)
    assert kept_screening(study)["settings"]["steps"] == 16


MADE_UP = Screening({"a": 0.5, "b": 0.25}, {"a": 0.1, "b": 0.0}, {"a": 0.01, "b": 0.01}, {"a": 0.01, "b": 0.01},
                    {"a": 1200, "b": 3}, {"steps": 8, "learning_rate": 0.03})  # fmt: skip


def test_the_command_screens_and_writes_what_it_found(tmp_path, capsys, caplog, monkeypatch):
    asked = {}
    monkeypatch.setattr(MemControlTrainer, "screen", lambda _, *args, **options: asked.update(options) or MADE_UP)
    cli.main(["screen", "--output_dir", str(tmp_path), "--max_train_steps", "8", "--search_max_steps", "8"])
    assert "screening: 8 steps with all 16 blocks on" in caplog.text
    assert asked == {"learning_rate": pytest.approx(10**-1.5), "seeds": 1, "singular_values": False}
    assert Screening.from_json(tmp_path / "screening.json") == MADE_UP
    assert (tmp_path / "screening.png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in tmp_path.iterdir()} == {"mask.json", "screening.json", "screening.png"}
    assert read_mask(tmp_path) == suggested_mask(MADE_UP) == {"a": False, "b": True}
    printed = capsys.readouterr().out
    suggested = ["  b", "    1 of 2 blocks, 3 parameters; learns 33% and memorizes 0% of what all blocks do"]
    assert "\n".join([f"train these blocks with --mask_from {tmp_path}:", *suggested]) in printed
    assert "a      1,200       +0.5000 ± 0.0100  +0.1000 ± 0.0100" in printed
    whole = ["  a, b", "    2 of 2 blocks, 1,203 parameters; learns 100% and memorizes 100% of what all blocks do"]
    assert printed.splitlines()[-4:] == [*whole, *suggested]
    nothing = replace(MADE_UP, learns={"a": -0.5, "b": -0.25})
    monkeypatch.setattr(MemControlTrainer, "screen", lambda *_, **__: nothing)
    cli.main(["screen", "--output_dir", str(tmp_path), "--search_max_steps", "8"])
    assert "no block lowers the loss on validation images: screen with more steps" in capsys.readouterr().out
    assert not (tmp_path / "mask.json").exists(), "the mask of an earlier screening"


def test_the_flag_for_several_seeds_reaches_the_screening_of_command_and_search(tmp_path, capsys, caplog, monkeypatch):
    asked = []
    monkeypatch.setattr(MemControlTrainer, "screen", lambda _, *args, **options: asked.append(options) or MADE_UP)
    flags = ["--output_dir", str(tmp_path), "--search_max_steps", "8", "--screen_seeds", "3"]
    cli.main(["screen", *flags])
    assert "screening: 3 times 8 steps with all 16 blocks on" in caplog.text
    assert "over the probes, or over the seeds if that is larger" in capsys.readouterr().out
    args = ScriptArguments(output_dir=str(tmp_path), search_max_steps=8, screen_seeds=3)
    trainer, _, rates, mask = make_trainer(args)
    options = search_options(args, trainer, rates, mask)
    assert (options["screen_seeds"], options["settings"]["screen_seeds"]) == (3, 3)
    assert "screen_seeds" not in settings(replace(args, screen_seeds=1)), "a study of before is gone on with"
    monkeypatch.setattr(MemControlTrainer, "train_and_evaluate", lambda self: FIGURES)
    searched(tmp_path, n_trials=1, screen_seeds=2)
    assert [options["seeds"] for options in asked] == [3, 2]
    assert "from 2 times 8 steps with all of them on" in caplog.text
    assert re.search(r"^screening, if it is made +3 +256 +0 +128", dry_run(args), re.MULTILINE)


def test_the_command_writes_single_singular_values_that_a_search_tunes(tmp_path, capsys, monkeypatch):
    modules = [f"down_blocks.{i}.attentions.0.transformer_blocks.0.attn1.to_q" for i in (0, 1)]
    figures = {"learns": [1.0, 2.0], "memorizes": [1.0, 0.0]}, {"learns": [1.0, -1.0], "memorizes": [0.0, 0.0]}
    found = replace(MADE_UP, singular_values=dict(zip(modules, figures)))
    monkeypatch.setattr(MemControlTrainer, "screen", lambda *_, **options: found if options["singular_values"] else 1)
    out = str(tmp_path / "screened")
    cli.main(["screen", "--output_dir", out, "--singular_values", "2", "--search_max_steps", "8"])
    printed = capsys.readouterr().out
    written = f"{out}/singular_values.json"
    assert printed.splitlines()[-1] == f"2 of them, in 2 modules: train with --peft_config {written}"
    files = {"mask.json", "screening.json", "screening.png", "singular_values.json"}
    assert {file.name for file in Path(out).iterdir()} == files
    assert "number  learns  memorizes\n------  ------  ---------\n1       50%     0%\n3       100%    100%" in printed
    config = peft_config_from(written)
    assert config.method == "svdiff" and config.singular_values == {modules[0]: [1], modules[1]: [0]}
    args = ScriptArguments(output_dir=str(tmp_path / "out"), peft_config=written)
    trainer, _, rates, _ = make_trainer(args)
    assert trainer.trainable_parameters == 2 == sum(trainer.mask.values()) and rates == METHODS["svdiff"][1]
    made_with = settings_with_images(args, trainer)["singular_values"]
    trainer.peft_config = replace(config, singular_values={modules[0]: [0, 1]})
    assert settings_with_images(args, trainer)["singular_values"] != made_with  # another file is another study
    assert re.search(r"^all blocks +2 ", dry_run(args), re.MULTILINE)
    with pytest.raises(SystemExit) as ended:
        cli.main(["screen", "--output_dir", out, "--singular_values", "4", "--search_max_steps", "8"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "from 1 to 3, since so many of 4 lower the loss on validation images, but is 4" in error
    assert f"The screening is kept in {out}" in error and (tmp_path / "screened" / "screening.json").exists()


@pytest.mark.parametrize(
    ("command", "given", "message"),
    [
        ("screen", ["--singular_values", "0"], "--singular_values must be at least 1, but is 0"),
        ("screen", ["--singular_values", "10369"], "--singular_values 10369: the blocks have 10368 singular values"),
        ("screen", ["--singular_values", "9", "--method", "lora"], "are tuned by SV-DIFF alone"),
        ("screen", ["--dry_run"], "--dry_run is a flag of memcontrol train, whose plan has the screening as a stage"),
        (
            "train",
            ["--singular_values", "9"],
            "is a flag of memcontrol screen, which writes a file for --peft_config",
        ),
    ],
)
def test_singular_values_that_cannot_be_chosen_are_refused_before_any_training(
    tmp_path, capsys, command, given, message
):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--output_dir", str(tmp_path / "out"), *given])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_the_command_screens_images_without_an_encoder_beside_a_study_of_another_method(tmp_path, monkeypatch):
    folder_of(images_of(40), tmp_path / "images")
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}) for i in range(40)]
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(lines))
    settings = {"settings": {"method": "svdiff"}, "study_name": "memcontrol"}
    SharedStudy.open(SearchSettings(8, ["minimize"] * 2, **settings), str(tmp_path / "out" / "study.journal"))
    monkeypatch.setattr(MemControlTrainer, "screen", lambda *_, **__: MADE_UP)
    flags = ["--train_data_dir", str(tmp_path / "images"), "--method", "lora", "--search_max_steps", "8"]
    cli.main(["screen", "--output_dir", str(tmp_path / "out"), *flags])
    assert Screening.from_json(tmp_path / "out" / "screening.json") == MADE_UP


def test_the_command_says_what_cannot_be_screened(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["screen", "--output_dir", str(tmp_path / "out"), "--search_max_steps", "3"])
    assert ended.value.code == 2 and not list((tmp_path / "out").glob("screening*"))
    assert "error: a screening of 3 steps has no probe every 4 steps" in capsys.readouterr().err
