"""Several concepts: which can be forgotten together or one after another, and what is retained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from erase.prompts.concepts import ConceptSpec, check_distinct
from erase.prompts.errors import ErasureError
from erase.prompts.names import Names, same
from erase.prompts.retain import without


def check_together(concepts: Sequence[ConceptSpec]) -> None:
    """Refuse concepts that cannot be forgotten in one go.

    Raises:
        ErasureError: none at all, two that have a name in common, or an anchor that is, or names,
            what is to be forgotten too.
    """
    if not concepts:
        raise ErasureError("no concept to erase was given")
    check_distinct(concepts)
    for concept, names in _named_by_anchors(concepts, concepts):
        if names := [name for name in names if name not in concept.names]:
            raise ErasureError(
                f"the anchor of {concept.target!r} is {concept.anchor!r}, and {names[0]!r} is to "
                "be forgotten as well; choose another anchor, or erase the concepts one at a time"
            )


def check_after(
    concepts: Sequence[ConceptSpec], earlier: Sequence[ConceptSpec], source: str
) -> None:
    """Refuse concepts that cannot be forgotten by a model that has forgotten others.

    Args:
        concepts: to be forgotten now.
        earlier: forgotten before.
        source: what errors call the earlier erasure.

    Raises:
        ErasureError: a concept that is gone already, or that an earlier anchor is or names, or an
            anchor that is, or names, what is gone.
    """
    gone = {same(name) for concept in earlier for name in concept.names}
    for name in (name for concept in concepts for name in concept.names):
        if same(name) in gone:
            raise ErasureError(
                f"{name!r} was erased by {source} already; leave it out, or erase again from "
                "the base if it is not gone"
            )
    for first, names in _named_by_anchors(earlier, concepts):
        if names:
            raise ErasureError(
                f"{source} draws {first.anchor!r} in the place of {first.target!r}, so that "
                f"{names[0]!r} must stay there; to forget both, erase {first.target!r} again with "
                "another anchor"
            )
    for concept, names in _named_by_anchors(concepts, earlier):
        if names:
            raise ErasureError(
                f"the anchor of {concept.target!r} is {concept.anchor!r}, and {source} erased "
                f"{names[0]!r}; choose another anchor"
            )


def _named_by_anchors(
    concepts: Sequence[ConceptSpec], others: Sequence[ConceptSpec]
) -> list[tuple[ConceptSpec, list[str]]]:
    """Each of the concepts, with the names of the others that its anchor is or holds."""
    listed = [name for other in others for name in other.names]
    alike, names = {same(name): [name] for name in listed}, Names(listed)
    anchors = dict.fromkeys(concept.anchor for concept in concepts)
    found = {anchor: alike.get(same(anchor)) or names.found(anchor) for anchor in anchors}
    return [(concept, found[concept.anchor]) for concept in concepts]


class Together:
    """Concepts that are forgotten together, and their anchors in texts."""

    def __init__(self, concepts: Sequence[ConceptSpec]) -> None:
        self._anchors = {name: concept.anchor for concept in concepts for name in concept.names}
        self._names = Names(self._anchors)
        self._found: dict[str, list[str]] = {}

    def anchor_templates(self, concept: ConceptSpec) -> tuple[str, ...]:
        """For each template of a concept the one for its anchor to stand in: where another of the
        concepts stands, its anchor does ("a {} in Neon style": "a {} in Flat style"). Else the
        answer to one would be held to show another."""
        return tuple(self.anchored(template, concept.names) for template in concept.templates)

    def anchored(self, text: str, but: Sequence[str] = ()) -> str:
        """The text with the anchors in the places of all names but these."""
        if text not in self._found:
            self._found[text] = self._names.found(text)
        gone = [name for name in self._found[text] if name not in but]
        return Names(gone).replaced(text, self._anchors) if gone else text


def anchored_pairs(concepts: Sequence[ConceptSpec]) -> list[list[tuple[str, str]]]:
    """Of each of the concepts that are forgotten together, its pairs of forget and anchor prompt
    (`ConceptSpec.pairs`); no anchor prompt's template names another of them."""
    together = Together(concepts)
    return [concept.pairs(together.anchor_templates(concept)) for concept in concepts]


def retained_prompts(
    concepts: Sequence[ConceptSpec], earlier: Sequence[ConceptSpec] = ()
) -> tuple[str, ...]:
    """The retain prompts of concepts that are forgotten together, each once, less those that name
    one of them; and `earlier_prompts`, each concept's as often as any other's: repeated until those
    of the longest list have come once."""
    listed = dict.fromkeys(prompt for concept in concepts for prompt in concept.retain)
    kept = without(listed, [name for concept in concepts for name in concept.names])
    before = earlier_prompts(earlier, concepts)
    longest = max(map(len, before), default=0)
    return kept + tuple(own[i % len(own)] for i in range(longest) for own in before)


def earlier_prompts(
    earlier: Sequence[ConceptSpec], concepts: Sequence[ConceptSpec]
) -> list[tuple[str, ...]]:
    """Of each concept that was forgotten before, its prompts, less those that name what is to be
    forgotten now: what a model must go on answering as it does. One that has none left is left
    out."""
    names = [name for concept in concepts for name in concept.names]
    left = [without(dict(concept.pairs()), names) for concept in earlier]
    return [prompts for prompts in left if prompts]


def merged(concepts: Sequence[ConceptSpec]) -> list[ConceptSpec]:
    """The concepts, each once: of several whose names are the same to `same`, the first.

    Raises:
        ErasureError: two concepts of one target that differ in more.
    """
    first: dict[str, ConceptSpec] = {}
    for concept in concepts:
        earlier = first.setdefault(same(concept.target), concept)
        if replace(concept, target=earlier.target, anchor=earlier.anchor) != earlier or same(
            concept.anchor
        ) != same(earlier.anchor):
            raise ErasureError(
                f"the concept {concept.target!r} is given twice, and not in the same way (its "
                f"anchors are {earlier.anchor!r} and {concept.anchor!r}); leave one of them out"
            )
    return list(first.values())
