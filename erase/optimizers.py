"""Optimizers by name: torch's own, and those with 8-bit state of bitsandbytes, where that is installed."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from erase.sharding import sharded
from prompts.errors import ErasureError, unknown

NOT_OURS = {"Optimizer", "LBFGS", "SparseAdam"}  # the abstract class; steps that need a closure; sparse gradients
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
"""what has one kernel for the whole step, on CPUs and GPUs"""


def make_optimizer(
    values: list[torch.nn.Parameter], name: str, lr: float, args: dict[str, Any], fuse: bool, shard: bool = False
) -> torch.optim.Optimizer:
    """An optimizer of these values.

    Args:
        values: what it steps on.
        name: a class of torch.optim, or a name of bitsandbytes.optim that ends in 8bit.
        lr: learning rate.
        args: its further arguments.
        fuse: take the fused kernel where there is one and `args` do not say otherwise: one pass over each tensor, and no copies.
        shard: split its state among the processes.

    Raises:
        ErasureError: an unknown name or argument, a second learning rate, or bitsandbytes is not installed.
    """
    if "lr" in args:  # the schedule would write over it
        raise ErasureError(f"optimizer_args has a learning rate ({args['lr']}); give it as train.lr")
    kind = _eight_bit(name) if name.endswith("8bit") else _torch_optimizer(name)
    if fuse and kind in FUSED and not args.keys() & {"foreach", "differentiable"}:
        args = {"fused": True} | args
    try:
        options = {"lr": lr, **args}
        optimizer: torch.optim.Optimizer = sharded(kind, values, options) if shard else kind(values, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ErasureError(f"optimizer {name}: {error}") from error
    return optimizer


def _torch_optimizer(name: str) -> Any:
    kinds = {
        known: kind
        for known, kind in vars(torch.optim).items()
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and known not in NOT_OURS
    }
    if name not in kinds:
        raise unknown("optimizer", name, kinds)
    return kinds[name]


def _eight_bit(name: str) -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ErasureError(
            f'optimizer {name} is one of bitsandbytes, which is not installed; pip install "concept-erasure-toolkit[8bit]"'
        ) from error
    except (OSError, RuntimeError) as error:  # another torch's build, or another CUDA's
        raise ErasureError(f"optimizer {name}: bitsandbytes is installed and cannot be loaded ({error}); use AdamW") from error
    kinds = {known: kind for known, kind in vars(bitsandbytes.optim).items() if known.endswith("8bit")}
    if name not in kinds:
        raise unknown("optimizer", name, kinds)
    return kinds[name]
