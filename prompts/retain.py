"""Prompts that must stay: the shipped lists, less the prompts that name a concept."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from erase.prompts.errors import ErasureError, unknown
from erase.prompts.names import Names
from erase.prompts.reading import DATA, as_texts, read_yaml

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
        raise ErasureError(
            f"{unknown('retain list', name, retain_lists())}; or write the prompts themselves, as "
            "a list"
        )
    return as_texts(read_yaml(RETAIN / f"{name}.yaml"), f"{name}.yaml")


def without(prompts: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """The prompts in which none of `names` stands, as `erase.prompts.names.Names` finds them."""
    gone = Names(names)
    return tuple(prompt for prompt in prompts if not gone.found(prompt))
