"""Activations that are cheap to make are made again in the backward pass instead of being kept.

Selective recomputation (Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198), by the kind of
operation: norms, SiLU, GELU and products of two activations read what their own backward passes
keep anyway, so what they gave need not be kept for the next layer. The same kernel on the same
input gives the same bits. What took a product with weights is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

SMALL = 1 << 12
"""numbers; tensors of fewer are kept"""
NORM = "made by this norm"
"""key of a graph node's metadata"""


class _Recipe(NamedTuple):
    """In the place of a tensor that is not kept: the node of the graph that made it, what makes it
    again, and how it is seen."""

    node: Any
    make: Callable[[Any], Tensor]
    shape: torch.Size
    dtype: torch.dtype

    def seen(self, value: Tensor) -> Tensor:
        return value.to(self.dtype).view(self.shape)


@contextmanager
def recomputing(parts: Iterable[nn.Module], memory: SavedActivations | None) -> Iterator[None]:
    """Forward passes through these modules within the block keep in `memory` what their backward
    passes need; None: as torch does."""
    with ExitStack() as stack:
        if memory:
            for layer in chain.from_iterable(part.modules() for part in parts):
                if type(layer) in (nn.GroupNorm, nn.LayerNorm):
                    stack.callback(layer.register_forward_hook(_mark).remove)
            stack.enter_context(saved_tensors_hooks(memory.pack, memory.unpack))
        yield


def _mark(layer: nn.Module, inputs: Any, output: Tensor) -> None:
    """A norm's node of the graph does not know its bias; the layer does."""
    if output.grad_fn is not None:
        # torch declares a method, and has a dict
        output.grad_fn.metadata[NORM] = layer  # type: ignore[index]


class SavedActivations:
    """The tensors that autograd keeps for the backward pass, without cheap activations, which are
    made again there."""

    def __init__(self) -> None:
        self._recent: list[tuple[Any, Tensor]] = []
        """the last two that were made again, often asked for once more: a norm's output by SiLU, or
        for queries, keys and values"""

    def pack(self, tensor: Tensor) -> Tensor | _Recipe:
        """The tensor, or how to make it again."""
        self._recent.clear()
        node, output, casts = tensor.grad_fn, tensor.output_nr, 0
        while node is not None and node.name() in VIEW_NODES:
            casts += node.name() == CAST
            node, output = node.next_functions[0]
        # other outputs than the first are a norm's mean and deviation; a second cast would not
        # bring back what the first one rounded off
        make = _maker(node) if tensor.numel() >= SMALL and output == 0 and casts < 2 else None
        return _Recipe(node, make, tensor.shape, tensor.dtype) if make else tensor

    @torch.no_grad()
    def unpack(self, kept: Tensor | _Recipe) -> Tensor:
        """The packed tensor, with the same bits."""
        if torch.is_tensor(kept):
            return kept
        for node, value in self._recent:
            if node is kept.node:
                return kept.seen(value)
        value = kept.make(kept.node)
        self._recent = [*self._recent[-1:], (kept.node, value)]
        return kept.seen(value)


def _maker(node: Any) -> Callable[[Any], Tensor] | None:
    """The function that makes a node's output again from the tensors that it keeps for itself;
    None: it is not cheap, or keeps too little."""
    if node is None:
        return None
    if node.name() == "MulBackward0" and any(source is None for source, _ in node.next_functions):
        return None  # of a product with a constant, only the constant is kept
    if node.name() in NORMS and NORM not in node.metadata:
        return None
    return MAKERS.get(node.name())


def _group_norm(node: Any) -> Tensor:
    layer = node.metadata[NORM]
    return functional.group_norm(
        node._saved_input, layer.num_groups, layer.weight, layer.bias, layer.eps
    )


def _layer_norm(node: Any) -> Tensor:
    layer = node.metadata[NORM]
    return functional.layer_norm(
        node._saved_input, layer.normalized_shape, layer.weight, layer.bias, layer.eps
    )


CAST = "ToCopyBackward0"
VIEW_NODES = ("ViewBackward0", CAST)
"""nodes that only show a tensor in another shape or precision, as layers and autocast do"""
NORMS: dict[str, Callable[[Any], Tensor]] = {
    "NativeGroupNormBackward0": _group_norm,
    "NativeLayerNormBackward0": _layer_norm,
}
MAKERS = NORMS | {
    "SiluBackward0": lambda node: functional.silu(node._saved_self),
    "GeluBackward0": lambda node: functional.gelu(
        node._saved_self, approximate=node._saved_approximate
    ),
    "MulBackward0": lambda node: node._saved_self * node._saved_other,
}
"""name of a graph node -> its output, from what it keeps"""
