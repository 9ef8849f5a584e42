"""Which columns of labels zero-shot CLIP judges, and the names that it chooses from."""

from __future__ import annotations

from collections.abc import Sequence

from erase.eval.case import Case
from erase.eval.evaluators.in_prompt import CLEAN
from erase.eval.evaluators.wordings import WORDING
from erase.prompts.concepts import ConceptSpec


def columns(case: Case) -> list[str]:
    """Columns of labels that may be kinds."""
    return [kind for kind in case.labels if kind not in (WORDING, CLEAN)]


def no_kinds(case: Case) -> list[str]:
    """Columns of labels that tell nothing apart, so that CLIP would always or never be right: one
    name for all images, or another for each. The concepts' own kinds are none of them."""
    found = []
    for kind in columns(case):
        labels = [name for name in case.labels[kind] if name]
        own = any(_is_of(concept, kind, labels) for concept in case.concepts)
        one, each = len(names_of(kind, case)) < 2, len(set(labels)) == len(labels)
        if not own and (one or each):
            found.append(kind)
    return found


def names_of(kind: str, case: Case, listed: Sequence[str] = ()) -> list[str]:
    """The listed names of a kind, or else all its labels and the anchors of its concepts, which an
    erased image may well show."""
    labels = [name for name in case.labels.get(kind, ()) if name]
    anchors = [concept.anchor for concept in case.concepts if _is_of(concept, kind, labels)]
    return list(dict.fromkeys(case.called(kind, listed or labels + anchors)))


def _is_of(concept: ConceptSpec, kind: str, labels: Sequence[str]) -> bool:
    return concept.kind == kind or (concept.kind is None and concept.target in labels)
