"""What all commands share: their exit codes, and how their help is laid out."""

import argparse
import copy

PASSED, ERROR, WRONG_USE, GATE_FAILED = 0, 1, 2, 3
"""Exit codes: passed or done, an error, wrong use, the release gate failed."""


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
