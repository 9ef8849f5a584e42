"""Evaluators: one file each, one line each below.

Each has a `Config`, `evaluate(images, concepts, config) -> list[Score]`, and `foreseen(images, concepts, config) -> list[Score]`, which refuses
before any image is made what `evaluate` would refuse after hours of it, and gives the label scores of a judge that is always right.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from erase.prompts.errors import unknown

EVALUATORS = {
    "classifier": "erase.eval.evaluators.classifier",
    "clip": "erase.eval.evaluators.clip",
    "nudenet": "erase.eval.evaluators.nudenet",
}


def get_evaluator(name: str) -> ModuleType:
    """The module of an evaluator, imported when asked for.

    Raises:
        ErasureError: no evaluator has this name; the near one is suggested.
    """
    if name not in EVALUATORS:
        raise unknown("evaluator", name, EVALUATORS)
    return import_module(EVALUATORS[name])
