"""Shared by the commands: parsers that teach, unknown keys with a suggestion, errors in one
sentence, configs from dataclasses."""

from __future__ import annotations

import os
import shutil
import sys
from argparse import Action, RawDescriptionHelpFormatter
from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentParser as JsonArgumentParser
from jsonargparse import DefaultHelpFormatter, Namespace, set_parsing_settings

from erase.prompts.errors import ErasureError
from erase.prompts.reading import read_text, read_yaml
from erase.scripts.cli.complaints import Offered, complaint
from erase.scripts.cli.completion import PrintCompletion
from erase.scripts.cli.guards import check_settings, guard_yaml, no_group, settle_paths
from erase.scripts.cli.light import OptionsKnown, check_options_only
from erase.scripts.cli.naming import read_concepts
from erase.scripts.cli.recipes import config_files, with_paths
from erase.scripts.cli.running import alone, hush, note, run

__all__ = [
    "Parser",
    "Words",
    "add_base",
    "add_config",
    "add_group",
    "add_prompts",
    "alone",
    "build",
    "check_folder",
    "config_files",
    "note",
    "parse",
    "parser",
    "read_concepts",
    "run",
]

T = TypeVar("T")
WIDTH = 80  # columns of help, however wide the console is
FILES = frozenset(
    ".bin .ckpt .csv .gguf .h5 .html .jpg .json .msgpack .onnx .pkl .png .pt .pth .safetensors "
    ".yaml .yml .zip".split()
)
"""endings that only files have"""
# the line under each field is its help
set_parsing_settings(docstring_parse_attribute_docstrings=True)
guard_yaml()


class _Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Types and defaults beside each option; the description's lines, its examples, as they are; at
    most 80 columns."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=min(WIDTH, shutil.get_terminal_size().columns) - 1)

    def _expand_help(self, action: Action) -> str:
        return str(action.help) if isinstance(action, Words) else super()._expand_help(action)


class Parser(JsonArgumentParser):
    """A parser whose errors are `ErasureError`, with the near key suggested for an unknown one."""

    variant = ""
    """what on the command line decides which options there are"""
    absent: Mapping[str, str] = {}
    """option, or group of options -> why this variant does not have it"""

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """Raise instead of leaving the program, so that commands can be called from Python and from
        each other."""
        options = {
            option.lstrip("-") for action in self._actions for option in action.option_strings
        }
        offered = Offered(
            options | set(self._defaults_keys()),
            {one for one, action in self._option_string_actions.items() if _is_switch(action)},
            self.absent,
            " ".join(filter(None, (self.prog, self.variant, "--help"))),
        )
        raise complaint(message, offered) from ex

    def parse_path(self, path: Any, **options: Any) -> Namespace:  # type: ignore[override]
        """A config file as UTF-8; the library would take the locale's encoding."""
        # its name differs between versions
        return self.parse_string(read_text(path), os.path.basename(path), **options)

    def _defaults_keys(self) -> list[str]:
        # a Namespace, which is no mapping
        return [key for key in self.get_defaults(skip_validation=True).keys()]  # noqa: SIM118


def _is_switch(action: Action) -> bool:
    """Whether an option takes true or false."""
    return getattr(action, "_typehint", None) is bool


def parser(prog: str, doc: str | None, takes: str = "") -> Parser:
    """An empty parser of a command that takes such arguments beside its options: `--config
    file.yaml`, `--print_config`, `--print_completion`, `--version` and `--quiet`; options are not
    abbreviated."""
    command = Parser(
        prog=prog,
        # all options would be sixty lines before the first sentence
        usage=" ".join(filter(None, ("%(prog)s [options]", takes))),
        description=doc,
        default_env=False,
        formatter_class=_Formatter,
        allow_abbrev=False,
        version=_versions(),
    )
    command.add_argument(
        "--config",
        action="config",
        help="a recipe's name, or a YAML file of these options; options after it win",
    )
    command.add_argument(
        "--quiet",
        action="store_true",
        help="no progress bars and no notes: results and errors alone",
    )
    command.add_argument(
        "--print_completion", action=PrintCompletion, help="a script that completes this command"
    )
    return command


def _versions() -> str:
    from erase.run import VERSION

    return (
        f"{VERSION} "
        f"({', '.join(filter(None, map(_version_of, ('torch', 'diffusers', 'transformers'))))})"
    )


def _version_of(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""


def add_base(command: Parser, otherwise: str = "") -> None:
    """Options of the base that a delta belongs to, `--model` and `--load`; `otherwise` says what is
    loaded where there is no delta."""
    from erase.models.config import LoadConfig

    command.add_argument(
        "--model",
        type=str | None,
        default=None,
        help="the base: canvas or canvas-flow (shipped), a diffusers folder, a single file or a "
        f"hub id; by default the one that the delta names{otherwise}",
    )
    command.add_argument(
        "--load",
        type=LoadConfig,
        default=LoadConfig(),
        help="how the base is read; by default as it was for the delta",
    )


def add_prompts(command: Parser, otherwise: str) -> None:
    """The option of prompt sets, `--prompts`; `otherwise` says what none means."""
    from erase.prompts.prompt_sets import shipped_sets

    command.add_argument(
        "--prompts",
        action=Words,
        help=f"a shipped set ({', '.join(shipped_sets())}), or a .csv (the field's columns) or "
        ".yaml file (templates); may be given several times, the case numbers then count on; "
        f"{otherwise}",
    )


def add_config(parser: Parser, default: Any, skip: set[str] | None = None) -> None:
    """Options for every field of a dataclass, with the instance's values as defaults.

    Raises:
        ErasureError: a field has the name of another option.
    """
    skip = skip or set()
    for field in fields(default):
        if field.name not in skip:
            _check_free(parser, field.name, f"the field of {type(default).__name__}")
    parser.add_class_arguments(type(default), skip=skip)
    parser.set_defaults(
        {key: value for key, value in _flat(asdict(default)) if key.split(".")[0] not in skip}
    )


def add_group(parser: Parser, name: str, default: Any) -> None:
    """A group of options, `--NAME.FIELD`, for a dataclass, with the instance's values as defaults.

    Raises:
        ErasureError: another option has its name.
    """
    _check_free(parser, name, "the evaluator")
    parser.add_argument(f"--{name}", type=type(default), default=default)


def _check_free(parser: Parser, name: str, what: str) -> None:
    if f"--{name}" in parser._option_string_actions:
        raise ErasureError(
            f"{what}, {name!r}, has the name of another option of {parser.prog}; rename it"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        nested = isinstance(value, dict) and value and not key.endswith("args")
        rows += _flat(value, f"{prefix}{key}.") if nested else [(prefix + key, value)]
    return rows


class Words(Action):
    """An option that may be given several times, or as a list in a config file; the command line
    replaces the file's list."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, type=_as_words, default=[], **options)
        self._given: list[str] = []

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        self._given += values
        setattr(namespace, self.dest, list(self._given))


class OneDelta(Action):
    """An option of one delta: of two, the first would be left out without a word."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, type=str, **options)
        self._given = ""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        if self._given:
            raise ErasureError(
                f"{option_string} takes one delta, and is given {self._given} and {values}; make "
                "one of them (erase-export --delta A --delta B --format delta), or name one"
            )
        self._given = values
        setattr(namespace, self.dest, values)


def _as_words(value: object) -> list[str]:
    words: list[Any] = value if isinstance(value, list) else [value]
    for word in words:
        if not isinstance(word, str):
            raise ValueError(f"{word!r} is not text; put it in quotes")
    return words


def build(kind: type[T], options: Namespace) -> T:
    """The dataclass whose fields are among the parsed (and instantiated) options."""
    given = {f.name: options[f.name] for f in fields(kind) if f.name in options}  # type: ignore[arg-type]
    return kind(**given)


def parse(made: Parser, argv: list[str] | None) -> Namespace:
    """Parsed options, nested dataclasses built.

    Raises:
        ErasureError: an unknown option, a value of the wrong type, an empty one, a config file that
            cannot be read.
    """
    argv = with_paths(sys.argv[1:] if argv is None else argv)
    groups = {key.split(".")[0] for key in made._defaults_keys() if "." in key}
    for path in config_files(argv):
        # read_yaml names the line of a fault, a key that stands twice, and aliases that would never
        # end
        check_settings(path, read_yaml(path), groups)
    try:
        options = made.parse_args(argv)
        check_options_only()
        for group in groups:
            if not isinstance(options.get(group), Namespace):
                raise no_group(group)
        _check_filled(options)
        settle_paths(options)
        if options.quiet:
            hush()
        # its name before 4.49
        instantiate = getattr(made, "instantiate", None) or made.instantiate_classes
        return instantiate(options)
    except (ErasureError, OptionsKnown):
        raise
    except Exception as error:  # a config file's shape can upset any part of the parser
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ErasureError(
            f"cannot read these options: {reason}; --print_config shows their form"
        ) from error


def _check_filled(options: Namespace) -> None:
    """Refuse options whose value is no text at all: a script's variable that was not set, more
    often than not."""
    for key, value in options.items():
        words = value if isinstance(value, list) else [value]
        if any(isinstance(word, str) and not word.strip() for word in words):
            raise ErasureError(f"--{key} is empty; write something there, or leave the option out")


def check_folder(out: str, option: str = "--out") -> None:
    """Refuse a name that only a file has for what will be a folder."""
    if Path(out).suffix.lower() in FILES:
        raise ErasureError(
            f"{option} is a folder here, and {out} is the name of a file; leave {Path(out).suffix} "
            "off"
        )
