"""The methods: one file and one index line each, or an entry point `concept_erasure.methods`.

A name may be a preset: the same function with other defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from erase.latents.config import LatentConfig
from erase.plugins import Index
from erase.prompts.errors import ErasureError
from erase.task import Edit, Task

C = TypeVar("C")


@dataclass(frozen=True)
class Method(Generic[C]):
    """A way to erase: its function, its configuration with defaults, and where it comes from."""

    name: str
    paper: str
    config: C
    """a dataclass instance with the defaults; its type is this method's alone"""
    edit: Callable[[Task, C], Edit]
    """leaves the task's model as it was found"""
    latents: LatentConfig = field(default_factory=LatentConfig)
    """the data that it is given, unless told otherwise"""

    def settings(self, given: Any = None) -> Any:
        """The settings to run with: those that are given, or the defaults.

        Raises:
            ErasureError: they are another method's, whose results this one's name must not sign.
        """
        if given is None:
            return self.config
        if type(given) is not type(self.config):
            fitting = [
                name for name in METHODS.ours if type(get_method(name).config) is type(given)
            ]
            remedy = f'name method="{fitting[0]}"' if fitting else "give those"
            raise ErasureError(
                f"method {self.name} takes a {type(self.config).__name__}, not a "
                f"{type(given).__name__}; {remedy}, or leave them out"
            )
        return given


METHODS: Index[Method[Any]] = Index(
    "method",
    {
        "salun": "erase.methods.salun:METHODS",
        "salun-text": "erase.methods.salun:METHODS",
        "salun-twofold": "erase.methods.salun:METHODS",
        "salun-half": "erase.methods.salun:METHODS",
        "salun-soft": "erase.methods.salun:METHODS",
        "salun-paper": "erase.methods.salun:METHODS",
        "esd": "erase.methods.esd:METHODS",
        "uce": "erase.methods.uce:METHODS",
        "rece": "erase.methods.rece:METHODS",
        "speed": "erase.methods.speed:METHODS",
        "concept-ablation": "erase.methods.concept_ablation:METHODS",
        "erasediff": "erase.methods.erasediff:METHODS",
        "scissorhands": "erase.methods.scissorhands:METHODS",
        "forget-me-not": "erase.methods.forget_me_not:METHODS",
        "mace": "erase.methods.mace:METHODS",
        "doco": "erase.methods.doco:METHODS",
        "ssd": "erase.methods.ssd:METHODS",
        "npo": "erase.methods.npo:METHODS",
        "ascent": "erase.methods.ascent:METHODS",
        "few-shot": "erase.methods.ascent:METHODS",
        "hirm": "erase.methods.hirm:METHODS",
        "advunlearn": "erase.methods.advunlearn:METHODS",
        "race": "erase.methods.race:METHODS",
        "fia": "erase.methods.fia:METHODS",
        "stereo": "erase.methods.stereo:METHODS",
        "sfd": "erase.methods.sfd:METHODS",
    },
    Method,
)
"""method -> where it is defined"""


def get_method(name: str) -> Method[Any]:
    """The method or preset of this name, or at this `package.module:NAME`.

    Raises:
        ErasureError: an unknown name (the near one is suggested), or a plugin that cannot be used.
    """
    return METHODS.get(name)
