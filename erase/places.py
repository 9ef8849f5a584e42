"""Which weights of a tensor changed: one bit per weight, or, where few did, the gaps between them; in memory also flat indices.

Bits cost n / 8 bytes at any density; gaps about one byte per changed weight, which is less below a density of 1/8. Indices are
for work: selecting by them takes a fraction of the time that a boolean mask takes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prompts.errors import ErasureError


def indices(chosen: Tensor) -> Tensor:
    """Flat indices of what a boolean tensor chooses, ascending, int64, on its device."""
    if chosen.device.type == "cpu":  # numpy finds them several times as fast as torch
        return torch.from_numpy(np.flatnonzero(chosen.numpy()))
    return chosen.flatten().nonzero()[:, 0]


def to_gaps(bits: Tensor) -> Tensor:
    """Packed bits as gaps, shape (m,) uint8: each byte skips so many unchanged weights, then one changed weight follows.

    A byte of 255 skips 255 and none follows. The last one points behind the last bit, so that the length is known.
    """
    flat = np.unpackbits(bits.numpy(), bitorder="little")
    skipped = np.diff(np.append(np.flatnonzero(flat), flat.size), prepend=-1) - 1
    gaps = np.full(int((skipped // 255 + 1).sum()), 255, np.uint8)
    gaps[np.cumsum(skipped // 255 + 1) - 1] = skipped % 255
    return torch.from_numpy(gaps)


def from_gaps(gaps: Tensor) -> Tensor:
    """The packed bits that `to_gaps` was given.

    Raises:
        ErasureError: gaps that end in the middle.
    """
    steps = gaps.numpy().astype(np.int64)
    follows = steps < 255
    places = np.cumsum(steps + follows)[follows] - 1
    if not len(steps) or not follows[-1] or places[-1] % 8:
        raise ErasureError("the gaps end in the middle")
    flat = np.zeros(places[-1], np.uint8)
    flat[places[:-1]] = 1
    return torch.from_numpy(np.packbits(flat, bitorder="little"))
