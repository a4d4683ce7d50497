"""What all commands share: their exit codes, and how their help is laid out."""

import argparse
import copy
from collections.abc import Iterable
from difflib import get_close_matches

PASSED, ERROR, WRONG_USE, GATE_FAILED = 0, 1, 2, 3
"""Exit codes: passed or done, an error, wrong use, the release gate failed."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What an error about an unknown word ends with: the known one that is spelt nearly alike, if there is one."""
    near = get_close_matches(word.partition("=")[0], known, n=1, cutoff=0.75)
    return f" (did you mean {near[0]}?)" if near else ""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help texts with the default, where a flag has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        no_default = action.default is None or action.default is False or action.default == []
        return action.help if no_default else super()._get_help_string(action)


class HelpWithCommands(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the commands of a description as they are written, and each flag by one of its spellings."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        spelled_the_same = {name.replace("-", "_"): name for name in reversed(action.option_strings)}
        shown.option_strings = list(spelled_the_same.values())[::-1]
        return super()._format_action_invocation(shown)
