"""Pushing to a Hub on the loopback interface, one that fails too."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import adapter_folder, small_report, tiny_pipeline, tiny_trainer
from huggingface_hub import HfApi, ModelCard, constants
from mini_hub import TOKEN, Repo, serve
from safetensors.torch import load_file

from memcontrol_hf import MemorizationReport, cli
from memcontrol_hf.adapter_folder import PUBLIC_FILES, adapter_digests
from memcontrol_hf.families import family_of
from memcontrol_hf.publish.hub import CARD_BY_HAND, WAITS, PushError, push
from memcontrol_hf.report.mask_card import MaskCard

PUSHED = sorted(
    name
    for name in PUBLIC_FILES
    if "/" not in name and name not in ("pytorch_lora_weights.safetensors", "pareto_front.png")
)


@pytest.fixture
def hub(monkeypatch):
    """A running Hub that this process is logged in to."""
    with serve() as (hub, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        hub.address = address
        yield hub


@pytest.fixture
def waits(monkeypatch):
    """Seconds that would have been waited."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.fixture
def folder(tmp_path):
    return adapter_folder(tmp_path / "my-adapter")


def state(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_adapter_on_the_hub_is_attacked_as_its_report_says(hub, folder, tmp_path, capsys):
    push(folder, "tester/my-adapter")
    command = ["audit", "--adapter", "tester/my-adapter", *("--pipeline", "x", "--train", "x", "--held_out", "x")]
    command += ["--encoder", "demo", "--output_dir", str(tmp_path / "out"), "--resolution", "64"]
    assert cli.main(command) == 2
    assert "--resolution 64: the adapter was trained at 16 pixels" in capsys.readouterr().err
    assert cli.main([word.replace("my-adapter", "nothing") for word in command]) == 2, "its loading says why"


def test_a_push_is_one_commit_of_the_public_files_to_a_private_repository(hub, folder, capsys):
    assert cli.main(["push", str(folder)]) == 0
    repo = hub.repos["tester/my-adapter"]
    assert repo.private and len(repo.commits) == 1
    assert sorted(repo.files) == PUSHED
    assert f"pushed: {hub.address}/" in capsys.readouterr().out
    for name, data in repo.files.items():
        assert data == (folder / name).read_bytes(), name
    assert (folder / "private" / "review.html").exists() and (folder / "study.journal").exists()


def test_the_pushed_card_loads_from_where_it_was_pushed_to(hub, folder):
    push(folder, "owner/adapter", revision="v1")
    files = hub.repos["owner/adapter"].branches["v1"]
    assert hub.repos["owner/adapter"].files == {}
    assert '(pipe.unet, "owner/adapter", revision="v1")' in files["README.md"].decode()
    assert json.loads(files["memorization_report.json"])["card"]["hub_model_id"] == "owner/adapter"
    push(folder)  # to where it was pushed before
    assert '(pipe.unet, "owner/adapter")' in hub.repos["owner/adapter"].files["README.md"].decode()


def test_the_card_is_rendered_last_and_one_by_hand_is_kept(hub, folder, caplog):
    (folder / "README.md").write_text("written by somebody else")
    push(folder)
    assert (folder / "README.by_hand.md").read_text() == "written by somebody else"
    assert f"kept as {CARD_BY_HAND}" in caplog.text
    order = [line["value"]["path"] for line in commit(hub) if line["key"] != "header"]
    assert order[-1] == "README.md" and sorted(order) == PUSHED
    assert ModelCard(hub.repos["tester/my-adapter"].files["README.md"].decode()).data.library_name == "peft"


def test_a_second_card_by_hand_does_not_replace_the_first(hub, folder, caplog):
    for text in ("first", "second", "third"):
        (folder / "README.md").write_text(text)
        push(folder)
    assert "kept as README.by_hand.2.md" in caplog.text
    kept = ("README.by_hand.md", "README.by_hand.2.md", "README.by_hand.3.md")
    assert [(folder / name).read_text() for name in kept] == ["first", "second", "third"]


def commit(hub) -> list[dict]:
    body = next(sent for sent in hub.sent if b"/commit/" in sent.split(b"\n", 1)[0])
    return [json.loads(line) for line in body.split(b"\n") if line.startswith(b"{")]


@pytest.mark.parametrize("where", ["/api/repos/create", "/preupload/", "/lfs/", "/commit/", "/validate-yaml"])
@pytest.mark.parametrize("fault", [500, 429, "hang up"])
def test_a_hub_that_fails_for_a_while_gets_the_push_in_the_end(hub, folder, waits, where, fault):
    hub.faults[where] = [fault, fault]
    push(folder)
    assert len(hub.repos["tester/my-adapter"].commits) == 1
    assert sorted(hub.repos["tester/my-adapter"].files) == PUSHED
    assert len(waits) >= 2 and waits == sorted(waits)


def test_a_commit_whose_reply_is_lost_is_not_made_twice(hub, folder, waits):
    hub.faults["/commit/"] = ["lose the reply"]
    push(folder)
    assert len(hub.repos["tester/my-adapter"].commits) == 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (500, "the Hub has an error of its own (500)"),
        (429, "the Hub is asked too often (429)"),
        ("hang up", "the Hub hung up or cannot be reached"),
    ],
)
def test_after_a_failure_all_is_there_and_the_printed_command_pushes(hub, folder, waits, capsys, fault, reason):
    before = state(folder)
    hub.faults["/commit/"] = [fault] * 100
    arguments = ["--hub_model_id", "owner/adapter", "--hub_revision", "v1"]
    assert cli.main(["push", str(folder), *arguments]) == 1
    error = capsys.readouterr().err
    assert reason in error and "Nothing is lost: try again with" in error
    after = state(folder)
    assert after.keys() == before.keys()
    assert {n for n in after if after[n] != before[n]} == {"README.md", "memorization_report.json"}, "the location"
    assert [w for w in waits if w in WAITS] != []
    assert "owner/adapter" not in hub.repos, "it would be empty"
    hub.faults.clear()
    command = error.splitlines()[-1].split()
    assert command[:2] == ["memcontrol", "push"] and command[3:] == arguments
    assert cli.main(command[1:]) == 0
    assert sorted(hub.repos["owner/adapter"].branches["v1"]) == PUSHED


def test_a_repository_that_was_there_before_is_not_deleted(hub, folder, waits):
    HfApi().create_repo("owner/adapter", private=True)
    hub.faults["/commit/"] = [500] * 100
    with pytest.raises(PushError):
        push(folder, "owner/adapter")
    assert "owner/adapter" in hub.repos


@pytest.mark.parametrize("error", [RuntimeError("Data processing error: MaxRetry"), ConnectionError("reset by peer")])
def test_uploads_that_end_in_errors_of_their_own_are_tried_again(hub, folder, waits, monkeypatch, error):
    commit_once, calls = HfApi.create_commit, []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) < 3:
            raise error  # as hf_xet does
        return commit_once(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", failing)
    push(folder)
    assert len(hub.repos["tester/my-adapter"].commits) == 1 and len(waits) == 2


@pytest.mark.parametrize(
    ("token", "where", "fault", "reason"),
    [
        ("hf_wrong", None, None, "does not know your token: log in with `hf auth login`"),
        (TOKEN, "/commit/", 403, "may not write there: log in with a write token"),
    ],
)
def test_a_refused_token_is_no_reason_to_try_again(
    hub, folder, waits, capsys, monkeypatch, token, where, fault, reason
):
    monkeypatch.setenv("HF_TOKEN", token)
    hub.faults[where or "-"] = [fault]
    assert cli.main(["push", str(folder)]) == 1
    error = capsys.readouterr().err
    assert reason in error and f"memcontrol push {folder} --hub_model_id my-adapter" in error
    assert waits == [] and token not in error


def test_no_login_and_no_network_are_said(hub, folder, waits, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(PushError, match="log in with `hf auth login`"):
        push(folder)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PushError, match="cannot be reached"):
        push(folder)
    assert waits == list(WAITS)


def test_a_failed_gate_is_not_pushed_unless_allowed_and_the_card_says_so_first(hub, tmp_path, capsys):
    folder = adapter_folder(tmp_path / "leaky", report=small_report(passed=False))
    assert cli.main(["push", str(folder)]) == 3
    assert "the release gate failed (1 limits" in capsys.readouterr().err
    assert hub.requests == []
    assert cli.main(["push", str(folder), "--allow_failed_gate"]) == 0
    card = ModelCard(hub.repos["tester/leaky"].files["README.md"].decode())
    first = next(line for line in card.text.splitlines()[1:] if line and not line.startswith("#"))
    assert first.startswith("**Release gate: FAILED.**")
    assert "extraction\\_rate: may be as high as 0.500, above the limit 0.05" in card.text


def test_a_public_repository_must_be_allowed(hub, folder, capsys):
    hub.repos["owner/known"] = Repo(private=False)
    assert cli.main(["push", str(folder), "--hub_model_id", "owner/known"]) == 2
    assert "the repository 'owner/known' is public" in capsys.readouterr().err
    assert hub.repos["owner/known"].commits == []
    assert cli.main(["push", str(folder), "--hub_model_id", "owner/known", "--hub_public"]) == 0
    assert cli.main(["push", str(folder), "--hub_model_id", "owner/new", "--hub_public"]) == 0
    assert not hub.repos["owner/new"].private


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "memorization_report.json").unlink(), "holds no memorization_report.json"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "holds no adapter"),
        (lambda f: (f / "memorization_report.json").write_text("{"), "is no memorization report"),
    ],
)
def test_a_folder_without_an_adapter_is_refused_before_the_hub_is_asked(hub, folder, capsys, break_it, message):
    break_it(folder)
    assert cli.main(["push", str(folder)]) == 2
    assert message in capsys.readouterr().err and hub.requests == []


def test_other_weights_than_those_measured_are_refused(hub, folder, capsys):
    report = MemorizationReport.from_json(folder / "memorization_report.json")
    assert list(report.weights) == ["adapter_model.safetensors", "adapter_config.json"]
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights + b" ")
    assert cli.main(["push", str(folder)]) == 2 and not hub.repos
    assert "adapter_model.safetensors in" in (error := capsys.readouterr().err)
    assert "not what memorization_report.json was measured on" in error
    (folder / "adapter_model.safetensors").write_bytes(weights)
    assert cli.main(["push", str(folder)]) == 0


def edited(folder, change) -> None:
    file = folder / "memorization_report.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def config_with_a_large_scale(content, folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "scale": 50}))


EDITS = {
    "passed beside failures": (lambda c, f: c["gate"].update(failures=["ten"]), 3),
    "a word in the place of a boolean": (lambda c, f: c["gate"].update(passed="false"), 3),
    "no limit": (lambda c, f: c["gate"].update(limits={}), 2),
    "a measure without limit": (lambda c, f: c["gate"].update(limits={"extraction_rate": {}}), 2),
    "limits that are none": (lambda c, f: c["gate"].update(limits=[1]), 2),
    "no verdict": (lambda c, f: c["gate"].pop("passed"), 2),
    "no measures": (lambda c, f: c["audit"].update(measures={}), 3),
    "no audit": (lambda c, f: c.update(audit=None), 3),
    "worse figures": (lambda c, f: c["audit"]["measures"]["extraction_rate"]["model"].update(high=0.9), 3),
    "an end that hides the value": (
        lambda c, f: c["audit"]["measures"]["extraction_rate"]["model"].update(value=1),
        3,
    ),
    "figures that are words": (lambda c, f: c["audit"]["measures"]["extraction_rate"]["model"].update(high="0"), 2),
    "no gate": (lambda c, f: c.update(gate=None), 3),
    "no digests": (lambda c, f: c.update(weights={}), 2),
    "no digest of the configuration": (lambda c, f: c["weights"].pop("adapter_config.json"), 2),
    "another configuration": (config_with_a_large_scale, 2),
    "another plot": (lambda c, f: (f / "pareto_front.png").write_bytes(b"a scan"), 2),
    "NaN": (lambda c, f: c["audit"]["measures"]["extraction_rate"]["model"].update(high=float("nan")), 2),
    "an unknown part": (lambda c, f: c.update(caption="zebra"), 2),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_report_that_was_edited_is_judged_again_and_not_pushed(hub, folder, capsys, edit):
    change, code = EDITS[edit]
    edited(folder, lambda content: change(content, folder))
    assert cli.main(["push", str(folder)]) == code
    assert hub.requests == [] and "error: " in capsys.readouterr().err


def test_a_card_says_what_the_figures_say_and_not_what_the_report_claims(hub, folder):
    edited(folder, lambda content: content["audit"]["measures"]["extraction_rate"]["model"].update(high=0.9))
    push(folder, allow_failed_gate=True)
    assert "**Release gate: FAILED.**" in hub.repos["tester/my-adapter"].files["README.md"].decode()


@pytest.mark.parametrize("name", ["pareto_front.png", "README.md", "memorization_report.json", "text_encoder"])
@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_no_link_leads_a_file_of_this_machine_into_a_push(hub, folder, tmp_path, capsys, name, link):
    secret, place = tmp_path / "secret", folder / name
    if name == "text_encoder":
        secret.mkdir()
        (secret / "adapter_config.json").write_text("{}")
        if link == "hardlink_to":
            place.mkdir()
            secret, place = secret / "adapter_config.json", place / "adapter_config.json"
    else:
        secret.write_bytes(place.read_bytes() if place.exists() else b"secret")
        place.unlink(missing_ok=True)
    getattr(place, link)(secret)
    assert cli.main(["push", str(folder)]) == 2
    assert "link" in capsys.readouterr().err and hub.requests == []


def test_a_shared_mask_holds_what_is_known_and_follows_no_link(hub, folder, tmp_path, capsys):
    mask = {"mask": {"a": True, "b": False}, "patient": "zebra", "base_model": "$(touch stolen)"}
    (folder / "mask.json").write_text(json.dumps(mask))
    assert cli.main(["push-mask", str(folder), "owner/mask"]) == 0
    assert b"zebra" not in b"".join(hub.repos["owner/mask"].files.values())
    assert "--pretrained_model_name_or_path '$(touch stolen)'" in hub.repos["owner/mask"].files["README.md"].decode()
    (folder / "mask.json").rename(tmp_path / "secret.json")
    (folder / "mask.json").symlink_to(tmp_path / "secret.json")
    assert cli.main(["push-mask", str(folder), "owner/mask"]) == 2
    assert "symbolic link" in capsys.readouterr().err


@pytest.mark.parametrize("part", [{"search": {"sampler": "tpe"}}, {"figures": {"frozen base": {"fid": 1.0}}}])
def test_a_mask_of_which_no_card_can_be_written_makes_no_repository(hub, tmp_path, capsys, part):
    (tmp_path / "mask.json").write_text(json.dumps({"mask": {"a": True}} | part))
    assert cli.main(["push-mask", str(tmp_path), "owner/mask"]) == 2
    assert "its search or its figures lack a part" in capsys.readouterr().err
    assert hub.requests == []


def test_a_name_that_is_none_is_refused(hub, folder, capsys):
    assert cli.main(["push", str(folder), "--hub_model_id", "a b"]) == 2
    assert "'a b' is no name of a repository" in capsys.readouterr().err


def test_a_mask_alone_is_shared_without_weights(hub, folder):
    assert cli.main(["push-mask", str(folder), "owner/mask"]) == 0
    files = hub.repos["owner/mask"].files
    assert sorted(files) == ["README.md", "mask.json"] and hub.repos["owner/mask"].private
    content = json.loads(files["mask.json"])
    assert content["mask"]["mid_block.attentions.0"] is True and content["method"] == "svdiff"
    card = ModelCard(files["README.md"].decode())
    assert "memcontrol-mask" in card.data.tags
    assert "--mask_from owner/mask --method svdiff" in card.text and f"1 of {len(content['mask'])} blocks" in card.text
    assert "--train_data_dir my_images --encoder YOUR_ENCODER" in card.text
    assert not re.search(r"\{\{|None|\n\n\n", card.text) and "| frozen base |" in card.text
    command = MaskCard({**content, "method": "oft"}, "owner/mask").render()
    assert "--method" not in command and "--peft_config YOUR_PEFT_CONFIG" in command
    assert "--granularity" not in command
    for name, flag in (("mid_block.attentions.0.proj_in", "module"), ("--push_to_hub", "YOUR_EXPRESSIONS")):
        command = MaskCard({**content, "mask": {name: True}}, "owner/mask").render()
        assert f"--granularity {flag} -" in command


def test_the_trainer_pushes_what_it_trained(hub, tmp_path):
    trainer = tiny_trainer(
        tmp_path / "from-trainer", push_to_hub=True, save_strategy="steps", save_steps=2, max_steps=2
    )
    trainer.train()
    trainer.save_model(_internal_call=True)
    assert hub.requests == [], "nothing is pushed before it is asked for"
    trainer.push_to_hub()
    repo = hub.repos["tester/from-trainer"]
    assert repo.private and sorted(repo.files) == PUSHED
    card = ModelCard(repo.files["README.md"].decode())
    assert "Nothing was measured" in card.text and "**Release gate: not applied.**" in card.text
    trainer.set_mask({"mid_block.attentions.0": True})
    pushed = adapter_digests(tmp_path / "from-trainer")
    with pytest.raises(ValueError, match="is the report of another mask"):
        trainer.push_to_hub()
    assert adapter_digests(tmp_path / "from-trainer") == pushed, "a refused push writes over nothing"
    with pytest.raises(ValueError, match="give no token"):
        trainer.push_to_hub(token="hf_something")


def test_adapters_of_text_encoders_are_pushed_and_found_in_their_folders(hub, tmp_path):
    pipeline = tiny_pipeline()
    space = family_of(pipeline).search_space(text_encoder_blocks=True)
    trainer = tiny_trainer(tmp_path / "with-text", pipeline, space=space, max_steps=1)
    trainer.train()
    trainer.push_to_hub()
    inside = [f"text_encoder/{name}" for name in ("adapter_config.json", "adapter_model.safetensors")]
    assert sorted(hub.repos["tester/with-text"].files) == sorted([*PUSHED, *inside])
    tiny_pipeline().save_pretrained(tmp_path / "base")
    code = (
        "import sys; from diffusers import StableDiffusionPipeline; from memcontrol_hf.adapters import load_adapter\n"
        "pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1]); load_adapter(pipe, sys.argv[2])\n"
        "for part in (pipe.unet, pipe.text_encoder):\n"
        "    print(sum(p.double().sum() for n, p in part.named_parameters() if 'memcontrol_' in n).item())"
    )
    reached = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code, str(tmp_path / "base"), "tester/with-text"]
    loaded = subprocess.run(command, env={**os.environ, **reached}, capture_output=True, text=True)
    for part, found in zip(("", "text_encoder"), loaded.stdout.split(), strict=True):
        saved = load_file(tmp_path / "with-text" / part / "adapter_model.safetensors")
        total = sum(tensor.double().sum().item() for tensor in saved.values())
        assert total and float(found) == pytest.approx(total)


def test_an_adapter_in_the_cache_loads_without_the_network(hub, folder, tmp_path):
    push(folder, "owner/adapter")
    code = (
        "from conftest import tiny_pipeline; from memcontrol_hf.adapters import load_adapter\n"
        "pipe = tiny_pipeline(); load_adapter(pipe, 'owner/adapter'); print(type(pipe.unet).__name__)"
    )
    reached = {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    for offline in ("0", "1"):
        asked, environment = len(hub.requests), {**os.environ, **reached, "HF_HUB_OFFLINE": offline}
        command = [sys.executable, "-c", code]
        loaded = subprocess.run(command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True)
        assert loaded.stdout.strip() == "PeftModel", loaded.stderr
    assert len(hub.requests) == asked


def test_a_merged_export_is_pushed_whole_and_loads_from_the_hub(hub, tmp_path, capsys):
    base, merged = tmp_path / "tiny-sd", tmp_path / "merged"
    tiny_pipeline().save_pretrained(base)
    source = adapter_folder(tmp_path / "adapter", report=small_report(base_model="tiny-sd", card={}))
    assert (
        cli.main(["export", str(source), "--to", "merged", "--pipeline", str(base), "--output_dir", str(merged)]) == 0
    )
    made = {str(file.relative_to(merged)) for file in merged.rglob("*") if file.is_file()}
    report = MemorizationReport.from_json(merged / "memorization_report.json")
    assert set(report.weights) == made - {"README.md", "memorization_report.json"}
    (merged / "unet" / "patients.json").write_text("{}")
    (merged / "private").mkdir()
    (merged / "private" / "config.json").write_text("{}")
    assert cli.main(["push", str(merged), "--hub_model_id", "tester/merged"]) == 0, capsys.readouterr().err
    assert set(hub.repos["tester/merged"].files) - {".gitattributes"} == made
    reached = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
    code = "from diffusers import DiffusionPipeline as D; print(type(D.from_pretrained('tester/merged')).__name__)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **reached}, capture_output=True, text=True
    )
    assert loaded.stdout.strip() == "StableDiffusionPipeline", loaded.stderr

    (merged / "unet" / "config.json").write_text("{}")
    assert cli.main(["push", str(merged)]) == 2
    assert "unet/config.json in" in capsys.readouterr().err
