"""The rows of a batch that are a process's own, part by part."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from erase.prompts.errors import ErasureError

Batch = Any


def cut(batch: Batch, part: int, parts: int, accelerator: Accelerator) -> Batch:
    """This process's rows of one part of a batch, on its device.

    Every share is equally long, so that means of shares average to the mean of all.

    Args:
        batch: a tensor or a list of texts, with an entry per row; or a tuple, mapping or dataclass
            of those. None stays.

    Raises:
        ErasureError: rows that do not split evenly.
    """
    match batch:
        case None:
            return None
        case Tensor():
            return batch[_share(len(batch), part, parts, accelerator)].to(accelerator.device)
        case list():
            return batch[_share(len(batch), part, parts, accelerator)]
        case tuple():
            return tuple(cut(column, part, parts, accelerator) for column in batch)
        case dict():
            return {name: cut(column, part, parts, accelerator) for name, column in batch.items()}
    columns = {
        field.name: cut(getattr(batch, field.name), part, parts, accelerator)
        for field in fields(batch)
    }
    return replace(batch, **columns)


def _share(size: int, part: int, parts: int, accelerator: Accelerator) -> slice:
    shares = parts * accelerator.num_processes
    if size % shares:
        raise ErasureError(
            f"a batch of {size} rows cannot be split evenly into {parts} parts on "
            f"{accelerator.num_processes} processes"
        )
    width = size // shares
    start = (accelerator.process_index * parts + part) * width
    return slice(start, start + width)
