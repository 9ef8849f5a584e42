"""The runs' images side by side, prompt by prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from erase.eval.comparing.runs import Run
from erase.eval.comparing.table import Comparison
from erase.eval.images import ImageRow, ImageSet
from erase.eval.report.figures import data_uri
from erase.eval.report.report import BASE, ERASED
from erase.eval.report.wall import groups, spread_out
from erase.eval.report.words import either

PARTED, ASKING, OTHERS = 12, 10, 10
"""prompts on the page: where the judge tells the runs apart, of the concept, of other things"""
Asked = tuple[str, int]
"""prompt and seed"""


@dataclass(frozen=True)
class Word:
    """What a judge says of an image."""

    text: str
    good: bool


@dataclass(frozen=True)
class Picture:
    """One image, or none where a run has none of this prompt."""

    column: str
    source: str
    word: Word | None


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
    words = {BASE: _words(owner, BASE, concept)}
    words |= {run.name: _words(run, ERASED, concept) for run in runs}
    told = [words[run.name] for run in runs]
    parted = [row for row in base.rows if _parted(row, told)]
    shown = {"Where the judge tells the runs apart": spread_out(parted, PARTED)}
    shown |= groups(concept, base, ASKING, OTHERS)
    sets = {BASE: base}
    sets |= {run.name: run.images[ERASED] for run in runs if ERASED in run.images}
    found, strips = {name: _by_prompt(images) for name, images in sets.items()}, {}
    for heading, rows in shown.items():
        strips[heading] = [_strip(row, comparison.columns, sets, found, words) for row in rows]
    side = max(base.image(base.rows[0]).size)
    return Wall({heading: some for heading, some in strips.items() if some}, side, missing)


def _by_prompt(images: ImageSet) -> dict[Asked, ImageRow]:
    return {_asked(row): row for row in images.rows}


def _asked(row: ImageRow) -> Asked:
    return row.prompt, row.seed


def _parted(row: ImageRow, words: Sequence[Mapping[Asked, Word]]) -> bool:
    told = [of_run.get(_asked(row)) for of_run in words]
    return len({word.text for word in told if word}) > 1


def _strip(
    row: ImageRow,
    columns: Sequence[str],
    sets: Mapping[str, ImageSet],
    found: Mapping[str, Mapping[Asked, ImageRow]],
    words: Mapping[str, Mapping[Asked, Word]],
) -> Strip:
    pictures = []
    for column in columns:
        own = found.get(column, {}).get(_asked(row))
        source = data_uri(sets[column].image(own)) if own else ""
        pictures.append(Picture(column, source, words[column].get(_asked(row))))
    return Strip(row.prompt, row.seed, pictures)


def _words(run: Run, row: str, concept: Mapping[str, Any]) -> dict[Asked, Word]:
    """What the first judge of each kind says of a run's images, as far as it is known."""
    images = run.images.get(row)
    if images is None or run.kept is None:
        return {}
    asked = {one.case: _asked(one) for one in images.rows}
    target = either(concept)
    says = {
        "UA": (Word(f"{target} seen", False), Word(f"no {target} seen", True)),
        "IRA": (Word("wrong", False), Word("right", True)),
        "NudeNet image rate": (Word("not flagged", True), Word("flagged", False)),
    }
    words: dict[Asked, Word] = {}
    for name, outcomes in run.kept.outcomes.get(row, {}).items():
        no, yes = says.get(name.rpartition(": ")[2], (None, None))
        for case, value in outcomes:
            word = yes if value > 0 else no
            if word and case in asked:
                words.setdefault(asked[case], word)
    return words
