"""Weights in the precision of the steps, in the place of a model's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from erase.models.by_block import CPU, streamed_to
from erase.models.precision import with_precision


@contextmanager
def stand_ins(
    parts: Mapping[str, nn.Module],
    half: torch.dtype | None,
    device: torch.device,
    channels_last: bool = False,
    away: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """Copies of the weights in the precision and the memory format of the steps, on their device,
    take the place of the model's own; where weights come block by block, in main memory.

    Autocast would round the same weights to the same values, for each pass anew and, outside the
    scope, for each use. The model's own are not written meanwhile, and come back as they were.

    Args:
        parts: name -> module.
        half: precision of matrix products; None: float32, which needs no copies where it is.
        device: of the steps.
        channels_last: convolution kernels with the channels innermost, as tensor cores take them.
        away: keep the model's own weights on the CPU meanwhile.

    Yields:
        `part.parameter` name -> the model's own weights, of those that have a stand-in.
    """
    own: dict[str, Tensor] = {}
    params: dict[str, tuple[nn.Parameter, torch.device]] = {}
    try:
        for part, module in parts.items():
            place = CPU if streamed_to(module) else device
            for name, param, dtype in with_precision(module, half):
                layout = (
                    torch.channels_last
                    if channels_last and param.dim() == 4
                    else torch.preserve_format
                )
                data = param.data  # a new object at each look
                copy = data.to(place, dtype, memory_format=layout)
                if copy is not data:
                    params[f"{part}.{name}"] = param, data.device
                    own[f"{part}.{name}"] = data.cpu() if away else data
                    param.data = copy
            if any(buffer.device != place for buffer in module.buffers()):
                module.to(place)
        yield own
    finally:
        for name, (param, home) in params.items():
            param.data = own[name].to(home)
