"""The metadata of a delta: read, checked, and refused in a sentence before anything is made of
them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from erase.models.config import LoadConfig
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.prompts.reading import as_path

NEEDED = ("base_fingerprint", "method", "config", "concepts")
KNOWN = {
    *NEEDED,
    *("base_id", "created_with", "cut_prompts", "parts", "undoes", "license", "format", "foreign"),
    *("after", "requests"),
}
CONCEPT = get_type_hints(ConceptSpec)
PART = {"erased": str, "scale": int | float, "method": str, "sha256": str}
REQUEST = {
    "erased": list,
    "method": str,
    "config_sha256": str,
    "start": str,
    "sha256": str,
}
NOTHING = "nothing"
"""title of a delta that erases no concept, also as a part of another"""
DEEPEST = 200  # levels of a config; a composed delta of composed ones takes three for each time
log = logging.getLogger("erase")


@dataclass(frozen=True)
class Origin:
    """Where a delta comes from."""

    method: str
    config: dict[str, Any]
    """plain values; numbers that are not finite are text"""
    concepts: list[ConceptSpec]


def read_origin(metadata: Mapping[str, str], source: str) -> Origin:
    """Everything that a delta says of itself, as work needs it; errors as `check_metadata`, also
    where a concept is not whole."""
    check_metadata(metadata, source)
    concepts = []
    for i, values in enumerate(concepts_of(metadata, source), 1):
        known = {key: value for key, value in values.items() if key in CONCEPT}
        concepts.append(ConceptSpec.from_dict(known, f"{source}, concept {i},"))
    return Origin(metadata["method"], config_of(metadata, source), concepts)


def check_metadata(metadata: Mapping[str, str], source: str) -> None:
    """Refuse metadata that are not a delta's. A key of a newer version is left out later, and now
    told on the log.

    Args:
        metadata: of the delta.
        source: the file or thing that errors name.

    Raises:
        ErasureError: a key is missing, is not JSON, or says what cannot be.
    """
    if "base_fingerprint" not in metadata:
        raise ErasureError(
            f"{source} does not say which base it belongs to; the file is damaged, erase again"
        )
    try:
        as_path(metadata.get("base_id", "?"))
    except ErasureError as error:
        raise ErasureError(
            f"{source}: its base is no file, folder or id ({error}); the file is damaged, erase "
            "again"
        ) from error
    concepts = concepts_of(metadata, source)
    load_options(metadata, source)
    for part in _plain(metadata, "parts", list, source):
        _check_part(part, source)
    requests_of(metadata, source)
    foreign_of(metadata, source)
    if lacks := [key for key in NEEDED if key not in metadata]:
        raise ErasureError(
            f"{source} does not say its {' and '.join(lacks)}; the file is damaged, erase again"
        )
    newer = {
        *(metadata.keys() - KNOWN),
        *(f"concepts: {key}" for values in concepts for key in values.keys() - CONCEPT.keys()),
    }
    if newer:
        version, unknown = metadata.get("created_with", "a newer version"), ", ".join(sorted(newer))
        log.warning(
            "%s: this version does not know its %.200s (made with %.80s), and leaves it out",
            source,
            unknown,
            version,
        )


def concepts_of(metadata: Mapping[str, str], source: str) -> list[dict[str, Any]]:
    """The concepts that were erased as plain data, each with a target; none where nothing is said.
    Errors as `check_metadata`."""
    concepts: list[dict[str, Any]] = _plain(metadata, "concepts", list, source)
    for i, values in enumerate(concepts, 1):
        if not isinstance(values, dict) or "target" not in values:
            raise ErasureError(
                f"{source}: concept {i} in its metadata is none, with a target; the file is "
                "damaged, erase again"
            )
        if wrong := [
            key
            for key, value in values.items()
            if key in CONCEPT and not _fits(value, CONCEPT[key])
        ]:
            raise ErasureError(
                f"{source}: {wrong[0]} of concept {i} is not what it should be; the file is "
                "damaged, erase again"
            )
    return concepts


def config_of(metadata: Mapping[str, str], source: str) -> dict[str, Any]:
    """The config of the erasure as plain data; empty where nothing is said. Errors as
    `check_metadata`."""
    config: dict[str, Any] = _plain(metadata, "config", dict, source)
    return config


def requests_of(metadata: Mapping[str, str], source: str) -> list[dict[str, Any]]:
    """The requests that a delta answers, one after another (`erase.compose.sequence`); none where
    they came at once. Errors as `check_metadata`."""
    requests: list[dict[str, Any]] = _plain(metadata, "requests", list, source)
    for i, request in enumerate(requests, 1):
        right = isinstance(request, dict) and all(
            isinstance(request.get(key), kind) for key, kind in REQUEST.items()
        )
        if not right or not all(isinstance(name, str) for name in request["erased"]):
            raise ErasureError(
                f"{source}: request {i} of its log is not told as erase-concept --after tells it; "
                "the file is damaged, erase again"
            )
    return requests


def foreign_of(metadata: Mapping[str, str], source: str) -> list[dict[str, Any]]:
    """The files of other programs that a delta was read from (`erase.foreign`), each with the
    concepts that it erases; none of a delta of our own. Errors as `check_metadata`."""
    files: list[dict[str, Any]] = _plain(metadata, "foreign", list, source)
    concepts = [concept["target"] for concept in concepts_of(metadata, source)]
    told = [{"erased": concepts, **file} for file in files if isinstance(file, dict)]
    if len(told) < len(files) or not all(_fits(file["erased"], list[str]) for file in told):
        raise ErasureError(
            f"{source}: the files of another program are not told as --erased tells them; the file "
            "is damaged, read them again"
        )
    return told


def unanchored(metadata: Mapping[str, str]) -> set[str]:
    """The concepts in whose place another program put what nobody knows, by their targets."""
    files = foreign_of(metadata, "this delta")
    return {target for file in files for target in file["erased"]}


def held(metadata: Mapping[str, str], source: str) -> set[str]:
    """Digests of the deltas whose changes a delta holds: its parts, and its requests but the last.
    Errors as `check_metadata`."""
    entries = [*_plain(metadata, "parts", list, source), *requests_of(metadata, source)[:-1]]
    return {str(entry["sha256"]) for entry in entries}


def gone(metadata: Mapping[str, str]) -> list[str]:
    """The concepts that a delta erases, by its metadata: `heart`, or `heart (at 0.5 of its
    strength)` where it was scaled; none of a delta that undoes another."""
    check_metadata(metadata, "this delta")
    if "undoes" in metadata:
        return []
    if requests := requests_of(metadata, "this delta"):
        return [name for request in requests for name in request["erased"]]
    if "parts" not in metadata:
        return [str(concept["target"]) for concept in json.loads(metadata.get("concepts", "[]"))]
    parts = [(str(part["erased"]), float(part["scale"])) for part in json.loads(metadata["parts"])]
    return [
        erased if scale == 1 else f"{erased} (at {scale:g} of its strength)"
        for erased, scale in parts
        if scale > 0 and erased != NOTHING
    ]


def load_options(metadata: Mapping[str, str], source: str) -> LoadConfig:
    """How the base was read: of a composed delta's parts, which have one base, the first one's.
    Errors as `check_metadata`."""
    config = config_of(metadata, source)
    broken = ErasureError(
        f"{source}: its config does not say how its base was read; the file is damaged, erase again"
    )
    while "parts" in config:
        parts = config["parts"]
        if (
            not isinstance(parts, list)
            or not parts
            or not all(isinstance(part, dict) for part in parts)
        ):
            raise broken
        config = parts[0]
    erase = config.get("erase", {})
    options = erase.get("load", {}) if isinstance(erase, dict) else None
    if not isinstance(options, dict):
        raise broken
    hints = get_type_hints(LoadConfig)
    if newer := sorted(set(options) - set(hints)):
        log.warning(
            "%s: its base was read with load.%s, which this version does not know; it is left out",
            source,
            newer[0][:99],
        )
    known = {key: value for key, value in options.items() if key in hints}
    if wrong := [key for key, value in known.items() if not _fits(value, hints[key])]:
        raise ErasureError(
            f"{source}: load.{wrong[0]} in its config is {str(known[wrong[0]])[:40]!r}; the file "
            "is damaged, erase again"
        )
    try:
        return LoadConfig(**known)
    except ErasureError as error:
        raise ErasureError(f"{source}: load in its config: {error}") from error


def _fits(value: object, hint: Any) -> bool:
    kind = get_origin(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if kind is Literal:
        return value in get_args(hint)
    if kind in (list, tuple):
        return isinstance(value, list) and all(_fits(item, get_args(hint)[0]) for item in value)
    return isinstance(value, kind or hint)


def _check_part(part: object, source: str) -> None:
    right = isinstance(part, dict) and all(
        isinstance(part.get(key), kind) for key, kind in PART.items()
    )
    if not right or not abs(part["scale"]) < 1e300:  # type: ignore[index]  # a dict, if it is right
        raise ErasureError(
            f"{source}: its parts are not told as a composed delta tells them; the file is "
            "damaged, compose it again"
        )


def _plain(metadata: Mapping[str, str], key: str, kind: type, source: str) -> Any:
    """A key's JSON, of this kind; empty where it is missing."""
    if key not in metadata:
        return kind()
    try:
        value = json.loads(metadata[key], parse_constant=str, parse_float=_number)
        _check_texts(value)
    except (ValueError, TypeError, RecursionError) as error:
        said = str(error)[:120] or type(error).__name__
        raise ErasureError(
            f"{source}: its {key} is not JSON ({said}); the file is damaged, erase again"
        ) from error
    if not isinstance(value, kind):
        expected = "a list" if kind is list else "a mapping"
        raise ErasureError(
            f"{source}: its {key} is not {expected}; the file is damaged, erase again"
        )
    return value


def _number(text: str) -> float | str:
    number = float(text)
    return number if math.isfinite(number) else text


def _check_texts(value: object, depth: int = 0) -> None:
    """Refuse what no report could be written of: text with half a character, a nesting without
    end."""
    if depth > DEEPEST:
        raise ValueError(f"nested more than {DEEPEST} levels deep")
    if isinstance(value, str):
        value.encode()
    items = value.items() if isinstance(value, dict) else ()
    for part in (*items, *(value if isinstance(value, list | tuple) else ())):
        _check_texts(part, depth + 1)
