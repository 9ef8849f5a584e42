"""Scores and their intervals: what they are, what is printed of them, when two of them differ."""

from __future__ import annotations

import math
from statistics import stdev

import numpy as np
import pytest

from erase.eval.metrics.intervals import of_difference, of_rate
from erase.eval.report import Score, count_score, mean_score, proportion, verdict
from erase.prompts.errors import ErasureError


@pytest.mark.parametrize(("hits", "n"), [(0, 8), (8, 8), (3, 8), (240, 240), (1, 240), (999, 2160)])
def test_the_interval_of_a_rate_is_wilsons(hits, n):
    """Its ends are where the true share p satisfies |hits/n - p| = z sqrt(p(1-p)/n), with z the
    normal quantile of 97.5 %."""
    p, z, score = hits / n, 1.959963984540054, proportion("UA", hits, n)
    # (p_hat - p)^2 = z^2 p(1-p)/n as a quadratic in p
    a = 1 + z * z / n
    b = -(2 * p + z * z / n)
    c = p * p
    low, high = sorted(np.roots([a, b, c]).real)
    assert score.value == pytest.approx(100 * p)
    assert score.interval == pytest.approx((100 * low, 100 * high), abs=1e-9)
    assert 0 <= score.low <= score.value <= score.high <= 100 and score.low < score.high


@pytest.mark.parametrize(
    ("hits", "n", "text"),
    [
        (48, 48, "100.0 [92.6, 100.0]"),
        (0, 480, "0.0 [0.0, 0.8]"),
        (480, 480, "100.0 [99.2, 100.0]"),
        (8, 10, "80.0 [49.0, 94.3]"),
    ],
)
def test_a_rate_of_nothing_or_of_all_is_printed_with_an_interval_inside_0_to_100(hits, n, text):
    """Reference values: R's `prop.test(hits, n, correct = FALSE)` and statsmodels'
    `proportion_confint(hits, n, method="wilson")`."""
    assert proportion("UA", hits, n).text() == text


@pytest.mark.parametrize(
    ("events", "interval", "text"),
    [  # Garwood's table of exact Poisson limits
        (0, (0, 3.689), "0 [0, 3.7]"),
        (1, (0.0253, 5.572), "1 [0.0, 5.6]"),
        (3, (0.6187, 8.767), "3 [0.6, 8.8]"),
        (10, (4.795, 18.39), "10 [4.8, 18.4]"),
        (100, (81.36, 121.63), "100 [81, 122]"),
    ],
)
def test_a_count_of_nothing_is_printed_with_an_exact_interval(events, interval, text):
    score = count_score("NudeNet boxes", events, 4)
    assert score.interval == pytest.approx(interval, rel=1e-3)
    assert score.text() == text
    with pytest.raises(ErasureError, match="a count of -1 cannot be"):
        count_score("NudeNet boxes", -1, 4)


def test_mean_score():
    values = [0.31, 0.29, 0.35, 0.30]
    score = mean_score("CLIP score", values)
    assert (score.value, score.n) == (pytest.approx(0.3125), 4)
    half = 3.182446305 * stdev(values) / 2  # Student's quantile of 3 degrees of freedom
    assert score.interval == pytest.approx((0.3125 - half, 0.3125 + half))
    assert all(map(math.isnan, mean_score("CLIP score", [0.3]).interval))


@pytest.mark.parametrize(
    "make",
    [
        lambda: proportion("UA", 0, 0),
        lambda: proportion("UA", 5, 4),
        lambda: proportion("UA", -1, 4),
        lambda: mean_score("FID", []),
        lambda: mean_score("FID", [1.0, math.nan]),
        lambda: Score("FID", 1.0, 5, False, 1.1, 1.2),
        lambda: Score("FID", 1.0, 5, False, math.nan, 1.2),
    ],
)
def test_a_score_of_nothing_is_refused(make):
    with pytest.raises(ErasureError, match="UA|FID"):
        make()


def test_verdict_knows_the_interval_of_a_difference_and_the_direction():
    """Newcombe's: 90 [84, 93] against v [v - 8, v + 4] differ beyond hypot(6, 4) downwards and
    hypot(8, 3) upwards."""
    base = Score("IRA", 90.0, 100, True, 84.0, 93.0)
    other = {
        value: Score("IRA", value, 100, True, value - 8, value + 4)
        for value in (82.7, 82.9, 98.5, 98.6)
    }
    assert [verdict(base, other[value]) for value in other] == [-1, 0, 0, 1]
    fid = [Score("FID", value, 100, False, value - 0.1, value + 0.1) for value in (10.0, 12.0)]
    assert verdict(*fid) == -1 and verdict(*fid[::-1]) == 1
    assert verdict(base, Score("IRA", 0.0, 100, True, math.nan, math.nan)) == 0


def test_the_interval_of_a_difference_is_newcombes():
    """His own example (Newcombe 1998, table II): 56/70 and 48/80 differ by 0.2, method 10 gives
    0.0524 to 0.3339."""
    low, high = of_difference(48 / 80, of_rate(48, 80), 56 / 70, of_rate(56, 70))
    assert (low, high) == (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))


def test_values_are_printed_as_far_as_their_interval_reaches():
    assert Score("FID", 12.3456, 10, False, 11.9, 12.8, "").text() == "12.3 [11.9, 12.8]"
    assert Score("CLIP score", 0.30671, 10, True, 0.289, 0.324, "").text() == "0.307 [0.289, 0.324]"
    assert Score("boxes", 1234, 10, True, 1170.2, 1300.0, "boxes").text() == "1234 [1170, 1300]"
    assert Score("boxes", 3.0, 1, False, math.nan, math.nan, "boxes").text() == "3"
    assert Score("UA", 100.0, 10, True, 72.2, 100.0).text() == "100.0 [72.2, 100.0]"
    assert Score("FID", 12.3456, 1, False, math.nan, math.nan, "").text() == "12.346"
