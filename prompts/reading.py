"""Reading what users write: every fault in a file is an `ErasureError` that names the file."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from prompts.errors import ErasureError, unknown

DATA = Path(__file__).parent / "data"
"""The folder of the shipped sets."""
MOST_VALUES = 1_000_000  # in one YAML file


class _TextLoader(yaml.BaseLoader):
    """YAML whose scalars stay text (`no`, `007` and dates are words here) and whose mappings may hold a key only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            keys = [key.value for key, _ in node.value]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands there twice", node.start_mark)
        return mapping


def _unfolded(node: yaml.Node, seen: dict[int, int]) -> int:
    """How many values a node holds once its aliases are written out; a few lines of aliases to aliases can hold billions."""
    if id(node) not in seen:
        seen[id(node)] = 1  # a node that holds itself ends here; the loader refuses it
        pairs = node.value if isinstance(node, yaml.CollectionNode) else ()
        children = [child for item in pairs for child in (item if isinstance(item, tuple) else (item,))]
        seen[id(node)] += sum(_unfolded(child, seen) for child in children)
    return seen[id(node)]


def read_text(path: str | Path) -> str:
    """The whole of a UTF-8 file, without its byte-order mark.

    Raises:
        ErasureError: the file is missing, unreadable or not UTF-8.
    """
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ErasureError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        raise ErasureError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}; check the path") from error


def read_yaml(path: str | Path) -> object:
    """A YAML (or JSON) file as dicts, lists and strings: numbers are left as text.

    Raises:
        ErasureError: see `read_text`; also a syntax error (with its line) or a key that stands twice in one mapping.
    """
    text = read_text(path)
    try:
        loader = _TextLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _unfolded(node, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"its aliases unfold to more than {MOST_VALUES:,} values")
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, ArithmeticError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ErasureError(f"{path}{line} is not valid YAML: {problem}") from error


def as_mapping(value: object, keys: Iterable[str], where: str | Path) -> dict[str, object]:
    """`value`, which must be a mapping with no other keys than `keys`; `where` begins the message of the error."""
    if not isinstance(value, Mapping):
        raise ErasureError(f"{where}: expected `key: value` lines with some of: {', '.join(sorted(keys))}")
    keys = set(keys)
    for key in value:
        if key not in keys:
            raise unknown(f"key in {where}:", str(key), keys)
    return dict(value)


def as_text(value: object, where: str) -> str:
    """`value`, which must be a string with something in it that UTF-8 can hold."""
    if not isinstance(value, str):
        raise ErasureError(f"{where} must be text")
    if not value.strip():
        raise ErasureError(f"{where} is empty; write something there")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which YAML escapes can write
        raise ErasureError(f"{where} has a character that is not valid Unicode (position {error.start})") from error
    return value


def as_texts(value: object, where: str) -> tuple[str, ...]:
    """`value`, which must be a list of such strings, as a tuple; the empty list is allowed."""
    if not isinstance(value, list | tuple):
        raise ErasureError(f"{where} must be a list")
    return tuple(as_text(item, f"{where}, item {i},") for i, item in enumerate(value, 1))
