"""Tensors of a checkpoint file, one at a time: safetensors, or a torch pickle that is read without
running anything in it."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from erase.prompts.errors import ErasureError

PICKLES = (".ckpt", ".pt", ".pth")
SINGLE_FILES = (".safetensors", *PICKLES)
BESIDE = (
    "optimizer",
    "optimizers",
    "optimizer_states",
    "optimizer_state_dict",
    "lr_schedulers",
    "scheduler",
    "scaler",
    "loops",
)
"""what training programs keep beside the weights"""


@dataclass(frozen=True)
class TensorFile:
    """An open checkpoint."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    """of every tensor in it, by key"""
    read: Callable[[str], Tensor]
    """a tensor by its key, in memory of its own"""
    metadata: dict[str, str] = field(default_factory=dict)
    step: int | None = None
    """`global_step`, where the training program left it"""


@contextmanager
def open_tensors(path: str | Path, *, nested: bool = False) -> Iterator[TensorFile]:
    """Open a `.safetensors`, `.ckpt`, `.pt` or `.pth` file.

    Args:
        path: of the file.
        nested: of a pickle that holds several sets of weights, take them all, each under its name
            and a dot; else it is refused.

    Raises:
        ErasureError: no such file, another suffix, content that the suffix does not promise, a
            damaged file, or a pickle that holds more than tensors and plain data.
    """
    path = Path(path)
    check_kind(path)
    try:
        if path.suffix.lower() in PICKLES:
            yield _pickled(path, nested)
        else:
            # pread: a memory map would keep the pages of the file resident beside the copies
            with safe_open(path, framework="pt", backend="pread") as file:
                _check_ours(path, file.metadata() or {})
                names = file.keys()
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in names}
                yield TensorFile(path, shapes, file.get_tensor, file.metadata() or {})
    except (OSError, EOFError, SafetensorError) as error:
        raise ErasureError(
            f"cannot read {path}: {error}; if it was cut short, fetch or make it again"
        ) from error


def _check_ours(path: Path, metadata: Mapping[str, str]) -> None:
    """Refuse what this toolkit itself writes beside checkpoints."""
    if metadata.get("format") == "delta":
        raise ErasureError(
            f"{path} is a delta, what an erasure changed, and no checkpoint; give it as --delta "
            "(to erase-concept as --after), and as --model the base that it changes "
            f"({metadata.get('base_id', 'unknown')})"
        )
    if metadata.get("format") in ("mask", "saliency", "latents"):
        raise ErasureError(
            f"{path} is of an erasure's {metadata['format']}, and no checkpoint; give a checkpoint "
            "in its place, or, where a delta is taken, the delta.safetensors beside it"
        )


def check_kind(path: Path) -> None:
    """Compare what the name promises with the first bytes.

    Raises:
        ErasureError: they differ, or the file cannot be read.
    """
    if not path.is_file():
        raise ErasureError(f"{path} is not a file")
    suffix = path.suffix.lower()
    if suffix not in SINGLE_FILES:
        raise ErasureError(
            f"{path} has the suffix {path.suffix!r}; a single-file checkpoint is .safetensors, "
            f"{', '.join(PICKLES)}"
        )
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except PermissionError as error:
        raise ErasureError(
            f"cannot read {path}: permission denied; make it readable (chmod +r)"
        ) from error
    except OSError as error:
        raise ErasureError(f"cannot read {path}: {error}") from error
    if head.startswith(b"version https://git-lfs"):
        raise ErasureError(
            f"{path} is the placeholder that git leaves for a large file; run `git lfs pull` in "
            "its repository"
        )
    # safetensors begins with the length of its header, which may well begin like a pickle (0x80) or
    # an archive (PK)
    is_safetensors = head[5:9] == b"\0\0\0{"
    is_pickle = not is_safetensors and (head[:2] == b"PK" or head[:1] == b"\x80")
    if suffix in PICKLES and is_safetensors:
        raise ErasureError(
            f"{path} holds safetensors under the name of a pickle; rename it to "
            f"{path.stem}.safetensors"
        )
    if suffix not in PICKLES and is_pickle:
        raise ErasureError(
            f"{path} holds a pickle under the name of safetensors; rename it to {path.stem}.ckpt"
        )
    if not (is_pickle or is_safetensors):
        begins = f"begins with {head[:16]!r}" if head else "is empty"
        raise ErasureError(f"{path} is no checkpoint: it {begins}; fetch it again")


def _pickled(path: Path, nested: bool) -> TensorFile:
    content, step = _load_plain(path), None
    for _ in range(4):  # deeper than any program nests, and an end for a pickle that holds itself
        if isinstance(content, dict):
            step = content["global_step"] if isinstance(content.get("global_step"), int) else step
            content = _unwrapped(path, content, nested)
    if not isinstance(content, dict):
        raise ErasureError(
            f"{path} holds a {type(content).__name__}, not named weights; it is no checkpoint of "
            "Stable Diffusion"
        )
    tensors = {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return TensorFile(path, shapes, lambda key: tensors[key].clone(), step=step)


def _unwrapped(path: Path, content: dict[Any, Any], nested: bool) -> dict[Any, Any]:
    """The weights that a training program put into `state_dict`, `model`, `params`, ...; the
    content itself, where it holds tensors; with `nested`, the weights of several.

    Raises:
        ErasureError: several things hold weights, and none is called `state_dict`.
    """
    inner = {key: value for key, value in content.items() if isinstance(value, Mapping) and value}
    if "state_dict" in inner:
        return dict(inner["state_dict"])
    if any(isinstance(value, Tensor) for value in content.values()):
        return content
    weights = [
        key for key, value in inner.items() if str(key) not in BESIDE and _holds_tensors(value)
    ]
    if len(weights) > 1 and nested:
        return {f"{part}.{key}": inner[part][key] for part in weights for key in inner[part]}
    if len(weights) > 1:
        raise ErasureError(
            f"{path} holds several sets of weights ({', '.join(map(str, weights[:5]))}); save the "
            f"one that is meant alone: torch.save(torch.load(FILE)[{weights[0]!r}], NEW)"
        )
    return dict(inner[weights[0]]) if weights else content


def _holds_tensors(content: Mapping[Any, Any], depth: int = 4) -> bool:
    inner = [value for value in content.values() if isinstance(value, Mapping)]
    return any(isinstance(value, Tensor) for value in content.values()) or (
        depth > 0 and any(_holds_tensors(value, depth - 1) for value in inner)
    )


def _load_plain(path: Path) -> object:
    with path.open("rb") as file:
        is_archive = file.read(2) == b"PK"  # older files are bare pickles, which cannot be mapped
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:  # a damaged file can fail anywhere in torch's reader
        code = (
            re.search(r"GLOBAL (\S+)", str(error))
            if isinstance(error, pickle.UnpicklingError)
            else None
        )
        if code:
            raise ErasureError(
                f"{path} is a pickle that asks for {code[1]}, which is code, so it was not opened: "
                "that could run anything; get the model as .safetensors, or convert it in a "
                "container without network and without your files"
            ) from error
        reason = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
        raise ErasureError(
            f"cannot read {path}: "
            f"{reason.strip().splitlines()[0] if reason.strip() else type(error).__name__}; it was "
            "cut short, damaged, or holds more than tensors; fetch it again, or get the model as "
            ".safetensors"
        ) from error
