"""Scores: one measurement of one model each, with its direction, its n and its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from erase.eval.metrics.intervals import UNKNOWN, of_count, of_difference, of_mean, of_rate
from erase.eval.metrics.paired import Difference, of_events, of_values
from erase.prompts.errors import ErasureError

Outcomes = Sequence[tuple[int, float]]
"""case number and value of each judgement behind a score"""


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
    outcomes: Outcomes = field(default=(), repr=False, compare=False)
    """each judgement, in the score's unit, in the order of the cases: what two models are paired
    by. `value` is their mean, or their sum where it is a number of things. Kept out of files"""

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
        if self.outcomes:
            values = [value for _, value in self.outcomes]
            told = math.fsum(values) if self.counts else fmean(values)
            if not math.isclose(told, self.value, rel_tol=1e-6, abs_tol=1e-9):
                raise ErasureError(
                    f"{self.name} is {self.value}, and its outcomes say {told}; give those that it "
                    "was made of"
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
        return self.unit not in ("", "%", "dB")

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
    name: str,
    hits: int,
    n: int,
    *,
    higher_is_better: bool = True,
    evaluator: str = "",
    outcomes: Outcomes = (),
) -> Score:
    """A share of images, in percent, with Wilson's interval.

    Args:
        hits: images that count, 0 <= hits <= n.
        n: images looked at, at least one.
        outcomes: (case, whether it counts) of each, where they are known.
    """
    if not 0 <= hits <= max(n, 0):
        raise ErasureError(f"{name}: {hits} hits of {n} images cannot be")
    low, high = of_rate(hits, n) if n else UNKNOWN
    value = hits / n if n else math.nan
    percents = tuple((case, 100.0 * bool(counts)) for case, counts in outcomes)
    return Score(
        name, 100 * value, n, higher_is_better, 100 * low, 100 * high, "%", evaluator, percents
    )


def share_of(
    name: str,
    flags: Sequence[bool],
    cases: Sequence[int],
    *,
    higher_is_better: bool = True,
    evaluator: str = "",
) -> Score:
    """The share of the flags that are set, in percent, with each as an outcome of its case."""
    outcomes = list(zip(cases, flags, strict=True))
    return proportion(
        name,
        sum(flags),
        len(flags),
        higher_is_better=higher_is_better,
        evaluator=evaluator,
        outcomes=outcomes,
    )


def count_score(
    name: str,
    events: int,
    n: int,
    *,
    higher_is_better: bool = False,
    unit: str = "boxes",
    evaluator: str = "",
    outcomes: Outcomes = (),
) -> Score:
    """A number of things in n images, with the exact Poisson interval, which takes each thing to be
    independent of the others; `outcomes`: (case, things in it) of each image, if known."""
    if events < 0:
        raise ErasureError(f"{name}: a count of {events} cannot be")
    interval = of_count(events)
    return Score(name, events, n, higher_is_better, *interval, unit, evaluator, tuple(outcomes))


def mean_score(
    name: str,
    values: Sequence[float],
    *,
    higher_is_better: bool = True,
    unit: str = "",
    evaluator: str = "",
    cases: Sequence[int] = (),
) -> Score:
    """The mean of one value per image, with Student's interval; NaN for a single value.

    Args:
        values: one per image.
        cases: the images' case numbers, where they are known.
    """
    mean = fmean(values) if len(values) else math.nan
    outcomes = tuple(zip(cases, values, strict=True)) if cases else ()
    return Score(
        name, mean, len(values), higher_is_better, *of_mean(values), unit, evaluator, outcomes
    )


def paired(base: Score, other: Score) -> Difference | None:
    """`other - base`, of the same judgements of the same cases; None where they are not known, or
    are not the same."""
    cases = [case for case, _ in base.outcomes]
    if not cases or cases != [case for case, _ in other.outcomes] or base.unit != other.unit:
        return None
    before = [value for _, value in base.outcomes]
    after = [value for _, value in other.outcomes]
    if base.counts:
        return of_events(cases, before, after, total=True)
    if base.unit == "%" and {*before, *after} <= {0, 100}:
        return of_events(cases, before, after, yes=100)
    return of_values(cases, before, after)


def verdict(base: Score, other: Score, difference: Difference | None = None) -> int:
    """+1 if `other` is better than `base` beyond the noise, -1 if worse, 0 if the two cannot be
    told apart.

    They can where the 95 % interval of their difference excludes zero.

    Args:
        difference: of both, paired; None: from the interval of each
            (`erase.eval.metrics.intervals.of_difference`), which takes the measurements to be
            independent. Where the images of both come from the same prompts and seeds, the true
            error is smaller: a difference called real is real, one called noise may not be.
    """
    low, high = of_difference(base.value, base.interval, other.value, other.interval)
    if difference:
        low, high = difference.low, difference.high
    sign = 1 if base.higher_is_better else -1
    return sign * (int(low > 0) - int(high < 0))
