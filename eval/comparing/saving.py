"""A comparison as files: Markdown, CSV, LaTeX and a page."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

from erase.eval.comparing.table import PAIRED, Cell, Comparison
from erase.files import atomic_write

FIELDS = (
    *("score", "unit", "better", "run", "value", "low", "high", "n", "evaluator", "against", "how"),
    *("difference", "difference_low", "difference_high", "p", "pairs", "verdict"),
)
"""columns of the CSV: a line for each score of each run"""
ESCAPED = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "→": r"$\to$",
    "−": "$-$",
}


def save_comparison(folder: str | Path, comparison: Comparison) -> list[Path]:
    """Write compare.md, compare.csv, compare.tex and compare.html into `folder`; their paths."""
    from erase.eval.comparing.page import render

    texts = {
        "compare.md": markdown(comparison),
        "compare.csv": as_csv(comparison),
        "compare.tex": latex(comparison),
        "compare.html": render(comparison),
    }
    for name, text in texts.items():
        with atomic_write(Path(folder) / name) as aside:
            aside.write_text(text, encoding="utf-8", newline="")
    return [Path(folder) / name for name in texts]


def markdown(comparison: Comparison) -> str:
    """A pipe table, and the notes under it."""
    rows = [["score", *comparison.columns], ["---", *["---:"] * len(comparison.columns)]]
    for line in comparison.lines:
        cells = [line.get(column) for column in comparison.columns]
        rows.append([comparison.titled(line).heading, *map(_markdown_cell, cells)])
    table = ["| " + " | ".join(map(_piped, row)) + " |" for row in rows]
    notes = [f"- {note}" for note in (_reading(comparison), *comparison.notes)]
    return "\n".join([*table, "", *notes, ""])


def _reading(comparison: Comparison) -> str:
    return (
        "In brackets: 95 % intervals. After the semicolon: the difference from "
        f"{comparison.against}; **bold** is better beyond the noise, *italic* worse."
    )


def _markdown_cell(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    mark = ("", "**", "*")[cell.verdict]
    change = cell.change()
    return cell.score.text() + (f"; {mark}{change}{mark}" if change else "")


def _piped(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def as_csv(comparison: Comparison) -> str:
    """A line for each score of each run, numbers as they are; what is not known is empty."""
    written = io.StringIO()
    table = csv.DictWriter(written, FIELDS, lineterminator="\n")
    table.writeheader()
    for line in comparison.lines:
        for column in comparison.columns:
            if column in line:
                table.writerow(_record(comparison, column, line[column]))
    return written.getvalue()


def _record(comparison: Comparison, column: str, cell: Cell) -> dict[str, object]:
    score, one = cell.score, cell.difference
    record: dict[str, object] = {
        "score": score.name,
        "unit": score.unit,
        "better": "higher" if score.higher_is_better else "lower",
        "run": column,
        "value": score.value,
        "low": score.low,
        "high": score.high,
        "n": score.n,
        "evaluator": score.evaluator,
    }
    if one:
        record |= {"against": comparison.against, "how": cell.how, "verdict": cell.word}
        record |= {"difference": one.difference, "p": one.p, "pairs": one.n or ""}
        record |= {"difference_low": one.low, "difference_high": one.high}
    return {key: "" if _unknown(value) else value for key, value in record.items()}


def _unknown(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def latex(comparison: Comparison) -> str:
    """A table for booktabs; two lines for each score, its values and their differences."""
    head = " & ".join(map(escaped, ["", *comparison.columns]))
    lines = [
        r"% \usepackage{booktabs}",
        r"\begin{tabular}{l" + "r" * len(comparison.columns) + "}",
        r"\toprule",
        rf"{head} \\",
        r"\midrule",
    ]
    for line in comparison.lines:
        cells = [line.get(column) for column in comparison.columns]
        values = [escaped(cell.score.text()) if cell else "--" for cell in cells]
        lines.append(" & ".join([escaped(comparison.titled(line).heading), *values]) + r" \\")
        if any(cell and cell.difference for cell in cells):
            lines.append(" & ".join(["", *map(_latex_change, cells)]) + r" \\")
    notes = [f"% {note}" for note in comparison.notes]
    about = [
        f"% differences from {comparison.against}; bold: better beyond the noise; italic: worse"
    ]
    return "\n".join([*about, *notes, *lines, r"\bottomrule", r"\end{tabular}", ""])


def _latex_change(cell: Cell | None) -> str:
    if cell is None or cell.difference is None:
        return ""
    text = escaped(cell.change().partition(", p ")[0] if cell.how == PAIRED else cell.change())
    style = ("", r"\bfseries", r"\itshape")[cell.verdict]
    return rf"{{\scriptsize{style} {text}}}"


def escaped(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(ESCAPED.get(sign, sign) for sign in text)
