"""Files and folders of an export, which appear whole or not at all."""

from __future__ import annotations

import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from safetensors import SafetensorError

from erase.files import put_in_place
from erase.prompts.errors import ErasureError

HOST = re.sub(r"[^A-Za-z0-9-]", "-", platform.node())[:32] or "host"
"""this machine, in the names of unfinished folders: one whose process is dead is told by its lock,
which another machine may not see"""


def is_file(out: str | Path) -> bool:
    """Whether this name asks for a file and not for a folder."""
    return Path(out).suffix == ".safetensors"


def check_free(out: str | Path) -> Path:
    """`out` as a path.

    Raises:
        ErasureError: it exists already.
    """
    if Path(out).exists():
        raise ErasureError(f"{out} exists already; choose another name or delete it")
    return Path(out)


@contextmanager
def new_file(out: str | Path, card: str, picture: str | Path | None, name: str) -> Iterator[Path]:
    """Where to write the one file of a format: `out` itself (its writer writes it whole), or `name`
    in a new folder."""
    if is_file(out):
        yield check_free(out)
    else:
        with new_folder(out, card, picture) as aside:
            yield aside / name


@contextmanager
def new_folder(out: str | Path, card: str, picture: str | Path | None) -> Iterator[Path]:
    """A new folder beside `out` to write to; with its card it is renamed to `out`, on any error it
    is removed."""
    out = check_free(out)
    try:
        with _unfinished(out) as aside:
            yield aside
            if card:
                (aside / "README.md").write_text(card, encoding="utf-8")
            if picture:
                shutil.copyfile(picture, aside / "before_after.png")
            # another export may have been quicker; over a folder that is not empty no rename
            # succeeds
            check_free(out)
            put_in_place(aside, out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ErasureError(
            f"cannot write {out}: {reason}; free some space or choose another folder"
        ) from error


@contextmanager
def _unfinished(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that is this export's alone and locked; leftovers of killed exports
    to `out` are removed first."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f".{escape(out.name)}.{HOST}.*.part"):
        with _locked(left) as dead:
            if dead:
                shutil.rmtree(left, ignore_errors=True)

    aside = out.with_name(f".{out.name}.{HOST}.{os.getpid()}.{secrets.token_hex(4)}.part")
    aside.mkdir()
    with _locked(aside):
        try:
            yield aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder, if the disk has locks and no living process holds it; the system
    frees a dead one's."""
    handle = None
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = folder.exists()
    except (ImportError, OSError):
        held = False
    try:
        yield held
    finally:
        if handle is not None:
            os.close(handle)
