"""TIES: trim, elect sign, disjoint mean (Yadav et al. 2023, https://arxiv.org/abs/2306.01708), a
way to merge deltas in which they do not cancel each other where they change the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from erase.delta import ErasedDelta
from erase.prompts.errors import ErasureError
from erase.tensors import indices, pack, top_k

KEEP = 0.2
"""the paper's share of changes"""
Part = tuple[Tensor, Tensor, float]
"""flat indices of the weights that it changes in one tensor, the values there, its scale"""


def check_keep(keep: float) -> None:
    """Refuse a share that keeps nothing, or more than there is."""
    if not 0 < keep <= 1:
        raise ErasureError(
            f"keep is {keep}; it is the fraction of each delta's changes that ties keeps, above 0 "
            "and at most 1"
        )


def trimmed(params: Mapping[str, nn.Parameter], delta: ErasedDelta, keep: float) -> ErasedDelta:
    """The largest changes of a delta alone.

    Args:
        params: of its base.
        delta: what changed.
        keep: fraction of its changed weights: floor(keep * count) of them stay, at least one.
    """
    sizes = {}
    for name, new in delta.values.items():
        base = params[name].detach().cpu().flatten()
        sizes[name] = change_of(base, (delta.places(name), new, 1.0)).abs().float()

    values, bits = {}, {}
    count = max(int(keep * delta.count), min(delta.count, 1))
    for name, large in top_k(sizes, count):
        if len(kept := indices(large)):
            where = torch.zeros(params[name].numel(), dtype=torch.bool)
            where[delta.places(name).index_select(0, kept)] = True
            values[name], bits[name] = delta.values[name].index_select(0, kept), pack(where)
    return replace(delta, values=values, bits=bits)


def change_of(base: Tensor, part: Part) -> Tensor:
    """What a part adds to the flat values of one tensor where it changes them, scaled, in
    float64."""
    where, values, scale = part
    return scale * (values.double() - base.index_select(0, where).double())


def elected(base: Tensor, parts: Sequence[Part]) -> list[Part]:
    """Of each part the changes in the elected direction: the sign of the sum of all scaled changes
    of a weight.

    Args:
        base: flat values of one tensor.
        parts: what changes there.
    """
    changes = [change_of(base, part) for part in parts]
    total = torch.zeros(base.shape, dtype=torch.float64)
    for (where, _, _), change in zip(parts, changes, strict=True):
        total.scatter_add_(0, where, change)
    agreeing = []
    for (where, values, scale), change in zip(parts, changes, strict=True):
        with_it = indices(change.sign() == total.index_select(0, where).sign())
        agreeing.append((where.index_select(0, with_it), values.index_select(0, with_it), scale))
    return agreeing
