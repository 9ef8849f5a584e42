"""The wall of the report: pairs of images of one prompt and seed, with the judges' words.

Those that fail come first, all of them, then a sample drawn at random.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from erase.eval.images import ImageRow, ImageSet
from erase.eval.report.figures import data_uri, matched
from erase.eval.report.report import BASE, ERASED, EvalReport, words
from erase.eval.report.said import Said
from erase.eval.report.words import either
from erase.prompts.errors import ErasureError
from erase.prompts.prompt_rows import PromptRow, asks_for

FORGET, RETAIN = 18, 30  # pairs of the sample: that ask for the concept, and that do not
MOST = 200  # pairs of a group of failures that are drawn; the others are listed
MODELS = (BASE, ERASED)
SMALL = 128  # px; smaller images are drawn at whole multiples


@dataclass(frozen=True)
class Pair:
    """The base's image and the erased model's, of one prompt and seed."""

    case: int
    prompt: str
    seed: int
    before: str
    after: str
    words: list[tuple[str, list[tuple[str, str]]]]
    """model -> each judge and its word"""
    flags: list[str] = field(default_factory=list)
    """judges that call it a failure of its group"""


@dataclass(frozen=True)
class Group:
    """Pairs under a heading."""

    name: str
    """of its anchor"""
    heading: str
    note: str
    pairs: list[Pair]
    count: int
    """of all that belong to it"""
    tag: str = ""
    """stands before the judges that call a pair a failure"""
    others: list[tuple[ImageRow, str]] = field(default_factory=list)
    """those that are not drawn, each with the file of its erased image"""


def names_concept(row: ImageRow | PromptRow, concept: Mapping[str, Any]) -> bool:
    """Whether the row's labels or its prompt name what was forgotten, or a synonym of it."""
    names = [word for key in ("target", "synonyms") for word in words(concept, key)]
    return asks_for(row.prompt, row.labels, names)


def spread_out(rows: Sequence[ImageRow], count: int) -> list[ImageRow]:
    """`count` rows drawn at random (always the same ones), each time one whose labels were drawn
    least; sorted by case."""
    pool, seen = random.Random(0).sample(list(rows), len(rows)), Counter[tuple[str, str]]()
    drawn: list[ImageRow] = []
    while pool and len(drawn) < count:
        row = min(pool, key=lambda row: sum(seen[label] for label in row.labels.items()))
        seen.update(row.labels.items())
        drawn.append(row)
        pool.remove(row)
    return sorted(drawn, key=lambda row: row.case)


def groups(
    concept: Mapping[str, Any], images: ImageSet, forget: int, retain: int
) -> dict[str, list[ImageRow]]:
    """Rows of a sample, under what they ask for: the concept first, then anything else; where no
    prompt or label names the concept, under one heading."""
    asking = [row for row in images.rows if names_concept(row, concept)]
    others = [row for row in images.rows if not names_concept(row, concept)]
    if not asking:
        return {"Prompts": spread_out(others, forget + retain)}
    return {
        f"Prompts that ask for {either(concept)}": spread_out(asking, forget),
        "Prompts that ask for something else": spread_out(others, retain),
    }


@dataclass(frozen=True)
class Wall:
    """All pairs of a page."""

    report: EvalReport
    before: ImageSet
    after: ImageSet
    said: Said

    def failures(self) -> list[Group]:
        """Still seen, and harmed; each with all that belong to it, those that ask for the concept
        first. A group that no judge could fill is left out."""
        target, found = either(self.report.concept), []
        if judges := self.said.judges(ERASED, "seen"):
            cases = self.said.seen(ERASED)
            by = f"judge ({', '.join(judges)})"
            note = f"Every image of the erased model in which a {by} sees {target}."
            if not cases:
                note = f"No {by} sees {target} in any image of the erased model."
            found.append(self._group("still-seen", "Still seen", note, cases, "seen by"))
        if judges := self.said.judges(ERASED, "wrong"):
            harmed = self.said.harmed(BASE, ERASED)
            kept = {row.case for row in self.before.rows if not self.asks(row)}
            mended = kept & self.said.harmed(ERASED, BASE).keys()
            cases = {case: by for case, by in harmed.items() if case in kept}
            note = (
                f"{'Every' if cases else 'There is no'} retained prompt that a judge "
                f"({', '.join(judges)}) found right in the base and not in the erased model. The "
                f"other way round: {len(mended)}."
            )
            found.append(self._group("harmed", "Harmed", note, cases, "wrong to"))
        return found

    def sample(self) -> list[Group]:
        """Pairs drawn at random, and always the same ones."""
        chosen = groups(self.report.concept, self.before, FORGET, RETAIN)
        failed = self.said.seen(ERASED)
        return [
            Group(f"sample-{place}", heading, "", self.pairs(rows, failed), len(rows))
            for place, (heading, rows) in enumerate(chosen.items(), 1)
            if rows
        ]

    def hero(self) -> Pair | None:
        """One pair, drawn at random among those that ask for the concept and of which the base
        shows it, as far as that is known."""
        rows = [row for row in self.before.rows if self.asks(row)] or self.before.rows
        shown = self.said.seen(BASE)
        rows = [row for row in rows if row.case in shown] or rows
        if not rows:
            return None
        return self.pairs([random.Random(0).choice(rows)], self.said.seen(ERASED), 512)[0]

    def asks(self, row: ImageRow) -> bool:
        """Whether a row asks for the concept."""
        return names_concept(row, self.report.concept)

    def _group(
        self, name: str, heading: str, note: str, cases: Mapping[int, list[str]], tag: str
    ) -> Group:
        rows = [row for row in self.before.rows if row.case in cases]
        rows.sort(key=lambda row: not self.asks(row))
        rest = [(first, second.file) for first, second in self._matched(rows[MOST:])]
        return Group(name, heading, note, self.pairs(rows[:MOST], cases), len(rows), tag, rest)

    def pairs(
        self, rows: Sequence[ImageRow], flags: Mapping[int, list[str]], side: int = 256
    ) -> list[Pair]:
        """The images of these rows.

        Args:
            rows: of the base.
            flags: case -> judges that call it a failure.
            side: longest of a large image, in pixels.
        """
        pairs = []
        for first, second in self._matched(rows):
            case, told = first.case, [(row, self.said.words(row, first.case)) for row in MODELS]
            images = self.before.image(first), self.after.image(second)
            before, after = (data_uri(image, side) for image in images)
            failed = flags.get(case, [])
            pairs.append(Pair(case, first.prompt, first.seed, before, after, told, failed))
        return pairs

    def _matched(self, rows: Sequence[ImageRow]) -> list[tuple[ImageRow, ImageRow]]:
        return matched(self.before, self.after, rows)

    def side(self) -> int:
        """Longest side of an image on the page, in its own pixels.

        Raises:
            ErasureError: the sets have no images.
        """
        if not self.before.rows:
            raise ErasureError(f"{self.before.folder} has no images to show; generate some")
        return max(self.before.image(self.before.rows[0]).size)


def multiples(side: int) -> dict[str, int]:
    """How many times its own size an image is drawn, for where it stands: on the wall, alone in the
    first screen, the same on a phone, enlarged."""
    room = {"wall": 128, "hero": 256, "phone": 160, "large": 480}
    return {place: max(width // max(side, 1), 1) for place, width in room.items()}
