"""Methods and evaluators that a command line names, found before there is a parser.

They decide which further options there are.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from itertools import chain

import yaml

from erase.prompts.errors import ErasureError
from erase.prompts.reading import parse_yaml, read_yaml

NULLS = ("null", "Null", "NULL", "~")
"""nothing, as YAML and the command line write it"""


def names_given(argv: list[str] | None, option: str, files: list[str]) -> list[str]:
    """Every name that config files and the command line give to an option, in this order.

    A name may be a place, `package.module:NAME`, which is code: only the command line may give
    one. It is looked for in the working folder too, after everything that is installed.

    Args:
        argv: the command line; None: this program's.
        option: takes a name, or a list of names.
        files: paths of the config files.

    Raises:
        ErasureError: a config file gives a place that the command line does not.
    """
    early = ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument(
        f"--{option}", f"--{option}+", dest="given", action="append", default=[], nargs="?"
    )
    typed = list(chain.from_iterable(map(_names, early.parse_known_args(argv)[0].given)))
    if any(":" in name for name in typed) and not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())

    written = []
    for path in files:
        settings = read_yaml(path)
        names = _names(settings.get(option)) if isinstance(settings, dict) else []
        for name in names:
            if ":" in name and name not in typed:
                raise ErasureError(
                    f"{path} gives {option} the code {name!r}, which no file may; put it on the "
                    f"command line, --{option}, or install its package and use the name that it "
                    "has there"
                )
        written += names
    return written + typed


def _names(value: object) -> list[str]:
    """The names in a value as it was written; none where it is null, or where the parser will
    refuse its form."""
    if value in NULLS:
        return []
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_yaml(value)
        except yaml.YAMLError:
            return []
    names = value if isinstance(value, list) else [value]
    return [name for name in names if isinstance(name, str) and name.strip()]
