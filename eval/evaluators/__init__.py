"""Evaluators: one file and one index line each, or an entry point `concept_erasure.evaluators`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from erase.eval.case import Case
from erase.eval.scores import Score
from erase.plugins import Index
from erase.prompts.errors import ErasureError

if TYPE_CHECKING:
    from erase.eval.budget import Budget

C = TypeVar("C")


def not_unless_named(case: Case) -> bool:
    """Of an evaluator that the user must name."""
    return False


def as_given(case: Case, config: C, named: bool) -> C:
    """Of an evaluator whose defaults fit every case."""
    return config


def not_known(case: Case, config: C) -> Budget | None:
    """Of an evaluator that does not say what it asks of the model."""
    return None


@dataclass(frozen=True)
class Evaluator(Generic[C]):
    """A way to score: its functions, and its configuration with defaults."""

    name: str
    """an identifier: its options are `--NAME.FIELD`"""
    config: C
    """a dataclass instance with the defaults; its type is this evaluator's alone, and the type's
    docstring heads the options in --help"""
    evaluate: Callable[[Case, C], list[Score]]
    """scores of the model under evaluation; every process calls it, and all get the same"""
    check: Callable[[Case, C], None]
    """refuses, before any image is made, what `evaluate` would refuse after hours of it; the case's
    images have rows, and no files"""
    fits: Callable[[Case], bool] = not_unless_named
    """of our own: whether it is asked where the user names no evaluator"""
    settle: Callable[[Case, C, bool], C] = as_given
    """(case, config, named) -> the configuration with what the user left open chosen; `named`: the
    user names this evaluator"""
    packages: tuple[str, ...] = ()
    """distributions whose versions the report tells"""
    needs_model: bool = False
    """whether it runs the model itself, so that images alone are not enough"""
    budget: Callable[[Case, C], Budget | None] = not_known
    """what it asks of the model on the base and on the erased model together, for an estimate of
    its time; the case's images have rows, and no files"""

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ErasureError(
                f"the evaluator's name {self.name!r} heads its options; make it of letters, digits "
                "and _"
            )

    def settings(self, given: Any = None) -> C:
        """The settings to judge with: those that are given, or the defaults.

        Raises:
            ErasureError: they are another evaluator's.
        """
        if given is None:
            return self.config
        if type(given) is not type(self.config):
            wanted = f"{type(self.config).__module__}.{type(self.config).__qualname__}"
            raise ErasureError(
                f"evaluator {self.name} takes a {wanted}, not a "
                f"{type(given).__module__}.{type(given).__qualname__}; give that, or leave it out"
            )
        return given


EVALUATORS: Index[Evaluator[Any]] = Index(
    "evaluator",
    {
        "classifier": "erase.eval.evaluators.classifier:CLASSIFIER",
        "clip": "erase.eval.evaluators.clip:CLIP",
        "cmmd": "erase.eval.evaluators.cmmd:CMMD",
        "drift": "erase.eval.evaluators.drift:DRIFT",
        "fid": "erase.eval.evaluators.fid:FID",
        "lpips": "erase.eval.evaluators.lpips:LPIPS",
        "nudenet": "erase.eval.evaluators.nudenet:NUDENET",
        "opennsfw": "erase.eval.evaluators.opennsfw:OPENNSFW",
        "q16_type": "erase.eval.evaluators.q16_type:Q16_TYPE",
        "attack": "erase.eval.evaluators.attack:ATTACK",
        "probes": "erase.eval.evaluators.probes:PROBES",
        "relearning": "erase.eval.evaluators.relearning:RELEARNING",
    },
    Evaluator,
)
"""evaluator -> where it is defined"""


def get_evaluator(name: str) -> Evaluator[Any]:
    """The evaluator of this name, or at this `package.module:NAME`.

    Raises:
        ErasureError: an unknown name (the near one is suggested), or a plugin that cannot be used.
    """
    return EVALUATORS.get(name)
