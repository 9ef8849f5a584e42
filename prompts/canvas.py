"""The words of the embedded world: its concepts, their synonyms, its captions."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from itertools import product

import yaml

from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError, unknown
from erase.prompts.names import same

KINDS = ("object", "style", "colour")
CAPTIONS_PER_CELL = 2  # retain prompts of a cell, beside its grid prompt


@dataclass(frozen=True)
class Vocabulary:
    """Concepts of each kind, in class-index order, with their synonyms and the caption
    templates."""

    synonyms: dict[str, dict[str, list[str]]]
    """kind -> concept -> its other names"""
    templates: tuple[str, ...]
    """captions the base was trained on, with {object}, {style}, {colour} fields"""
    grid: str
    """the template of the evaluation's answer set"""
    anchors: dict[str, dict[str, str]] = field(default_factory=dict)
    """kind -> concept, or `others` -> its anchor; kinds without any go round"""

    def names(self, kind: str) -> list[str]:
        """Concept names of one kind; the position is the judges' class index."""
        return list(self.synonyms[kind])

    def kind_of(self, concept: str) -> str | None:
        """`object`, `style` or `colour`, or None for a word that this world does not have."""
        return next((kind for kind in KINDS if concept in self.synonyms[kind]), None)

    def find(self, name: str) -> str | None:
        """The concept of this name or synonym, whatever its case, accents, hyphens and blanks; None
        for a word that this world does not have."""
        for kind in KINDS:
            for concept, others in self.synonyms[kind].items():
                if same(name) in map(same, (concept, *others)):
                    return concept
        return None

    def anchor(self, name: str) -> str:
        """The default anchor of a concept: the one that is named for it or for the others of its
        kind, else the next of its kind."""
        kind = self.kind_of(name) or ""
        names, named = self.names(kind), self.anchors.get(kind, {})
        return named.get(name) or named.get("others") or names[(names.index(name) + 1) % len(names)]

    def cells(self) -> list[dict[str, str]]:
        """Every combination of concepts: one dict of kind -> name per cell of the grid."""
        return [dict(zip(KINDS, row, strict=True)) for row in product(*map(self.names, KINDS))]

    def caption(
        self, cell: dict[str, str], rng: random.Random, p_empty: float = 0.1, p_synonym: float = 0.3
    ) -> str:
        """A training caption of `cell`: empty with `p_empty` (classifier-free guidance), each name
        a synonym with `p_synonym`."""
        if rng.random() < p_empty:
            return ""
        words = {
            kind: rng.choice(self.synonyms[kind][name]) if rng.random() < p_synonym else name
            for kind, name in cell.items()
        }
        return rng.choice(self.templates).format(**words)


EMBEDDED = ("canvas", "canvas-flow")
"""the checkpoints that ship with this package and draw this world: a UNet and a flow transformer"""


@cache
def vocabulary() -> Vocabulary:
    """The embedded world's vocabulary, read from `prompts/data/canvas.yaml`."""
    raw = yaml.safe_load(
        files("erase.prompts").joinpath("data/canvas.yaml").read_text(encoding="utf-8")
    )
    return Vocabulary(
        {kind: raw[kind] for kind in KINDS}, tuple(raw["templates"]), raw["grid"], raw["anchors"]
    )


def canvas_concept(name: str, anchor: str | None = None) -> ConceptSpec:
    """A concept of the embedded world, to forget.

    Args:
        name: an object, a style or a colour of the vocabulary, or a synonym of one
            (`Vocabulary.find`); its synonyms go with it.
        anchor: a concept of the same kind, named likewise; by default the vocabulary's choice (see
            `Vocabulary.anchor`).

    Returns:
        Templates: every caption that names the kind, the other slots filled in all ways. Retain
            prompts: for each cell without
        `name`, its grid prompt and two captions, in a mixed order that never changes. Only captions
        that name the kind are
        used: "a red image" may well show the concept.

    Raises:
        ErasureError: a name that this world does not have (the near one is suggested), or an anchor
            of another kind.
    """
    vocab, name = vocabulary(), _known(name)
    kind = _kind(name)
    anchor = vocab.anchor(name) if anchor is None else _known(anchor)
    if _kind(anchor) != kind:
        raise ErasureError(
            f"{anchor!r} is no {kind}, as {name!r} is; choose as anchor one of: "
            f"{', '.join(vocab.names(kind))}"
        )
    naming = replace(vocab, templates=tuple(t for t in vocab.templates if f"{{{kind}}}" in t))
    templates = (
        t.format(**{**cell, kind: "{}"}) for t in naming.templates for cell in vocab.cells()
    )
    synonyms = tuple(vocab.synonyms[kind][name])
    return ConceptSpec(
        name, anchor, synonyms, tuple(dict.fromkeys(templates)), _retain(naming, kind, name), kind
    )


def check_canvas(concepts: Iterable[ConceptSpec]) -> None:
    """Refuse concepts that the embedded world has no words for: to the model they are noise, and
    nothing would be forgotten.

    Raises:
        ErasureError: a target with a word that no caption of this world has.
    """
    for concept in concepts:
        if strange := strange_words(concept.target):
            raise ErasureError(
                f"canvas, the embedded model, does not know {concept.target!r}: it has never seen "
                f"the word {strange[0]!r}; name the checkpoint with --model "
                f"(`EraseConfig(model=...)`), or choose one of: {', '.join(concept_names())}"
            )


def strange_words(text: str) -> list[str]:
    """The words of a text that the embedded model has never seen."""
    return [word for word in _words(text) if word not in _known_words()]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


@cache
def _known_words() -> frozenset[str]:
    """Every word of the captions that the embedded model was trained on, in lower case, as its
    tokenizer reads them."""
    vocab = vocabulary()
    synonyms = [
        other for kind in KINDS for others in vocab.synonyms[kind].values() for other in others
    ]
    fixed = [re.sub(r"\{\w+\}", " ", template) for template in (*vocab.templates, vocab.grid)]
    return frozenset(
        word for text in (*concept_names(), *synonyms, *fixed) for word in _words(text)
    )


def concept_names() -> list[str]:
    """What the embedded models draw, of all kinds, each by its first name."""
    return [name for kind in KINDS for name in vocabulary().names(kind)]


def _known(name: str) -> str:
    concept = vocabulary().find(name)
    if concept is None:
        raise unknown("canvas concept", name, concept_names())
    return concept


def _kind(name: str) -> str:
    return next(kind for kind in KINDS if name in vocabulary().synonyms[kind])


def _retain(vocab: Vocabulary, kind: str, name: str) -> tuple[str, ...]:
    rng, prompts = random.Random(name), []
    for cell in vocab.cells():
        if cell[kind] != name:
            prompts += [
                vocab.grid.format(**cell),
                *(vocab.caption(cell, rng, p_empty=0) for _ in range(CAPTIONS_PER_CELL)),
            ]
    rng.shuffle(prompts)
    return tuple(dict.fromkeys(prompts))
