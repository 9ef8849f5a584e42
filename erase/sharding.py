"""The optimizer's state, split among processes: ZeRO stage 1 (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054).

Each process keeps the state of some of the values, steps on those, and sends them to the others. Gradients are the same everywhere
before the step, so an optimizer that works value by value, or tensor by tensor, gives the unsplit result bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from erase.processes import processes


def sharded(kind: Any, values: list[nn.Parameter], options: dict[str, Any]) -> torch.optim.Optimizer:
    """An optimizer of this kind over `values`, whose state is split among the processes; the plain one where there is one process."""
    if processes().num_processes == 1:
        return kind(values, **options)  # type: ignore[no-any-return]
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(values, kind, parameters_as_bucket_view=True, **options)


def whole_state(prepared: AcceleratedOptimizer) -> dict[str, Any] | None:
    """The state of all values, as an unsplit optimizer has it; every process must ask, the main process alone is told."""
    main = processes().is_main_process
    if hasattr(prepared.optimizer, "consolidate_state_dict"):
        prepared.optimizer.consolidate_state_dict(to=0)
    return prepared.state_dict() if main else None
