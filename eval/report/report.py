"""The report that holds the scores: never how well a concept went without what that cost, nor
without the base."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erase.eval.metrics.paired import Difference
from erase.eval.scores import Score, paired, verdict
from erase.files import atomic_write
from erase.prompts.errors import ErasureError, reason

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

SCHEMA_VERSION = 2
BASE, ERASED = "base", "erased"
ENDS = "low", "high"
INTERVALS = "[low, high]: 95 % interval of n judgements"
NOT_ZERO_SHOT = " (or with clip.zero_shot false, for the CLIP score alone)"


@dataclass
class EvalReport:
    """The measurements of a base, of its erased weights and of any control, and the settings behind
    them.

    `extras` is free for whatever is not a score; the page knows, by row, `judged` (see
    `erase.eval.judgements`), `attacks`, `relearning`, and `confusion`: a list of `{"kind": str,
    "labels": [str], "counts": [[int]]}`, where `counts[i][j]` is how many images whose prompt names
    `labels[i]` were classified as `labels[j]`.
    """

    concept: dict[str, Any]
    """`ConceptSpec` as a mapping: target, anchor, synonyms, kind, …; target and anchor are lists if
    several were forgotten"""
    rows: dict[str, list[Score]]
    """"base", "erased" and named controls -> their scores"""
    provenance: dict[str, Any] = field(default_factory=dict)
    """fingerprints, prompt set, sampler, versions, and `commands`: the command lines that make it
    all again"""
    extras: dict[str, Any] = field(default_factory=dict)
    paired: dict[str, dict[str, Difference]] = field(default_factory=dict)
    """row -> score -> its difference from the base's on the same cases; see `differences`"""

    def score(self, row: str, name: str) -> Score | None:
        """One score of one row, or None."""
        return next((score for score in self.rows.get(row, []) if score.name == name), None)

    def difference(self, row: str, name: str) -> Difference | None:
        """A score's difference from the base's, where both were measured on the same cases."""
        return self.paired.get(row, {}).get(name)

    def verdict(self, row: str, name: str) -> int:
        """+1 if a row's score is better than the base's beyond the noise, -1 if worse, else 0; 0
        too where one of them is missing."""
        base, score = self.score(BASE, name), self.score(row, name)
        if base is None or score is None or row == BASE:
            return 0
        return verdict(base, score, self.difference(row, name))

    def columns(self) -> list[Score]:
        """One score of each name, in order of first appearance over the rows."""
        first: dict[str, Score] = {}
        for score in chain.from_iterable(self.rows.values()):
            first.setdefault(score.name, score)
        return list(first.values())

    @property
    def title(self) -> str:
        """`heart → star`."""
        return " → ".join(
            ", ".join(words(self.concept, key))
            for key in ("target", "anchor")
            if words(self.concept, key)
        )

    def check(self) -> EvalReport:
        """Refuse a report that tells how well a concept went without its price.

        Raises:
            ErasureError: a UA (of any judge) stands without that judge's IRA and CRA, or without a
                base row that has all three.
        """
        judges = {
            s.name.removesuffix("UA")
            for scores in self.rows.values()
            for s in scores
            if f" {s.name}".endswith(" UA")
        }
        for judge in sorted(judges):
            for row in [BASE, *(row for row in self.rows if self.score(row, f"{judge}UA"))]:
                lacks = [
                    judge + name
                    for name in ("UA", "IRA", "CRA")
                    if self.score(row, judge + name) is None
                ]
                if lacks:
                    raise ErasureError(
                        f"{judge}UA says nothing alone: row {row!r} lacks {', '.join(lacks)}; "
                        "evaluate the base and the erased model on forget and on retained "
                        "prompts, labelled with two kinds or more"
                        f"{NOT_ZERO_SHOT if judge else ''}"
                    )
        return self

    def table(self) -> Table:
        """A console table: a row per score, a column per model; differences from the base beyond
        the noise are coloured."""
        from rich.table import Table
        from rich.text import Text

        # Text: brackets are no markup
        table = Table(title=Text(self.title), caption=Text(INTERVALS))
        table.add_column("score")
        for row in self.check().rows:
            table.add_column(Text(row), justify="right")
        for score in self.columns():
            table.add_row(Text(score.heading), *(self._cell(row, score.name) for row in self.rows))
        return table

    def _cell(self, row: str, name: str) -> Text:
        from rich.text import Text

        score = self.score(row, name)
        if score is None:
            return Text("–", style="dim")
        style = ("", "green", "red")[self.verdict(row, name)]
        # a narrow console breaks before n, not inside the value
        value = score.text().replace(" ", "\N{NO-BREAK SPACE}")
        return Text.assemble((value, style), (f" ({score.n})", "dim"))

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from erase.eval.report.notebook import as_html

        return as_html(self.check())

    def to_pandas(self) -> Any:
        """All scores as a pandas frame; see `erase.eval.report.notebook.to_pandas`."""
        from erase.eval.report.notebook import to_pandas

        return to_pandas(self.check())

    def to_json(self) -> str:
        """The report as JSON text. Intervals that are not known are null."""
        rows = {row: list(map(_plain, scores)) for row, scores in self.check().rows.items()}
        content = {"schema_version": SCHEMA_VERSION, "concept": self.concept, "rows": rows}
        content |= {"paired": {row: _plain_all(found) for row, found in self.paired.items()}}
        content |= {"provenance": self.provenance, "extras": self.extras}
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "report.json") -> EvalReport:
        """The report that `to_json` wrote; `where` names it in errors.

        Raises:
            ErasureError: it is truncated, of another schema version, or lacks what `check` asks
                for.
        """
        try:
            content = json.loads(text, parse_float=_finite, parse_constant=_finite)
            if content["schema_version"] != SCHEMA_VERSION:
                raise ErasureError(
                    f"{where} has schema {content['schema_version']}, not {SCHEMA_VERSION}; "
                    "evaluate again"
                )
            rows = {row: list(map(_score, scores)) for row, scores in content["rows"].items()}
            _check_parts(content)
            pairs = {row: _differences(found) for row, found in content.get("paired", {}).items()}
            about = content["concept"], rows, content["provenance"], content["extras"]
            return cls(*about, pairs).check()
        except ErasureError as error:
            raise error if where in str(error) else ErasureError(f"{where}: {error}") from error
        except (
            ArithmeticError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            raise ErasureError(
                f"{where} is not a whole report ({reason(error)}); evaluate again to make it anew"
            ) from error

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
            raise ErasureError(
                f"cannot read {path}: {reason}; name a report.json that an evaluation wrote"
            ) from error


def differences(rows: Mapping[str, list[Score]]) -> dict[str, dict[str, Difference]]:
    """Row -> score -> its difference from the base's, of all that were measured on the same
    cases."""
    base = {score.name: score for score in rows.get(BASE, [])}
    found: dict[str, dict[str, Difference]] = {}
    for row, scores in rows.items():
        pairs = {s.name: paired(base[s.name], s) for s in scores if s.name in base and row != BASE}
        known = {name: difference for name, difference in pairs.items() if difference}
        found |= {row: known} if known else {}
    return found


def words(concept: Mapping[str, Any], key: str) -> list[str]:
    """The words under one key of a concept: none, one or several."""
    value = concept.get(key) or []
    return [value] if isinstance(value, str) else list(value)


def _plain(score: Score) -> dict[str, Any]:
    plain = asdict(replace(score, outcomes=())) | {
        key: None if math.isnan(end) else end for key, end in zip(ENDS, score.interval, strict=True)
    }
    plain.pop("outcomes")
    return plain


def _plain_all(found: Mapping[str, Difference]) -> dict[str, Any]:
    return {name: asdict(difference) for name, difference in found.items()}


def _differences(raw: dict[str, Any]) -> dict[str, Difference]:
    found = {name: Difference(**values) for name, values in raw.items()}
    for name, one in found.items():
        numbers = (one.difference, one.low, one.high, one.p)
        if any(type(number) not in (int, float) for number in numbers) or type(one.n) is not int:
            raise TypeError(f"the difference of {name!r} has a value of the wrong type")
        if not one.low <= one.difference <= one.high or not 0 <= one.p <= 1:
            raise ValueError(f"the difference of {name!r} is outside of its interval")
    return found


def _score(raw: dict[str, Any]) -> Score:
    if "outcomes" in raw:
        raise TypeError("outcomes are kept out of files")
    score = Score(**raw | {key: math.nan if raw[key] is None else raw[key] for key in ENDS})
    texts, numbers = (score.name, score.unit, score.evaluator), (score.value, *score.interval)
    right = all(isinstance(text, str) for text in texts) and all(
        type(number) in (int, float) for number in numbers
    )
    if not right or type(score.n) is not int or type(score.higher_is_better) is not bool:
        raise TypeError(f"the score {score.name!r} has a value of the wrong type")
    return score


def _check_parts(content: dict[str, Any]) -> None:
    """Refuse, by a TypeError or a ValueError, parts of a report that the table, the page or the
    card could not show."""
    json.dumps(content, ensure_ascii=False).encode()  # lone surrogates
    concept, provenance, extras = (
        dict(content[part]) for part in ("concept", "provenance", "extras")
    )
    for key in ("target", "anchor", "synonyms", "kind"):
        _check_texts(concept.get(key), key)
    _check_texts(provenance.get("commands"), "commands")
    for key in ("base_fingerprint", "base_id", "delta_sha256"):
        if not isinstance(provenance.get(key, ""), str):
            raise TypeError(f"{key} is no text")
    confusions = dict(extras.get("confusion", {})).values()
    for table in chain.from_iterable(
        each if isinstance(each, list) else [each] for each in confusions
    ):
        labels, counts = table["labels"], table["counts"]
        _check_texts([table["kind"], *labels], "confusion")
        if len(counts) != len(labels) or any(
            len(row) != len(labels) or _not_numbers(row) for row in counts
        ):
            raise ValueError("a confusion is no square of counts")
    for values in [
        *dict(extras.get("curves", {})).values(),
        list(dict(extras.get("density", {})).values()),
    ]:
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
