"""The methods: one file and one index line each, or an entry point `concept_erasure.methods`.

A name may be a preset: the same function with other defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from erase.mask import SaliencyMask
from erase.plugins import Index
from erase.prompts.errors import ErasureError


@dataclass(frozen=True)
class Method:
    """A way to erase: its function, its configuration with defaults, and where it comes from."""

    name: str
    paper: str
    config: Any
    """a dataclass instance with the defaults; its type is this method's alone"""
    compute: Callable[..., Edit]
    """(model, concepts, forget, retain, config, *, seed, accelerator, folder) -> Edit; leaves the model as it was found"""

    def settings(self, given: Any = None) -> Any:
        """The settings to run with: those that are given, or the defaults.

        Raises:
            ErasureError: they are another method's, whose results this one's name must not sign.
        """
        if given is None:
            return self.config
        if type(given) is not type(self.config):
            fitting = [name for name in METHODS.ours if type(get_method(name).config) is type(given)]
            remedy = f'name method="{fitting[0]}"' if fitting else "give those"
            raise ErasureError(
                f"method {self.name} takes a {type(self.config).__name__}, not a {type(given).__name__}; {remedy}, or leave them out"
            )
        return given


@dataclass
class Edit:
    """What a method computes: new values, and the evidence of how it came to them."""

    values: Mapping[str, Tensor]
    """parameter name -> new values"""
    losses: list[float]
    """one per optimizer step; empty for a closed form"""
    mask: SaliencyMask | None = None


METHODS: Index[Method] = Index(
    "method",
    {
        "salun": "erase.methods.salun:METHODS",
        "salun-paper": "erase.methods.salun:METHODS",
    },
    Method,
)
"""method -> where it is defined"""


def get_method(name: str) -> Method:
    """The method or preset of this name, or at this `package.module:NAME`.

    Raises:
        ErasureError: an unknown name (the near one is suggested), or a plugin that cannot be used.
    """
    return METHODS.get(name)
