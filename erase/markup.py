"""Small HTML for notebooks: a heading and rows, with everything escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape


def facts_table(title: str, facts: Mapping[str, str]) -> str:
    """A name and a value in each row."""
    rows = [
        f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in facts.items()
    ]
    return f"<table><caption>{escape(title)}</caption><tbody>{''.join(rows)}</tbody></table>"


def grid_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], under: str) -> str:
    """Columns under their headings, the first one of names; `under` is a line below."""
    cells = "".join(f"<th>{escape(text)}</th>" for text in head)
    body = []
    for name, *values in rows:
        told = "".join(f"<td>{escape(text)}</td>" for text in values)
        body.append(f"<tr><th>{escape(name)}</th>{told}</tr>")
    table = f"<thead><tr>{cells}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f"<table><caption>{escape(title)}</caption>{table}</table><small>{escape(under)}</small>"
