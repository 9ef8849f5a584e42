"""The runs' images side by side, prompt by prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from erase.eval.comparing.runs import Run
from erase.eval.comparing.table import Comparison
from erase.eval.images import ImageRow, ImageSet
from erase.eval.report.figures import data_uri
from erase.eval.report.report import BASE, ERASED
from erase.eval.report.said import Said
from erase.eval.report.wall import groups, names_concept, spread_out

PARTED, ASKING, OTHERS = 12, 10, 10
"""prompts on the page: where the judges tell the runs apart, of the concept, of other things"""
Asked = tuple[str, int]
"""prompt and seed"""


@dataclass(frozen=True)
class Picture:
    """One image, or none where a run has none of this prompt."""

    column: str
    source: str
    words: list[tuple[str, str]]
    """each judge and its word, as the report's own wall has them"""
    flags: frozenset[str]
    """judges that see what was forgotten, or find wrong what should have stayed"""


@dataclass(frozen=True)
class Strip:
    """One prompt: the base's image and every run's."""

    prompt: str
    seed: int
    pictures: list[Picture]


@dataclass(frozen=True)
class Wall:
    """Strips under their headings; `side`: of the images in pixels; `missing`: runs without any."""

    groups: dict[str, list[Strip]]
    side: int
    missing: list[str]


def wall(comparison: Comparison) -> Wall:
    """Where the runs part, then prompts of the concept and of other things, drawn at random."""
    runs = comparison.runs
    own = next((run for run in runs if run.name == comparison.against), runs[0])
    owner = next((run for run in (own, *runs) if BASE in run.images), None)
    missing = [run.name for run in runs if ERASED not in run.images]
    if owner is None or len(missing) == len(runs):
        return Wall({}, 0, missing)
    base, concept = owner.images[BASE], own.report.concept
    columns = {BASE: _Column.of(owner, BASE)}
    erased = {run.name: _Column.of(run, ERASED) for run in runs}
    columns |= erased
    parted = [row for row in base.rows if _parted(row, list(erased.values()))]
    shown = {"Where the judges tell the runs apart": spread_out(parted, PARTED)}
    shown |= groups(concept, base, ASKING, OTHERS)
    strips = {}
    for heading, rows in shown.items():
        strips[heading] = [_strip(row, comparison.columns, columns) for row in rows]
    side = max(base.image(base.rows[0]).size)
    return Wall({heading: some for heading, some in strips.items() if some}, side, missing)


@dataclass(frozen=True)
class _Column:
    """A row of one run's report: its images, and what the report says of them."""

    row: str
    said: Said
    images: ImageSet | None
    rows: Mapping[Asked, ImageRow]
    flags: Mapping[Asked, frozenset[str]]
    """judges that call an image a failure of the erasure, of those that have one"""

    @classmethod
    def of(cls, run: Run, row: str) -> _Column:
        """Of a run's report."""
        images = run.images.get(row)
        rows = {_asked(one): one for one in images.rows} if images else {}
        said, flags = Said(run.report), {}
        seen, wrong = (said.by_case(row, question) for question in ("seen", "wrong"))
        for asked, one in rows.items() if row != BASE else ():
            own = [*seen.get(one.case, ())]
            if not names_concept(one, run.report.concept):
                own += wrong.get(one.case, ())
            flags[asked] = frozenset(own)
        return cls(row, said, images, rows, flags)

    def picture(self, name: str, asked: Asked) -> Picture:
        """The image of a prompt, under this name."""
        own = self.rows.get(asked)
        if self.images is None or own is None:
            return Picture(name, "", [], frozenset())
        words = self.said.words(self.row, own.case)
        flags = self.flags.get(asked, frozenset())
        return Picture(name, data_uri(self.images.image(own)), words, flags)


def _asked(row: ImageRow) -> Asked:
    return row.prompt, row.seed


def _parted(row: ImageRow, columns: Sequence[_Column]) -> bool:
    """Whether the judges that judged all runs' images of a prompt find failures in some alone."""
    asked = _asked(row)
    told = [column for column in columns if asked in column.rows]
    judges = [set(dict(one.said.words(one.row, one.rows[asked].case))) for one in told]
    shared = set.intersection(*judges) if judges else set()
    return len({one.flags[asked] & shared for one in told}) > 1


def _strip(row: ImageRow, names: Sequence[str], columns: Mapping[str, _Column]) -> Strip:
    pictures = [columns[name].picture(name, _asked(row)) for name in names]
    return Strip(row.prompt, row.seed, pictures)
