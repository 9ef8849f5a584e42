"""Completion for shells, by shtab: a script of a command's own options, printed."""

from __future__ import annotations

from argparse import SUPPRESS, Action
from collections.abc import Iterable, Mapping
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
    names, file = _names(), shtab.FILE
    shown._actions = [_completed(action, names, file) for action in parser._actions]
    shown._action_groups = []
    for group in parser._action_groups:
        members = copy(group)
        members._group_actions = [_completed(one, names, file) for one in group._group_actions]
        shown._action_groups.append(members)
    return str(shtab.complete(shown, shell))


def _completed(action: Action, names: Mapping[str, Iterable[str]], file: Any) -> Action:
    """An action with what may stand behind it: names, true and false, or a file."""
    if action.choices or not action.option_strings:
        return action
    shown, name = copy(action), action.dest.rpartition(".")[2]
    if action.dest in names:
        shown.choices = list(names[action.dest])
    elif _of_bool(action):
        shown.choices = ["true", "false"]
    elif name in PATHS:
        shown.complete = file  # type: ignore[attr-defined]
    return shown


def _of_bool(action: Action) -> bool:
    return getattr(action, "_typehint", None) is bool


def _names() -> dict[str, Iterable[str]]:
    """Options whose values are words, with these; of `concept` what the shipped models draw."""
    from erase.eval.protocols import protocol_names
    from erase.latents.config import PICKS
    from erase.methods import METHODS
    from erase.models.scopes import SCOPES
    from erase.prompts.canvas import concept_names
    from erase.training.config import ALLOCATIONS, COMBINE, CONTROLS, RULES

    precisions = ("no", "bf16", "fp16")
    return {
        "method": METHODS,
        "protocol": protocol_names(),
        "concept": concept_names(),
        "scope": SCOPES,
        "combine": COMBINE,
        "mask.rule": (*RULES, *CONTROLS),
        "mask.allocation": ALLOCATIONS,
        "latents.pick": PICKS,
        "latents.mixed_precision": precisions,
        "train.mixed_precision": precisions,
    }
