"""Published networks of the metrics as files on this disk, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch

ALEXNET = {
    0: (64, 3, 11, 11),
    3: (192, 64, 5, 5),
    6: (384, 192, 3, 3),
    8: (256, 384, 3, 3),
    10: (256, 256, 3, 3),
}
"""torchvision's AlexNet: place among its features -> shape of the weights"""


def write_alexnet(file: Path) -> Path:
    """What LPIPS takes of torchvision's file."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for place, shape in ALEXNET.items():
        scale = (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
        tensors[f"features.{place}.weight"] = scale * torch.randn(shape, generator=generator)
        tensors[f"features.{place}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, file)
    return file
