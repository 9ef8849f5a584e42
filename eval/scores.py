"""Scores: one measurement of one model each, with its direction, its n and its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from erase.eval.metrics.intervals import UNKNOWN, of_count, of_difference, of_mean, of_rate
from erase.prompts.errors import ErasureError


@dataclass(frozen=True)
class Score:
    """One measurement of one model."""

    name: str
    """the field's term: `UA`, `IRA`, `CRA`; another judge's are prefixed with its name, as in `CLIP
    UA`"""
    value: float
    n: int
    """images (or boxes, prompts, …) measured"""
    higher_is_better: bool
    low: float
    high: float
    """95 % interval of `value`, in the same unit; both NaN where it is not known"""
    unit: str = "%"
    evaluator: str = ""
    """what measured it, with its version or threshold"""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ErasureError(
                f"{self.name} was measured on no images at all; check that the prompt set has "
                "prompts for it"
            )
        if not math.isfinite(self.value):
            raise ErasureError(
                f"{self.name} is {self.value}; its evaluator ({self.evaluator or 'unnamed'}) gave "
                "no number"
            )
        if not (
            self.low <= self.value <= self.high or (math.isnan(self.low) and math.isnan(self.high))
        ):
            raise ErasureError(
                f"{self.name} is {self.value}, which is outside of its interval [{self.low}, "
                f"{self.high}]"
            )

    @property
    def interval(self) -> tuple[float, float]:
        """Its ends."""
        return self.low, self.high

    @property
    def decimals(self) -> int:
        """Decimals worth printing: one for percentages, none for counts, else down to the first
        digit of a quarter of the interval."""
        width = self.high - self.low
        if self.unit == "%":
            return 1
        if self.counts or not 0 < width < math.inf:
            return 0 if float(self.value).is_integer() else 3
        return min(max(-math.floor(math.log10(width / 4)), 0), 5)

    @property
    def counts(self) -> bool:
        """Whether it is a number of things: a unit such as `boxes`."""
        return self.unit not in ("", "%")

    def value_text(self) -> str:
        """`99.1`."""
        return f"{self.value:.{self.decimals}f}"

    def interval_text(self) -> str:
        """`[98.4, 99.6]`; empty where it is not known."""
        if math.isnan(self.low):
            return ""
        decimals = int(self.high < 100) if self.counts else self.decimals
        low, high = (f"{end:.{decimals}f}" for end in self.interval)
        return f"[{'0' if self.counts and self.low == 0 else low}, {high}]"

    def text(self) -> str:
        """`99.1 [98.4, 99.6]`; of a count `0 [0, 3.7]`; without a known interval `99.1`."""
        return f"{self.value_text()} {self.interval_text()}".strip()

    @property
    def heading(self) -> str:
        """`UA % ↑`: name, unit and the direction that is better."""
        return " ".join(filter(None, [self.name, self.unit, "↑" if self.higher_is_better else "↓"]))


def proportion(
    name: str, hits: int, n: int, *, higher_is_better: bool = True, evaluator: str = ""
) -> Score:
    """A share of images, in percent, with Wilson's interval.

    Args:
        hits: images that count, 0 <= hits <= n.
        n: images looked at, at least one.
    """
    if not 0 <= hits <= max(n, 0):
        raise ErasureError(f"{name}: {hits} hits of {n} images cannot be")
    low, high = of_rate(hits, n) if n else UNKNOWN
    value = hits / n if n else math.nan
    return Score(name, 100 * value, n, higher_is_better, 100 * low, 100 * high, "%", evaluator)


def count_score(
    name: str,
    events: int,
    n: int,
    *,
    higher_is_better: bool = False,
    unit: str = "boxes",
    evaluator: str = "",
) -> Score:
    """A number of things in n images, with the exact Poisson interval, which takes each thing to be
    independent of the others."""
    if events < 0:
        raise ErasureError(f"{name}: a count of {events} cannot be")
    return Score(name, events, n, higher_is_better, *of_count(events), unit, evaluator)


def mean_score(
    name: str,
    values: Sequence[float],
    *,
    higher_is_better: bool = True,
    unit: str = "",
    evaluator: str = "",
) -> Score:
    """The mean of one value per image, with Student's interval; NaN for a single value."""
    mean = fmean(values) if len(values) else math.nan
    return Score(name, mean, len(values), higher_is_better, *of_mean(values), unit, evaluator)


def verdict(base: Score, other: Score) -> int:
    """+1 if `other` is better than `base` beyond the noise, -1 if worse, 0 if the two cannot be
    told apart.

    They can where the 95 % interval of their difference excludes zero
    (`erase.eval.metrics.intervals.of_difference`). That takes the measurements to be independent.
    The images of both come from the same prompts and seeds, so the true error is smaller: a
    difference called real here is real, one called noise may not be.
    """
    low, high = of_difference(base.value, base.interval, other.value, other.interval)
    sign = 1 if base.higher_is_better else -1
    return sign * (int(low > 0) - int(high < 0))
