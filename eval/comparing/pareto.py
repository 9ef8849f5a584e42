"""What was traded for what: unlearning, retention, robustness and endurance of runs, and the Pareto
front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from erase.eval.comparing.runs import Run
from erase.eval.report.axes import (
    AREA,
    ATTACK,
    HARMLESS,
    RETENTION,
    RETENTION_IS,
    Measure,
    endurance,
    retention,
    robustness,
    unlearning,
)
from erase.eval.report.report import ERASED
from erase.eval.report.states import judges_of, plain


@dataclass(frozen=True)
class Point:
    """A run: its number (from 1), name and coordinates by the axes' names."""

    number: int
    name: str
    at: dict[str, Measure]

    @property
    def values(self) -> tuple[float, ...]:
        """Its coordinates."""
        return tuple(measure.value for measure in self.at.values())


@dataclass(frozen=True)
class Traded:
    """All runs in common coordinates."""

    axes: dict[str, str]
    """name -> what it is; all are measured in every run"""
    points: list[Point]
    best: list[int]
    """numbers of the points on the front: no other is as good in all and better in one"""

    @property
    def beaten(self) -> list[int]:
        """Numbers of the points that are beaten beyond the noise: by one whose interval in some
        coordinate lies above theirs."""
        best = [point for point in self.points if point.number in self.best]
        others = [point for point in self.points if point.number not in self.best]
        return [point.number for point in others if _above_it(best, point)]


def traded(runs: Sequence[Run]) -> Traded | None:
    """Unlearning, retention and, where the runs share attacks or relearnings, robustness and
    endurance to these (`erase.eval.report.axes`). None where no judge gave UA, IRA and CRA to every
    run."""
    shared = [name for name in _names(runs[0]) if _everywhere(runs, name)]
    judges = judges_of(shared)
    judge = next((one for one in judges if one + "IRA" in shared and one + "CRA" in shared), None)
    if judge is None:
        return None
    attacks = [name for name in shared if plain(name).startswith(ATTACK)]
    areas = [name for name in shared if plain(name).startswith(AREA) and HARMLESS not in name]
    ua = f"{judge}UA"
    axes = {ua: "unlearning accuracy", RETENTION: RETENTION_IS.format(judge=judge)}
    if attacks:
        axes["robustness"] = f"100 − the highest of {', '.join(attacks)}"
    if areas:
        axes["endurance"] = f"the smallest of {', '.join(areas)}"
    points = []
    for number, run in enumerate(runs, 1):
        at = {ua: unlearning(run.report, ERASED, judge)}
        at[RETENTION] = retention(run.report, ERASED, judge)
        if attacks:
            at["robustness"] = robustness(run.report, ERASED, attacks)
        if areas:
            at["endurance"] = endurance(run.report, ERASED, areas)
        points.append(Point(number, run.name, at))
    best = front([list(point.values) for point in points])
    return Traded(axes, points, [points[place].number for place in best])


def front(points: Sequence[Sequence[float]]) -> list[int]:
    """Places of the points that no other dominates: is at least as high in every coordinate, and
    higher in one. Equal points stand together on the front or off it."""

    def dominated(point: Sequence[float]) -> bool:
        return any(_dominates(other, point) for other in points)

    return [place for place, point in enumerate(points) if not dominated(point)]


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def _above_it(best: Sequence[Point], point: Point) -> bool:
    return any(_above(other, point) for other in best)


def _above(one: Point, other: Point) -> bool:
    """Whether a point dominates another, and is above its interval somewhere."""
    beyond = any(mine.low > other.at[axis].high for axis, mine in one.at.items())
    return beyond and _dominates(one.values, other.values)


def _everywhere(runs: Sequence[Run], name: str) -> bool:
    return all(run.report.score(ERASED, name) for run in runs)


def _names(run: Run) -> list[str]:
    return [score.name for score in run.report.rows.get(ERASED, [])]
