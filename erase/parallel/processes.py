"""Several processes, on one machine or many, as `accelerate launch` or `torchrun` starts them: the
share of each, and the one that writes.

Nothing here knows of models. In a single process every function does its plain work.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env, reduce
from torch import Tensor

from erase.parallel.launch import check_launch
from erase.parallel.progress import bar
from erase.prompts.errors import ErasureError

T = TypeVar("T")
# for each other: shares of a slower GPU may take hours; launchers end all processes when one dies
PATIENCE = timedelta(hours=12)
BUCKET = 25 << 20  # bytes that are reduced at a time, DistributedDataParallel's own choice


def processes() -> PartialState:
    """This process among those that were launched together: `process_index`, `num_processes`,
    `is_main_process`, `device`.

    Raises:
        ErasureError: the launch asks for DeepSpeed or the like.
    """
    check_launch()
    # without cpu=True, processes on CPU stay strangers
    return PartialState(
        cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available(),
        timeout=PATIENCE,
    )


def default_device() -> torch.device:
    """Where this process's models go: its own GPU, or the CPU."""
    device: torch.device = processes().device
    return device


def peak_memory() -> int:
    """Bytes that this process has held at most: of its GPU, or else of the machine's memory; 0
    where the system does not tell."""
    if default_device().type == "cuda":
        return torch.cuda.max_memory_allocated(default_device())
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def exists_on_all(path: Path) -> bool:
    """Whether a file was there before any process could write it: nobody goes on before everybody
    has looked.

    Raises:
        ErasureError: some processes see it and others do not.
    """
    seen = gather_object([path.exists()])
    if any(seen) and not all(seen):
        raise ErasureError(
            f"{path} is seen by {sum(seen)} of {len(seen)} processes; put the output folder on a "
            "disk that all machines share, or delete it to start again"
        )
    return all(seen)


def round_robin(items: Sequence[T], pad: bool = False) -> list[tuple[T, bool]]:
    """This process's share of the items, taken by turns, each with whether it counts.

    Args:
        items: the same in every process.
        pad: give every process as many, where each is an effort of all: who has one less takes one
            that does not count.
    """
    state = processes()
    mine = [(item, True) for item in items[state.process_index :: state.num_processes]]
    if pad and len(mine) * state.num_processes < len(items):
        mine.append((items[-1], False))
    return mine


def in_shares(
    count: int, size: int, work: Callable[[range], T], what: str, unit: str, pad: bool = False
) -> list[T]:
    """The results of `work` for rows 0 to `size`, `size` to 2 `size`, ... of `count`: each range
    done by one process, all known to all.

    The ranges do not depend on the number of processes, so neither do their results, nor their
    rounding.

    Args:
        count: rows in all.
        size: rows at a time.
        work: takes the rows' numbers; its result is pickled, so tensors belong on the CPU.
        what: names the progress bar.
        unit: of its rows.
        pad: `work` is an effort of all processes, so each must do as much (`round_robin`).

    Returns:
        One result per range, in order.
    """
    ranges = [range(start, min(start + size, count)) for start in range(0, count, size)]
    mine = round_robin(ranges, pad)
    done = []
    with progress(what, unit, sum(len(rows) for rows, _ in mine)) as progress_bar:
        for rows, counts in mine:
            result = work(rows)
            if counts:
                done.append(result)
            progress_bar.update(len(rows))
    shares = gather_object([done])
    return [shares[i % len(shares)][i // len(shares)] for i in range(len(ranges))]


def progress(what: str, unit: str, total: int, initial: int = 0) -> Any:
    """A bar over this process's share, shown by the main process alone; it says that it is a
    share."""
    state = processes()
    name = what if state.num_processes == 1 else f"{what} of process 1 of {state.num_processes}"
    return bar(name, unit, total, initial, state.is_main_process)


def reduce_all(tensors: Iterable[Tensor], how: str) -> None:
    """Put the sum or the mean over all processes in the place of each tensor, the same bits in
    every process.

    A few large exchanges instead of one per tensor.

    Args:
        tensors: the same shapes and order in every process.
        how: `sum` or `mean`.
    """
    if processes().num_processes == 1:
        return
    for bucket in _buckets(tensors):
        total = reduce(torch.cat([tensor.flatten() for tensor in bucket]), reduction=how)
        for tensor, part in zip(
            bucket, total.split([tensor.numel() for tensor in bucket]), strict=True
        ):
            tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of at most `BUCKET` bytes; a larger tensor is a run of its own."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.nbytes > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
