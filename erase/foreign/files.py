"""The files of a foreign checkpoint: which there are, what kind each is of, and their digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from erase.delta.stored import FILE
from erase.files import file_sha256
from erase.models.folder import INDEX, read_index
from erase.models.part_files import WEIGHTS, check_part, read_config, variants, weight_variant
from erase.prompts.errors import ErasureError
from erase.prompts.reading import as_path

PARTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class Source:
    """One foreign checkpoint on disk."""

    path: Path
    kind: str
    """delta, file or folder"""
    files: Mapping[Path, str]
    """file of weights -> what stands before its names: the component whose folder it lies in, with
    a dot"""
    prediction: str | None = None
    """what the folder's own scheduler says that it predicts"""
    pipeline: str | None = None
    """the class that the folder's index names"""

    @property
    def sha256(self) -> str:
        """Hex digest of the file, or of the names and digests of a folder's files."""
        if self.kind == "file":
            return file_sha256(self.path) or ""
        lines = (f"{file.relative_to(self.path)} {file_sha256(file)}\n" for file in self.files)
        return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def find(path: str | Path, variant: str | None = None) -> Source:
    """What a path holds.

    Args:
        path: a file or a folder.
        variant: of a folder's files, where there are several; parts that have no such file are read
            without.

    Raises:
        ErasureError: nothing is there, or no weights are.
    """
    path = as_path(path)
    if path.is_file():
        return Source(path, "delta" if _is_delta(path) else "file", {path: ""})
    if not path.is_dir():
        raise ErasureError(
            f"there is no file or folder {path}; what is on the hub, fetch first "
            f"(hf download {path} --local-dir NAME)"
        )
    if (path / INDEX).is_file():
        return _pipeline(path, variant)
    if (path / FILE).is_file():
        return Source(path / FILE, "delta", {path / FILE: ""})
    if parts := [part for part in PARTS if (path / part).is_dir()]:
        return Source(path, "folder", _files_of(path, parts, variant))
    if variants(path):
        return Source(path, "folder", dict.fromkeys(_weights_in(path, variant), ""))
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return Source(found[0], "file", {found[0]: ""})
    several = f"several ({', '.join(file.name for file in found[:5])})" if found else "no weights"
    raise ErasureError(
        f"{path} holds {several}; name a file, or a folder that is a pipeline ({INDEX}), has a "
        f"part's folder ({', '.join(PARTS[:4])}, ...) or holds one .safetensors file"
    )


def _is_delta(path: Path) -> bool:
    if path.suffix.lower() != ".safetensors":
        return False
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            return (file.metadata() or {}).get("format") == "delta"
    except (OSError, SafetensorError):
        return False  # its reader says what is wrong with it


def _pipeline(path: Path, variant: str | None) -> Source:
    index = read_index(path)
    parts = [part for part in PARTS if isinstance(index.get(part), list) and any(index[part])]
    schedule: Mapping[str, Any] = {}
    if (config := path / "scheduler" / "scheduler_config.json").is_file():
        schedule = read_config(config)
    return Source(
        path,
        "folder",
        _files_of(path, parts, variant),
        str(schedule.get("prediction_type", "epsilon")) if schedule else None,
        index["_class_name"],
    )


def _files_of(path: Path, parts: list[str], variant: str | None) -> dict[Path, str]:
    files = {}
    for part in parts:
        for file in _weights_in(check_part(path, part), variant):
            files[file] = f"{part}."
    return files


def _weights_in(where: Path, variant: str | None) -> list[Path]:
    """The files of one part: those of the variant, or else those without one in their names, or
    else those of the only one."""
    there = variants(where)
    only = next(iter(there)) if len(there) == 1 else None
    chosen = weight_variant(where, variant if variant in there else only)
    matches = (WEIGHTS.fullmatch(file.name) for file in sorted(where.iterdir()))
    return [
        where / match.string
        for match in matches
        if match and match["kind"] == "safetensors" and match["variant"] == chosen
    ]
