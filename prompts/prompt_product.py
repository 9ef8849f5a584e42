"""Rows of prompts from a YAML file: templates, and lists that fill them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from string import Formatter

from erase.prompts.errors import ErasureError
from erase.prompts.prompt_rows import (
    MOST_CHARACTERS,
    MOST_ROWS,
    SENSITIVE,
    PromptRow,
    finite_number,
    mark_in,
    whole_number,
)
from erase.prompts.reading import as_mapping, as_text, as_texts, read_yaml


def yaml_rows(path: str | Path) -> tuple[tuple[PromptRow, ...], bool | None]:
    """The product of a YAML file's lists, and whether the file calls it sensitive (see
    `PromptSet.from_yaml`)."""
    raw = read_yaml(path)
    templates = (
        as_texts(raw.get("templates", ()), f"{path}: templates") if isinstance(raw, Mapping) else ()
    )
    parts = [_parse(template, path) for template in templates]
    slots = {slot: None for template in parts for _, slot in template if slot}
    data = as_mapping(raw, ("templates", "seeds", "guidance", SENSITIVE, *slots), path)
    for name in ("templates", "seeds", *slots):
        if not data.get(name):
            raise ErasureError(f"{path} needs a list `{name}: […]` with something in it")
    lists = {name: as_texts(data[name], f"{path}: {name}") for name in ("seeds", *slots)}
    seeds = [
        whole_number(seed, f"{path}: seeds, item {i},") for i, seed in enumerate(lists["seeds"], 1)
    ]
    guidance = (
        finite_number(as_text(data["guidance"], f"{path}: guidance"), str(path))
        if "guidance" in data
        else None
    )
    _check_product(path, parts, lists)
    rows: list[PromptRow] = []
    for template in parts:
        named = dict.fromkeys(slot for _, slot in template if slot)
        for values, seed in product(product(*(lists[slot] for slot in named)), seeds):
            words = dict(zip(named, values, strict=True))
            prompt = "".join(text + words.get(slot, "") for text, slot in template)
            rows.append(PromptRow(len(rows), prompt, seed, guidance, words))
    return tuple(rows), mark_in(data, path)


def _parse(template: str, path: str | Path) -> list[tuple[str, str]]:
    """A template as (text, name of the slot after it or "")."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ErasureError(
            f"{path}: the template {template!r} has an unmatched brace; write {{{{ for a plain one"
        ) from error
    for _, slot, spec, conversion in parts:
        if slot == "" or spec or conversion:
            raise ErasureError(
                f"{path}: the template {template!r} has a slot that is not a plain name, such as "
                f"{{object}}"
            )
    return [(text, slot or "") for text, slot, _, _ in parts]


def _check_product(
    path: str | Path, templates: Sequence[list[tuple[str, str]]], lists: Mapping[str, Sequence[str]]
) -> None:
    """Refuse more rows, or longer ones, than anybody could draw, before they are made."""
    rows = characters = 0
    for template in templates:
        named = {slot for _, slot in template if slot}
        count = math.prod(len(lists[slot]) for slot in (*named, "seeds"))
        rows += count
        characters += count * sum(
            len(text) + (max(map(len, lists[slot])) if slot else 0) for text, slot in template
        )
    if rows > MOST_ROWS or characters > MOST_CHARACTERS:
        raise ErasureError(
            f"{path} would be {rows:,} prompts of {characters // rows:,} characters, and "
            f"{MOST_ROWS:,} prompts or {MOST_CHARACTERS:,} characters in all are the most; shorten "
            "its lists, or make several sets"
        )
