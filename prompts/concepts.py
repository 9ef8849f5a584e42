"""Concepts: the thing to forget, the anchor in its place, the prompts to keep."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import yaml

from erase.prompts.errors import ErasureError, unknown
from erase.prompts.names import same
from erase.prompts.reading import DATA, as_mapping, as_text, as_texts, read_yaml
from erase.prompts.retain import load_retain, without

TEMPLATES = ("a photo of {}", "an image of {}", "a picture of {}", "{}")

MOST_PAIRS = 1_000_000  # templates times names


@dataclass(frozen=True)
class ConceptSpec:
    """A concept to forget, with the safe concept that takes its place.

    Names lose the blanks around them, and have one where they had several.

    Raises:
        ErasureError: an empty target, anchor, template list or prompt; an anchor that is the target
            or one of its synonyms, whatever its case, accents, blanks, hyphens and article; a
            template without exactly one `{}`.
    """

    target: str
    """the concept that must go, as prompts name it"""
    anchor: str
    """what the model is to draw instead"""
    synonyms: tuple[str, ...] = ()
    """other names that must go too"""
    templates: tuple[str, ...] = TEMPLATES
    """prompts with one `{}` where the concept stands"""
    retain: tuple[str, ...] = ()
    """prompts whose images must stay as they are"""
    kind: str | None = None
    """the axis it is judged on, a label of the prompt set (object, style, class): IRA is the same
    kind, CRA the others"""

    def __post_init__(self) -> None:
        where = f"concept {as_text(self.target, 'the target of a concept')!r}"
        as_text(self.anchor, f"the anchor of {where}")
        for name in ("synonyms", "templates", "retain"):
            object.__setattr__(self, name, as_texts(getattr(self, name), f"{where}: {name}"))
        if self.kind is not None:
            as_text(self.kind, f"the kind of {where}")
        object.__setattr__(self, "target", _tidy(self.target))
        object.__setattr__(self, "anchor", _tidy(self.anchor))
        object.__setattr__(self, "synonyms", tuple(map(_tidy, self.synonyms)))
        if twin := [name for name in self.names if same(name) == same(self.anchor)]:
            itself = "itself" if twin[0] == self.target else f"its own synonym {twin[0]!r}"
            raise ErasureError(
                f"{where} has {itself} as its anchor, so nothing would be forgotten; choose "
                "another anchor"
            )
        if not self.templates:
            raise ErasureError(
                f"{where} has no templates; give at least one, such as {TEMPLATES[0]!r}"
            )
        if len(self.templates) * len(self.names) > MOST_PAIRS:
            raise ErasureError(
                f"{where} has {len(self.templates):,} templates for {len(self.names):,} names, "
                f"more than {MOST_PAIRS:,} prompts; leave some out"
            )
        for template in self.templates:
            if template.count("{}") != 1:
                raise ErasureError(
                    f"{where}: the template {template!r} needs one {{}} where the concept stands"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The target and its synonyms: every name that must go."""
        return (self.target, *self.synonyms)

    @property
    def slug(self) -> str:
        """The target for file names: at most 57 of [a-z0-9-], distinct unless targets differ only
        in case, spaces, hyphens."""
        slug = "-".join(re.findall(r"[a-z0-9]+", self.target.lower()))[:48]
        if slug == "-".join(self.target.lower().split()):
            return slug
        digest = hashlib.sha256(self.target.encode()).hexdigest()[:8]
        return f"{slug}-{digest}".lstrip("-")

    def pairs(self, anchor_templates: Sequence[str] | None = None) -> list[tuple[str, str]]:
        """(forget prompt, anchor prompt): each template filled with each of `names`, beside the
        same, or its like among `anchor_templates`, filled with the anchor."""
        filled = [
            (template.replace("{}", name), instead.replace("{}", self.anchor))
            for template, instead in zip(
                self.templates, anchor_templates or self.templates, strict=True
            )
            for name in self.names
        ]
        return list(dict.fromkeys(filled))

    def to_dict(self) -> dict[str, object]:
        """The fields as plain JSON values; `kind` is left out where it is None."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values
            if value is not None
        }

    @classmethod
    def from_dict(cls, data: object, where: str | Path = "concept") -> ConceptSpec:
        """The inverse of `to_dict`.

        Args:
            data: a mapping of the fields; all but `target` and `anchor` may be absent. `retain` may
                be the name of a shipped list (see `erase.prompts.retain`), of which the prompts
                that name the concept are left out.
            where: file or place that an error names.

        Raises:
            ErasureError: not a mapping, an unknown key (the near one is suggested), a missing key,
                or a value that `ConceptSpec` refuses.
        """
        values = as_mapping(data, [f.name for f in fields(cls)], where)
        for name in ("target", "anchor"):
            if name not in values:
                raise ErasureError(f"{where} has no {name!r}; add a line `{name}: …`")
        shared = values.pop("retain") if isinstance(values.get("retain"), str) else None
        try:
            # the constructor checks each value's type
            concept = cls(**values)  # type: ignore[arg-type]
            return (
                concept
                if shared is None
                else replace(concept, retain=without(load_retain(str(shared)), concept.names))
            )
        except ErasureError as error:
            raise ErasureError(f"{where}: {error}") from error


def _tidy(name: str) -> str:
    return " ".join(name.split())


def check_distinct(concepts: Sequence[ConceptSpec], where: str | Path | None = None) -> None:
    """Refuse concepts of which two have a name in common (`erase.prompts.names.same`).

    Raises:
        ErasureError: names both; `where` begins it.
    """
    owner: dict[str, ConceptSpec] = {}
    for concept in concepts:
        for name in concept.names:
            first = owner.setdefault(same(name), concept)
            if first is not concept:
                raise ErasureError(
                    f"{where or 'this erasure'} names {name!r} twice, for {first.target!r} and for "
                    f"{concept.target!r}; write its templates and synonyms in one concept"
                )


def dump(concepts: Sequence[ConceptSpec]) -> str:
    """The concepts as one line of JSON, for metadata; `load_concepts` reads it too."""
    return json.dumps([concept.to_dict() for concept in concepts], ensure_ascii=False)


def to_yaml(concepts: Sequence[ConceptSpec]) -> str:
    """The concepts as a YAML file to edit: one mapping, or a list of them; `load_concepts` reads
    it."""
    order = ("target", "anchor", "kind", "synonyms", "templates", "retain")  # long lists last
    data = []
    for concept in concepts:
        values = concept.to_dict()
        data.append({key: values[key] for key in order if key in values})
    return yaml.dump(
        data[0] if len(data) == 1 else data,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=1000,
    )


class _Dumper(yaml.SafeDumper):
    """YAML that a reader gives back to the character: PyYAML folds rare line breaks (U+0085,
    U+2028) unless they are escaped."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, None if text.isprintable() else '"'
    ),
)


def shipped() -> list[str]:
    """Names of the concept files that come with the package."""
    return sorted(path.stem for path in DATA.glob("*.yaml") if path.stem != "canvas")


def load_concepts(source: str | Path) -> list[ConceptSpec]:
    """Concepts from a YAML file: one mapping of `ConceptSpec`'s fields, or a list of them.

    Args:
        source: a path, or the name of a shipped file ("nudity", "imagenette", ...; see `shipped`).

    Raises:
        ErasureError: the file is missing, unreadable, no YAML, empty, or names a target twice; or
            see `ConceptSpec.from_dict`.
    """
    path = DATA / f"{source}.yaml" if str(source) in shipped() else Path(source)
    if path == Path(path.name) and not path.suffix and not path.exists():
        raise unknown("concept file", str(source), shipped())
    data = read_yaml(path)
    if not isinstance(data, list):
        return [ConceptSpec.from_dict(data, path)]
    if not data:
        raise ErasureError(f"{path} holds no concept; write at least a target and an anchor")
    concepts = [
        ConceptSpec.from_dict(item, f"{path}, concept {i}") for i, item in enumerate(data, 1)
    ]
    check_distinct(concepts, path)
    return concepts
