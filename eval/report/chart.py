"""The loss chart of the report: lines in an SVG that stretches, labels in HTML, so that text keeps
its size at any width."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

POINTS = 400  # drawn per line at most
SIDE = 1000  # of the SVG's coordinates


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis from `low` to `high`, and the round values on it."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Where `value` lies between low (0) and high (1); a logarithmic axis puts what it cannot
        show at its low end."""
        if not self.log:
            return (value - self.low) / ((self.high - self.low) or 1)
        return (math.log10(max(value, self.low)) - math.log10(self.low)) / math.log10(
            self.high / self.low
        )


@dataclass(frozen=True)
class Line:
    """One curve: SVG path data of its values and of their moving average, and the average at both
    ends."""

    name: str
    raw: str
    smooth: str
    first: float
    last: float


@dataclass(frozen=True)
class Chart:
    """Curves over steps on common axes."""

    lines: list[Line]
    steps: Axis
    values: Axis

    @property
    def xticks(self) -> list[tuple[float, str]]:
        """(percent from the left, label)"""
        return [(100 * self.steps.at(tick), f"{tick:g}") for tick in self.steps.ticks]

    @property
    def yticks(self) -> list[tuple[float, str]]:
        """(percent from the top, label)"""
        return [(100 - 100 * self.values.at(tick), f"{tick:g}") for tick in self.values.ticks]


def linear_axis(low: float, high: float) -> Axis:
    """An axis with two to seven ticks at multiples of 1, 2 or 5 times a power of ten, widened to
    end on ticks."""
    step = _step(low, high)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return Axis(first * step, last * step, False, tuple(i * step for i in range(first, last + 1)))


def step_axis(steps: int) -> Axis:
    """The axis from the first to the last training step, with ticks at round ones."""
    step = max(int(_step(1, steps)), 1)
    return Axis(1, steps, False, tuple(range(step, steps + 1, step)))


def _step(low: float, high: float) -> float:
    span = (high - low) or abs(high) or 1.0
    unit = 10.0 ** math.floor(math.log10(span))
    return next(m * unit for m in (0.2, 0.5, 1, 2) if span <= 5 * m * unit)


def log_axis(low: float, high: float) -> Axis:
    """An axis with ticks at 1, 2 and 5 times the powers of ten, or at fewer where those crowd. 0 <
    low < high."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for parts in ((1, 2, 5), (1, 3), (1,)):
        ticks = tuple(m * 10.0**p for p in powers for m in parts if low <= m * 10.0**p <= high)
        if len(ticks) <= 6:
            break
    return Axis(low, high, True, ticks)


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over `window` values (odd); near the ends over those that there are."""
    half = window // 2
    return [fmean(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))]


def chart(curves: Mapping[str, Sequence[float]]) -> Chart | None:
    """Lay out curves that have one finite value per step, the first step being 1.

    The axis of values covers all but the highest and lowest hundredth, from zero; it is logarithmic
    where they span more than a factor of 20. None if there is nothing to draw.
    """
    curves = {name: values for name, values in curves.items() if len(values)}
    if not curves:
        return None
    ranked = sorted(value for values in curves.values() for value in values)
    low, high = ranked[len(ranked) // 100], ranked[-1 - len(ranked) // 100]
    values = (
        log_axis(low / 1.1, high * 1.1)
        if 0 < 20 * low < high
        else linear_axis(min(low, 0.0), max(high, 0.0))
    )
    steps = step_axis(max(map(len, curves.values())))
    return Chart(
        [_line(name, curve, steps, values) for name, curve in curves.items()], steps, values
    )


def _line(name: str, curve: Sequence[float], steps: Axis, values: Axis) -> Line:
    smooth = moving_average(curve, max(len(curve) // 12, 1) | 1)
    return Line(
        name, _path(curve, steps, values), _path(smooth, steps, values), smooth[0], smooth[-1]
    )


def _path(curve: Sequence[float], steps: Axis, values: Axis) -> str:
    stride = max(math.ceil(len(curve) / POINTS), 1)
    spots = [*range(0, len(curve) - 1, stride), len(curve) - 1]
    return "M" + "L".join(
        f"{SIDE * steps.at(i + 1):.1f} {SIDE - SIDE * values.at(curve[i]):.1f}" for i in spots
    )
