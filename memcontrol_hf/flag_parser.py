"""Reads the flags of `memcontrol train`, from a command line and from a YAML file. It does not load PyTorch."""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from .command_line import WRONG_USE, HelpWithCommands, did_you_mean
from .error_lines import in_one_line
from .flags import ScriptArguments

_GROUPS = {
    "--pretrained_model_name_or_path": "model and images",
    "--method": "what is tuned",
    "--n_trials": "search",
    "--resolution": "training",
    "--encoder": "measures and audit",
    "--dry_run": "the run",
    "--push_to_hub": "publishing",
}
"""The groups of the help, each by its first flag."""

_UNKNOWN = "unrecognized arguments: "
"""How argparse begins its error for flags that it does not know."""


class FlagParser(HfArgumentParser):
    """Parses [`ScriptArguments`] from a command line and from the YAML file of `--config`.

    Args:
        description (`str`, *optional*): text above the flags, whose lines are kept.
        prog (`str`, *optional*): name of the command; that of the process by default.
    """

    def __init__(self, description: str | None = None, prog: str | None = None):
        self._group: argparse._ArgumentGroup | None = None
        layout = {"formatter_class": HelpWithCommands, "usage": "%(prog)s [--flag value ...]"}
        super().__init__(ScriptArguments, description=description, prog=prog, **layout)
        text = "YAML file with flags, name: value; a flag of the command line wins."
        argparse.ArgumentParser.add_argument(self, "--config", metavar="FILE", type=Path, help=text)

    def add_argument(self, *names: str, study: Any = None, publish: Any = None, **options: Any) -> argparse.Action:
        """Add a flag to the group that it belongs to. argparse does not know what else a flag says."""
        if names[0] in _GROUPS:
            self._group = self.add_argument_group(_GROUPS[names[0]])
        return (self._group.add_argument if self._group else super().add_argument)(*names, **options)

    def error(self, message: str) -> NoReturn:
        """End with one line, since the usage of all flags would hide it."""
        if message.startswith(_UNKNOWN):
            message += did_you_mean(message.removeprefix(_UNKNOWN).split()[0], self._option_string_actions)
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(WRONG_USE)

    def script_arguments(self, argv: list[str] | None = None) -> ScriptArguments:
        """The flags of a command line, and below them those of its `--config`.

        Args:
            argv (list of `str`, *optional*): arguments; those of the process by default.

        Raises:
            SystemExit: for a wrong flag, with one line that names it.
        """
        argv = sys.argv[1:] if argv is None else argv
        given = self.parse_args(argv)
        if given.config is not None:
            given = self.parse_args([*self._words_of(given.config, argv), *argv])
        del given.config
        return ScriptArguments(**vars(given))

    def _words_of(self, file: Path, argv: list[str]) -> list[str]:
        """The command line that a YAML file stands for, so that both are read by the same rules.

        Args:
            file (`Path`): YAML file.
            argv (list of `str`): the command line, whose flags win.
        """
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            self.error(f"--config {file} cannot be read: {in_one_line(error)}")
        if not isinstance(content, dict):
            self.error(f"--config {file} holds no flags: write one a line, name: value")
        content = {str(name).replace("-", "_"): value for name, value in content.items()}  # as on a command line
        known = {flag.name for flag in fields(ScriptArguments)}
        if unknown := sorted(content.keys() - known):
            names = ", ".join(name + did_you_mean(name, known) for name in unknown)
            self.error(f"--config {file} has unknown flags: {names}; --help lists the flags")
        flags = [word.partition("=")[0] for word in argv if word.startswith("--")]
        winning = {flag.removeprefix("--").replace("-", "_") for flag in flags}
        words: list[str] = []
        for name, value in content.items():
            if name in winning:
                continue
            if isinstance(value, bool):  # YAML reads no as False
                value = "yes" if value else "no"
            if isinstance(value, list) and value:
                words += [f"--{name}", *map(str, value)]
            elif value is not None and value != []:
                words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
        return words
