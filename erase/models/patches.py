"""Latents as FLUX's transformer takes them: a sequence of patches of 2 x 2, and where each lies."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """Latents (n, c, h, w) as patches, row by row, shape (n, h / 2 * w / 2, 4 c): of each, channel
    by channel, the four values."""
    n, channels, height, width = latents.shape
    cells = latents.reshape(n, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, 4 * channels)


def unpack(patches: Tensor, height: int, width: int) -> Tensor:
    """The latents (n, c, height, width) of patches; the inverse of `pack`."""
    n, channels = len(patches), patches.shape[-1] // 4
    cells = patches.reshape(n, height // 2, width // 2, channels, 2, 2)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(n, channels, height, width)


def positions(height: int, width: int) -> Tensor:
    """Of each patch 0, its row and its column, shape (patches, 3): rotary positions, which of text
    are all 0."""
    rows, columns = torch.arange(height // 2), torch.arange(width // 2)
    grid = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), rows, columns)
    return grid.float()
