"""Text that goes to others with the weights: names as names, not as Markdown, and nothing of where
files lie on this disk."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from erase.delta.origin import config_of

ABSOLUTE = re.compile(r"(?:~|[A-Za-z]:)?[/\\].*", re.S)
BREAKS = re.compile(r"[ \x00-\x1f\x7f\x85\u2028\u2029]+")


def plain(text: object) -> str:
    """One line of Markdown that shows the text as it is: no markup, no HTML, no link comes of
    it."""
    line = BREAKS.sub(" ", str(text)).strip()
    line = re.sub(r"([\\`*_\[\]<>#|~!&$])", r"\\\1", line)
    return re.sub(r"(:)(?=//)|(?<=www)(\.)", lambda match: "\\" + match[0], line)


def code(text: object) -> str:
    """A code span of one line; backticks, which would end it, are left out."""
    return "`" + " ".join(str(text).replace("`", "").split()) + "`"


def without_folders(text: str) -> str:
    """An absolute path as `path/to/` its last part, any other text as it is."""
    if not ABSOLUTE.fullmatch(text):
        return text
    last = re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    return f"path/to/{last}".rstrip("/")


def without_paths(value: Any) -> Any:
    """A JSON value with `without_folders` of each text in it."""
    match value:
        case str():
            return without_folders(value)
        case list():
            return [without_paths(one) for one in value]
        case dict():
            return {key: without_paths(one) for key, one in value.items()}
    return value


def published(metadata: Mapping[str, str]) -> dict[str, str]:
    """A delta's metadata, `without_paths` in its base and its config."""
    config = json.dumps(without_paths(config_of(metadata, "this delta")), sort_keys=True)
    return {**metadata, "base_id": without_folders(metadata.get("base_id", "?")), "config": config}


def command_without_paths(command: str) -> str:
    """A command line with `without_folders` of each word, and of what stands behind a `=`."""
    try:
        words = shlex.split(command)
    except ValueError:  # an open quote
        words = command.split()
    cleaned = []
    for word in words:
        option, equals, value = word.partition("=")
        cleaned.append(
            option + equals + without_folders(value) if equals else without_folders(word)
        )
    return shlex.join(cleaned)
