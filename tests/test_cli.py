"""The command's parsers: what a newcomer reads with `--help`, and defaults that agree with those of the functions."""

import argparse
import inspect

import pytest

from memcontrol_hf import cli
from memcontrol_hf.audit import AuditSettings
from memcontrol_hf.flag_parser import FlagParser
from memcontrol_hf.publish.export import FORMATS, export

COMMANDS = next(a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)).choices


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_is_explained_by_a_phrase_that_names_something(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert not ended.value.code
    printed = " ".join(capsys.readouterr().out.split())
    assert "Exit codes: 0 " in printed and "default: None" not in printed
    flags = (FlagParser() if name in ("train", "screen") else COMMANDS[name])._actions
    assert len(flags) > 1, "more than --help"
    for action in flags:
        assert len(action.help.split()) >= 2 and action.help.split()[0].lower() not in (
            "of",
            "for",
            "that",
            "instead:",
        )


def test_the_audits_defaults_are_those_of_its_settings():
    args = cli._parser().parse_args(
        ["audit", "--pipeline", "p", "--train", "t", "--held_out", "h", "--output_dir", "o"]
    )
    settings = {name: value for name, value in vars(AuditSettings()).items() if name != "resolution"}
    assert {name: getattr(args, name) for name in settings} == settings


def test_the_exports_formats_and_rank_are_those_of_the_function():
    args = cli._parser().parse_args(["export", "folder", "--to", "lora", "--output_dir", "o"])
    assert args.rank == inspect.signature(export).parameters["rank"].default
    (to,) = (action for action in COMMANDS["export"]._actions if action.dest == "to")
    assert {*FORMATS, "pipeline"} == {*to.choices}


def test_a_flag_that_a_command_lacks_is_an_error_beside_the_usage_of_that_command(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["push", "folder", "--hub_model_id", "me/adapter", "--dry_run"])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert (
        "usage: memcontrol push" in printed and "memcontrol push: error: unrecognized arguments: --dry_run" in printed
    )
    with pytest.raises(SystemExit):
        cli.main(
            ["audit", "--train", "x", "--held_out", "y", "--output_dir", "z", "--adaptor", "a", "--pipeline", "p"]
        )
    assert "unrecognized arguments: --adaptor a (did you mean --adapter?)" in capsys.readouterr().err
