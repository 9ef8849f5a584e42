"""What the benchmarks share: when the device is done, and the most memory that was taken."""

from __future__ import annotations

import resource

import torch


def wait(device: str | torch.device) -> None:
    """Return when all work on the device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def host_peak() -> int:
    """Peak resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak(device: str | torch.device) -> int:
    """Peak memory so far, in bytes: allocated on a GPU, resident on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.device(device).type == "cuda" else host_peak()
