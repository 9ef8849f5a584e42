"""Completion for shells, by shtab: a script of a command's own options, printed."""

from __future__ import annotations

from argparse import SUPPRESS, Action
from collections.abc import Callable, Iterable
from copy import copy
from typing import TYPE_CHECKING, Any

from erase.prompts.errors import ErasureError
from erase.scripts.cli.guards import PATHS

if TYPE_CHECKING:
    from argparse import ArgumentParser

OPTION, SHELLS = "--print_completion", ("bash", "zsh")
INSTALL = "pip install 'concept-erasure-toolkit[completion]'"


class PrintCompletion(Action):
    """`--print_completion SHELL`: print the script, and end."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, SUPPRESS, default=SUPPRESS, choices=SHELLS, **options)

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        print(script(parser, str(values)))
        parser.exit(0)


def script(parser: ArgumentParser, shell: str) -> str:
    """The script that a shell reads to complete a command.

    Raises:
        ErasureError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise ErasureError(f"{OPTION} needs shtab, which is not installed; {INSTALL}") from error
    shown = copy(parser)
    shown._actions = [_completed(action, shtab.FILE) for action in parser._actions]
    shown._action_groups = []
    for group in parser._action_groups:
        members = copy(group)
        members._group_actions = [_completed(one, shtab.FILE) for one in group._group_actions]
        shown._action_groups.append(members)
    return str(shtab.complete(shown, shell))


def _completed(action: Action, file: Any) -> Action:
    """An action with what may stand behind it: names, true and false, or a file."""
    if action.choices or not action.option_strings:
        return action
    shown, name = copy(action), action.dest.rpartition(".")[2]
    if names := NAMES.get(action.dest):
        shown.choices = list(names())
    elif _of_bool(action):
        shown.choices = ["true", "false"]
    elif name in PATHS:
        shown.complete = file  # type: ignore[attr-defined]
    return shown


def _of_bool(action: Action) -> bool:
    return getattr(action, "_typehint", None) is bool


def _methods() -> Iterable[str]:
    from erase.methods import METHODS

    return METHODS


def _protocols() -> Iterable[str]:
    from erase.eval.protocols import protocol_names

    return protocol_names()


NAMES: dict[str, Callable[[], Iterable[str]]] = {"method": _methods, "protocol": _protocols}
"""options whose values are names and nothing else"""
