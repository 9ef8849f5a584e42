"""Several reports of the same evaluation: mean, spread and worst run of every score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from erase.eval.report.report import EvalReport
from erase.eval.scores import Score
from erase.prompts.errors import ErasureError


@dataclass(frozen=True)
class Spread:
    """One score of one row over several runs (seeds)."""

    row: str
    name: str
    runs: int
    mean: float
    sd: float
    """sample standard deviation over the runs; NaN for one run"""
    low: float
    high: float
    higher_is_better: bool
    unit: str
    better: int = 0
    """runs in which it is better than the base beyond the noise"""
    worse: int = 0
    """runs in which it is worse"""

    @property
    def worst(self) -> float:
        """The run that a sceptic would quote."""
        return self.low if self.higher_is_better else self.high


def summarise(reports: Sequence[EvalReport]) -> list[Spread]:
    """Mean, sample sd and range of every score of every row over reports of the same evaluation
    with different seeds.

    Raises:
        ErasureError: there are none, or one lacks a row or a score that another has.
    """
    if not reports:
        raise ErasureError("no reports to summarise; give at least one")
    wanted = [(row, s.name) for row, scores in reports[0].check().rows.items() for s in scores]
    for i, report in enumerate(reports):
        if {(row, s.name) for row, scores in report.check().rows.items() for s in scores} != set(
            wanted
        ):
            raise ErasureError(
                f"report {i + 1} does not hold the rows and scores of the first; evaluate all in "
                "the same way"
            )
    spreads = []
    for row, name in wanted:
        scores = [report.score(row, name) for report in reports]
        verdicts = [report.verdict(row, name) for report in reports]
        spreads.append(_spread(row, [score for score in scores if score], verdicts))
    return spreads


def _spread(row: str, scores: list[Score], verdicts: list[int]) -> Spread:
    values = [score.value for score in scores]
    sd = stdev(values) if len(values) > 1 else math.nan
    first = scores[0]
    limits = min(values), max(values)
    return Spread(
        row,
        first.name,
        len(values),
        fmean(values),
        sd,
        *limits,
        first.higher_is_better,
        first.unit,
        verdicts.count(1),
        verdicts.count(-1),
    )
