"""A report in a notebook: a short table, and a pandas frame of all scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from erase.prompts.errors import ErasureError

if TYPE_CHECKING:
    from erase.eval.report.report import EvalReport

SHOWN = 12  # scores of a notebook's cell
WORDS = ("", " better", " worse")


def as_html(report: EvalReport) -> str:
    """The first scores, a column per row of the report, with better or worse than the base beyond
    the noise."""
    columns = report.columns()
    rows = []
    for score in columns[:SHOWN]:
        rows.append([score.heading, *(_cell(report, row, score.name) for row in report.rows)])
    left = len(columns) - SHOWN
    under = "[low, high]: 95 % interval" + (
        f"; {left} more scores: .to_pandas()" if left > 0 else ""
    )
    return grid_table(report.title, ["", *report.rows], rows, under)


def _cell(report: EvalReport, row: str, name: str) -> str:
    score = report.score(row, name)
    return f"{score.text()}{WORDS[report.verdict(row, name)]}" if score else "–"


def to_pandas(report: EvalReport) -> Any:
    """A frame with a line for each score of each row: `row`, `score`, `value`, `low`, `high`, `n`,
    `unit`, `higher_is_better`, `evaluator`, and of its paired difference from the base
    `difference`, `difference_low`, `difference_high`, `p`.

    Raises:
        ErasureError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ErasureError(
            "to_pandas needs pandas, which is not installed; pip install "
            "'concept-erasure-toolkit[pandas]'"
        ) from error
    lines = []
    for row, scores in report.rows.items():
        for score in scores:
            own = {"row": row, "score": score.name, "value": score.value}
            own |= {"low": score.low, "high": score.high, "n": score.n, "unit": score.unit}
            own |= {"higher_is_better": score.higher_is_better, "evaluator": score.evaluator}
            lines.append(own | _difference(report, row, score.name))
    return pandas.DataFrame(lines)


def _difference(report: EvalReport, row: str, name: str) -> dict[str, float]:
    names = ("difference", "difference_low", "difference_high", "p")
    one = report.difference(row, name)
    values = (one.difference, one.low, one.high, one.p) if one else (math.nan,) * len(names)
    return dict(zip(names, values, strict=True))


def grid_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], under: str) -> str:
    """Columns under their headings, the first one of names; `under` is a line below."""
    cells = "".join(f"<th>{escape(text)}</th>" for text in head)
    body = []
    for name, *values in rows:
        told = "".join(f"<td>{escape(text)}</td>" for text in values)
        body.append(f"<tr><th>{escape(name)}</th>{told}</tr>")
    table = f"<thead><tr>{cells}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f"<table><caption>{escape(title)}</caption>{table}</table><small>{escape(under)}</small>"
