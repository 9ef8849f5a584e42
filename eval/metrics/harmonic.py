"""The harmonic mean of shares, and its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence


def harmonic(shares: Sequence[float]) -> float:
    """n / (1/s_1 + ... + 1/s_n), of shares >= 0; 0 where one is 0, as in the limit."""
    return len(shares) / sum(1 / share for share in shares) if min(shares) > 0 else 0.0


def of_harmonic(
    shares: Sequence[float], intervals: Sequence[tuple[float, float]]
) -> tuple[float, float]:
    """The 95 % interval of a harmonic mean of independent shares, from the interval of each.

    The variances are recovered from the shares' own intervals (Zou and Donner 2008, MOVER), in
    which the mean is moved by one share at a time; it rises with each of them.
    """
    mean, below, above = harmonic(shares), [], []
    for place, (low, high) in enumerate(intervals):
        lowered, raised = list(shares), list(shares)
        lowered[place], raised[place] = low, high
        below.append(mean - harmonic(lowered))
        above.append(harmonic(raised) - mean)
    return max(mean - math.hypot(*below), 0.0), mean + math.hypot(*above)
