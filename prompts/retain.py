"""Prompts that must stay: the shipped lists, and how a prompt that names a concept is told from one that does not."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cache

from prompts.errors import ErasureError, unknown
from prompts.reading import DATA, as_texts, read_yaml

RETAIN = DATA / "retain"


def retain_lists() -> list[str]:
    """Names of the shipped lists."""
    return sorted(path.stem for path in RETAIN.glob("*.yaml"))


@cache
def load_retain(name: str) -> tuple[str, ...]:
    """The prompts of a shipped list ("artists", "clothed", "everyday", "objects", "people").

    Raises:
        ErasureError: no list has this name; the near one is suggested.
    """
    if name not in retain_lists():
        raise ErasureError(f"{unknown('retain list', name, retain_lists())}; or write the prompts themselves, as a list")
    return as_texts(read_yaml(RETAIN / f"{name}.yaml"), f"{name}.yaml")


def without(prompts: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """The prompts in which none of `names` stands.

    A name is looked for as whole words, whatever its case, accents, spaces and hyphens, also with an s behind it: "chain saw"
    is found in "two chainsaws", "cat" is not found in "a cathedral".
    """
    patterns = [_pattern(name) for name in names]
    return tuple(prompt for prompt in prompts if not any(pattern.search(fold(prompt)) for pattern in patterns))


def fold(text: str) -> str:
    """`text` for comparing: without case and accents."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)).casefold()


def _pattern(name: str) -> re.Pattern[str]:
    letters = re.sub(r"[\s\-]", "", fold(name)) or name
    spaced = r"[\s\-]*".join(map(re.escape, letters))
    return re.compile(rf"(?<!\w){spaced}(?:e?s)?(?!\w)")
