"""`memcontrol train` before and after it computes: its help, the YAML file of its flags, and what it prints."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from dataclasses import fields
from typing import get_args

import pytest
import yaml

from memcontrol_hf import MemorizationReport, cli
from memcontrol_hf.evaluation import METRICS
from memcontrol_hf.families import DTYPES, QUANTIZATIONS
from memcontrol_hf.flag_parser import FlagParser
from memcontrol_hf.flags import MITIGATIONS, Method, Objective, ScriptArguments
from memcontrol_hf.from_flags import METHODS
from memcontrol_hf.mitigations import MITIGATIONS as KNOWN_MITIGATIONS
from memcontrol_hf.search import SAMPLERS
from memcontrol_hf.search.settings import named_values
from memcontrol_hf.train import last_words

HEAVY = {"torch", "diffusers", "peft", "datasets", "optuna", "wandb"}


def printed_by(*command: str) -> str:
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def choices(name: str) -> list[str]:
    (action,) = (action for action in FlagParser()._actions if action.dest == name)
    return list(action.choices)


def test_the_help_loads_no_library_that_computes():
    code = "import sys\nfrom memcontrol_hf.train import main\ntry:\n main(['--help'])\nfinally:\n print(*sys.modules)"
    loaded = printed_by("-c", code).splitlines()[-1].split()
    assert "memcontrol_hf.flags" in loaded and not HEAVY & {*loaded}


def test_the_help_is_the_same_by_module_and_by_command_and_has_groups(capsys):
    by_module = printed_by("-m", "memcontrol_hf.train", "--help")
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--help"])
    by_command = capsys.readouterr().out
    assert not ended.value.code
    assert by_command.split("options:")[1] == by_module.split("options:")[1]
    assert by_command.startswith("usage: memcontrol train [--flag value ...]\n")
    groups = ["model and images", "what is tuned", "search", "training", "measures and audit", "the run", "publishing"]
    assert [line[:-1] for line in by_command.splitlines() if line[:-1] in groups and line[-1:] == ":"] == groups
    assert "{svdiff,difffit,attention,weights,norm,bias,lora}" in by_command and "default: None" not in by_command


def test_the_choices_are_those_of_the_package():
    assert get_args(Method) == (*METHODS,) and get_args(Objective) == (*METRICS,)
    assert (*KNOWN_MITIGATIONS,) == MITIGATIONS
    assert choices("sampler") == [*SAMPLERS] and choices("objectives") == [*METRICS]
    assert choices("dtype") == [*DTYPES] and choices("quantization") == [*QUANTIZATIONS]


def test_a_yaml_file_holds_any_flag_and_the_command_line_wins(tmp_path):
    values = {
        **{"method": "lora", "seed": 3, "learning_rate": 1e-4, "objectives": ["fid", "amd"], "dry_run": True},
        **{"trainer_args": {"optim": "sgd"}, "gate": None, "validation_prompt": '-- a "quoted" prompt'},
        **{"mitigation": ["rwa:n=4"], "text_encoder_blocks": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    args = FlagParser().script_arguments(["--seed", "5", "--config", str(tmp_path / "run.yaml")])
    expected = ScriptArguments(**values | {"seed": 5, "trainer_args": '{"optim": "sgd"}'})
    assert args == expected
    assert {*vars(args)} == {flag.name for flag in fields(ScriptArguments)}


def test_yaml_reads_no_as_a_word_and_lists_of_the_command_line_replace_those_of_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text("mixed_precision: no\ndry_run: no\nmitigation: [rwa:n=4]\nn-trials: 3\n")
    config = ["--config", str(tmp_path / "run.yaml")]
    args = FlagParser().script_arguments(config)
    assert (args.mixed_precision, args.dry_run, args.mitigation, args.n_trials) == ("no", False, ["rwa:n=4"], 3)
    args = FlagParser().script_arguments([*config, "--mitigation", "threshold:q=0.9", "--n-trials=5"])
    assert (args.mitigation, args.n_trials) == (["threshold:q=0.9"], 5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "seed: 1\nlerning_rate: 3\n",
            "run.yaml has unknown flags: lerning_rate (did you mean learning_rate?); --help lists the flags",
        ),
        ("- seed\n", "run.yaml holds no flags: write one a line, name: value"),
        ("seed: [1", "run.yaml cannot be read: while parsing"),
        ("seed: many\n", "argument --seed: invalid int value: 'many'"),
        ("method: dreambooth\n", "argument --method: invalid choice: 'dreambooth'"),
        (None, "run.yaml cannot be read: [Errno 2]"),
    ],
)
def test_a_wrong_yaml_file_is_one_line(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(SystemExit) as ended:
        FlagParser().script_arguments(["--config", str(tmp_path / "run.yaml")])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line.replace("\\", "/")


# ---- what a run prints ----

QUIET = """
import logging, warnings
from memcontrol_hf.progress import bar, quiet_log
with quiet_log():
    logging.getLogger("memcontrol_hf.search").info("trial 0 of 2")
    logging.getLogger("transformers").warning("nobody asked")
    warnings.warn("the disk is nearly full")
    for _ in bar(range(3), "sampling"):
        pass
"""


def test_a_log_that_is_no_terminal_has_one_line_for_each_stage_and_no_bars():
    result = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True)
    assert result.stderr.splitlines() == ["trial 0 of 2", "warning: the disk is nearly full"]


def test_a_terminal_gets_a_bar_with_the_time_left():
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 100, 0, 0))
    code = "import logging; logging.getLogger('memcontrol_hf').setLevel(20); from memcontrol_hf.progress import bar"
    subprocess.run([sys.executable, "-c", f"{code}; [*bar(range(3), 'sampling')]"], stderr=theirs, check=True)
    printed = os.read(ours, 1 << 16).decode()
    assert "sampling:   0%" in printed and "| 0/3 [00:00<?" in printed


@pytest.mark.parametrize(
    ("gate", "audit", "said"),
    [
        ({"passed": True, "failures": []}, {}, ["verdict: passed", "next: memcontrol push"]),
        (
            {"passed": False, "failures": ["a: above", "b: above"]},
            {},
            ["verdict: FAILED, 2 limits are not kept", "--allow_failed_gate", "next: train with a mitigation"],
        ),
        (
            {"passed": False, "failures": ["a: may be"], "kinds": {"a": "unmeasured"}},
            {},
            ["verdict: FAILED, 1 limit is not kept", "next: measure with more images"],
        ),
        (
            {"passed": False, "failures": ["a: above", "b: may be"], "kinds": {"a": "leaks", "b": "unmeasured"}},
            {},
            ["verdict: FAILED, 2 limits are not kept", "next: train with a mitigation"],
        ),
        (
            {"passed": False, "failures": ["no audit: the train set has 3"]},
            None,
            ["verdict: FAILED, since the adapter could not be attacked", "next: train with more images"],
        ),
    ],
)
def test_a_run_ends_with_verdict_places_and_the_next_command(tmp_path, gate, audit, said):
    for name in ("adapter_model.safetensors", "README.md", "private/review.html"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    lines = last_words(MemorizationReport(base_model="demo", gate=gate, audit=audit), tmp_path).splitlines()
    assert lines[0].startswith(said[0]) and lines[-1].startswith(said[-1]) and len(lines) <= 10
    assert all(any(part in line for line in lines) for part in said)
    assert f"card: {tmp_path / 'README.md'}" in lines and not any("plot:" in line for line in lines)
    assert any(str(tmp_path / "private" / "review.html") in line for line in lines)


def test_a_trial_names_its_figures():
    assert named_values([3.4361, 0.5416], ["fid", "membership_auc"]) == "fid 3.436, membership_auc 0.5416"
    assert named_values([1.0], None) == "1"
