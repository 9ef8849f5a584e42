"""States: one question on an erasure, its answer in a word and in a sentence, and the scores that
the answer rests on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from erase.eval.report.report import ERASED, EvalReport
from erase.eval.report.words import ERASED_WORD, NOT_ERASED, NOTHING, PARTLY
from erase.eval.scores import Score

GOOD, MIXED, BAD, UNKNOWN = "good", "mixed", "bad", "unknown"
TONES = {ERASED_WORD: GOOD, PARTLY: MIXED, NOT_ERASED: BAD, NOTHING: UNKNOWN}


@dataclass(frozen=True)
class Claim:
    """One score of the base and of the erased model, as a reader asks for it."""

    text: str
    erased: Score
    base: Score | None
    tone: str = UNKNOWN


@dataclass(frozen=True)
class State:
    """One question, its answer in a word and in a sentence, and what that rests on."""

    question: str
    word: str
    tone: str
    said: str
    claims: tuple[Claim, ...] = ()


def judges(report: EvalReport) -> list[str]:
    """What the names of each judge's scores begin with, of those with UA in both rows: nothing, or
    `CLIP `, or a set's name."""
    return judges_of([score.name for score in report.check().rows.get(ERASED, [])])


def judges_of(names: Sequence[str]) -> list[str]:
    """The same of these scores' names."""
    return [name.removesuffix("UA") for name in names if f" {name}".endswith(" UA")]


def plain(name: str) -> str:
    """A score's name without its set and its judge: `seen by name` of `i2p: CLIP seen by name`."""
    return name.rpartition(": ")[2].removeprefix("CLIP ")


def seen(ua: Score) -> Score:
    """What a UA leaves: the share of images in which the judge sees the concept."""
    low, high = 100 - ua.high, 100 - ua.low
    return Score(ua.name, 100 - ua.value, ua.n, False, low, high, ua.unit, ua.evaluator)


def hits(score: Score) -> int:
    """Images that count in a rate."""
    return round(score.value * score.n / 100)


def known(report: EvalReport, row: str, name: str) -> Score:
    """A score that stands in the row."""
    score = report.score(row, name)
    assert score is not None
    return score
