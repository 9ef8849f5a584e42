"""Whether weights are finite: asked of every weight, at every load, so it is worth being quick about."""

from __future__ import annotations

from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether a floating point tensor holds neither NaN nor infinity.

    Its extremes tell (NaN is passed on to both): one pass without temporary tensors, a fraction of the time of `isfinite().all()`.
    """
    return not tensor.numel() or all(end.isfinite() for end in tensor.aminmax())
