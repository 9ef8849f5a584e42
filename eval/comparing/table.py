"""Every score of every run, and its difference from one of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

from erase.eval.comparing.runs import Run
from erase.eval.metrics.intervals import of_difference
from erase.eval.metrics.paired import Difference
from erase.eval.report.report import BASE, ERASED
from erase.eval.report.words import VERDICTS, change_text, signed
from erase.eval.scores import Score, paired, verdict
from erase.prompts.errors import ErasureError, unknown

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

PAIRED, UNPAIRED = "paired", "unpaired"
CAPTION = "[low, high]: 95 % interval; below it the difference from {against}, ~ where unpaired"


@dataclass(frozen=True)
class Cell:
    """One score of one column, beside that of the column that all are compared with."""

    score: Score
    how: str = ""
    """`paired`, `unpaired`, or nothing: there is nothing to compare it with"""
    difference: Difference | None = None
    """of an unpaired one p is NaN and n 0; its ends are NaN where an interval is not known"""
    verdict: int = 0
    """+1 better beyond the noise, -1 worse, 0 not to be told apart"""

    @property
    def word(self) -> str:
        """`better`, `worse`, `within noise`; nothing where nothing is known of the noise."""
        known = self.difference and not math.isnan(self.difference.low)
        return VERDICTS[self.verdict] if known else ""

    def change(self) -> str:
        """`+3.2 [1.0, 5.4], p = 0.004`, or `~ +3.2 [-1.0, 7.4]` of an unpaired one."""
        one = self.difference
        if one is None:
            return ""
        if self.how == PAIRED:
            return change_text(self.score, one)
        value = signed(one.difference, self.score.decimals)
        if math.isnan(one.low):
            return f"~ {value}"
        low, high = (signed(end, self.score.decimals) for end in (one.low, one.high))
        return f"~ {value} [{low}, {high}]"


@dataclass(frozen=True)
class Comparison:
    """The runs, and a line of cells for each score."""

    runs: list[Run]
    against: str
    """the column that all are compared with"""
    columns: list[str]
    """the base, then the runs as they were given"""
    lines: list[dict[str, Cell]]
    """column -> cell, of one score; a column that lacks it was not measured"""
    notes: list[str]
    """what a reader must know before comparing"""

    @property
    def shared(self) -> list[dict[str, Cell]]:
        """The lines of scores that two runs have, or more."""
        return [line for line in self.lines if len(line.keys() - {BASE}) > 1]

    @property
    def single(self) -> list[dict[str, Cell]]:
        """The lines of scores that one run alone has."""
        return [line for line in self.lines if len(line.keys() - {BASE}) <= 1]

    def titled(self, line: dict[str, Cell]) -> Score:
        """A score that tells a line's name, unit and direction."""
        return next(iter(line.values())).score

    def table(self) -> Table:
        """For a console: a row per score that two runs have or more, a column per run."""
        from rich.table import Table
        from rich.text import Text

        table = Table(caption=Text(CAPTION.format(against=self.against)))
        table.add_column("score")
        for column in self.columns:
            table.add_column(Text(column), justify="right", overflow="fold")
        for line in self.shared:
            table.add_row(
                Text(self.titled(line).heading), *(_told(line.get(name)) for name in self.columns)
            )
        return table


def _told(cell: Cell | None) -> Text:
    from rich.text import Text

    if cell is None:
        return Text("–", style="dim")
    value, change = (
        text.replace(" ", "\N{NO-BREAK SPACE}")
        for text in (cell.score.text(), cell.change().partition(", p ")[0])
    )
    style = ("dim", "green", "red")[cell.verdict]
    return Text.assemble(value, *([("\n" + change, style)] if change else []))


def compare(runs: Sequence[Run], against: str | None = None, must_pair: bool = False) -> Comparison:
    """Set every score of the runs beside the same score of one of them.

    Args:
        runs: of one base, as `load_runs` gives them.
        against: the name of the run to compare with, or `base`; default: the first run.
        must_pair: refuse what cannot be paired, instead of comparing it unpaired.

    Raises:
        ErasureError: an unknown name; or, where pairs are asked for, runs that were asked other
            prompts, or whose judgements are not there.
    """
    runs, against = list(runs), against or runs[0].name
    columns = [BASE, *(run.name for run in runs)]
    if against not in columns:
        raise unknown("run in --against", against, columns)
    if must_pair:
        _check_pairs(runs)
    reference = runs[0] if against == BASE else next(run for run in runs if run.name == against)
    lines = []
    for name in _names(runs):
        line: dict[str, Cell] = {}
        bases = (run.report.score(BASE, name) for run in (reference, *runs))
        if base := next(filter(None, bases), None):
            line[BASE] = Cell(base)
        for run in runs:
            if score := run.score(ERASED, name):
                alone = run.name == against
                line[run.name] = Cell(score) if alone else _cell(reference, against, run, score)
        lines.append(line)
    return Comparison(runs, against, columns, lines, _notes(runs, reference, lines))


def _names(runs: Sequence[Run]) -> list[str]:
    """Names of scores in order of first appearance, every run's erased row before any base's."""
    rows = [run.report.rows.get(row, []) for row in (ERASED, BASE) for run in runs]
    return list(dict.fromkeys(score.name for score in chain.from_iterable(rows)))


def _cell(reference: Run, against: str, run: Run, score: Score) -> Cell:
    """A run's score beside the reference's, or beside that of the run's own base."""
    if against == BASE:
        first, pair = run.score(BASE, score.name), run.report.difference(ERASED, score.name)
    else:
        first = reference.score(ERASED, score.name)
        pair = _pair(reference, run, first, score) if first else None
    if first is None or first.unit != score.unit:
        return Cell(score)
    if pair:
        return Cell(score, PAIRED, pair, verdict(first, score, pair))
    low, high = of_difference(first.value, first.interval, score.value, score.interval)
    moved = Difference(score.value - first.value, low, high, math.nan, 0)
    return Cell(score, UNPAIRED, moved, verdict(first, score))


def _pair(reference: Run, run: Run, first: Score, score: Score) -> Difference | None:
    """Their difference on the same prompts and seeds, whatever the cases' numbers are."""
    ours, theirs = reference.kept, run.kept
    if reference.forgot != run.forgot:
        return None  # an attacker's or a probe's cases are of the concept
    if ours is None or theirs is None or not (first.outcomes and score.outcomes):
        return None
    if ours.questions(first) != theirs.questions(score):
        return None
    cases = [case for case, _ in first.outcomes]
    values = [value for _, value in score.outcomes]
    return paired(first, replace(score, outcomes=tuple(zip(cases, values, strict=True))))


def _check_pairs(runs: Sequence[Run]) -> None:
    first = runs[0]
    for run in runs:
        if run.forgot != first.forgot:
            raise ErasureError(
                f"{run.name} forgot {', '.join(run.forgot)}, and {first.name} "
                f"{', '.join(first.forgot)}, so they are not paired; leave --paired out"
            )
        if run.kept is None:
            raise ErasureError(
                f"{run.name} has no outcomes.json beside its report, so nothing can be paired; "
                "evaluate it again, or leave --paired out"
            )
        assert first.kept is not None  # it was looked at first
        ours, theirs = first.kept.asked.values(), run.kept.asked.values()
        if list(ours) != list(theirs):
            other = next((i for i, pair in enumerate(zip(ours, theirs)) if len(set(pair)) > 1), -1)  # noqa: B905
            where = (
                f"from number {other + 1} on" if other >= 0 else f"{len(theirs)}, not {len(ours)}"
            )
            raise ErasureError(
                f"{run.name} was asked other prompts or seeds than {first.name} ({where}); "
                "evaluate both on one prompt set, or leave --paired out"
            )


def _notes(runs: Sequence[Run], reference: Run, lines: Sequence[dict[str, Cell]]) -> list[str]:
    titles = {run.name: run.report.title for run in runs}
    notes = []
    if len(set(titles.values())) > 1:
        told = "; ".join(f"{name}: {title}" for name, title in titles.items())
        notes.append(f"The runs forgot different things ({told}), so UA is of different prompts.")
    for run in runs:
        notes += _differs(reference, run)
    unpaired = [_name(line) for line in lines if UNPAIRED in _hows(line)]
    if unpaired:
        notes.append(
            f"Unpaired (~), by Newcombe's interval of independent measurements: "
            f"{', '.join(unpaired)}. A difference called real is real; one called noise may not be."
        )
    for line in lines:
        judged = {cell.score.evaluator for column, cell in line.items() if column != BASE}
        if len(judged) > 1:
            notes.append(f"{_name(line)} was not measured alike: {' | '.join(sorted(judged))}.")
    single = [_name(line) for line in lines if len(line.keys() - {BASE}) <= 1]
    if single:
        notes.append(f"Measured in one run alone, and so not compared: {', '.join(single)}.")
    compared = sum(len(_hows(line)) for line in lines)
    if compared:
        notes.append(
            f"{compared} differences at 95 %: of equal models, one in twenty excludes zero by "
            "chance."
        )
    return notes


def _name(line: dict[str, Cell]) -> str:
    return next(iter(line.values())).score.name


def _hows(line: dict[str, Cell]) -> list[str]:
    """How each cell is compared, of those that are."""
    return [cell.how for cell in line.values() if cell.how]


def _differs(reference: Run, run: Run) -> list[str]:
    """How a run's images were made, and its base judged, otherwise than the reference's."""
    notes = []
    made, other = (one.report.provenance.get("evaluation", {}) for one in (reference, run))
    ours, theirs = (dict(told.get("generate", {})) for told in (made, other))
    keys = [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
    if keys:
        told = ", ".join(f"{key} {theirs.get(key)}, not {ours.get(key)}" for key in sorted(keys))
        notes.append(f"{run.name} was drawn with {told} as {reference.name} was.")
    own = {score.name: score.value for score in reference.report.rows.get(BASE, [])}
    theirs = {score.name: score.value for score in run.report.rows.get(BASE, [])}
    moved = [name for name, value in theirs.items() if own.get(name, value) != value]
    if moved:
        notes.append(
            f"The base's scores beside {run.name} are not those beside {reference.name}, which "
            f"are shown ({', '.join(moved[:5])}{', …' * (len(moved) > 5)}): other prompts, seeds "
            "or settings."
        )
    return notes
