"""Scores and the report that holds them: never how well a concept went without what that cost, nor without the base."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from erase.eval.metrics.intervals import UNKNOWN, of_count, of_difference, of_mean, of_rate
from erase.files import atomic_write
from erase.prompts.errors import ErasureError, reason

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

SCHEMA_VERSION = 2
BASE, ERASED = "base", "erased"
ENDS = "low", "high"
INTERVALS = "[low, high]: 95 % interval of n judgements"


@dataclass(frozen=True)
class Score:
    """One measurement of one model."""

    name: str
    """the field's term: `UA`, `IRA`, `CRA`; another judge's are prefixed with its name, as in `CLIP UA`"""
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
            raise ErasureError(f"{self.name} was measured on no images at all; check that the prompt set has prompts for it")
        if not math.isfinite(self.value):
            raise ErasureError(f"{self.name} is {self.value}; its evaluator ({self.evaluator or 'unnamed'}) gave no number")
        if not (self.low <= self.value <= self.high or (math.isnan(self.low) and math.isnan(self.high))):
            raise ErasureError(f"{self.name} is {self.value}, which is outside of its interval [{self.low}, {self.high}]")

    @property
    def interval(self) -> tuple[float, float]:
        """Its ends."""
        return self.low, self.high

    @property
    def decimals(self) -> int:
        """Decimals worth printing: one for percentages, none for counts, else down to the first digit of a quarter of the interval."""
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


def proportion(name: str, hits: int, n: int, *, higher_is_better: bool = True, evaluator: str = "") -> Score:
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
    name: str, events: int, n: int, *, higher_is_better: bool = False, unit: str = "boxes", evaluator: str = ""
) -> Score:
    """A number of things in n images, with the exact Poisson interval, which takes each thing to be independent of the others."""
    if events < 0:
        raise ErasureError(f"{name}: a count of {events} cannot be")
    return Score(name, events, n, higher_is_better, *of_count(events), unit, evaluator)


def mean_score(
    name: str, values: Sequence[float], *, higher_is_better: bool = True, unit: str = "", evaluator: str = ""
) -> Score:
    """The mean of one value per image, with Student's interval; NaN for a single value."""
    mean = fmean(values) if len(values) else math.nan
    return Score(name, mean, len(values), higher_is_better, *of_mean(values), unit, evaluator)


def verdict(base: Score, other: Score) -> int:
    """+1 if `other` is better than `base` beyond the noise, -1 if worse, 0 if the two cannot be told apart.

    They can where the 95 % interval of their difference excludes zero (`erase.eval.metrics.intervals.of_difference`). That takes the measurements
    to be independent. The images of both come from the same prompts and seeds, so the true error is smaller: a difference called
    real here is real, one called noise may not be.
    """
    low, high = of_difference(base.value, base.interval, other.value, other.interval)
    sign = 1 if base.higher_is_better else -1
    return sign * (int(low > 0) - int(high < 0))


@dataclass
class EvalReport:
    """What was measured of a base, of its erased weights and of any control, and how.

    `extras` is free for whatever is not a score; the page knows `confusion`: row name -> {"kind": str, "labels": [str],
    "counts": [[int]]}, where counts[i][j] is how many images whose prompt names labels[i] were classified as labels[j].
    """

    concept: dict[str, Any]
    """`ConceptSpec` as a mapping: target, anchor, synonyms, kind, …; target and anchor are lists if several were forgotten"""
    rows: dict[str, list[Score]]
    """"base", "erased" and named controls -> their scores"""
    provenance: dict[str, Any] = field(default_factory=dict)
    """fingerprints, prompt set, sampler, versions, and `commands`: the command lines that make it all again"""
    extras: dict[str, Any] = field(default_factory=dict)

    def score(self, row: str, name: str) -> Score | None:
        """One score of one row, or None."""
        return next((score for score in self.rows.get(row, []) if score.name == name), None)

    def columns(self) -> list[Score]:
        """One score of each name, in order of first appearance over the rows."""
        first: dict[str, Score] = {}
        for score in chain.from_iterable(self.rows.values()):
            first.setdefault(score.name, score)
        return list(first.values())

    @property
    def title(self) -> str:
        """`heart → star`."""
        return " → ".join(", ".join(words(self.concept, key)) for key in ("target", "anchor") if words(self.concept, key))

    def check(self) -> EvalReport:
        """Refuse a report that tells how well a concept went without its price.

        Raises:
            ErasureError: a UA (of any judge) stands without that judge's IRA and CRA, or without a base row that has all three.
        """
        judges = {s.name.removesuffix("UA") for scores in self.rows.values() for s in scores if f" {s.name}".endswith(" UA")}
        for judge in sorted(judges):
            for row in [BASE, *(row for row in self.rows if self.score(row, f"{judge}UA"))]:
                lacks = [judge + name for name in ("UA", "IRA", "CRA") if self.score(row, judge + name) is None]
                if lacks:
                    raise ErasureError(
                        f"{judge}UA says nothing alone: row {row!r} lacks {', '.join(lacks)}; "
                        f"evaluate the base and the erased model on forget and on retained prompts, labelled with two kinds or more"
                        f"{' (or with clip.zero_shot false, for the CLIP score alone)' if judge else ''}"
                    )
        return self

    def table(self) -> Table:
        """A console table: a row per score, a column per model; what differs from the base beyond the noise is coloured."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self.title), caption=Text(INTERVALS))  # Text: brackets are no markup
        table.add_column("score")
        for row in self.check().rows:
            table.add_column(Text(row), justify="right")
        for score in self.columns():
            table.add_row(Text(score.heading), *(self._cell(row, score.name) for row in self.rows))
        return table

    def _cell(self, row: str, name: str) -> Text:
        from rich.text import Text

        score, base = self.score(row, name), self.score(BASE, name)
        if score is None:
            return Text("–", style="dim")
        style = ("", "green", "red")[verdict(base, score)] if base else ""
        value = score.text().replace(" ", "\N{NO-BREAK SPACE}")  # a narrow console breaks before n, not inside the value
        return Text.assemble((value, style), (f" ({score.n})", "dim"))

    def to_json(self) -> str:
        """The report as JSON text. Intervals that are not known are null."""
        rows = {row: [_plain(score) for score in scores] for row, scores in self.check().rows.items()}
        content = {"schema_version": SCHEMA_VERSION, "concept": self.concept, "rows": rows}
        content |= {"provenance": self.provenance, "extras": self.extras}
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "report.json") -> EvalReport:
        """The report that `to_json` wrote; `where` names it in errors.

        Raises:
            ErasureError: it is truncated, of another schema version, or lacks what `check` asks for.
        """
        try:
            content = json.loads(text, parse_float=_finite, parse_constant=_finite)
            if content["schema_version"] != SCHEMA_VERSION:
                raise ErasureError(f"{where} has schema {content['schema_version']}, not {SCHEMA_VERSION}; evaluate again")
            rows = {row: [_score(raw) for raw in scores] for row, scores in content["rows"].items()}
            _check_parts(content)
            return cls(content["concept"], rows, content["provenance"], content["extras"]).check()
        except ErasureError as error:
            raise error if where in str(error) else ErasureError(f"{where}: {error}") from error
        except (ArithmeticError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ErasureError(f"{where} is not a whole report ({reason(error)}); evaluate again to make it anew") from error

    def save(self, path: str | Path) -> Path:
        """Write `report.json`."""
        text = self.to_json()
        with atomic_write(path) as aside:
            aside.write_text(text, encoding="utf-8")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> EvalReport:
        """Read what `save` wrote."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise ErasureError(f"cannot read {path}: {reason}; name a report.json that an evaluation wrote") from error


def words(concept: Mapping[str, Any], key: str) -> list[str]:
    """The words under one key of a concept: none, one or several."""
    value = concept.get(key) or []
    return [value] if isinstance(value, str) else list(value)


def _plain(score: Score) -> dict[str, Any]:
    return asdict(score) | {key: None if math.isnan(end) else end for key, end in zip(ENDS, score.interval, strict=True)}


def _score(raw: dict[str, Any]) -> Score:
    score = Score(**raw | {key: math.nan if raw[key] is None else raw[key] for key in ENDS})
    texts, numbers = (score.name, score.unit, score.evaluator), (score.value, *score.interval)
    right = all(isinstance(text, str) for text in texts) and all(type(number) in (int, float) for number in numbers)
    if not right or type(score.n) is not int or type(score.higher_is_better) is not bool:
        raise TypeError(f"the score {score.name!r} has a value of the wrong type")
    return score


def _check_parts(content: dict[str, Any]) -> None:
    """Refuse, by a TypeError or a ValueError, parts of a report that the table, the page or the card could not show."""
    json.dumps(content, ensure_ascii=False).encode()  # lone surrogates
    concept, provenance, extras = (dict(content[part]) for part in ("concept", "provenance", "extras"))
    for key in ("target", "anchor", "synonyms", "kind"):
        _check_texts(concept.get(key), key)
    _check_texts(provenance.get("commands"), "commands")
    for key in ("base_fingerprint", "base_id", "delta_sha256"):
        if not isinstance(provenance.get(key, ""), str):
            raise TypeError(f"{key} is no text")
    for table in dict(extras.get("confusion", {})).values():
        labels, counts = table["labels"], table["counts"]
        _check_texts([table["kind"], *labels], "confusion")
        if len(counts) != len(labels) or any(len(row) != len(labels) or _not_numbers(row) for row in counts):
            raise ValueError("a confusion is no square of counts")
    for values in [*dict(extras.get("curves", {})).values(), list(dict(extras.get("density", {})).values())]:
        if _not_numbers(values):
            raise TypeError("curves and density are of numbers")


def _check_texts(value: Any, what: str) -> None:
    """`value` is a text, or a list of texts, or absent."""
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{what} is neither text nor a list of texts")


def _not_numbers(values: Any) -> bool:
    return not isinstance(values, list) or any(type(value) not in (int, float) for value in values)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no number")
    return number


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

    @property
    def worst(self) -> float:
        """The run that a sceptic would quote."""
        return self.low if self.higher_is_better else self.high


def summarise(reports: Sequence[EvalReport]) -> list[Spread]:
    """Mean, sample sd and range of every score of every row over reports of the same evaluation with different seeds.

    Raises:
        ErasureError: there are none, or one lacks a row or a score that another has.
    """
    if not reports:
        raise ErasureError("no reports to summarise; give at least one")
    wanted = [(row, s.name) for row, scores in reports[0].check().rows.items() for s in scores]
    for i, report in enumerate(reports):
        if {(row, s.name) for row, scores in report.check().rows.items() for s in scores} != set(wanted):
            raise ErasureError(f"report {i + 1} does not hold the rows and scores of the first; evaluate all in the same way")
    return [_spread(row, [s for r in reports if (s := r.score(row, name))]) for row, name in wanted]


def _spread(row: str, scores: list[Score]) -> Spread:
    values = [score.value for score in scores]
    sd = stdev(values) if len(values) > 1 else math.nan
    first = scores[0]
    limits = min(values), max(values)
    return Spread(row, first.name, len(values), fmean(values), sd, *limits, first.higher_is_better, first.unit)
