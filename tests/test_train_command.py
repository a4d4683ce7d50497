"""`memcontrol train` before it computes: its help, its choices, and the YAML file of its flags."""

import subprocess
import sys
from dataclasses import fields
from typing import get_args

import pytest
import yaml

from memcontrol_hf import cli
from memcontrol_hf.evaluation import METRICS
from memcontrol_hf.families import DTYPES, QUANTIZATIONS
from memcontrol_hf.flag_parser import FlagParser
from memcontrol_hf.flags import MITIGATIONS, Method, Objective, ScriptArguments
from memcontrol_hf.from_flags import METHODS
from memcontrol_hf.mitigations import MITIGATIONS as KNOWN_MITIGATIONS
from memcontrol_hf.search import SAMPLERS

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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed: 1\nlerning_rate: 3\n", "run.yaml has unknown flags: lerning_rate; --help lists the flags"),
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
