"""TensorBoard, and Weights & Biases on a real server, where one is installed; offline: test_train_memcontrol.py."""

import json
import shutil
import socket
import sqlite3
import subprocess
import time
import urllib.request

import pytest
import torch
from conftest import adapter_folder, small_report, tiny_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from memcontrol_hf import MemorizationReport
from memcontrol_hf.publish.wandb_report import clear_of_copies, log_images, log_report
from memcontrol_hf.tracking import log_push, run_url, start_tracking


def test_copies_are_withheld_and_other_images_are_shown():
    train, others, fresh = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0))
    copies = train[:10] + 0.01 * others[:10]
    assert not clear_of_copies(copies, train, others).any()
    assert clear_of_copies(fresh, train, others).float().mean() > 0.9


def test_the_run_shows_the_images_that_are_no_copies_and_counts_the_others(tmp_path, monkeypatch):
    import wandb

    train, others, fresh = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0))
    features = torch.cat([train[:3], fresh[:2]])
    images = torch.rand(len(features), 3, 8, 8, generator=torch.Generator().manual_seed(1))
    monkeypatch.setenv("WANDB_MODE", "offline")
    with wandb.init(dir=tmp_path, project="memcontrol") as run:
        log_images(images, "a public prompt", features, train, others)
        assert run.summary["generated_withheld"] == 3
        assert (
            run.summary["generated"]["count"] == 2 and run.summary["generated"]["captions"] == ["a public prompt"] * 2
        )
    log_images(images, "a public prompt", features, train, others)  # no run: nothing happens


def test_only_an_adapter_that_passed_its_gate_is_logged(tmp_path, monkeypatch):
    import wandb

    for name, value in {"LOG_MODEL": "end", "DATA_DIR": tmp_path, "CACHE_DIR": tmp_path}.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    logged = {True: [], False: [], None: []}  # by the verdict of the gate; None: no audit
    with wandb.init(dir=tmp_path, mode="disabled") as run:
        for passed, names in logged.items():
            report = small_report(passed, search=None)
            monkeypatch.setattr(run, "log_artifact", lambda artifact, names=names: names.append(artifact.name))
            log_report(report, adapter_folder(tmp_path / str(passed), report=report))
    reports = ["memorization-report"]
    assert logged == {True: [*reports, "adapter"], False: reports, None: reports}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A W&B server on the loopback interface."""
    program = shutil.which("openwandb")
    if program is None:
        pytest.skip("no W&B server here: install openwandb in an environment of its own and put it on PATH")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    place = ["--host", "127.0.0.1", "--port", str(port), "--data-dir", str(tmp_path / "server")]
    process = subprocess.Popen([program, "serve", *place], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/graphql", timeout=1)
            except urllib.error.HTTPError:
                break  # it answers
            except OSError:
                time.sleep(0.5)
            else:
                break
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setenv("WANDB_API_KEY", "local" + "0" * 40)
        for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            (tmp_path / name).mkdir()
            monkeypatch.setenv(name, str(tmp_path / name))
        yield address
    finally:
        process.terminate()
        process.wait()


def test_a_run_reaches_the_server_with_its_report(server, tmp_path):
    import wandb

    folder = adapter_folder(tmp_path / "adapter")
    report = MemorizationReport.from_json(folder / "memorization_report.json")
    report.search = None
    trainer = tiny_trainer(tmp_path / "out", report_to=["wandb"], mask={"mid_block.attentions.0": True}, max_steps=2)
    start_tracking(trainer, "my-study", "selected mask", "final", {"mask": trainer.mask, "learning_rate": 0.01})
    assert run_url().startswith(server)
    trainer.train()
    figures = trainer.evaluate(metrics=["loss"])
    log_report(report, folder)
    log_push("https://hub.example/tester/adapter")
    wandb.finish()

    found = sqlite3.connect(tmp_path / "server" / "openwandb.db")  # it keeps neither groups nor files of artifacts
    name, state, config, summary, *places = found.execute(
        "SELECT display_name, state, config_json, summary_json, host, program FROM runs"
    ).fetchone()
    config, summary = json.loads(config), json.loads(summary)
    assert (name, state) == ("selected mask", "finished")
    assert config["mask"]["value"] == trainer.mask and config["learning_rate"]["value"] == 0.01
    assert summary["eval/loss"] == figures["eval_loss"]
    assert summary["hub"] == "https://hub.example/tester/adapter"
    assert ("memorization-report", "report") in found.execute("SELECT name, artifact_type FROM artifacts").fetchall()
    said = json.dumps([config, summary, places])
    assert str(tmp_path) not in said and places == ["-", "-"], "neither the machine nor the program"


def test_tensorboard_has_a_folder_a_trial_with_its_own_figures(tmp_path):
    trainer = tiny_trainer(tmp_path, report_to="tensorboard", max_steps=2, logging_steps=1)
    runs = trainer.hyperparameter_search(n_trials=3, learning_rate_range=(1e-2, 1e-1))
    for trial in runs[0].run_summary.trials:
        folder = tmp_path / "runs" / "memcontrol" / f"trial-{trial.number}"
        events = EventAccumulator(str(folder)).Reload()
        losses = [event.value for event in events.Scalars("eval/loss")]
        assert losses == pytest.approx([trial.values[0]])
        trained = any(trial.user_attrs["hyperparameters"]["mask"].values())
        assert ("train/loss" in events.Tags()["scalars"]) == trained
