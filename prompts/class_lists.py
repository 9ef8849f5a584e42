"""Class lists: the names of a classifier's outputs, kind by kind, shipped or in a user's file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from erase.prompts.errors import ErasureError, unknown
from erase.prompts.reading import DATA, as_text, as_texts, read_yaml

CLASSES = DATA / "classes"


@dataclass(frozen=True)
class ClassList:
    """The classes of one kind."""

    outputs: Mapping[str, int]
    """name -> place of its output"""
    whole: bool
    """whether every output has a name here, so that their number is that of the names"""


def class_lists() -> list[str]:
    """Names of the shipped lists."""
    return sorted(path.stem for path in CLASSES.glob("*.yaml"))


def load_classes(source: str) -> dict[str, ClassList]:
    """kind -> its classes.

    Args:
        source: a shipped list, or a YAML file: kind -> the names of all outputs in their order, or
            name -> output where only some of the outputs have a name.

    Raises:
        ErasureError: no such list, a bad value, or a name or an output that stands twice.
    """
    path = CLASSES / f"{source}.yaml" if source in class_lists() else Path(source)
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise ErasureError(
            f"{unknown('class list', source, class_lists())}; or give a .yaml file: a kind, and "
            "the names of the outputs in their order"
        )
    content = read_yaml(path)
    if not isinstance(content, Mapping) or not content:
        raise ErasureError(
            f"{path}: expected `kind: [name, …]`, or `kind: {{name: output, …}}`, for one kind or "
            "more"
        )
    return {as_text(kind, f"{path}: a kind"): _of_kind(content[kind], f"{path}: {kind}")
            for kind in content}  # fmt: skip


def _of_kind(value: object, where: str) -> ClassList:
    if isinstance(value, Mapping):
        outputs = {str(name): _output(place, f"{where}: {name}") for name, place in value.items()}
    else:
        names = as_texts(value, where)
        outputs = {name: place for place, name in enumerate(names)}
        if len(outputs) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ErasureError(f"{where} has {twice!r} twice; each output needs a name of its own")
    if len(outputs) < 2:
        raise ErasureError(f"{where} has {len(outputs)} classes; a classifier needs two or more")
    places = list(outputs.values())
    if len(set(places)) < len(places):
        twice_given = next(place for place in places if places.count(place) > 1)
        raise ErasureError(f"{where} gives the output {twice_given} two names; leave one out")
    return ClassList(outputs, not isinstance(value, Mapping))


def _output(value: object, where: str) -> int:
    if not isinstance(value, str) or not re.fullmatch(r"\d{1,9}", value):
        raise ErasureError(f"{where} is {value!r}; it must be the place of an output, from 0")
    return int(value)
