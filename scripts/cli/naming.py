"""The concepts that a command line means: by name, from files, some of a file's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from erase.prompts.canvas import EMBEDDED, canvas_concept, check_canvas, vocabulary
from erase.prompts.concepts import ConceptSpec, load_concepts, shipped
from erase.prompts.errors import ErasureError, counted, near_name, unknown
from erase.prompts.proposals import find_shipped, known, propose
from erase.prompts.several import merged
from erase.scripts.cli.running import note


@dataclass(frozen=True)
class _Named:
    """The parts of a concept that is given by name."""

    name: str
    anchor: str | None
    retain: tuple[str, ...]
    kind: str | None


def read_concepts(
    names: Sequence[str],
    anchors: Sequence[str],
    file: str | Sequence[str] | None,
    model: str,
    retain: Sequence[str],
    kind: str | None = None,
) -> list[ConceptSpec]:
    """Concepts from files, some of a file's, and concepts by name.

    A name that one of the files has picks it, and the file's others are left out; any other name is
    one more concept: a word of the embedded world on `canvas`; elsewhere as it is given, or, where
    anchor or retain prompts are left out, as `erase.prompts.proposals` proposes it, with a line
    about it on stderr. A concept that is given twice is taken once.

    Raises:
        ErasureError: no concept; a file or name that is not known; anchors that do not pair; one
            concept in two ways; or, on canvas, one that it does not know.
    """
    files = [file] if isinstance(file, str) else list(file or ())
    loaded, left = _from_files(files, names, model)
    if files and not left and (anchors or retain or kind):
        raise ErasureError(
            "--anchor, --retain and --kind do not go with --concepts; write them into a copy of "
            f"{files[0]}"
        )
    if not loaded and not left:
        raise ErasureError(
            "no concept was given; name one with --concept (on canvas, e.g. heart), or a file with "
            "--concepts"
        )
    if anchors and len(anchors) != len(left):
        where = " (those of --concepts have theirs)" if files else ""
        raise ErasureError(
            f"{counted(len(left), 'concept')} but {counted(len(anchors), 'anchor')}{where}; give "
            "one --anchor for each --concept, in the same order"
        )
    if left and model in EMBEDDED and (retain or kind):
        raise ErasureError(
            "canvas brings its own retain prompts and kinds; leave out --retain and --kind, or use "
            "--concepts"
        )
    wanted: Sequence[str | None] = anchors or [None] * len(left)
    named = [
        _Named(name, anchor, tuple(retain), kind) for name, anchor in zip(left, wanted, strict=True)
    ]
    concepts = merged(
        [*loaded, *(_canvas(one) if model in EMBEDDED else _by_name(one) for one in named)]
    )
    if model in EMBEDDED:
        check_canvas(concepts)
    return concepts


def concepts_named(words: Sequence[str], model: str | None) -> list[ConceptSpec]:
    """Concepts to judge by, of one option that takes names and files alike.

    A word is a `.yaml` file or a shipped one's name; a name that such a file has, which then picks
    it; a name that `erase.prompts.proposals` knows; or one of the embedded world's, which goes
    before where there is no model (None) but finished images.

    Raises:
        ErasureError: a name that none of these know; a file that cannot be read.
    """
    files = [word for word in words if word in shipped() or Path(word).suffix in (".yaml", ".yml")]
    names = [word for word in words if word not in files]
    loaded, left = _from_files(files, names, model)
    concepts = merged([*loaded, *(_to_judge(name, model) for name in left)])
    if model in EMBEDDED:
        check_canvas(concepts)
    return concepts


def _to_judge(name: str, model: str | None) -> ConceptSpec:
    of_canvas = vocabulary().find(name) is not None
    if model in EMBEDDED or (model is None and of_canvas):
        return canvas_concept(name)
    if known(name):
        return propose(name)
    if of_canvas:
        return canvas_concept(name)
    raise ErasureError(
        f"{name!r} is on none of the lists of names, so its synonyms and kind are not known; write "
        "them into a YAML file (target, anchor, synonyms, kind), and give that as --concepts"
    )


def _from_files(
    files: Sequence[str], names: Sequence[str], model: str | None
) -> tuple[list[ConceptSpec], list[str]]:
    """The files' concepts, or those of a file that `names` pick, in the file's order; and the names
    that no file has."""
    loaded = {file: load_concepts(file) for file in files}
    targets = {concept.target for concepts in loaded.values() for concept in concepts}
    left = [name for name in names if name not in targets]
    for name in left:
        _check_spelling(name, loaded, model)
    result: list[ConceptSpec] = []
    for concepts in loaded.values():
        picked = [concept for concept in concepts if concept.target in names]
        result += picked or concepts
    return result, left


def _check_spelling(name: str, loaded: dict[str, list[ConceptSpec]], model: str | None) -> None:
    """Refuse a name that is nearly one of a file's concepts, and no other concept's."""
    if model not in EMBEDDED and find_shipped(name):
        return
    for file, concepts in loaded.items():
        targets = [concept.target for concept in concepts]
        if near_name(name, targets):
            raise unknown(f"concept of {file}", name, targets)


def _canvas(named: _Named) -> ConceptSpec:
    return canvas_concept(named.name, named.anchor)


def _by_name(named: _Named) -> ConceptSpec:
    shipped = find_shipped(named.name)
    if named.anchor and named.retain and not named.kind:
        return ConceptSpec(target=named.name.strip(), anchor=named.anchor, retain=named.retain)
    concept = propose(named.name, named.kind)
    concept = replace(
        concept, anchor=named.anchor or concept.anchor, retain=named.retain or concept.retain
    )
    idle = (
        f"; it is a shipped concept, so --kind {named.kind} is not asked"
        if shipped and named.kind
        else ""
    )
    note(
        f"proposed for {named.name!r}: {concept.target} -> {concept.anchor}, "
        f"{counted(len(concept.names), 'name')}, {counted(len(concept.templates), 'template')} "
        f"({concept.templates[0]!r}, ...), {counted(len(concept.retain), 'retain prompt')} "
        f"({concept.retain[0]!r}, ...){idle}; add --propose to see all of it as YAML, which "
        "--concepts reads"
    )
    return concept
