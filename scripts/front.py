"""What the commands share: parsers that teach, unknown keys with a suggestion, errors in one sentence, configs from dataclasses."""

from __future__ import annotations

import logging
import os
import re
import sys
from argparse import Action, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, fields, replace
from typing import Any, TypeVar

import torch
from jsonargparse import ArgumentParser as JsonArgumentParser
from jsonargparse import DefaultHelpFormatter, Namespace, set_parsing_settings

from erase.processes import processes
from erase.reproducible import settle_sums
from prompts.canvas import canvas_concept
from prompts.concepts import ConceptSpec, load_concepts
from prompts.errors import ErasureError, unknown
from prompts.proposals import propose
from prompts.reading import read_yaml, why
from scripts.guards import check_settings, guard_yaml, no_group, settle_paths
from scripts.stopping import exit_code, terminable

T = TypeVar("T")
LEANER = (
    "do less at a time: a smaller batch_size (of latents, of generate), train.accumulation 4, train.gradient_checkpointing true, "
    "a narrower scope such as xattn; docs/performance.md says what each saves"
)
set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the line under each field is its help
guard_yaml()


class _Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Types and defaults beside each option; the description's lines, its examples, as they are."""

    def _expand_help(self, action: Action) -> str:
        return str(action.help) if isinstance(action, Words) else super()._expand_help(action)


class Parser(JsonArgumentParser):
    """A parser whose errors are `ErasureError`, with the near key suggested for an unknown one."""

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """Raise instead of leaving the program, so that commands can be called from Python and from each other."""
        options = sorted(
            {option.lstrip("-") for action in self._actions for option in action.option_strings} | set(self._defaults_keys())
        )
        for pattern in (
            r"[Uu]nrecognized arguments: --([\w.\-]+)",
            r"Key ['\"]([\w.]+)['\"] is not expected",
            r"Option '([\w.]+)' is not accepted",  # this and the next: keys of a config file
            r"Group '([\w.]+)' does not accept option '([\w.]+)'",
        ):
            if match := re.search(pattern, message):
                raise unknown("option", ".".join(match.groups()), options) from ex
        if match := re.search(r'Parser key "([\w.]+)".*Expected a <class \'list\'>.*value: ([\w.,-]+)\s*$', message, re.S):
            raise ErasureError(f"{match[1]} is a list, also where it holds one thing: --{match[1]} '[{match[2]}]'") from ex
        raise ErasureError(re.sub(r"\s+", " ", message).strip()) from ex

    def _defaults_keys(self) -> list[str]:
        return [key for key in self.get_defaults(skip_validation=True).keys()]  # noqa: SIM118 (a Namespace)


def parser(prog: str, doc: str | None) -> Parser:
    """An empty parser with `--config file.yaml` and `--print_config`."""
    made = Parser(prog=prog, description=doc, default_env=False, formatter_class=_Formatter)
    made.add_argument("--config", action="config", help="a YAML file of these options; options after it win")
    return made


def add_config(parser: Parser, default: Any, skip: set[str] | None = None) -> None:
    """Options for every field of a dataclass, with the instance's values as defaults."""
    parser.add_class_arguments(type(default), skip=skip or set())
    parser.set_defaults({key: value for key, value in _flat(asdict(default)) if key.split(".")[0] not in (skip or ())})


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        nested = isinstance(value, dict) and value and not key.endswith("args")
        rows += _flat(value, f"{prefix}{key}.") if nested else [(prefix + key, value)]
    return rows


class Words(Action):
    """An option that may be given several times, or as a list in a config file; the command line replaces the file's list."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, type=_as_words, default=[], **options)
        self._given: list[str] = []

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        self._given += values
        setattr(namespace, self.dest, list(self._given))


def _as_words(value: object) -> list[str]:
    words = value if isinstance(value, list) else [value]
    for word in words:
        if not isinstance(word, str):
            raise ValueError(f"{word!r} is not text; put it in quotes")
    return words


def build(kind: type[T], options: Namespace) -> T:
    """The dataclass whose fields are among the parsed (and instantiated) options."""
    return kind(**{f.name: options[f.name] for f in fields(kind) if f.name in options})  # type: ignore[arg-type]


def config_files(argv: list[str] | None) -> list[str]:
    """What stands behind --config."""
    early = ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", action="append", default=[], nargs="?")  # nothing behind it is for the real parser to say
    return [path for path in early.parse_known_args(argv)[0].config if path]


def parse(made: Parser, argv: list[str] | None) -> Namespace:
    """Parsed options, nested dataclasses built.

    Raises:
        ErasureError: an unknown option, a value of the wrong type, a config file that cannot be read.
    """
    groups = {key.split(".")[0] for key in made._defaults_keys() if "." in key}
    for path in config_files(argv):
        # read_yaml names the line of a fault, a key that stands twice, and aliases that would never end
        check_settings(path, read_yaml(path), groups)
    try:
        options = made.parse_args(argv)
        for group in groups:
            if not isinstance(options.get(group), Namespace):
                raise no_group(group)
        settle_paths(options)
        return made.instantiate_classes(options)
    except ErasureError:
        raise
    except Exception as error:  # a config file's shape can upset any part of the parser
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ErasureError(f"cannot read these options: {reason}; --print_config shows their form") from error


def run(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> int:
    """Run a command: 0 when done, 2 for bad input or too little memory (one sentence on stderr), 130 for Ctrl-C, 143 for SIGTERM.

    Of several processes the main one alone speaks; all tell their errors.
    """
    settle_sums()
    _quiet()
    logging.basicConfig(format="%(message)s")
    try:
        with terminable():
            if processes().is_main_process:
                logging.getLogger("erase").setLevel(logging.INFO)  # what was decided on the user's behalf
                main(argv)
            else:
                with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
                    main(argv)
    except ErasureError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)):
            raise
        print(f"error: out of memory; {LEANER}", file=sys.stderr)
        return 2
    except OSError as error:  # of a path or a disk that no check foresaw
        if error.errno is None:
            raise
        print(f"error: {f'{error.filename}: ' if error.filename else ''}{why(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return exit_code(stopped)
    return 0


def alone(command: str) -> None:
    """Refuse several processes, for a command whose work is not shared: each would write the same files."""
    if (count := processes().num_processes) > 1:
        raise ErasureError(f"{command} is work for one process, not {count}; run it without accelerate launch or torchrun")


def _quiet() -> None:
    """Only our own progress bars: not those of every file that a library loads."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def read_concepts(
    names: list[str], anchors: list[str], file: str | None, model: str, retain: list[str], kind: str | None = None
) -> list[ConceptSpec]:
    """Concepts from flags, a file, or some of a file's.

    By name: words of the embedded world on `canvas`; elsewhere as they are given, or, where anchor or retain prompts are left
    out, as `prompts.proposals` proposes them, with a line about it on stderr.
    """
    if file:
        if anchors or retain or kind:
            raise ErasureError(f"--anchor, --retain and --kind do not go with --concepts; write them into a copy of {file}")
        return _picked(load_concepts(file), names, file)
    if not names:
        raise ErasureError("no concept was given; name one with --concept (on canvas, e.g. heart), or a file with --concepts")
    if anchors and len(anchors) != len(names):
        raise ErasureError(
            f"{len(names)} concepts but {len(anchors)} anchors; give one --anchor for each --concept, in the same order"
        )
    paired = list(zip(names, anchors or [None] * len(names), strict=True))
    if model == "canvas":
        if retain or kind:
            raise ErasureError("canvas brings its own retain prompts and kinds; leave out --retain and --kind, or use --concepts")
        return [canvas_concept(name, anchor) for name, anchor in paired]
    return [_by_name(name, anchor, tuple(retain), kind) for name, anchor in paired]


def _picked(concepts: list[ConceptSpec], names: list[str], file: str) -> list[ConceptSpec]:
    """The concepts of these names, in the file's order; all of them where there are none."""
    targets = [concept.target for concept in concepts]
    for name in names:
        if name not in targets:
            raise unknown(f"concept of {file}", name, targets)
    return [concept for concept in concepts if not names or concept.target in names]


def _by_name(name: str, anchor: str | None, retain: tuple[str, ...], kind: str | None) -> ConceptSpec:
    if anchor and retain and not kind:
        return ConceptSpec(target=name, anchor=anchor, retain=retain)
    found = propose(name, kind)
    found = replace(found, anchor=anchor or found.anchor, retain=retain or found.retain)
    print(
        f"proposed for {name!r}: {found.target} -> {found.anchor}, {len(found.names)} names, {len(found.templates)} templates "
        f"({found.templates[0]!r}, ...), {len(found.retain)} retain prompts ({found.retain[0]!r}, ...); add --propose to see all "
        "of it as YAML, which --concepts reads",
        file=sys.stderr,
    )
    return found
