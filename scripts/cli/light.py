"""Help, and a look at the options, without the libraries that a job needs: to import torch and
diffusers takes seconds, to list options does not need them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import Any

HEAVY = frozenset(
    "accelerate diffusers huggingface_hub nudenet numpy open_clip safetensors scipy "
    "torch torchvision transformers".split()
)
DESCRIBING = {"-h", "--help", "--version", "--print_completion"}


def only_describes(argv: Sequence[str]) -> bool:
    """Whether a command line asks for text alone, in a process that has not loaded torch anyway."""
    return not DESCRIBING.isdisjoint(argv) and "torch" not in sys.modules


def options_can_be_read(argv: Sequence[str]) -> bool:
    """Whether a command line can be looked through before torch is loaded: it prints nothing of its
    options, and names no file of Python, which may load libraries of its own."""
    return "torch" not in sys.modules and not any(
        word.startswith("--print_") or re.search(r"\w:\w", word) for word in argv
    )


class OptionsKnown(Exception):
    """A command has every option that it was given, which is all that was asked of it."""


@contextmanager
def stood_in(options_only: bool = False) -> Iterator[None]:
    """Within the block, imports of `HEAVY` give empty modules whose every attribute is an empty
    class; nothing is left of them afterwards. `options_only`: a command in it ends with
    `OptionsKnown` once it has read its options.

    That is enough to import a module and to read its dataclasses, and for nothing else. Every
    package that came in within the block goes with them, since its modules may hold stand-ins.
    """
    finder = _Finder(options_only)
    sys.meta_path.insert(0, finder)
    before = set(sys.modules)
    known = {name.partition(".")[0] for name in before} | sys.stdlib_module_names
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            top = name.partition(".")[0]
            if top not in known or top in HEAVY or top == "erase":
                del sys.modules[name]


def stand_in() -> bool:
    """Whether torch is a stand-in here, so that a plugin that is real may fail."""
    return isinstance(sys.modules.get("torch"), _Module)


def check_options_only() -> None:
    """End a command that was asked for its options alone.

    Raises:
        OptionsKnown: it was.
    """
    if any(isinstance(finder, _Finder) and finder.options_only for finder in sys.meta_path):
        raise OptionsKnown


class _Finder(MetaPathFinder, Loader):
    def __init__(self, options_only: bool) -> None:
        self.options_only = options_only

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:  # type: ignore[override]
        return (
            ModuleSpec(fullname, self, is_package=True)
            if fullname.partition(".")[0] in HEAVY
            else None
        )

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Empty(type):
    """The class of the empty classes: their attributes are empty classes as well."""

    def __getattr__(cls, name: str) -> Any:
        return _empty(name)

    def __getitem__(cls, _: object) -> Any:
        return cls

    def __call__(cls, *args: Any, **named: Any) -> Any:
        """As a decorator, with or without arguments, it changes nothing."""
        return args[0] if args and isinstance(args[0], FunctionType | type) else super().__call__()


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return _empty(name)


def _empty(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Empty(name, (_Base,), {})


class _Base(metaclass=_Empty):
    def __call__(self, first: Any = None, *_: Any, **__: Any) -> Any:
        return first
