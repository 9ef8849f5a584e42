"""95 % intervals: of a rate (Wilson), of a count (Garwood), of a mean (Student), and of a
difference of any two (Newcombe)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

LEVEL = 0.95
UNKNOWN = (math.nan, math.nan)


def of_rate(hits: int, n: int) -> tuple[float, float]:
    """Wilson's interval of a share (1927), a fraction: where the true share p satisfies |hits/n -
    p| <= z sqrt(p(1-p)/n).

    It lies within [0, 1], and says of 8 of 8 something else than of 8000 of 8000.
    """
    from scipy.stats import binomtest

    interval = binomtest(hits, n).proportion_ci(LEVEL, "wilson")
    return min(float(interval.low), hits / n), max(float(interval.high), hits / n)  # rounding aside


def of_count(events: int) -> tuple[float, float]:
    """The exact interval of a Poisson count's mean (Garwood 1936): half of chi-squared quantiles of
    2k and 2k + 2 degrees of freedom."""
    from scipy.stats import chi2

    low, high = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    return float(chi2.ppf(low, 2 * events)) / 2 if events else 0.0, float(
        chi2.ppf(high, 2 * events + 2)
    ) / 2


def of_mean(values: Sequence[float]) -> tuple[float, float]:
    """Student's interval of a mean; unknown for a single value."""
    from scipy.stats import t

    n = len(values)
    if n < 2 or not all(map(math.isfinite, values)):
        return UNKNOWN
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * stdev(values) / math.sqrt(n)
    mean = fmean(values)
    return mean - half, mean + half


def of_difference(
    first: float,
    around_first: tuple[float, float],
    second: float,
    around_second: tuple[float, float],
) -> tuple[float, float]:
    """The interval of `second - first`, independent measurements, from the interval of each
    (Newcombe 1998, method 10)."""
    (l1, u1), (l2, u2) = around_first, around_second
    difference = second - first
    return difference - math.hypot(second - l2, u1 - first), difference + math.hypot(
        u2 - second, first - l1
    )
