"""The whole way from a trainer to a card, as a notebook goes it."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import images_of, tiny_pipeline, tiny_trainer
from datasets import DatasetDict
from transformers import TrainerCallback
from transformers.trainer_utils import BestRun

from memcontrol_hf import MemControlConfig, MemorizationReport, workflow
from memcontrol_hf.adapter_checks import base_weights
from memcontrol_hf.adapter_folder import adapter_digests
from memcontrol_hf.audit import AuditSettings
from memcontrol_hf.report import DEFAULT_GATE
from memcontrol_hf.workflow import _choose, within_gate

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


@pytest.fixture
def data() -> DatasetDict:
    return DatasetDict(train=images_of(10, seed=1), validation=images_of(8, seed=2), held_out=images_of(10, seed=3))


def test_the_example_of_the_docs_ends_with_the_report_and_the_card(tmp_path, data, capsys):
    """The page's own lines, on a tiny pipeline and with small numbers."""
    (code,) = re.findall(r"```python\n(from memcontrol_hf import MemControlConfig.*?)```", PAGE.read_text(), re.S)
    small = {"resolution": 16, "max_steps": 2, "search_max_steps": 2, "per_device_train_batch_size": 4}
    small |= {"eval_num_images": 6, "eval_inference_steps": 2, "n_trials": 3}
    for name, value in small.items():
        code, count = re.subn(rf"\b{name}=[\d.]+", f"{name}={value}", code)
        assert count == 1, name
    code = code.replace("import demo_dataset, demo_pipeline, workflow", "import workflow")
    code = code.replace('output_dir="out"', f"output_dir={str(tmp_path / 'out')!r}")
    exec(code, {"demo_pipeline": tiny_pipeline, "demo_dataset": lambda: data})
    out = tmp_path / "out"
    report = MemorizationReport.from_json(out / "memorization_report.json")
    assert list(report.figures) == ["frozen base", "all blocks", "selected mask"]
    assert report.search["trials"] and report.audit["subject"] == "adapter" and report.gate["limits"]
    assert f"gate: {'passed' if report.gate['passed'] else 'FAILED'}" in capsys.readouterr().out
    left = {file.name for file in out.iterdir() if file.is_file()}
    assert left == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "memorization_report.json"),
        *("pareto_front.png", "study.journal"),
    }
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["mask"] == report.mask and config["search"]["sampler"] == "tpe"


def test_a_run_that_the_gate_would_fail_is_not_chosen_in_silence(caplog):
    runs = [BestRun(str(i), (fid, auc), {}) for i, (fid, auc) in enumerate([(1.0, 0.97), (2.0, 0.6), (3.0, 0.55)])]
    assert [run.run_id for run in within_gate(runs, ["fid", "membership_auc"], DEFAULT_GATE)] == ["1", "2"]
    assert "above the gate's limit 0.65: trial 0: 0.970" in caplog.text
    assert [run.run_id for run in within_gate(runs[:1], ["fid", "membership_auc"], DEFAULT_GATE)] == ["0"]
    assert "the gate will fail" in caplog.text
    assert within_gate(runs, ["fid", "amd"], DEFAULT_GATE) == runs


def random_front(seed: int) -> list[BestRun]:
    """Runs none of which dominates another: a lower loss goes with a higher AUC. The first is the frozen base."""
    draws = np.random.default_rng(seed)
    number = int(draws.integers(2, 9))
    losses, aucs = np.sort(draws.uniform(0.1, 0.2, number))[::-1], np.sort(draws.uniform(0.5, 0.75, number))
    return [BestRun(str(i), [losses[i], aucs[i]], {"mask": {"a": i > 0}}) for i in range(number)]


@pytest.mark.parametrize("budget", [None, 0.75])
def test_repeats_with_the_same_figures_do_not_change_the_choice(monkeypatch, budget):
    monkeypatch.setattr(workflow, "repeat_runs", lambda trainer, runs, repeats: list(runs))
    trainer = SimpleNamespace(args=SimpleNamespace(objectives=["loss", "membership_auc"]))
    for seed in range(200):
        front = random_front(seed)
        once, repeated = (_choose(trainer, front, budget, DEFAULT_GATE, finalists, 1) for finalists in (0, 3))
        assert once == repeated, seed


def test_a_finalist_whose_repeats_the_gate_would_fail_is_not_chosen(monkeypatch, caplog):
    front = [BestRun(str(i), list(objective), {"mask": {"a": i > 0}})
             for i, objective in enumerate([(0.2, 0.5), (0.11, 0.55), (0.1, 0.64)])]  # fmt: skip
    repeated = [front[1]._replace(objective=[0.1, 0.7]), front[2]._replace(objective=[0.19, 0.64])]
    monkeypatch.setattr(workflow, "repeat_runs", lambda trainer, runs, repeats: repeated)
    trainer = SimpleNamespace(args=SimpleNamespace(objectives=["loss", "membership_auc"]))
    assert _choose(trainer, front, None, DEFAULT_GATE, 2, 1).run_id == "2"
    assert "above the gate's limit 0.65: trial 1: 0.700" in caplog.text


def test_when_the_repeats_of_all_finalists_are_over_the_budget_the_next_runs_are_repeated(monkeypatch, caplog):
    figures = [(0.23, 0.5), (0.2, 0.53), (0.17, 0.57), (0.16, 0.58), (0.15, 0.59)]
    front = [BestRun(str(i), list(objective), {"mask": {"a": i > 0}}) for i, objective in enumerate(figures)]
    made = []

    def worse_by_a_little(trainer, runs, repeats):
        made.append([run.run_id for run in runs])
        return [run._replace(objective=[run.objective[0], run.objective[1] + 0.04]) for run in runs]

    monkeypatch.setattr(workflow, "repeat_runs", worse_by_a_little)
    trainer = SimpleNamespace(args=SimpleNamespace(objectives=["loss", "membership_auc"]))
    assert _choose(trainer, front, 0.6, DEFAULT_GATE, 3, 1).run_id == "1" and made == [["4", "3", "2"], ["1"]]
    assert "no run is within the memorization budget of 0.6" in caplog.text
    with pytest.raises(ValueError, match=r"no run is within the memorization budget of 0\.59: .* 0\.61"):
        _choose(trainer, front[:1] + front[2:], 0.59, DEFAULT_GATE, 2, 1)


def test_a_given_mask_goes_the_same_way_without_a_search(tmp_path, data):
    modules = [f"{block}.attentions.0.transformer_blocks.0.attn1.to_q" for block in ("down_blocks.0", "mid_block")]
    config = MemControlConfig(singular_values={modules[0]: [0], modules[1]: [1, 2]})
    trainer = tiny_trainer(tmp_path, train=data["train"], config=config, max_steps=2)
    mask = trainer.search_space.check({"mid_block.attentions.0": True})
    choice = workflow.Choice({"mask": mask, "learning_rate": 0.01})
    tuned = workflow.fine_tune(trainer, choice, data["held_out"])
    report = workflow.save(trainer, choice, tuned, data)
    assert report.search is None and report.mask == mask and report.method == "svdiff"
    assert tuned.figures["frozen base"]["trainable_parameters"] == 0 and not tuned.failed
    assert tuned.figures["selected mask"]["trainable_parameters"] == 2 and report.training["singular_values"] == 3
    card = workflow.write_card(trainer, report, choice).read_text()
    assert card.startswith("---") and "3 in all blocks together were chosen one by one" in card
    assert not (tmp_path / "pareto_front.png").exists()


class Stops(TrainerCallback):
    def on_step_end(self, args, state, control, **others):
        control.should_training_stop = state.global_step == 2


def test_the_steps_of_a_training_that_is_told_epochs_are_in_report_and_card(tmp_path, data):
    trainer = tiny_trainer(tmp_path, train=data["train"], max_steps=-1, num_train_epochs=1)
    trainer.add_callback(Stops())
    choice = workflow.Choice({"mask": {"mid_block.attentions.0": True}, "learning_rate": 0.01})
    tuned = workflow.fine_tune(trainer, choice, data["held_out"])
    report = workflow.save(trainer, choice, tuned, data)
    assert report.training["max_steps"] == 3
    assert report.training["stopped_at_step"] == {"all blocks": 2, "selected mask": 2}
    card = workflow.write_card(trainer, report, choice).read_text()
    assert "(at most 3 steps, seed" in card and ", 3 steps of batch size 4" in card


def test_what_was_audited_can_be_saved_again_and_is_the_same(tmp_path, data):
    trainer = tiny_trainer(tmp_path, train=data["train"], max_steps=1)
    choice = workflow.Choice({"mask": {"mid_block.attentions.0": True}, "learning_rate": 0.01})
    report = workflow.save(trainer, choice, workflow.fine_tune(trainer, choice, data["held_out"]), data)
    workflow.audit(trainer, report, data, AuditSettings(resolution=16, num_prompts=2, inference_steps=1))
    card = workflow.write_card(trainer, report, choice).read_text()
    assert report.audit and trainer.mask == report.mask
    trainer.save_model()
    assert adapter_digests(tmp_path) == report.weights and (tmp_path / "README.md").read_text() == card


def test_what_stopped_an_audit_is_logged_and_not_published(tmp_path, data, caplog):
    trainer = tiny_trainer(tmp_path, train=data["train"], max_steps=1)
    choice = workflow.Choice({"mask": trainer.mask, "learning_rate": 0.01})
    tuned = workflow.fine_tune(trainer, choice, data["held_out"])
    report = workflow.save(trainer, choice, tuned, data)
    assert report.training["base_weights"] == base_weights(tiny_pipeline().unet)
    (tmp_path / "private").touch()
    assert not workflow.audit(trainer, report, data)
    assert str(tmp_path) in caplog.text
    assert report.gate["failures"] == ["no audit: the log of the training says why"]
    assert str(tmp_path) not in (tmp_path / "memorization_report.json").read_text()


def test_a_space_of_masks_alone_is_searched_and_saved(tmp_path, data):
    trainer = tiny_trainer(tmp_path, max_steps=1, learning_rate=0.03)
    blocks = list(trainer.search_space.blocks)
    masks = iter([{blocks[0]: True}, {blocks[0]: True}, {blocks[1]: True, blocks[0]: False}])
    trainer.train_and_evaluate = lambda: {"eval_loss": 0.1, "eval_membership_auc": 0.5}
    choice = workflow.search(trainer, n_trials=2, hp_space=lambda trial: {"mask": next(masks)}, enqueue=[])
    tuned = workflow.FineTuned({"selected mask": {"loss": 0.1}})
    report = workflow.save(trainer, choice, tuned, data)
    assert [trial["learning_rate"] for trial in report.search["trials"]] == [0.03, 0.03]
    assert report.search["block_effects"] == {blocks[0]: [0.0, 0.0], blocks[1]: [0.0, 0.0]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_objective": lambda figures: [1.0, 2.0]}, "compute_objective is not supported.*objectives=.*Choice"),
        ({"gate": "typo.yaml"}, "cannot read the gate 'typo.yaml'"),
        ({"n_finalists": -1}, "n_finalists must be at least 0, but is -1"),
        ({"n_finalists": 3, "finalist_repeats": 0}, "finalist_repeats must be at least 1, but is 0"),
        ({"hp_space": lambda trial: None}, "hp_space must return a dictionary of hyperparameters, but returned None"),
    ],
)
def test_what_a_choice_cannot_be_made_with_is_refused_before_the_first_trial(tmp_path, options, message):
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(ValueError, match=message):
        workflow.search(trainer, **options)
    assert not (tmp_path / "study.journal").exists()


def test_a_space_without_a_mask_is_refused_before_the_first_trial(tmp_path):
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(ValueError, match="hp_space suggests learning_rate and no mask, which is what is chosen"):
        workflow.search(trainer, hp_space=lambda trial: {"learning_rate": trial.suggest_float("x", 0.1, 0.2)})
    assert not (tmp_path / "study.journal").exists()


def test_a_second_search_has_the_seed_of_the_first_one(tmp_path, data):
    trainer, seeds = tiny_trainer(tmp_path, objectives=["loss"]), []
    trainer.train_and_evaluate = lambda: seeds.append(trainer.args.seed) or {"eval_loss": 0.1}
    trainer.train = lambda resume_from_checkpoint=None: seeds.append(trainer.args.seed)
    trainer.evaluate = lambda held_out, metrics: {"eval_loss": 0.1}
    for name in ("one", "two"):
        choice = workflow.search(trainer, n_trials=1, study_name=name, storage=str(tmp_path / "journal"))
        workflow.fine_tune(trainer, choice, data["held_out"])
        assert choice.seed == trainer.args.seed == 43, "figures that are measured afterwards have the seed, too"
    assert seeds == 2 * [42, 43, 43], "one trial, all blocks and the chosen mask"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("the losses are not finite"), "the losses are not finite"),
        (torch.OutOfMemoryError("CUDA out of memory. Process 12 has 10 GiB memory in use."), "out of memory"),
    ],
)
def test_all_blocks_that_cannot_be_trained_are_left_out_of_the_comparison(tmp_path, data, monkeypatch, error, said):
    trainer, calls = tiny_trainer(tmp_path), []

    def failing(trainer, *args):
        calls.append(dict(trainer.mask))
        if len(calls) in fails:
            raise error
        return {"loss": 0.1}

    monkeypatch.setattr(workflow, "fine_tune_and_measure", failing)
    choice, fails = workflow.Choice({"mask": {"mid_block.attentions.0": True}, "learning_rate": 0.01}), [2]
    tuned = workflow.fine_tune(trainer, choice, data["held_out"])
    assert tuned.failed == {"all blocks": said} and list(tuned.figures) == ["frozen base", "selected mask"]
    fails.append(len(calls) + 3)  # the chosen mask itself
    with pytest.raises(type(error)):
        workflow.fine_tune(trainer, choice, data["held_out"])


def test_an_audit_that_does_not_end_does_not_pass(tmp_path, data, monkeypatch):
    trainer = tiny_trainer(tmp_path, train=data["train"], max_steps=1)
    choice = workflow.Choice({"mask": trainer.mask, "learning_rate": 0.01})
    report = workflow.save(trainer, choice, workflow.fine_tune(trainer, choice, data["held_out"]), data)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(workflow, "audit_memorization", killed)
    with pytest.raises(KeyboardInterrupt):
        workflow.audit(trainer, report, data)
    left = MemorizationReport.from_json(tmp_path / "memorization_report.json")
    assert left.gate["failures"] == ["the audit did not end"] and not left.gate["passed"] and left.figures
