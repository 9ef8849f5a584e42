"""Files that are whole or absent: written aside, then renamed; and safetensors with the errors that
a user can read."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import secrets
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from erase.prompts.errors import ErasureError
from erase.prompts.reading import WRITING, as_path, why

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
"""their names in safetensors, in the order in which its own writer puts them: widest first, so that
all lie aligned"""


HOST = re.sub(r"[^A-Za-z0-9-]", "-", platform.node())[:32] or "host"
"""this machine, in the names of unfinished files"""


placed: deque[Path] = deque(maxlen=1)
"""the last file that this process finished"""


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on success it is renamed to `path`, on any error it
    is removed.

    What is renamed has reached the disk: a machine that fails finds the old file or the new one,
    never an empty one. What a killed process left unfinished is removed when another begins to
    write into the same folder.

    Raises:
        ErasureError: the folder cannot be written to, the disk is full, or the name is none that a
            file can have.
    """
    path = as_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        with _unfinished(path) as aside:
            yield aside
            put_in_place(aside, path)
            placed.append(path)
    except (OSError, SafetensorError) as error:
        raise ErasureError(f"cannot write {path}: {why(error, WRITING)}") from error
    except RuntimeError as error:
        if "inline_container" not in str(error):  # torch.save's own words for a write that failed
            raise
        cause = error.__context__ if isinstance(error.__context__, OSError) else None
        raise ErasureError(
            f"cannot write {path}: {why(cause or OSError('the disk is full'), WRITING)}"
        ) from error


@contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """An empty file beside `path` under a name of its own, locked while it is written; gone at the
    end, unless it was renamed."""
    name = f".{path.name[:40]}.{HOST}.{os.getpid()}.{secrets.token_hex(4)}.part"
    aside = path.with_name(name)
    with _open_locked(aside) as file:
        if os.name == "nt":
            file.close()  # Windows renames no open file
        try:
            yield aside
        finally:
            aside.unlink(missing_ok=True)


def zeros_on_disk(count: int, folder: Path | None) -> Tensor:
    """So many float32 zeros, shape (count,), mapped from a file that has no name: of main memory
    they take what the system can spare. The file ends with the tensor, and with the process.

    Args:
        count: at least 1.
        folder: where the file lies; None: where the system has temporary files.

    Raises:
        ErasureError: the disk has no room for them.
    """
    folder = folder or Path(tempfile.gettempdir())
    try:
        with _unfinished(folder / "zeros") as aside, aside.open("rb+") as file:
            # what is not set aside now would end the process when it is written
            reserve = getattr(os, "posix_fallocate", lambda _, start, size: file.truncate(size))
            reserve(file.fileno(), 0, count * torch.float32.itemsize)
            return torch.from_file(str(aside), shared=True, size=count, dtype=torch.float32)
    except OSError as error:
        raise ErasureError(f"cannot write to {folder}: {why(error, WRITING)}") from error


def _open_locked(aside: Path) -> BinaryIO:
    """The new file; again if a sweep took it for a dead process's between its making and its
    lock."""
    file = aside.open("xb")
    _lock(file, wait=True)
    if os.fstat(file.fileno()).st_nlink:
        return file
    file.close()
    return _open_locked(aside)


def _lock(file: BinaryIO, wait: bool = False) -> bool:
    """Lock an open file, if the disk has locks and no other holds it; the system lets go of it when
    this process ends."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (ImportError, OSError):
        return False
    return True


def put_in_place(aside: Path, path: Path) -> None:
    """Rename a file or a folder, with the content on the disk before and the name after."""
    inside = sorted(aside.rglob("*"), reverse=True) if aside.is_dir() else []
    for one in (*inside, aside):
        if one.is_dir():
            _sync_folder(one)
        else:
            with one.open("rb+") as file:
                os.fsync(file.fileno())
    aside.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some systems cannot do this
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


_next_sweep: dict[Path, float] = {}


def _sweep(folder: Path) -> None:
    """Remove what killed processes of this machine left in a folder: unfinished files that nobody
    holds locked.

    A lock tells the dead from the living where a process number does not: it may be in use again,
    or be another container's. Those of other machines are left to them, since not every shared disk
    shares its locks. Listing the folder takes at most a hundredth of the time, however many images
    are in it.
    """
    began = time.monotonic()
    if began < _next_sweep.get(folder, 0):
        return
    for part in folder.glob(".*.part"):
        if re.fullmatch(rf"\..+\.{HOST}\.\d+\.[0-9a-f]{{8}}\.part", part.name):
            with suppress(OSError), part.open("rb") as file:
                if _lock(file):
                    part.unlink()
    _next_sweep[folder] = time.monotonic() + 100 * (time.monotonic() - began)


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file; the metadata's `format` says what it is."""
    stream_tensors(path, tensors, tensors.__getitem__, metadata)


def stream_tensors(
    path: str | Path,
    layout: Mapping[str, Tensor],
    make: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file tensor by tensor, so that those which are converted or fetched from
    a GPU never stand all in memory.

    safetensors' own writer wants all of them at once. The bytes are the same as its, but for the
    order of the metadata: there it is by chance, here as given, so that the same content is always
    the same file.

    Args:
        path: of the file.
        layout: shape and dtype of each tensor; the values do not matter, it may be on the meta
            device.
        make: the tensor of a name, called once for each.
        metadata: text for the header.

    Raises:
        ErasureError: a dtype that is not written, the file cannot be, or `make` raises it; nothing
            is left then.
    """
    if odd := [name for name, tensor in layout.items() if tensor.dtype not in DTYPES]:
        raise ErasureError(
            f"{path}: {odd[0]} is of {layout[odd[0]].dtype}, which is not written; convert it to "
            "float16 or float32"
        )
    names = sorted(layout, key=lambda name: (list(DTYPES).index(layout[name].dtype), name))
    header = _header(layout, names, metadata)
    with atomic_write(path) as aside, aside.open("wb") as file:
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
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


@contextmanager
def errors_named(path: str | Path, remedy: str) -> Iterator[None]:
    """Whatever the content of a damaged file upsets in the block becomes one error that names the
    file.

    Raises:
        ErasureError: a key is missing, or a value is not of the type, shape or form that it should
            have.
    """
    try:
        yield
    except ErasureError:
        raise
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
    ) as error:  # a deep nesting is a RuntimeError
        reason = " ".join(str(error).split())[:120]
        raise ErasureError(
            f"{path} is damaged ({type(error).__name__}: {reason}); {remedy}"
        ) from error


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a safetensors file that `save_tensors` wrote as `kind`, in memory
    of their own.

    Raises:
        ErasureError: no such file, a damaged file, or one of another kind.
    """
    with _opened(path, kind) as (file, metadata):
        # no mapping
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118


def load_metadata(path: str | Path, kind: str) -> dict[str, str]:
    """The metadata alone, of a file as `load_tensors` reads it."""
    with _opened(path, kind) as (_, metadata):
        return metadata


@contextmanager
def _opened(path: str | Path, kind: str) -> Iterator[tuple[Any, dict[str, str]]]:
    path = as_path(path)
    try:
        path.open(
            "rb"
        ).close()  # the system's words for what cannot be read are better than the library's
        # pread: under a memory map, a file that another process shortens would end this one
        with safe_open(path, framework="pt", backend="pread") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != kind:
                found = _what(metadata, list(file.keys()), kind)
                raise ErasureError(f"{path} is not a {kind} file: it is {found}")
            yield file, metadata
    except OSError as error:
        raise ErasureError(f"cannot read {path}: {why(error)}") from error
    except (
        SafetensorError,
        AttributeError,
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:  # the last: dtypes that torch lacks
        if isinstance(error, ErasureError):
            raise
        raise ErasureError(
            f"cannot read {path} as safetensors: {why(error, 'if it was cut short, make it again')}"
        ) from error


KINDS = {
    "mask": "a mask, which says only which weights may change",
    "saliency": "a saliency map, which masks are cut from",
    "delta": "a delta, what an erasure changed",
    "latents": "a set of latents, an erasure's training data",
}
IN_A_RUN = ("delta", "mask", "saliency")
"""kinds whose files, named for them, lie beside each other in the folder of a run"""


def _what(metadata: Mapping[str, str], names: list[str], wanted: str) -> str:
    """The kind of a safetensors file, by its own format or the names of its tensors, and where the
    wanted one is."""
    format = metadata.get("format", "")
    if format in KINDS:
        beside = format in IN_A_RUN and wanted in IN_A_RUN
        hint = f"; give the {wanted}.safetensors beside it" if beside else ""
        return KINDS[format] + hint
    if any(".lora_" in name or name.startswith("lora_") for name in names):
        return "a LoRA; give the delta.safetensors that it was exported from"
    if any(
        name.startswith(
            ("model.diffusion_model.", "first_stage_model.", "down_blocks.", "text_model.")
        )
        for name in names
    ):
        return "weights of a model; a checkpoint is given as --model"
    return f"something else (its format is {metadata.get('format', 'unknown')!r})"


def file_sha256(path: Path) -> str | None:
    """Hex digest of the file's bytes, or None if there is no such file."""
    try:
        with as_path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ErasureError(f"cannot read {path}: {why(error)}") from error
