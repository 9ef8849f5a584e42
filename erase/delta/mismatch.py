"""The likely reason why a model is not the base of a delta."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from erase.models import DiffusionModel

if TYPE_CHECKING:
    from erase.delta import ErasedDelta


OTHERWISE = "load that base, or erase from this one"


def way_out(delta: ErasedDelta, model: DiffusionModel) -> str:
    """What to do with a delta whose base is not this model, as its weights tell: they may have the
    delta's values already, or be rounded."""
    params = model.parameters()
    if not delta.values or not delta.values.keys() <= params.keys() & delta.bits.keys():
        return OTHERWISE

    weights = {name: params[name].detach().cpu() for name in delta.values}
    if all(_has(delta, name, weight) for name, weight in weights.items()):
        return "it has the values of this delta already; load what it was applied to"
    for dtype in (torch.float16, torch.bfloat16):
        if all(torch.equal(one, one.to(dtype).to(one.dtype)) for one in weights.values()):
            kind = str(dtype).removeprefix("torch.")
            return (
                f"its weights are rounded to {kind} (by --load.dtype, or by --dtype of an export), "
                "which makes another base of them; load that base in float32, or erase from this "
                "one"
            )
    return OTHERWISE


def _has(delta: ErasedDelta, name: str, weight: torch.Tensor) -> bool:
    """Whether a parameter has the delta's values where it changes them."""
    if delta.bits[name].numel() != -(-weight.numel() // 8):
        return False
    held = weight[delta.where(name, tuple(weight.shape))]
    return torch.equal(held, delta.values[name].to(held.dtype))
