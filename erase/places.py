"""Which weights of a tensor changed: one bit per weight, or, where few did, the gaps between them; in memory also flat indices.

Bits cost n / 8 bytes at any density; gaps about one byte per changed weight, which is less below a density of 1/8. Indices are
for work: selecting by them takes a fraction of the time that a boolean mask takes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from erase.prompts.errors import ErasureError

RUN = 1 << 16  # gaps that are unfolded at a time, into 16 MB at most


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


def span(gaps: Tensor) -> int:
    """Of how many weights, or bits, some gaps tell; counted, so that a few bytes which stand for many can be refused first.

    Raises:
        ErasureError: gaps that end in the middle.
    """
    size = int(gaps.sum(dtype=torch.int64)) + int((gaps < 255).sum()) - 1
    if not gaps.numel() or gaps[-1] == 255 or size % 8:
        raise ErasureError("the gaps end in the middle")
    return size


def from_gaps(gaps: Tensor) -> Tensor:
    """The packed bits that `to_gaps` was given; beyond them it takes little memory.

    Raises:
        ErasureError: gaps that end in the middle.
    """
    bits = np.zeros(span(gaps) // 8 + 1, np.uint8)  # the last gap points behind the last bit
    end = 0  # of the weights that the runs so far tell of
    for run in gaps.split(RUN):
        steps = run.numpy().astype(np.int64)
        follows = steps < 255
        ends = end + np.cumsum(steps + follows)
        start, end = end // 8, int(ends[-1])
        flat = np.zeros((end // 8 + 1 - start) * 8, np.uint8)
        flat[ends[follows] - 1 - start * 8] = 1
        bits[start : end // 8 + 1] |= np.packbits(flat, bitorder="little")
    return torch.from_numpy(bits[:-1])
