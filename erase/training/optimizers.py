"""Optimizers by name: torch's own, and those with 8-bit state of bitsandbytes, where that is
installed."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from erase.prompts.errors import ErasureError, is_number, reason, unknown

NOT_OURS = {
    "Optimizer": "is no optimizer itself",
    "LBFGS": "computes the loss several times a step",
    "SparseAdam": "takes sparse gradients alone",
    "Muon": "steps on matrices alone, and a denoiser has other weights as well",
}
"""classes of torch.optim that this training cannot take -> why"""
TRIAL_SHAPES = (6,), (2, 3), (2, 3, 1, 1)
"""the compact values of a mask are flat; without one, parameters have their own shapes"""
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
"""what has one kernel for the whole step, on CPUs and GPUs"""


def make_optimizer(
    values: list[torch.nn.Parameter], name: str, lr: float, args: dict[str, Any], fuse: bool
) -> torch.optim.Optimizer:
    """An optimizer of these values.

    Args:
        values: what it steps on.
        name: a class of torch.optim, or a name of bitsandbytes.optim that ends in 8bit.
        lr: learning rate.
        args: its further arguments.
        fuse: take the fused kernel where there is one and `args` do not say otherwise: one pass
            over each tensor, and no copies.

    Raises:
        ErasureError: an unknown name or argument, a second learning rate, or bitsandbytes is not
            installed.
    """
    if "lr" in args:  # the schedule would write over it
        raise ErasureError(
            f"optimizer_args has a learning rate ({args['lr']}); give it as train.lr"
        )
    if args.get("maximize"):
        raise ErasureError(
            "optimizer_args asks to maximize the loss, which undoes what erasing is to do; leave "
            "maximize out"
        )
    kind = _eight_bit(name) if name.endswith("8bit") else _torch_optimizer(name)
    _check_kinds(kind, name, args)
    if fuse and kind in FUSED and not args.keys() & {"foreach", "differentiable"}:
        args = {"fused": True} | args
    try:
        options = {"lr": lr, **args}
        optimizer: torch.optim.Optimizer = kind(values, **options)
    except (TypeError, ValueError, RuntimeError, LookupError) as error:
        raise ErasureError(f"optimizer {name}: {reason(error)}") from error
    return optimizer


def try_optimizer(
    name: str, lr: float, args: dict[str, Any], fuse: bool, device: torch.device
) -> None:
    """Take two steps on a few weights: some arguments are looked at no earlier, and hours may lie
    before the first real one.

    Raises:
        ErasureError: as `make_optimizer`; or the steps fail, leave weights that are not finite, or
            leave all where they were.
    """
    values = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in TRIAL_SHAPES]
    optimizer = make_optimizer(values, name, min(lr, 1.0), args, fuse)
    try:
        for _ in range(2):
            for value in values:
                value.grad = torch.linspace(-1, 1, value.numel(), device=device).view(value.shape)
            optimizer.step()
    except Exception as error:
        raise ErasureError(
            f"optimizer {name} cannot take a step with {_text_of(args)}: {reason(error)}"
        ) from error
    if not all(value.isfinite().all() for value in values):
        raise ErasureError(
            f"optimizer {name} makes weights that are not finite with {_text_of(args)}; "
            "choose other arguments"
        )
    if not any(value.any() for value in values):
        raise ErasureError(
            f"optimizer {name} moves no weight with lr {lr:g} and {_text_of(args)}; choose a "
            "larger lr"
        )


def _check_kinds(kind: Any, name: str, args: dict[str, Any]) -> None:
    """Refuse what an optimizer would take for something else: a text is true, and of three betas it
    may use two."""
    known = inspect.signature(kind).parameters
    for arg, value in args.items():
        # of an unknown one the optimizer itself says more
        usual = known[arg].default if arg in known else None
        wanted = None
        if isinstance(usual, bool):
            wanted = None if isinstance(value, bool) else "true or false"
        elif isinstance(usual, int | float) and not is_number(value):
            wanted = "a number"
        elif isinstance(usual, tuple) and not (
            isinstance(value, list | tuple) and len(value) == len(usual)
        ):
            wanted = f"a list of {len(usual)} numbers"
        if wanted:
            raise ErasureError(f"optimizer {name}: {arg} is {value!r}; it must be {wanted}")


def _text_of(args: dict[str, Any]) -> str:
    return f"optimizer_args {args}" if args else "its own arguments"


def _torch_optimizer(name: str) -> Any:
    kinds = {
        known: kind
        for known, kind in vars(torch.optim).items()
        if inspect.isclass(kind)
        and issubclass(kind, torch.optim.Optimizer)
        and known not in NOT_OURS
    }
    if name in NOT_OURS:
        raise ErasureError(
            f"unknown optimizer {name!r}: torch's {NOT_OURS[name]}; choose one of: "
            f"{', '.join(sorted(kinds))}"
        )
    if name not in kinds:
        raise unknown("optimizer", name, kinds)
    return kinds[name]


def _eight_bit(name: str) -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ErasureError(
            f"optimizer {name} is one of bitsandbytes, which is not installed; pip install "
            '"concept-erasure-toolkit[8bit]"'
        ) from error
    except (OSError, RuntimeError) as error:  # another torch's build, or another CUDA's
        raise ErasureError(
            f"optimizer {name}: bitsandbytes is installed and cannot be loaded ({error}); use AdamW"
        ) from error
    kinds = {
        known: kind for known, kind in vars(bitsandbytes.optim).items() if known.endswith("8bit")
    }
    if name not in kinds:
        raise unknown("optimizer", name, kinds)
    return kinds[name]
