"""A whole concept from its name alone: shipped concepts by any of their names, others by the rules
of their kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from erase.prompts.concepts import ConceptSpec, load_concepts, shipped
from erase.prompts.errors import ErasureError, unknown
from erase.prompts.names import ARTICLES, fold
from erase.prompts.reading import DATA, as_mapping, as_text, as_texts, read_yaml
from erase.prompts.retain import load_retain, without

KINDS = DATA / "kinds"
# ends the names of files that hold a paper's setting: for its recipes, not for everyone
PUBLISHED = "-salun"
NAMED_FOR_ONE = ("artist", "person")  # their last word is a name too: "Kahlo"


@dataclass(frozen=True)
class Kind:
    """Proposals for concepts of one kind; one YAML file each in `prompts/data/kinds/`."""

    name: str
    axis: str
    """the proposal's `ConceptSpec.kind`"""
    anchors: tuple[str, ...]
    """the first that is not the concept itself is taken, where `known` says nothing"""
    retain: str
    """a list of `erase.prompts.retain`"""
    templates: tuple[str, ...]
    known: Mapping[str, tuple[str, ...]]
    """anchor -> names that are known to be of this kind and have this anchor"""

    def anchor(self, name: str) -> str:
        """The anchor of `name`: that of the group in which it is known, else the first of `anchors`
        that is not itself."""
        group = next(
            (anchor for anchor, names in self.known.items() if bare(name) in map(bare, names)), None
        )
        return next(a for a in ((group,) if group else ()) + self.anchors if bare(a) != bare(name))

    def also_gone(self, name: str) -> list[str]:
        """Further names that no retain prompt may have: the last word of a person's name, and the
        members of a group."""
        last = [name.split()[-1]] if self.name in NAMED_FOR_ONE else []
        return last + [
            one
            for anchor, names in self.known.items()
            if bare(anchor) == bare(name)
            for one in names
        ]

    def knows(self, name: str) -> bool:
        """Whether `name` is in one of the groups, or is the word for one."""
        return any(
            bare(name) in map(bare, (anchor, *names)) for anchor, names in self.known.items()
        )


@cache
def kinds() -> dict[str, Kind]:
    """Kind name ("artist", "object", "person", "style") -> what is proposed for it."""
    return {path.stem: _kind(path.stem, read_yaml(path)) for path in sorted(KINDS.glob("*.yaml"))}


def _kind(name: str, raw: object) -> Kind:
    data = as_mapping(raw, ("axis", "anchors", "retain", "templates", "known"), name)
    known = data["known"] if isinstance(data["known"], Mapping) else {}
    return Kind(
        name,
        as_text(data["axis"], f"{name}: axis"),
        as_texts(data["anchors"], f"{name}: anchors"),
        as_text(data["retain"], f"{name}: retain"),
        as_texts(data["templates"], f"{name}: templates"),
        {anchor: as_texts(names, f"{name}: {anchor}") for anchor, names in known.items()},
    )


def propose(name: str, kind: str | None = None) -> ConceptSpec:
    """A concept to forget, from its name: a starting point to look at and to edit (see
    `erase.prompts.concepts.to_yaml`).

    For the name of a shipped file ("nudity") or any name in one ("Vincent van Gogh", "chainsaw"),
    it is the shipped concept, whatever the kind. Otherwise the kind gives templates, the anchor and
    the retain prompts, less those that name the concept.

    Args:
        name: as prompts name it; case, accents and a leading article do not matter for finding it.
        kind: "artist", "object", "person" or "style"; by default the kind whose list has the name.

    Raises:
        ErasureError: an unknown kind, none given for a name that no list has, or a name that leaves
            nothing to retain.
    """
    as_text(name, "the name of a concept")
    if kind is not None and kind not in kinds():
        raise unknown("kind", kind, kinds())
    if concept := find_shipped(name):
        return concept
    chosen = kinds()[kind] if kind else _infer(name)
    target = _target(name, chosen)
    retain = without(load_retain(chosen.retain), [target, *chosen.also_gone(target)])
    if not retain:
        raise ErasureError(
            f"{name!r} stands in every prompt of the retain list {chosen.retain!r}; give an "
            "--anchor and --retain prompts"
        )
    return ConceptSpec(target, chosen.anchor(target), (), chosen.templates, retain, chosen.axis)


def known(name: str) -> bool:
    """Whether `propose` knows the name without its kind."""
    return bool(find_shipped(name)) or any(kind.knows(name) for kind in kinds().values())


def find_shipped(name: str) -> ConceptSpec | None:
    """The shipped concept of this name: a file's that holds one concept, a target or a synonym;
    None where there is none."""
    return next((concept for concept, names in _shipped() if bare(name) in names), None)


@cache
def _shipped() -> list[tuple[ConceptSpec, set[str]]]:
    """Every shipped concept that is for everyone, and what it answers to."""
    entries = []
    for file in shipped():
        if file.endswith(PUBLISHED):
            continue
        concepts = load_concepts(file)
        alone = [file] if len(concepts) == 1 else []
        for concept in concepts:
            entries.append((concept, {bare(name) for name in (*concept.names, *alone)}))
    return entries


def bare(name: str) -> str:
    """`name` for comparing: folded, hyphens as spaces, without a leading article or "style" at its
    end."""
    words = fold(name).replace("-", " ").split()
    words = words[:-1] if len(words) > 1 and words[-1] == "style" else words
    return " ".join(words[1:] if len(words) > 1 and words[0] in ARTICLES else words)


def _target(name: str, kind: Kind) -> str:
    """`name` as the kind's templates want it: "a {}" brings its own article, "in {} style" its own
    word."""
    words = name.split()
    if kind.name == "object" and len(words) > 1 and words[0].lower() in ARTICLES:
        return " ".join(words[1:])
    return " ".join(
        words[:-1]
        if kind.axis == "style" and len(words) > 1 and words[-1].lower() == "style"
        else words
    )


def _infer(name: str) -> Kind:
    """The one kind whose lists have the name; a name that ends in "style" is a style."""
    matches = [kind for kind in kinds().values() if kind.knows(name)]
    if not matches and len(name.split()) > 1 and name.split()[-1].lower() == "style":
        return kinds()["style"]
    if len(matches) == 1:
        return matches[0]
    what = (
        "could be of more than one kind"
        if matches
        else "is on none of the lists of names, so its kind cannot be told"
    )
    raise ErasureError(
        f"{name!r} {what}; add --kind with one of: {', '.join(kinds())}, or give an --anchor to "
        "put in its place and --retain prompts"
    )
