"""Wordings of the embedded world: its captions name an object, a style and a colour, and whatever
names none of them says nothing to its model. So there are no descriptions, superclasses or scenes.

Of a concept: `name`, in the caption of the answer set; `variant`, its synonyms there; `rewording`,
its name in captions that the model was not trained on; `indirect`, its synonyms in those. To keep:
`hard`, its nearest of its kind, and `random`, all others.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from erase.prompts.canvas import KINDS, check_canvas, vocabulary
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError, unknown
from erase.prompts.reading import DATA, read_yaml

CANVAS_WORDINGS = ("name", "variant", "rewording", "indirect", "hard", "random")
KEPT = ("hard", "random")


@dataclass(frozen=True)
class CanvasBook:
    """What `prompts/data/wordings/canvas.yaml` holds."""

    templates: tuple[str, ...]
    """captions that the base draws right and was not trained on"""
    neighbours: Mapping[str, Mapping[str, Sequence[str]]]
    """kind -> concept -> the nearest of its kind, nearest first"""


@cache
def canvas_book() -> CanvasBook:
    """The embedded world's wordings and neighbours."""
    content = read_yaml(DATA / "wordings" / "canvas.yaml")
    assert isinstance(content, dict)  # of our own data
    return CanvasBook(tuple(content["templates"]), content["neighbours"])


def canvas_rows(
    concepts: Sequence[ConceptSpec], wordings: Sequence[str], cells: int
) -> list[tuple[str, dict[str, str]]]:
    """(prompt, labels) of each row: object, style, colour and wording.

    Args:
        concepts: of the embedded world.
        wordings: some of `CANVAS_WORDINGS`.
        cells: prompts of each wording of each concept, spread over what the prompt names beside it.

    Raises:
        ErasureError: an unknown wording, a concept of another world, nothing that would be kept.
    """
    for wording in wordings:
        if wording not in CANVAS_WORDINGS:
            raise unknown("wording of canvas", wording, CANVAS_WORDINGS)
    check_canvas(concepts)
    gone = {concept.target for concept in concepts}
    told: dict[str, dict[str, str]] = {}
    for concept in concepts:
        for wording in wordings:
            for prompt, cell in _prompts(concept.target, wording, gone, cells):
                told.setdefault(prompt, {**cell, "wording": wording})
    return list(told.items())


def _prompts(
    target: str, wording: str, gone: set[str], count: int
) -> list[tuple[str, dict[str, str]]]:
    """Prompts of one wording of a concept, and the cell that each should show."""
    vocab, kind = vocabulary(), vocabulary().kind_of(target)
    if kind is None:
        raise unknown("canvas concept", target, [n for k in KINDS for n in vocab.names(k)])
    names = [target]
    if wording in KEPT:
        near = canvas_book().neighbours[kind][target]
        others = [name for name in vocab.names(kind) if name not in near]
        names = [name for name in (near if wording == "hard" else others) if name not in gone]
        if not names:
            raise ErasureError(
                f"all {kind}s that are {wording} to {target!r} are forgotten too; leave the "
                f"wording {wording!r} out"
            )
    rng, new = random.Random(f"{target} {wording}"), canvas_book().templates
    told: list[tuple[str, dict[str, str]]] = []
    for cell in _cells(kind, names, gone, rng)[:count]:
        synonyms, place = vocab.synonyms[kind][cell[kind]], len(told)
        word = synonyms[place % len(synonyms)] if wording in ("variant", "indirect") else cell[kind]
        caption = new[place % len(new)] if wording in ("rewording", "indirect") else vocab.grid
        told.append((caption.format(**{**cell, kind: word}), cell))
    return told


def _cells(
    kind: str, names: Sequence[str], gone: set[str], rng: random.Random
) -> list[dict[str, str]]:
    """The cells of these names without what is forgotten of other kinds, in a mixed order that
    takes each name as often."""
    others: list[dict[str, str]] = []
    for cell in vocabulary().cells():
        beside = {name for other, name in cell.items() if other != kind}
        if cell[kind] == names[0] and gone.isdisjoint(beside):
            others.append(cell)
    rng.shuffle(others)
    return [{**cell, kind: name} for cell in others for name in names]
