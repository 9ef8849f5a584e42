"""All that can be named on a command line: one line each, read from where it is defined."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from erase.plugins import Index, PluginError
from erase.prompts.canvas import concept_names
from erase.prompts.concepts import load_concepts, shipped
from erase.prompts.errors import counted
from erase.prompts.prompt_sets import PromptSet, shipped_sets
from erase.prompts.reading import read_text
from erase.scripts.cli.light import stand_in
from erase.scripts.cli.recipes import recipe, recipes

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Entry:
    """A name and what stands behind it."""

    name: str
    text: str
    paper: str = ""
    package: str = ""
    """the distribution that brings it; empty for ours"""
    weights: int | None = None
    """of a scope in a model: how many"""

    def plain(self) -> dict[str, Any]:
        """As JSON has it, without what it has nothing to say of."""
        return {key: value for key, value in asdict(self).items() if value not in ("", None)}


def first_sentence(text: str | None) -> str:
    """The first sentence of a docstring or comment, on one line, without its full stop. A point
    ends it where a capital or nothing follows: neither `et al., 2024` nor `1.4, with`."""
    line = " ".join((text or "").split())
    return re.split(r"\.(?=\s+[A-Z`]|$)", line, maxsplit=1)[0]


def methods() -> list[Entry]:
    """Ways to erase."""
    from erase.methods import METHODS

    return list(_members(METHODS))


def evaluators() -> list[Entry]:
    """Ways to score."""
    from erase.eval.evaluators import EVALUATORS

    return list(_members(EVALUATORS))


def attacks() -> list[Entry]:
    """Ways to bring a concept back."""
    from erase.attacks import ATTACKS

    return list(_members(ATTACKS))


def protocols() -> list[Entry]:
    """Ways to measure that others can repeat."""
    from erase.eval.protocols import load_protocol, protocol_names

    loaded = map(load_protocol, protocol_names())
    return [Entry(one.name, one.summary, one.paper) for one in loaded]


def concepts() -> list[Entry]:
    """Concepts that `--concepts` knows by name, and the words of the embedded model."""
    words = concept_names()
    text = f"the embedded model's {len(words)}, each by --concept: {', '.join(words)}"
    return [Entry("canvas", text), *(Entry(name, _concepts_of(name)) for name in shipped())]


def _concepts_of(name: str) -> str:
    listed = load_concepts(name)
    if len(listed) > 1:
        return f"{len(listed)} concepts: {', '.join(concept.target for concept in listed)}"
    (one,) = listed
    return (
        f"{one.target} -> {one.anchor}; {counted(len(one.names), 'name')}, "
        f"{counted(len(one.templates), 'template')}, {counted(len(one.retain), 'retain prompt')}"
    )


def prompt_sets() -> list[Entry]:
    """Prompt sets that `--prompts` knows by name."""
    return [Entry(name, _prompts_of(PromptSet.load(name))) for name in shipped_sets()]


def _prompts_of(prompts: PromptSet) -> str:
    first = prompts.rows[0]
    labels = f"; labels {', '.join(first.labels)}" if first.labels else ""
    return f"{len(prompts.rows)} images{labels}; e.g. {first.prompt!r}"


def recipe_list() -> list[Entry]:
    """Recipes that `--config` knows by name, by the paragraph of comments that heads them."""
    heads = {name: read_text(recipe(name)).split("\n#\n")[0] for name in recipes()}
    return [Entry(name, first_sentence(head.replace("#", ""))) for name, head in heads.items()]


def families() -> list[Entry]:
    """Kinds of checkpoint, by what model_index.json calls them."""
    from erase.models.families import FAMILIES

    texts = {name: import_module(module).__doc__ for name, (module, _) in FAMILIES.items()}
    return [Entry(name, first_sentence(text)) for name, text in texts.items()]


def scopes(params: Mapping[str, nn.Parameter] | None = None) -> list[Entry]:
    """Weights that may change, by name; with how many of these parameters each has, none where it
    matches none."""
    from erase.models.scopes import ABOUT, SCOPES

    return [
        Entry(name, text, weights=None if params is None else _weights(params, SCOPES[name]))
        for name, text in ABOUT.items()
    ]


def _weights(params: Mapping[str, nn.Parameter], pattern: str) -> int:
    return sum(param.numel() for name, param in params.items() if re.search(pattern, name))


SECTIONS: dict[str, Callable[[], list[Entry]]] = {
    "methods": methods,
    "evaluators": evaluators,
    "attacks": attacks,
    "protocols": protocols,
    "concepts": concepts,
    "prompts": prompt_sets,
    "recipes": recipe_list,
    "families": families,
    "scopes": scopes,
}
"""what is listed -> the function that lists it"""


def _members(index: Index[Any]) -> Iterator[Entry]:
    """The entries of an index of plugins. A module's first is told by the module's docstring, its
    others, which are presets, by their config's. One that cannot be used is told as such."""
    seen: set[str] = set()
    for name in index:
        package = index.package(name)
        try:
            thing = index.get(name)
        except PluginError as error:
            if stand_in():
                raise  # it may need a real library
            yield Entry(name, f"cannot be used: {error}", package=package)
            continue
        kind = type(thing.config)
        doc = kind.__doc__ if kind.__module__ in seen else import_module(kind.__module__).__doc__
        seen.add(kind.__module__)
        paper = getattr(thing, "paper", "")
        text = first_sentence(doc).replace(f", {paper})", ")")
        yield Entry(name, text, paper, package)


def as_names(lists: Mapping[str, Sequence[Entry]], width: int) -> str:
    """The names in each list, wrapped at so many signs."""
    rows = []
    for title, entries in lists.items():
        marked = [f"{one.name} (of {one.package})" if one.package else one.name for one in entries]
        rows.append((title, ", ".join(marked)))
    return _columns({"": rows}, width, 10)


def as_text(lists: Mapping[str, Sequence[Entry]], width: int) -> str:
    """The lists as columns, wrapped at so many signs: names, and beside them what they are, each
    paper once."""
    shown: dict[str, list[tuple[str, str]]] = {}
    for title, entries in lists.items():
        told = {""}
        rows: list[tuple[str, str]] = []
        for entry in entries:
            paper = f"; {entry.paper}" if entry.paper not in told else ""
            told.add(entry.paper)
            rows.append((f"  {entry.name}", _line(entry, entries) + paper))
        shown[title] = rows
    return _columns(shown, width, 16)


def _columns(lists: Mapping[str, Sequence[tuple[str, str]]], width: int, first: int) -> str:
    console = Console(width=width, highlight=False, markup=False)
    with console.capture() as written:
        for title, rows in lists.items():
            if title:
                console.print(title)
            table = Table.grid(padding=(0, 2, 0, 0))
            table.add_column(min_width=first, no_wrap=True)
            table.add_column()
            for left, right in rows:
                table.add_row(Text(left), Text(right))
            console.print(table)
    return "\n".join(line.rstrip() for line in written.get().splitlines())


def _line(entry: Entry, among: Sequence[Entry]) -> str:
    parts = [entry.text]
    if entry.weights is not None:
        whole = max(other.weights or 0 for other in among if other.name == "full") or 1
        parts.append(f"({entry.weights:,} weights, {entry.weights / whole:.1%} of the denoiser)")
    if entry.package:
        parts.append(f"(of {entry.package})")
    return " ".join(parts)
