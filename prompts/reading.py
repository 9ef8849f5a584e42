"""Reading what users write: every fault in a file is an `ErasureError` that names the file."""

from __future__ import annotations

import codecs
import errno
import os
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from erase.prompts.errors import ErasureError, unknown

DATA = Path(__file__).parent / "data"
"""The folder of the shipped sets."""
MOST_VALUES = 1_000_000  # in one YAML file
MOST_BYTES = 256 << 20  # of one text file
# bytes of one file's name, characters of a path: what Linux and macOS take
MOST_NAME = 255
MOST_PATH = 4095


class _TextLoader(yaml.BaseLoader):
    """YAML whose scalars stay text (`no`, `007` and dates are words here) and whose mappings may
    hold a key only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            keys = [key.value for key, _ in node.value]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice!r} stands there twice", node.start_mark
            )
        return mapping


def _unfolded(node: yaml.Node, seen: dict[int, int]) -> int:
    """How many values a node holds once its aliases are written out; a few lines of aliases to
    aliases can hold billions."""
    if id(node) not in seen:
        seen[id(node)] = 1  # a node that holds itself ends here; the loader refuses it
        pairs = node.value if isinstance(node, yaml.CollectionNode) else ()
        children = [
            child for item in pairs for child in (item if isinstance(item, tuple) else (item,))
        ]
        seen[id(node)] += sum(_unfolded(child, seen) for child in children)
    return seen[id(node)]


READING, WRITING = "check the path", "free some space or choose another output folder"
WAYS_OUT = {
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "choose a folder on a disk that can be written to",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EISDIR: "name a file in it",
    errno.ENOTDIR: "a file stands where a folder should be; check the path",
    errno.EEXIST: "a file stands where a folder should be; check the path",
}


def why(error: BaseException, otherwise: str = READING) -> str:
    """The system's reason why a file cannot be read or written, and the way out: `Permission
    denied; check its permissions`."""
    said = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    return f"{said}; {WAYS_OUT.get(getattr(error, 'errno', None) or 0, otherwise)}"


def as_path(path: str | Path) -> Path:
    """`path`, if a file can have that name at all.

    Raises:
        ErasureError: it is empty, longer than any disk takes, or holds a NUL or half a character.
    """
    text = os.fspath(path)
    try:
        # whatever the locale
        longest = max(map(len, text.encode("utf-8", "surrogateescape").split(os.sep.encode())))
    except UnicodeEncodeError:  # a lone surrogate, which YAML and JSON escapes can write
        raise ErasureError(
            f"{text[:80]!r} is no path: it holds half a character; write another one"
        ) from None
    faults = {"is empty": not text, "holds a NUL character": "\0" in text}
    faults |= {"is too long": longest > MOST_NAME or len(text) > MOST_PATH}
    for fault, there in faults.items():
        if there:
            raise ErasureError(f"{text[:80]!r} is no path: it {fault}; write another one")
    return Path(path)


def read_text(path: str | Path) -> str:
    """The whole of a UTF-8 file, without its byte-order mark.

    Raises:
        ErasureError: the file is missing, unreadable, too large for a text, or in another encoding.
    """
    try:
        with as_path(path).open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ErasureError(f"cannot read {path}: {why(error)}") from error
    if len(data) > MOST_BYTES:
        raise ErasureError(
            f"{path} has more than {MOST_BYTES >> 20} MiB, which is no text to read whole; split it"
        )
    try:
        return data.decode("utf-8-sig").removeprefix("\ufeff")  # some programs set the mark twice
    except UnicodeDecodeError as error:
        wide = "but UTF-16 " if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else ""
        raise ErasureError(
            f"{path} is not UTF-8 text {wide}(byte {error.start}); save it as UTF-8 (in a "
            "spreadsheet: as `CSV UTF-8`)"
        ) from error


def read_yaml(path: str | Path) -> object:
    """A YAML (or JSON) file as dicts, lists and strings: numbers are left as text.

    Raises:
        ErasureError: see `read_text`; also a syntax error (with its line) or a key that stands
            twice in one mapping.
    """
    text = read_text(path)
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ErasureError(f"{path}{line} is not valid YAML: {problem}") from error


def parse_yaml(text: str) -> object:
    """A YAML text as dicts, lists and strings.

    Raises:
        yaml.YAMLError: a syntax error, a key that stands twice in one mapping, aliases or a nesting
            without end.
    """
    try:
        loader = _TextLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _unfolded(node, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"its aliases unfold to more than {MOST_VALUES:,} values")
        return loader.construct_document(node)
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise yaml.YAMLError(str(error) or "it is nested too deep") from error


def as_mapping(value: object, keys: Iterable[str], where: str | Path) -> dict[str, object]:
    """`value`, which must be a mapping with no other keys than `keys`; `where` begins the message
    of the error."""
    if not isinstance(value, Mapping):
        raise ErasureError(
            f"{where}: expected `key: value` lines with some of: {', '.join(sorted(keys))}"
        )
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
        raise ErasureError(
            f"{where} has a character that is not valid Unicode (position {error.start})"
        ) from error
    return value


def as_texts(value: object, where: str) -> tuple[str, ...]:
    """`value`, which must be a list of such strings, as a tuple; the empty list is allowed."""
    if not isinstance(value, list | tuple):
        raise ErasureError(f"{where} must be a list")
    return tuple(as_text(item, f"{where}, item {i},") for i, item in enumerate(value, 1))
