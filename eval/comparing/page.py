"""compare.html: one self-contained page, without scripts."""

from __future__ import annotations

from collections import Counter
from typing import Any

from erase.eval.comparing.pareto import Point, Traded, traded
from erase.eval.comparing.plane import HEIGHT, WIDTH, panels
from erase.eval.comparing.table import Cell, Comparison
from erase.eval.comparing.walls import wall
from erase.eval.report.axes import Measure
from erase.eval.report.covering import is_sensitive
from erase.eval.report.html import templates
from erase.eval.report.report import BASE, EvalReport
from erase.eval.report.tables import commands_of
from erase.eval.report.wall import SMALL
from erase.eval.scores import Score

BEATEN, BY_CHANCE = "Beaten beyond the noise", "Beaten, but within the noise"


def render(comparison: Comparison) -> str:
    """The page."""
    found, shown = traded(comparison.runs), wall(comparison)
    titles = dict.fromkeys(run.report.title for run in comparison.runs)
    return (
        templates("erase.eval.comparing")
        .get_template("compare.html.j2")
        .render(
            comparison=comparison,
            base=BASE,
            title=next(iter(titles)) if len(titles) == 1 else f"{len(comparison.runs)} erasures",
            numbers={run.name: number for number, run in enumerate(comparison.runs, 1)},
            about=[_about(run.report) for run in comparison.runs],
            lead=_lead(comparison, found),
            tally=_tally(comparison),
            traded=found,
            panels=panels(found) if found else [],
            size=(WIDTH, HEIGHT),
            measure=_measure,
            shared=_lines(comparison, comparison.shared),
            single=_lines(comparison, comparison.single),
            wall=shown,
            small=0 < shown.side <= SMALL,
            sensitive=any(
                is_sensitive(run.report.concept, run.images.values()) for run in comparison.runs
            ),
        )
    )


def _about(report: EvalReport) -> dict[str, Any]:
    """A run in a line: its method, and the commands that made its report."""
    provenance = report.provenance
    strength = provenance.get("delta_settings", {}).get("strength", 1.0)
    parts = strength if isinstance(strength, list) else [strength]
    return {
        "method": str(provenance.get("method", "")),
        "strength": ", ".join(f"{part:g}" for part in parts),
        "commands": commands_of(report),
    }


def _lead(comparison: Comparison, found: Traded | None) -> str:
    """The first sentences: who is on the front, who is beaten, or that nobody can be placed."""
    if found is None:
        return (
            "No judge gave UA, IRA and CRA to every run, so there is no plane; the scores are "
            "below, each beside the base's."
        )
    *most, last = found.axes
    front = f"On the Pareto front of {', '.join(most)} and {last}"
    groups: dict[str, list[str]] = {front: [], BEATEN: [], BY_CHANCE: []}
    for point in found.points:
        off = BEATEN if point.number in found.beaten else BY_CHANCE
        groups[front if point.number in found.best else off].append(point.name)
    return " ".join(f"{where}: {', '.join(names)}." for where, names in groups.items() if names)


def _tally(comparison: Comparison) -> dict[str, str]:
    """Column -> in how many scores it is better and worse than what it is compared with."""
    told = {}
    for column in comparison.columns:
        cells = [line[column] for line in comparison.lines if column in line]
        counts = Counter(cell.word for cell in cells if cell.word)
        if counts:
            kinds = ("better", "worse", "within noise")
            told[column] = ", ".join(f"{counts[kind]} {kind}" for kind in kinds)
    return told


def _measure(found: Traded, point: Point, axis: str) -> str:
    """`99.1 [98.4, 99.6]`."""
    one: Measure = point.at[axis]
    return f"{one.value:.1f} [{one.low:.1f}, {one.high:.1f}]"


def _lines(comparison: Comparison, lines: list[dict[str, Cell]]) -> list[tuple[Score, Any]]:
    return [(comparison.titled(line), _cells(comparison, line)) for line in lines]


def _cells(comparison: Comparison, line: dict[str, Cell]) -> list[dict[str, Any] | None]:
    """The cells of a line; differences on one scale, from -1 to 1."""
    ends = [
        abs(end)
        for cell in line.values()
        if cell.difference and cell.word
        for end in (cell.difference.low, cell.difference.high)
    ]
    scale = max(ends, default=0.0) or 1.0
    cells: list[dict[str, Any] | None] = []
    for column in comparison.columns:
        cell = line.get(column)
        cells.append(None if cell is None else {"cell": cell, "bar": _bar(cell, scale)})
    return cells


def _bar(cell: Cell, scale: float) -> dict[str, str] | None:
    """Percent from the left of a difference and of its interval's ends; zero is in the middle."""
    one = cell.difference
    if one is None or not cell.word:
        return None
    return {
        name: f"{50 + 50 * value / scale:.1f}"
        for name, value in (("low", one.low), ("at", one.difference), ("high", one.high))
    }
