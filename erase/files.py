"""Files that are whole or absent: written aside, then renamed."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import secrets
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from torch import Tensor

from erase.prompts.errors import ErasureError
from erase.prompts.reading import WRITING, as_path, why

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


def file_sha256(path: Path) -> str | None:
    """Hex digest of the file's bytes, or None if there is no such file."""
    try:
        with as_path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ErasureError(f"cannot read {path}: {why(error)}") from error
