"""The methods, one file each. A name here may be a preset: the same function with other defaults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Generic, TypeVar

from erase.prompts.errors import ErasureError, unknown
from erase.task import Edit, Task

C = TypeVar("C")
METHODS = {
    "salun": "erase.methods.salun",
    "salun-paper": "erase.methods.salun",
    "esd": "erase.methods.esd",
    "uce": "erase.methods.uce",
}
"""method -> the module whose `METHODS` holds it"""


@dataclass(frozen=True)
class Method(Generic[C]):
    """A way to erase: its function, its configuration with defaults, and where it comes from."""

    name: str
    paper: str
    config: C
    """a dataclass instance with the defaults; its type is this method's alone"""
    edit: Callable[[Task, C], Edit]
    """leaves the task's model as it was found"""

    def settings(self, given: Any = None) -> Any:
        """The settings to run with: those that are given, or the defaults.

        Raises:
            ErasureError: they are another method's, whose results this one's name must not sign.
        """
        if given is None:
            return self.config
        if type(given) is not type(self.config):
            fitting = [name for name in METHODS if type(get_method(name).config) is type(given)]
            remedy = f'name method="{fitting[0]}"' if fitting else "give those"
            raise ErasureError(
                f"method {self.name} takes a {type(self.config).__name__}, not a {type(given).__name__}; {remedy}, or leave them out"
            )
        return given


def get_method(name: str) -> Method[Any]:
    """The method or preset of this name.

    Raises:
        ErasureError: an unknown name; the near one is suggested.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    method: Method[Any] = import_module(METHODS[name]).METHODS[name]
    return method
