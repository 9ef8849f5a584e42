"""Weights that stay in main memory, and come to the device block by block, for each block's own
pass."""

from __future__ import annotations

from functools import update_wrapper
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

CPU = torch.device("cpu")
LISTS = {
    "resnets", "attentions", "transformer_blocks", "single_transformer_blocks",  # UNets, SD 3, FLUX
    "layers", "noise_refiner", "context_refiner",  # Z-Image; CLIP, Qwen
    "block", "blocks",  # T5; Qwen's images
}  # fmt: skip
"""lists of modules whose members are blocks"""


def blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks of a denoiser or a text encoder, inner ones before those that they lie in."""
    found = [
        member
        for name, owner in module.named_modules()
        if name.split(".")[-1] in LISTS
        for member in owner.children()
    ]
    return found[::-1]


def innermost(module: nn.Module) -> list[nn.Module]:
    """The blocks in which no others lie."""
    return [block for block in blocks(module) if not blocks(block)]


def stream(part: nn.Module, device: torch.device) -> None:
    """From now on the part runs on `device`, and its weights stay where they are.

    Each block has copies of its own weights there while it runs, and the part those that lie in no
    block. A pass that records a graph makes each innermost block again in the backward pass, with
    its weights anew (Chen et al. 2016, https://arxiv.org/abs/1604.06174): the graph holds none of
    them. Gradients arrive where the weights are.
    """
    for block in (*blocks(part), part):
        inner = blocks(block)
        theirs = {id(tensor) for one in inner for tensor in _tensors(one).values()}
        names = [name for name, tensor in _tensors(block).items() if id(tensor) not in theirs]
        block.forward = Streamed(block, names, device, again=block is not part and not inner)


def streamed_to(part: nn.Module) -> torch.device | None:
    """Where a part runs whose weights stay elsewhere; None: where its weights are."""
    forward = getattr(part, "_old_forward", part.forward)  # under a hook of accelerate's
    return forward.device if isinstance(forward, Streamed) else None


class Streamed:
    """The pass of a module, with copies on a device in the place of some of its tensors."""

    def __init__(
        self, module: nn.Module, names: list[str], device: torch.device, again: bool
    ) -> None:
        """`again`: made again in the backward pass."""
        self._run, self.device, self._again = _Run(module), device, again
        self._names = [f"module.{name}" for name in names]
        update_wrapper(self, module.forward)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        if self._again and torch.is_grad_enabled():
            return checkpoint(self._pass, *args, use_reentrant=False, **keywords)
        return self._pass(*args, **keywords)

    def _pass(self, *args: Any, **keywords: Any) -> Any:
        here = {name: attrgetter(name)(self._run).to(self.device) for name in self._names}
        return functional_call(self._run, here, args, keywords)


class _Run(nn.Module):
    """A module's forward pass without its hooks, which have run already."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self._inner = module, module.forward

    def forward(self, *args: Any, **keywords: Any) -> Any:
        return self._inner(*args, **keywords)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
