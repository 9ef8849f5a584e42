"""Two models measured on the same cases: their difference, its 95 % interval and its p-value.

Images of one prompt and seed are alike whoever draws them, so the difference of two models is known
better than either value: what both get right, or both get wrong, says nothing about it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from erase.eval.metrics.intervals import LEVEL

REJECTED = 1 - LEVEL


@dataclass(frozen=True)
class Difference:
    """`after - before` of one score."""

    difference: float
    low: float
    high: float
    """95 % interval, in the score's unit; it excludes zero where `p` is below 0.05"""
    p: float
    """two-sided: how often chance alone would part two equal models as far"""
    n: int
    """cases (images) that were paired"""


def of_values(
    cases: Sequence[int], before: Sequence[float], after: Sequence[float]
) -> Difference | None:
    """The difference of two means of a value per case: the paired t-test and its interval.

    A case that was judged several times is one observation, of the sum of its judgements; the mean
    is then a ratio, whose error is linearised.

    Args:
        cases: number of the case of each judgement; a case may come more than once.
        before: its value under the first model.
        after: under the second.

    Returns:
        None for less than two cases, which have no spread.
    """
    from scipy.stats import t

    moved, judgements = _per_case(cases, before, after)
    n = len(moved)
    if n < 2:
        return None
    difference = moved.sum() / judgements.sum()
    rest = moved - difference * judgements
    error = math.sqrt(n / (n - 1) * (rest @ rest)) / judgements.sum()
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * error
    p = 2 * float(t.sf(abs(difference) / error, n - 1)) if error else float(difference == 0)
    return _difference(difference, difference - half, difference + half, p, n)


def of_events(
    cases: Sequence[int],
    before: Sequence[float],
    after: Sequence[float],
    *,
    yes: float = 1.0,
    total: bool = False,
) -> Difference | None:
    """The difference of two shares of yes against no, or of two numbers of things.

    p is the exact sign test over cases (Fisher's randomisation): under the null, each case's
    difference is as likely as its opposite. With one yes or no per case that is McNemar's exact
    test. The interval of a share is Agresti's and Min's (2005, "Wald+2"): half a case is added to
    each cell of the table, so that no interval is empty where nothing changed. Judgements of one
    case count together. Where p does not reject, the interval is widened to reach zero.

    Args:
        cases: number of the case of each judgement; a case may come more than once.
        before: `yes` or 0, or its number of things, under the first model.
        after: under the second.
        yes: what a yes is worth, and so the unit of the difference.
        total: of the sums of all judgements, and not of their means.

    Returns:
        None for less than two cases.
    """
    from scipy.stats import norm

    moved, judgements = _per_case(cases, before, after)
    n, all_judgements = len(moved), judgements.sum()
    if n < 2:
        return None
    moved /= yes
    z, p = float(norm.ppf((1 + LEVEL) / 2)), _sign_test(np.rint(moved).astype(np.int64))
    if total:
        difference = centre = moved.sum()
        spread = n / (n - 1) * ((moved - moved.mean()) ** 2).sum() + 1
        low, high = (centre + end * math.sqrt(spread) for end in (-z, z))
    else:
        difference = moved.sum() / all_judgements
        centre = moved.sum() / (all_judgements + 2)
        spread = ((moved - centre * judgements) ** 2).sum() + 1 + 2 * centre**2
        half = z * math.sqrt(spread) / (all_judgements + 2)
        low, high = max(centre - half, -1.0), min(centre + half, 1.0)
    if p >= REJECTED:
        low, high = min(low, 0.0), max(high, 0.0)
    return _difference(yes * difference, yes * low, yes * high, p, n)


def _per_case(
    cases: Sequence[int], before: Sequence[float], after: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Of each case, the sum of its differences and how many judgements it had."""
    _, places = np.unique(np.asarray(cases), return_inverse=True)
    change = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    return np.bincount(places, change), np.bincount(places).astype(np.float64)


def _sign_test(moved: np.ndarray) -> float:
    """How often random signs give a sum of whole numbers as far from zero as theirs; exact."""
    from scipy.stats import binom

    sizes, counts = np.unique(np.abs(moved[moved != 0]), return_counts=True)
    chances = np.ones(1)  # of sums from -limit to +limit, every second one
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        steps = np.zeros(size * count + 1)
        steps[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, steps)
    limit = len(chances) - 1
    sums = 2 * np.arange(limit + 1) - limit
    return min(float(chances[np.abs(sums) >= abs(moved.sum())].sum()), 1.0)


def _difference(value: float, low: float, high: float, p: float, n: int) -> Difference:
    return Difference(
        float(value), min(float(low), float(value)), max(float(high), float(value)), p, n
    )
