"""Files that are whole or absent: written aside, then renamed; and safetensors with the errors that a user can read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prompts.errors import ErasureError

DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""their names in safetensors, in the order in which its own writer puts them: widest first, so that all lie aligned"""


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on success it is renamed to `path`, on any error it is removed.

    Raises:
        ErasureError: the folder cannot be written to or the disk is full.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        aside.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ErasureError(f"cannot write {path}: {reason}; free some space or choose another output folder") from error
    finally:
        if aside.is_file():
            aside.unlink()


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; the metadata's `format` says what it is."""
    stream_tensors(path, tensors, tensors.__getitem__, metadata)


def stream_tensors(
    path: str | Path, layout: Mapping[str, Tensor], make: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file tensor by tensor, so that those which are converted or fetched from a GPU never stand all in memory.

    safetensors' own writer wants all of them at once. The bytes are the same as its, but for the order of the metadata: there it is
    by chance, here as given, so that the same content is always the same file.

    Args:
        path: of the file.
        layout: shape and dtype of each tensor; the values do not matter, it may be on the meta device.
        make: the tensor of a name, called once for each.
        metadata: text for the header.

    Raises:
        ErasureError: a dtype that is not written, the file cannot be, or `make` raises it; nothing is left then.
    """
    if odd := [name for name, tensor in layout.items() if tensor.dtype not in DTYPES]:
        raise ErasureError(
            f"{path}: {odd[0]} is of {layout[odd[0]].dtype}, which is not written; convert it to float16 or float32"
        )
    names = sorted(layout, key=lambda name: (list(DTYPES).index(layout[name].dtype), name))
    header = _header(layout, names, metadata)
    with written_whole(path) as aside, aside.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            tensor = make(name).detach().cpu()
            assert (tensor.shape, tensor.dtype) == (layout[name].shape, layout[name].dtype), name
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _header(layout: Mapping[str, Tensor], names: list[str], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor = layout[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


@contextmanager
def damage_named(path: str | Path, remedy: str) -> Iterator[None]:
    """Whatever the content of a damaged file upsets in the block becomes one error that names the file.

    Raises:
        ErasureError: a key is missing, or a value is not of the type, shape or form that it should have.
    """
    try:
        yield
    except ErasureError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:  # a deep nesting is a RuntimeError
        reason = " ".join(str(error).split())[:120]
        raise ErasureError(f"{path} is damaged ({type(error).__name__}: {reason}); {remedy}") from error


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a safetensors file that `save_tensors` wrote as `kind`.

    Raises:
        ErasureError: no such file, a damaged file, or one of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: a path with a NUL in it
        raise ErasureError(f"cannot read {path} as safetensors: {error}; if it was cut short, make it again") from error
    if metadata.get("format") != kind:
        raise ErasureError(f"{path} is not a {kind} file (its format is {metadata.get('format', 'unknown')!r})")
    return tensors, metadata


def file_sha256(path: Path) -> str | None:
    """Hex digest of the file's bytes, or None if there is no such file."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ErasureError(f"cannot read {path}: {error.strerror}; check its permissions") from error
