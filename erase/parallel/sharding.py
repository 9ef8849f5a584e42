"""The optimizer's state, split among processes: ZeRO stage 1 (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054).

Each process keeps the state of some of the values, steps on those, and sends them to the others. Gradients are the same everywhere
before the step, so an optimizer that works value by value, or tensor by tensor, gives the unsplit result bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from erase.parallel.processes import processes

Gather = Callable[[Tensor], Tensor]


def sharded(kind: Any, values: list[nn.Parameter], options: dict[str, Any]) -> torch.optim.Optimizer:
    """An optimizer of this kind over `values`, whose state is split among the processes; the plain one where there is one process."""
    if processes().num_processes == 1:
        return kind(values, **options)  # type: ignore[no-any-return]
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(values, kind, parameters_as_bucket_view=True, **options)


def gathered(pieces: Mapping[Any, Any], gather: Gather, keep: bool) -> dict[Any, Any]:
    """All pieces put together, one after the other in the same order everywhere; what is no tensor, or a single number, stays as it is."""
    whole = {}
    for name, piece in pieces.items():
        found = gather(piece) if torch.is_tensor(piece) and piece.dim() else piece
        if keep:
            whole[name] = found
    return whole


def gather_state(prepared: AcceleratedOptimizer, gather: Gather, keep: bool) -> dict[str, Any]:
    """The state of all values, as an unsplit optimizer has it; every process must ask.

    Args:
        prepared: the optimizer.
        gather: makes a whole of what each process holds of a tensor with an entry per value.
        keep: whether this process, the main one, is to be told.
    """
    if hasattr(prepared.optimizer, "consolidate_state_dict"):
        prepared.optimizer.consolidate_state_dict(to=0)
        return prepared.state_dict() if keep else {}  # type: ignore[no-any-return]
    found = prepared.state_dict()
    return found | {"state": {index: gathered(of_value, gather, keep) for index, of_value in found["state"].items()}}  # type: ignore[no-any-return]


def scatter_state(whole: Mapping[str, Any], names: list[str], piece: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
    """This process's part of a whole state, whose values have these names in this order."""

    def each(name: str, of_value: Mapping[str, Any]) -> dict[str, Any]:
        return {key: piece(name, entry) if torch.is_tensor(entry) else entry for key, entry in of_value.items()}

    return {**whole, "state": {index: each(names[index], of_value) for index, of_value in whole["state"].items()}}
