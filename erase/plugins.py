"""Indexes of methods and evaluators: ours, those of packages, and any at `package.module:NAME`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from functools import lru_cache, reduce
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, Protocol, TypeVar

from erase.prompts.errors import ErasureError, near_name, reason, unknown


class Plugin(Protocol):
    """A member of an index."""

    @property
    def name(self) -> str:
        """By which it is asked for."""

    @property
    def config(self) -> Any:
        """A dataclass instance with the defaults."""


T = TypeVar("T", bound=Plugin)


class PluginError(ErasureError):
    """A plugin that cannot be used."""


@dataclass(frozen=True)
class Index(Generic[T]):
    """Names and where each thing is defined; a thing is imported when it is asked for."""

    kind: str
    """`method` or `evaluator`; packages add theirs as entry points of `concept_erasure.<kind>s`"""
    ours: Mapping[str, str]
    """name -> `module:NAME`, where NAME is the thing, or a mapping that holds it by its name"""
    holds: type[T]
    """the type of every thing in the index"""

    def __iter__(self) -> Iterator[str]:
        """Our names in their order, then those of other packages."""
        yield from dict.fromkeys([*self.ours, *sorted(point.name for point in self._points())])

    def __contains__(self, name: object) -> bool:
        return name in list(self)

    def listed(self) -> str:
        """All names for a help text, without an import: `a, b, c (of package)`."""
        theirs = {point.name: f"{point.name} (of {_package(point)})" for point in self._points()}
        return ", ".join(theirs.get(name, name) for name in self)

    def package(self, name: str) -> str:
        """The distribution that brings this name; empty for ours and for a place."""
        points = (
            [] if name in self.ours else [point for point in self._points() if point.name == name]
        )
        return points[0].dist.name if points and points[0].dist else ""

    def get(self, name: str) -> T:
        """The thing of this name, or at this `package.module:NAME`.

        Raises:
            ErasureError: an unknown name; the near one is suggested.
            PluginError: it cannot be imported, is of another type, or has a name that is taken.
        """
        if ":" in name:
            return self._at_place(name)

        points = [point for point in self._points() if point.name == name]
        if name in self.ours:
            self._refuse_second(name, "ours", points)
            return self._load(name, self.ours[name])
        if not points:
            raise unknown(self.kind, name, self)
        self._refuse_second(name, f"that of {_package(points[0])}", points[1:])
        return self._load(name, f"{points[0].module}:{points[0].attr}", _package(points[0]))

    def _points(self) -> tuple[EntryPoint, ...]:
        return _entry_points(f"concept_erasure.{self.kind}s", tuple(sys.path))

    def _refuse_second(self, name: str, first: str, others: list[EntryPoint]) -> None:
        if others:
            package = _package(others[0])
            raise PluginError(
                f"{package} brings {_a(self.kind)} {name!r}, and {first} has that name; "
                f"uninstall {package}, or ask its authors for another name"
            )

    def _at_place(self, place: str) -> T:
        """The thing at `package.module:NAME`, whose name must be its own."""
        thing = self._load(None, place)
        if thing.name in self and self.get(thing.name) is not thing:
            raise PluginError(
                f"the {self.kind} at {place} is called {thing.name!r}, and another one has that "
                "name; rename it"
            )
        return thing

    def _load(self, name: str | None, place: str, package: str = "") -> T:
        """Import what is at a place.

        Args:
            name: what it must be called; None: as it likes.
            place: `module:NAME`.
            package: the distribution that says so; empty: ours, or the user.
        """
        module, _, attribute = place.partition(":")
        title = f"the {self.kind} {name or place!r}" + f" of {package}" * bool(package)
        try:
            held = import_module(module)
        except Exception as error:  # a module may raise anything
            said = f"{type(error).__name__}: {reason(error)}"
            remedy = (
                f"update or uninstall {package}"
                if package
                else "check the name, or install its package"
            )
            raise PluginError(
                f"{title} cannot be imported ({said}); {remedy}: `python -c 'import {module}'` "
                "shows where it fails"
            ) from error

        try:
            thing: Any = reduce(getattr, attribute.split("."), held)
        except AttributeError:
            raise PluginError(f"{title} is not there; {self._hint(module, attribute)}") from None
        if name is not None and isinstance(thing, Mapping):
            thing = thing.get(name)
        if not isinstance(thing, self.holds):
            actual, wanted = _a(type(thing).__name__), _a(self.holds.__name__)
            raise PluginError(f"{title} is {actual}, not {wanted}; {self._hint(module, attribute)}")

        if name is not None and thing.name != name:
            raise PluginError(f"{title} calls itself {thing.name!r}; give both one name")
        if not is_dataclass(thing.config) or isinstance(thing.config, type):
            raise PluginError(
                f"{title} has a config that is no dataclass instance; its options come from one"
            )
        return thing

    def _hint(self, module: str, attribute: str) -> str:
        """The things of this type in the module, in words."""
        things = [
            key
            for key, value in vars(import_module(module)).items()
            if isinstance(value, self.holds)
        ]
        near = near_name(attribute, things) or next(iter(things), None)
        return (
            f"did you mean {module}:{near}?"
            if near
            else f"{module} has no {self.holds.__name__}: define one there"
        )


@lru_cache(maxsize=8)
def _entry_points(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Entry points of a group in the packages on `sys.path`, sorted by name; read once for each
    `path`."""
    return tuple(sorted(entry_points(group=group), key=lambda point: (point.name, _package(point))))


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "a package"


def _a(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"
