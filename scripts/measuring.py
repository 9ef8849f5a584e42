"""What the benchmarks share: when the device is done, and the most memory that was taken."""

from __future__ import annotations

import resource
from pathlib import Path

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


def start_peak(device: str | torch.device) -> int:
    """Forget the peak so far (of a process: on Linux alone); returns the memory that is held now, in bytes."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return host_peak()
    return _status("VmHWM")


def new_peak(device: str | torch.device) -> int:
    """Peak memory since `start_peak`, in bytes."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM") if Path("/proc/self/status").exists() else host_peak()


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
