"""How a delta lies on disk: the file that a path names, its tensors, and what is refused of damaged
ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from erase.delta.origin import check_metadata
from erase.prompts.errors import ErasureError
from erase.prompts.reading import as_path, why
from erase.tensor_files import load_tensors
from erase.tensors import all_finite, from_gaps, span, to_gaps, unpack

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FILE = "delta.safetensors"
"""name of a delta in the folder of its run"""
LARGEST, MOST = 2**30, 2**35
"""weights of one tensor and of a whole base that a file may tell of: eight and two times those of
the largest that there are"""


def delta_file(path: str | Path) -> Path:
    """The file of a delta that is named by its path or by its run's folder.

    Raises:
        ErasureError: there is none; it says what is there instead, and where the delta may be.
    """
    path = as_path(path)
    try:
        if not path.is_dir():
            path.stat()
        elif not (path / FILE).is_file():
            raise ErasureError(f"{path} holds no {FILE}: {_what(path)}")
    except OSError as error:
        near = path.parent / FILE
        hint = f"; did you mean {near}?" if path != near and _is_file(near) else ""
        raise ErasureError(f"there is no delta to be read at {path}: {why(error)}{hint}") from error
    return path / FILE if path.is_dir() else path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _what(folder: Path) -> str:
    """The kind of a folder without a delta, and the way out."""
    if (folder / "model_index.json").exists():
        return "it is a model; give a model as --model, and as --delta what erase-concept wrote"
    if (folder / "report.json").exists():
        near = folder.parent / FILE
        return (
            "it is the folder of a report; give its delta, "
            f"{near if near.is_file() else f'the {FILE} of the run'}"
        )
    if (folder / "run.json").exists():
        return (
            "its erasure has not come to its end; run the same erase-concept command again, which "
            "goes on"
        )
    if (folder / "manifest.jsonl").exists():
        return "it is a folder of images; give the folder of the run that erased"
    return "give the folder that erase-concept wrote to (its --out), or the file"


def stored_tensors(values: Mapping[str, Tensor], bits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, by their names in it: for each parameter its values and the smaller
    form of its places."""
    tensors = {f"values.{name}": value for name, value in values.items()}
    for name, packed in bits.items():
        gaps = to_gaps(packed) if values[name].numel() < packed.numel() else packed
        few = gaps.numel() < packed.numel()
        tensors[f"gaps.{name}" if few else f"bits.{name}"] = gaps if few else packed
    return tensors


def read_delta(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """The values, the packed bits, each by parameter name, and the metadata of a file.

    Raises:
        ErasureError: a damaged or foreign file; it names the file and the tensor.
    """
    tensors, metadata = load_tensors(path, "delta")
    check_metadata(metadata, str(path))
    values, bits, gaps = _split(path, tensors)
    _check_sizes(path, bits, gaps)
    bits |= {name: from_gaps(steps) for name, steps in gaps.items()}
    for name in values.keys() | bits.keys():
        if name not in values or name not in bits:
            raise ErasureError(
                f"{path}: {name} lacks its values or its places; the file is damaged, erase again"
            )
        if not values[name].numel():
            raise ErasureError(
                f"{path}: {name} has no values at all; the file is damaged, erase again"
            )
        check_values(str(path), name, values[name], bits[name])
    return values, {name: bits[name] for name in values}, metadata


def _split(path: Path, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The values, the bits and the gaps, each by parameter name."""
    split: dict[str, dict[str, Tensor]] = {"values": {}, "bits": {}, "gaps": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        if (
            part not in split
            or tensor.ndim != 1
            or tensor.dtype not in (DTYPES if part == "values" else (torch.uint8,))
        ):
            raise ErasureError(
                f"{path}: {key} ({tensor.dtype}, {tensor.ndim} dimensions) is not part of a "
                "delta; erase again"
            )
        split[part][name] = tensor
    if twice := sorted(split["bits"].keys() & split["gaps"].keys()):
        raise ErasureError(
            f"{path} tells the places of {twice[0]} twice; the file is damaged, erase again"
        )
    return list(split.values())


def _check_sizes(path: Path, bits: Mapping[str, Tensor], gaps: Mapping[str, Tensor]) -> None:
    """Refuse places of more weights than any model has, before gaps are unfolded: a byte of them
    tells of up to 255 weights."""
    sizes = {name: 8 * packed.numel() for name, packed in bits.items()}
    for name, steps in gaps.items():
        try:
            sizes[name] = span(steps)
        except ErasureError as error:
            raise ErasureError(
                f"{path}: the places of {name} are damaged ({error}); erase again"
            ) from error
    for name, size in sizes.items():
        if size > LARGEST:
            raise ErasureError(
                f"{path} tells of {size:,} weights in {name}, more than any model has; the file is "
                "damaged, erase again"
            )
    if (total := sum(sizes.values())) > MOST:
        raise ErasureError(
            f"{path} tells of {total:,} weights, more than any model has; the file is damaged, "
            "erase again"
        )


def check_values(source: str, name: str, value: Tensor, bits: Tensor) -> None:
    """Refuse values of one parameter that do not fit its places, or are not finite."""
    if unpack(bits, (bits.numel() * 8,)).count_nonzero() != value.numel():
        raise ErasureError(
            f"{source}: the values of {name} do not fit their places; the file is damaged, erase "
            "again"
        )
    if not all_finite(value):
        raise ErasureError(f"{source}: {name} has values that are not finite; erase again")
