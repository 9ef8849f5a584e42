"""safetensors files: written tensor by tensor, read with errors that a user can act on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from erase.files import atomic_write
from erase.prompts.errors import ErasureError
from erase.prompts.reading import as_path, why

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
