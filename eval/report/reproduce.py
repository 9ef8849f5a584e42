"""How an erasure is made again: the command, and the files that it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml

from erase.prompts.concepts import to_yaml

if TYPE_CHECKING:
    from erase.delta import ErasedDelta

RUN, CONCEPTS = "run.yaml", "concepts.yaml"
COMMAND = f"erase-concept --config {RUN} --out runs/again"


def recipe(delta: ErasedDelta) -> dict[str, str]:
    """File name -> its text: `run.yaml`, which `--config` reads, and `concepts.yaml`, which that
    names. Nothing where no one command makes the delta: of several parts or requests, or of another
    program.

    Args:
        delta: knows its method, config and concepts.
    """
    erase, method = (delta.origin.config.get(part) for part in ("erase", "method"))
    if not isinstance(erase, Mapping) or not isinstance(method, Mapping):
        return {}
    if {"parts", "foreign", "after"} & delta.metadata.keys():
        return {}
    run: dict[str, Any] = {**erase, "concepts": [CONCEPTS], **method}
    text = yaml.safe_dump(run, sort_keys=False, allow_unicode=True, width=1000)
    return {RUN: text, CONCEPTS: to_yaml(delta.origin.concepts)}
