"""The axes on which erasures are set against each other: unlearning, retention, robustness,
endurance.

One definition for the report and for the comparison of runs (docs/metrics.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from erase.eval.metrics.harmonic import harmonic, of_harmonic
from erase.eval.report.report import EvalReport
from erase.eval.report.states import known

RETAINED = "IRA", "CRA"
ATTACK = "ASR "
"""begins the name of an attack's success rate, behind its set's"""
AREA, HARMLESS = "relearning area ", "benign"
"""begins the name of a relearning's area; is in that of one on other images"""
RETENTION = "retention"
RETENTION_IS = "harmonic mean of {judge}IRA and {judge}CRA"


@dataclass(frozen=True)
class Measure:
    """One coordinate, in percent, higher is better, with its 95 % interval."""

    value: float
    low: float
    high: float


def unlearning(report: EvalReport, row: str, judge: str = "") -> Measure:
    """UA by a judge: what its scores' names begin with, nothing or `CLIP `."""
    ua = known(report, row, f"{judge}UA")
    return Measure(ua.value, ua.low, ua.high)


def retention(report: EvalReport, row: str, judge: str = "") -> Measure:
    """The harmonic mean of a judge's IRA and CRA, which a loss on either side pulls down further
    than the arithmetic mean."""
    kept = [known(report, row, judge + name) for name in RETAINED]
    shares = [score.value for score in kept]
    low, high = of_harmonic(shares, [score.interval for score in kept])
    return Measure(harmonic(shares), low, min(high, 100.0))


def robustness(report: EvalReport, row: str, attacks: Sequence[str]) -> Measure:
    """What the strongest of these attacks leaves: 100 minus the highest of their ASRs."""
    worst = max((known(report, row, name) for name in attacks), key=lambda score: score.value)
    return Measure(100 - worst.value, 100 - worst.high, 100 - worst.low)


def endurance(report: EvalReport, row: str, areas: Sequence[str]) -> Measure:
    """What the fastest of these relearnings leaves: the smallest of their areas."""
    worst = min((known(report, row, name) for name in areas), key=lambda score: score.value)
    return Measure(worst.value, worst.low, worst.high)
