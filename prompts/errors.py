"""The one error that a user is meant to read, the suggestion that goes with a misspelt name, and
the short reason of another's error."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from math import inf, nextafter
from numbers import Integral, Real
from sys import float_info
from textwrap import shorten

FINITE = -float_info.max, float_info.max
POSITIVE = float_info.min, float_info.max
COUNT = 1, inf
FRACTION = 0, 1
BELOW_ONE = 0, nextafter(1, 0)
NEAR = 0.61
"""least likeness of two names that may be mistaken for each other: `love` is no `flower`"""
WORDS = {
    FINITE: "a finite number",
    POSITIVE: "a finite number above 0",
    BELOW_ONE: "between 0 and 1, but not 1",
}
"""range -> how a sentence says it, where its ends would not read well"""


class ErasureError(ValueError):
    """Bad input: the message names the thing and the way out. Commands print it without a traceback
    and exit with 2."""


def counted(count: int, noun: str) -> str:
    """`1 image`, `1,200 images`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def unknown(what: str, name: str, options: Iterable[str]) -> ErasureError:
    """An error for a name that is not among `options`, with the near one suggested."""
    options = sorted(options)
    near = near_name(name, options)
    hint = f"did you mean {near!r}?" if near else f"choose one of: {', '.join(options)}"
    return ErasureError(f"unknown {what} {name!r}; {hint}")


def near_name(name: str, options: Iterable[str]) -> str | None:
    """The option that may be meant by a misspelt name."""
    options = sorted(options)
    near = get_close_matches(name, options, 1, NEAR) or [
        option for option in options if option.lower() == name.lower()
    ]
    return near[0] if near else None


def check_names(settings: object, options: Mapping[str, Collection[str]]) -> None:
    """Refuse names that are not among those to choose from.

    Args:
        settings: what has the fields.
        options: field -> its names.

    Raises:
        ErasureError: another name; the near one is suggested.
    """
    for field, names in options.items():
        if (name := getattr(settings, field)) not in names:
            raise unknown(field, name, names)


def check_ranges(
    settings: object, ranges: Mapping[str, tuple[float, float]], group: str = ""
) -> None:
    """Refuse numbers outside of what makes sense, before anything is made of them.

    Args:
        settings: what has the fields; a dataclass's annotations say which must hold whole numbers,
            and which may be None.
        ranges: field -> least and greatest value.
        group: the group of options that these are, which an error names before the field.

    Raises:
        ErasureError: a number outside of its range, or no such number at all (NaN, text, 1.5 of
            something countable).
    """
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        kind = _annotated(settings, name)
        option = f"{group}.{name}" if group else name
        if value is None and (not kind or "None" in kind):
            continue
        if not is_number(value):
            raise ErasureError(f"{option} is {value!r}, which is not a number")
        if not low <= value <= high:
            ends = f"{low:g} or more" if high == inf else f"between {low:g} and {high:g}"
            raise ErasureError(f"{option} is {value}; it must be {WORDS.get((low, high), ends)}")
        if kind.startswith("int") and not isinstance(value, Integral):
            raise ErasureError(f"{option} is {value}; it must be a whole number")


def is_number(value: object) -> bool:
    """Whether it is a number, and not true or false."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _annotated(settings: object, name: str) -> str:
    """A dataclass's annotation of a field, as text; empty where there is none."""
    field = getattr(settings, "__dataclass_fields__", {}).get(name)
    return "" if field is None else getattr(field.type, "__name__", str(field.type))


def reason(error: BaseException) -> str:
    """The first line of what another library's error says, or else its type: what stands within a
    sentence of ours."""
    text = str(error).strip()
    return shorten(text.splitlines()[0], 300, placeholder=" ...") if text else type(error).__name__
