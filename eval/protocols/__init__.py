"""Protocols: how the field measures an erasure, one versioned YAML file each.

A protocol says its source, what it needs and cannot bring, its prompts, how images are made, and
which evaluators look at them. Its variants (`NAME/VARIANT`) differ in some of these; `NAME/canvas`
is its counterpart in the embedded world, which needs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from erase.eval.evaluators import get_evaluator
from erase.eval.generate_config import GenerateConfig
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import COUNT, ErasureError, check_ranges, unknown
from erase.prompts.prompt_sets import ANSWER_SEEDS, PromptSet, canvas_grid
from erase.prompts.reading import DATA, as_mapping, as_text, as_texts, read_yaml
from erase.prompts.wordings import worded

PROTOCOLS = Path(__file__).parent
SETS = DATA / "protocols"
CANVAS = "canvas"


@dataclass(frozen=True)
class Need:
    """What a protocol cannot bring."""

    option: str
    """of erase-evaluate, that gives it"""
    missing: str
    """one sentence for where it is not given: what it is, and where it comes from"""


@dataclass(frozen=True)
class Prompts:
    """The prompts of a protocol: a set of the product of lists, or built for the concepts."""

    set: str | None = None
    """`canvas`, or a set of prompts/data/protocols"""
    wordings: tuple[str, ...] = ()
    """see `erase.prompts.wordings`"""
    book: str | None = None
    """of these wordings: `canvas`, or one of prompts/data/wordings"""
    seeds: tuple[int, ...] = ANSWER_SEEDS[:1]
    """each prompt is drawn from each of them; a set of a file has its own"""
    cells: int = 24
    """on canvas: prompts of each wording of each concept"""

    def __post_init__(self) -> None:
        check_ranges(self, {"cells": COUNT})
        if (self.set is None) == (self.book is None) or bool(self.wordings) != bool(self.book):
            raise ErasureError(
                "prompts need either `set`, or `book` and `wordings`; leave the others out"
            )

    def build(self, concepts: Sequence[ConceptSpec]) -> PromptSet:
        """The prompt set for these concepts."""
        if self.book:
            return worded(concepts, self.book, self.wordings, self.seeds, self.cells)
        if self.set == CANVAS:
            return canvas_grid(self.seeds)
        return PromptSet.from_yaml(SETS / f"{self.set}.yaml")


@dataclass(frozen=True)
class Protocol:
    """A way to measure that others can repeat."""

    name: str
    """`NAME`, or `NAME/VARIANT`"""
    version: str
    """of this file; it rises when a figure may change"""
    summary: str
    paper: str
    repository: str
    prompts: Prompts | None = None
    """None: the user gives them"""
    needs: tuple[Need, ...] = ()
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    evaluators: Mapping[str, Any] = field(default_factory=dict)
    """name -> its configuration"""
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    """evaluator -> the one that stands in its place where the user gives other prompts"""
    limits: tuple[str, ...] = ()
    """how it differs from its source, and what it does not tell"""
    _stated: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def check_needs(self, given: Callable[[str], object]) -> None:
        """Refuse, in the need's own sentence, what is missing.

        Args:
            given: option -> its value, empty where it is not given.
        """
        for need in self.needs:
            if not given(need.option):
                raise ErasureError(f"{self.name}: {need.missing}")

    def prompt_set(self, concepts: Sequence[ConceptSpec]) -> PromptSet:
        """Its prompts for these concepts.

        Raises:
            ErasureError: it has none, or none for these concepts.
        """
        if self.prompts is None:
            raise ErasureError(f"{self.name} brings no prompts; give them with --prompts")
        return self.prompts.build(concepts)

    def options(self, elsewhere: bool = False) -> dict[str, object]:
        """Option of erase-evaluate -> what this protocol sets it to; `elsewhere`: on prompts that
        are not its own."""
        names = [self.elsewhere.get(name, name) if elsewhere else name for name in self.evaluators]
        stated: dict[str, object] = {"evaluators": list(dict.fromkeys(names))}
        for group, settings in self._stated.items():
            stated |= _flat(group, settings, self.evaluators.get(group, self.generate))
        return stated


def _flat(group: str, settings: Mapping[str, Any], config: Any) -> dict[str, object]:
    """Option -> value; a configuration within one has its options under its own name."""
    options: dict[str, object] = {}
    for key, value in settings.items():
        inner = getattr(config, key)
        if is_dataclass(inner):
            options |= _flat(f"{group}.{key}", value, inner)
        else:
            options[f"{group}.{key}"] = value
    return options


def protocol_names() -> list[str]:
    """Every protocol, each followed by those of its variants that can be had."""
    names = []
    for path in sorted(PROTOCOLS.glob("*.yaml")):
        content = read_yaml(path)
        names.append(path.stem)
        variants = content.get("variants", {}) if isinstance(content, dict) else {}
        names += [f"{path.stem}/{name}" for name, one in variants.items() if "no" not in one]
    return names


def load_protocol(name: str, folder: Path = PROTOCOLS) -> Protocol:
    """The protocol of this name.

    Args:
        name: `NAME` or `NAME/VARIANT`.
        folder: of the files.

    Raises:
        ErasureError: an unknown name, key or setting (the near one is suggested), a bad value, or a
            variant that cannot be had, in the protocol's own sentence.
    """
    stem, _, variant = name.partition("/")
    path = folder / f"{stem}.yaml"
    if not path.is_file():
        raise unknown("protocol", name, protocol_names())
    content = as_mapping(read_yaml(path), (*KEYS, "variants"), path)
    given = content.pop("variants", {})
    if variant:
        variants = given if isinstance(given, Mapping) else {}
        if variant not in variants:
            raise unknown(f"variant of {stem}", variant, variants)
        changed = as_mapping(variants[variant], (*KEYS, "no"), f"{path}: {variant}")
        if "no" in changed:
            raise ErasureError(f"{name}: {as_text(changed['no'], f'{path}: {variant}: no')}")
        content |= changed
    return _read(name, content, f"{path}: {variant}".removesuffix(": "))


# ---- reading -------------------------------------------------------------------------------------

TEXTS = ("version", "summary", "paper", "repository")
KEYS = (*TEXTS, "needs", "prompts", "generate", "evaluators", "elsewhere", "limits")


def _read(name: str, content: dict[str, object], where: str) -> Protocol:
    for key in TEXTS:
        if key not in content:
            raise ErasureError(f"{where} has no {key!r}; add a line `{key}: …`")
    texts = {key: as_text(content[key], f"{where}: {key}") for key in TEXTS}
    generate = _settings(content.get("generate", {}), GenerateConfig(), f"{where}: generate")
    evaluators, stated = {}, {"generate": generate}
    listed = content.get("evaluators")
    if not isinstance(listed, Mapping) or not listed:
        raise ErasureError(f"{where} needs `evaluators: {{name: {{…}}}}` with one or more")
    for evaluator, settings in listed.items():
        default = get_evaluator(str(evaluator)).config
        stated[evaluator] = _settings(settings or {}, default, f"{where}: {evaluator}")
        evaluators[str(evaluator)] = _built(default, stated[evaluator])
    try:
        prompts = _prompts(content.get("prompts"), where)
        made = GenerateConfig(**generate)
    except ErasureError as error:
        raise ErasureError(f"{where}: {error}") from error
    elsewhere = as_mapping(content.get("elsewhere", {}), list(evaluators), f"{where}: elsewhere")
    for other in elsewhere.values():
        get_evaluator(str(other))
    needs = content.get("needs", [])
    if not isinstance(needs, list):
        raise ErasureError(f"{where}: needs must be a list of `option` and `missing`")
    return Protocol(
        name,
        **texts,
        prompts=prompts,
        needs=tuple(_need(need, f"{where}: needs") for need in needs),
        generate=made,
        evaluators=evaluators,
        elsewhere={name: str(other) for name, other in elsewhere.items()},
        limits=as_texts(content.get("limits", ()), f"{where}: limits"),
        _stated=stated,
    )


def _settings(value: object, default: Any, where: str) -> dict[str, Any]:
    """Those fields of a configuration that a file sets; numbers, true and false as such."""
    given = as_mapping(value, [one.name for one in fields(default)], where)
    plain: dict[str, Any] = {}
    for key, item in given.items():
        inner = getattr(default, key)
        plain[key] = (
            _settings(item, inner, f"{where}.{key}") if is_dataclass(inner) else _plain(item)
        )
    try:
        _built(default, plain)
    except ErasureError as error:
        raise ErasureError(f"{where}: {error}") from error
    return plain


def _built(default: Any, plain: Mapping[str, Any]) -> Any:
    """A configuration with these fields set, and those of configurations within it."""
    values = {}
    for key, value in plain.items():
        inner = getattr(default, key)
        values[key] = _built(inner, value) if is_dataclass(inner) else value
    return replace(default, **values)


def _plain(value: object) -> Any:
    """A value as YAML reads it: the files' readers leave scalars as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    scalar = yaml.safe_load(str(value))
    return scalar if isinstance(scalar, bool | int | float) or scalar is None else value


def _prompts(value: object, where: str) -> Prompts | None:
    if value is None or value == "":
        return None
    given = as_mapping(value, [one.name for one in fields(Prompts)], f"{where}: prompts")
    plain = {key: _plain(item) for key, item in given.items()}
    if isinstance(plain.get("seeds"), int):
        plain["seeds"] = range(plain["seeds"])
    for key in {"seeds", "wordings"} & plain.keys():
        plain[key] = tuple(plain[key])
    return Prompts(**plain)


def _need(value: object, where: str) -> Need:
    given = as_mapping(value, [one.name for one in fields(Need)], where)
    return Need(**{key: as_text(given.get(key), f"{where}: {key}") for key in asdict(Need("", ""))})
