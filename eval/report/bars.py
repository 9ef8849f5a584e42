"""Intervals as bars: where a score and the ends of its interval lie on an axis, for a page to draw
without a script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from erase.eval.scores import Score


@dataclass(frozen=True)
class Bar:
    """A score on an axis, in percent of its length."""

    row: str
    """the model"""
    at: float
    low: float
    high: float
    text: str
    """the score as it is printed"""


def bars(scores: Sequence[tuple[str, Score | None]]) -> list[Bar]:
    """The scores of several models on one axis: 0 to 100 for shares, else from the lowest end of an
    interval to the highest, and a tenth more on either side.

    Args:
        scores: (model, its score, or None where it has none).
    """
    known = [(row, score) for row, score in scores if score]
    low, high = _range([score for _, score in known])
    span = (high - low) or 1.0

    def place(value: float) -> float:
        return round(100 * min(max((value - low) / span, 0.0), 1.0), 2)

    drawn = []
    for row, score in known:
        ends = [score.value if math.isnan(end) else end for end in score.interval]
        unit = f" {score.unit}" if score.unit else ""
        text = f"{score.value_text()}{unit} {score.interval_text()}".strip()
        drawn.append(Bar(row, place(score.value), place(ends[0]), place(ends[1]), text))
    return drawn


def _range(scores: Sequence[Score]) -> tuple[float, float]:
    if all(score.unit == "%" and score.low >= 0 and score.high <= 100 for score in scores):
        return 0.0, 100.0
    values = [score.value for score in scores]
    ends = [end for score in scores for end in score.interval if math.isfinite(end)]
    low, high = min(values + ends), max(values + ends)
    return low - (high - low) / 10, high + (high - low) / 10
