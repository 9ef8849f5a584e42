"""Files that are whole or absent: written aside, then renamed; and safetensors with the errors that a user can read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prompts.errors import ErasureError


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
    with written_whole(path) as aside:
        aside.touch()
        mode = aside.stat().st_mode  # what the user's umask says; safetensors would make it readable by its owner alone
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, aside, dict(metadata))
        aside.chmod(mode)


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
