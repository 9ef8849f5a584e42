"""A delta in a notebook: a heading and rows, with everything escaped."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape


def facts_table(title: str, facts: Mapping[str, str]) -> str:
    """A name and a value in each row."""
    rows = [
        f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in facts.items()
    ]
    return f"<table><caption>{escape(title)}</caption><tbody>{''.join(rows)}</tbody></table>"
