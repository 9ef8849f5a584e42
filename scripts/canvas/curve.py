"""Curves of scores against the number of requests, as one SVG file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from erase.eval.report.chart import Axis, linear_axis
from erase.eval.report.curves import PERCENT

WIDTH, HEIGHT, LEFT, TOP, GAP = 240, 200, 44, 34, 56
"""of one plot and its margins, in pixels"""
STROKES = ("#1f5fbf", "#c2410c", "#15803d", "#7c3aed", "#a16207", "#111827", "#be185d", "#0e7490")
DASHES = ("", "7 4", "2 3", "9 3 2 3", "1 4", "12 4", "5 2", "3 3 9 3")
SCORES = ("UA", "IRA", "CRA")


def drawn(rows: Sequence[dict[str, Any]], ways: Sequence[str]) -> str:
    """One plot for each score, one line for each way; the base's is grey. The first request is the
    same in every way."""
    most = max((len(row["concepts"]) for row in rows), default=1)
    steps = linear_axis(1, max(most, 2))
    measured = {row["way"] for row in rows}
    shown = [way for way in ways if way in measured]
    parts = [_plot(rows, shown, name, place, steps) for place, name in enumerate(SCORES)]
    parts.append(_keys(shown))
    width, height = len(SCORES) * (WIDTH + GAP) + LEFT, HEIGHT + TOP + 64
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
    style = 'font-family="sans-serif" font-size="12" fill="#444" style="background:#fff">'
    return head + style + "".join(parts) + "</svg>\n"


def _plot(
    rows: Sequence[dict[str, Any]], ways: Sequence[str], name: str, place: int, steps: Axis
) -> str:
    left = LEFT + place * (WIDTH + GAP)
    parts = [f'<g transform="translate({left} {TOP})">', f'<text y="-14">{escape(name)} %</text>']
    for tick in PERCENT.ticks:
        y = HEIGHT * (1 - PERCENT.at(tick))
        parts.append(f'<path d="M0 {y:.1f}H{WIDTH}" stroke="#ddd"/>')
        parts.append(f'<text x="-6" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for count in range(1, int(steps.high) + 1):
        x = WIDTH * steps.at(count)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT + 16}" text-anchor="middle">{count}</text>')
    first = [row for row in rows if len(row["concepts"]) == 1]
    every = {len(row["concepts"]): row for row in rows}
    parts.append(_line(list(every.values()), "base", name, steps, "#999", "4 4"))
    for index, way in enumerate(ways):
        own = [row for row in rows if row["way"] == way and row not in first]
        parts.append(_line([*first, *own], "erased", name, steps, STROKES[index], DASHES[index]))
    return "".join([*parts, "</g>"])


def _line(
    rows: Sequence[dict[str, Any]], state: str, name: str, steps: Axis, stroke: str, dash: str
) -> str:
    ordered = sorted(rows, key=lambda row: len(row["concepts"]))
    spots = [
        (WIDTH * steps.at(len(row["concepts"])), HEIGHT * (1 - row[state][name][0] / 100))
        for row in ordered
    ]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{stroke}"/>' for x, y in spots]
    look = f'fill="none" stroke="{stroke}" stroke-width="2" stroke-dasharray="{dash}"'
    return f'<path d="{path}" {look}/>' + "".join(dots)


def _keys(ways: Sequence[str]) -> str:
    """What the lines mean, below the plots."""
    keys = [*zip(ways, STROKES, DASHES, strict=False), ("base", "#999", "4 4")]
    parts = [f'<g transform="translate({LEFT} {TOP + HEIGHT + 46})">']
    for place, (name, stroke, dash) in enumerate(keys):
        x = 125 * place
        parts.append(
            f'<path d="M{x} -4H{x + 24}" stroke="{stroke}" stroke-width="2" '
            f'stroke-dasharray="{dash}"/><text x="{x + 30}">{escape(name)}</text>'
        )
    return "".join([*parts, "</g>"])
