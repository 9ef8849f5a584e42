"""The planes of unlearning, retention, robustness and endurance against each other, laid out for an
SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import copysign

from erase.eval.comparing.pareto import Point, Traded, front
from erase.eval.report.chart import Axis, linear_axis

WIDTH, HEIGHT = 440, 330
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 16, 46
"""px of the drawing's own coordinates, and its margins"""
RADIUS, LETTER = 6, 9
AROUND = [(13, 0), (-13, 0), (0, -15), (0, 15), (12, -12), (-12, -12), (12, 12), (-12, 12)]
"""where a point's number may stand, in order of preference"""


@dataclass(frozen=True)
class Mark:
    """A run in the plane: its place, its interval's ends, and where its number stands."""

    number: int
    name: str
    best: bool
    x: float
    y: float
    across: tuple[float, float]
    down: tuple[float, float]
    label: tuple[float, float]
    text: str
    """the number, and how many more lie at the same place; of these, nothing"""


@dataclass(frozen=True)
class Panel:
    """Two axes and the runs between them."""

    across: str
    down: str
    xticks: list[tuple[float, str]]
    yticks: list[tuple[float, str]]
    marks: list[Mark]
    line: str
    """SVG path of this plane's own front: what is reached by one run or another"""


def panels(found: Traded) -> list[Panel]:
    """Unlearning against retention and against robustness, and what withstands against what
    endures."""
    first, *others = found.axes
    pairs = [(first, other) for other in others]
    if len(others) > 2:  # most erase by name alike
        pairs[-1] = others[-2], others[-1]
    return [_panel(found, *pair) for pair in pairs]


def _panel(found: Traded, across: str, down: str) -> Panel:
    xs, ys = _axis(found, across), _axis(found, down)
    places = [(_x(xs, p.at[across].value), _y(ys, p.at[down].value)) for p in found.points]
    marks: list[Mark] = []
    for point, place in zip(found.points, places, strict=True):
        marks.append(_mark(point, place, (across, down), (xs, ys), found, places, marks))
    best = front([[point.at[across].value, point.at[down].value] for point in found.points])
    line = _steps(sorted({places[number] for number in best}))
    xticks = [(_x(xs, tick), f"{tick:g}") for tick in xs.ticks]
    yticks = [(_y(ys, tick), f"{tick:g}") for tick in ys.ticks]
    marks.sort(key=lambda mark: mark.best)  # who is on the front is drawn over who is not
    return Panel(across, down, xticks, yticks, marks, line)


def _axis(found: Traded, name: str) -> Axis:
    low = min(point.at[name].low for point in found.points)
    return linear_axis(max(min(low, 99.0), 0.0), 100.0)


def _x(axis: Axis, value: float) -> float:
    return round(LEFT + axis.at(value) * (WIDTH - LEFT - RIGHT), 1)


def _y(axis: Axis, value: float) -> float:
    return round(HEIGHT - BOTTOM - axis.at(value) * (HEIGHT - TOP - BOTTOM), 1)


def _mark(
    point: Point,
    place: tuple[float, float],
    names: tuple[str, str],
    axes: tuple[Axis, Axis],
    found: Traded,
    places: Sequence[tuple[float, float]],
    done: Sequence[Mark],
) -> Mark:
    (across, down), (xs, ys) = [point.at[name] for name in names], axes
    first = all((mark.x, mark.y) != place for mark in done)
    more = f" +{places.count(place) - 1}" if places.count(place) > 1 else ""
    wide = 3.5 * len(more)  # half of the width of what it says more than a number
    taken = [*places, *(mark.label for mark in done if mark.text)]
    choices = [
        (place[0] + dx + copysign(wide, dx) * bool(dx), place[1] + dy) for dx, dy in _around()
    ]
    inside = [at for at in choices if _inside(at, wide)]
    free = [at for at in inside if _apart(at, taken, wide)]
    return Mark(
        point.number,
        point.name,
        point.number in found.best,
        *place,
        (_x(xs, across.low), _x(xs, across.high)),
        (_y(ys, down.low), _y(ys, down.high)),
        (free or inside)[0],
        f"{point.number}{more}" if first else "",
    )


def _around() -> list[tuple[float, float]]:
    """Places near a point, the nearer ones first."""
    return [(dx * far, dy * far) for far in (1, 1.8, 2.7, 3.6) for dx, dy in AROUND]


def _inside(at: tuple[float, float], wide: float) -> bool:
    return LEFT + wide < at[0] < WIDTH - 10 - wide and 8 < at[1] < HEIGHT - BOTTOM - 6


def _apart(at: tuple[float, float], taken: Sequence[tuple[float, float]], wide: float) -> bool:
    """Whether a number there would stand on nothing."""
    return all(
        abs(at[0] - x) >= LETTER + 3 + wide or abs(at[1] - y) >= LETTER + 4 for x, y in taken
    )


def _steps(best: Sequence[tuple[float, float]]) -> str:
    """From the left axis down to the lower one, in steps through the front."""
    if not best:
        return ""
    path = [f"M{LEFT} {best[0][1]} H{best[0][0]}"]
    path += [f"V{after[1]} H{after[0]}" for _, after in pairwise(best)]
    return " ".join([*path, f"V{HEIGHT - BOTTOM}"])
