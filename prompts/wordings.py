"""Prompt sets that ask for the concepts of one erasure in several wordings, and for others.

The wordings are those of EMMA (Wei et al., CVPR 2026), the sentences our own: `name`, the concept's
name; `variant`, its other names; `short` and `long`, descriptions without a name; `hard`, its
neighbours; `random`, other concepts. The last two must stay. Each row's labels are its wording and,
as the concept's kind, what its image should show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from erase.prompts.canvas_wordings import canvas_rows
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError, unknown
from erase.prompts.names import same
from erase.prompts.prompt_rows import SENSITIVE, PromptRow, mark_in
from erase.prompts.prompt_sets import PromptSet
from erase.prompts.reading import DATA, as_mapping, as_text, as_texts, read_yaml

BOOKS = DATA / "wordings"
CANVAS = "canvas"
SENTENCES = ("short", "long")
"""wordings that are whole prompts"""
WORDINGS = ("name", "variant", *SENTENCES, "hard", "random")
LISTS = ("variant", *SENTENCES, "hard")
"""what a book may say of a concept"""


@dataclass(frozen=True)
class Book:
    """Prompts for each concept that it knows."""

    where: str
    kind: str
    template: str
    """with one {} for a name"""
    concepts: Mapping[str, Mapping[str, tuple[str, ...]]]
    """concept -> one of `LISTS` -> sentences, or names of variants and of neighbours"""
    sensitive: bool | None = None
    """see `PromptSet`"""

    def rows(self, concept: ConceptSpec, wording: str, gone: set[str]) -> list[tuple[str, str]]:
        """(prompt, label) of one wording of a concept.

        Args:
            concept: one that the book knows.
            wording: one of `WORDINGS`.
            gone: names, as `same` gives them, that are forgotten too and no neighbours therefore.
        """
        own = self.concepts[concept.target]
        if wording in SENTENCES:
            return [(sentence, concept.target) for sentence in own[wording]]
        if wording in ("name", "variant"):
            variants = own["variant"] or concept.synonyms
            names = [concept.target] if wording == "name" else list(variants)
            return [(self.template.replace("{}", name), concept.target) for name in names]
        others = own["hard"] if wording == "hard" else set(self.concepts) - set(own["hard"])
        kept = [name for name in others if same(name) not in gone]
        return [(self.template.replace("{}", name), name) for name in sorted(kept)]


def books() -> list[str]:
    """Names of the shipped books; canvas has another form."""
    return sorted(path.stem for path in BOOKS.glob("*.yaml") if path.stem != CANVAS)


def load_book(source: str) -> Book:
    """A shipped book, or a .yaml file: `kind`, `template`, and `concepts`, concept -> some of the
    lists `variant`, `short`, `long` and `hard`; it may say `sensitive`, true or false.

    Raises:
        ErasureError: no such book, a missing or unknown key, a bad value.
    """
    path = BOOKS / f"{source}.yaml" if source in books() else Path(source)
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise ErasureError(f"{unknown('book of wordings', source, books())}; or give a .yaml file")
    keys = ("kind", "template", "concepts")
    content = as_mapping(read_yaml(path), (*keys, SENSITIVE), path)
    for key in keys:
        if key not in content:
            raise ErasureError(f"{path} has no {key!r}; add a line `{key}: …`")
    template = as_text(content["template"], f"{path}: template")
    if template.count("{}") != 1:
        raise ErasureError(f"{path}: the template {template!r} needs one {{}} for the name")
    if not isinstance(content["concepts"], Mapping):
        raise ErasureError(f"{path}: concepts must be a mapping, name -> {', '.join(LISTS)}")
    concepts = {}
    for name, value in content["concepts"].items():
        lists = as_mapping(value, LISTS, f"{path}: {name}")
        concepts[str(name)] = {
            wording: as_texts(lists.get(wording, ()), f"{path}: {name}: {wording}")
            for wording in LISTS
        }
    sensitive = mark_in(content, path)
    return Book(source, as_text(content["kind"], f"{path}: kind"), template, concepts, sensitive)


def worded(
    concepts: Sequence[ConceptSpec],
    source: str,
    wordings: Sequence[str],
    seeds: Sequence[int],
    cells: int = 24,
) -> PromptSet:
    """The prompts of these wordings for these concepts, each drawn from each seed.

    Args:
        concepts: what was forgotten; a variant is the book's, or else one of its synonyms.
        source: `canvas`, a shipped book or a file (`load_book`).
        wordings: those of `WORDINGS`; canvas has its own (`erase.prompts.canvas_wordings`).
        seeds: one or more.
        cells: on canvas: prompts of each wording of each concept.

    Raises:
        ErasureError: an unknown wording, a concept that the book has no page for, or none of the
            prompts of a wording.
    """
    if not seeds:
        raise ErasureError("prompts by wording need one seed or more; give some")
    sensitive: bool | None = False
    if source == CANVAS:
        told = canvas_rows(concepts, wordings, cells)
    else:
        book = load_book(source)
        told, sensitive = _of_book(book, concepts, wordings), book.sensitive
    rows = [
        PromptRow(place * len(seeds) + nth, prompt, seed, None, labels)
        for place, (prompt, labels) in enumerate(told)
        for nth, seed in enumerate(seeds)
    ]
    slug = "-".join(concept.slug for concept in concepts)
    return PromptSet(f"{Path(source).stem}-wordings-{slug}"[:120], tuple(rows), sensitive)


def _of_book(
    book: Book, concepts: Sequence[ConceptSpec], wordings: Sequence[str]
) -> list[tuple[str, dict[str, str]]]:
    gone = {same(name) for concept in concepts for name in concept.names}
    told: dict[str, dict[str, str]] = {}
    for concept in concepts:
        if concept.target not in book.concepts:
            what = f"concept of the book {book.where}:"
            raise ErasureError(
                f"{unknown(what, concept.target, book.concepts)}; or give a prompt set of your own "
                "with the label `wording`, by --prompts"
            )
        for wording in wordings:
            if wording not in WORDINGS:
                raise unknown("wording", wording, WORDINGS)
            for prompt, label in book.rows(concept, wording, gone):
                told.setdefault(prompt, {book.kind: label, "wording": wording})
    for wording in wordings:
        if all(labels["wording"] != wording for labels in told.values()):
            raise ErasureError(
                f"the book {book.where} has no prompts by {wording!r} for this erasure; give the "
                "concept synonyms, or leave the wording out"
            )
    return list(told.items())
