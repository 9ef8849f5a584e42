"""Mixed precision by name and by layer, and the rounding of matrix products on Intel's
processors."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from erase.models.naming import former_prefix
from erase.prompts.errors import unknown

PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
IN_HARDWARE = {
    "bf16": {"avx512_bf16", "amx_bf16", "bf16"},
    "fp16": {"avx512_fp16", "amx_fp16", "fp16_arith"},
}
"""what a processor that multiplies in this precision says of itself, on x86 or Arm"""
IN_HALF = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""the layers whose weights autocast would round for each use"""


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision for sampling: `no`, `bf16` or `fp16`; weights stay as they are.

    Warns where the processor only imitates it (a training step on the embedded model: 1.1 s in
    bf16, 0.5 in float32).

    Raises:
        ErasureError: another name; the near one is suggested.
    """
    check_precision(precision)
    if device.type == "cpu" and not in_hardware(precision):
        warnings.warn(
            f"this processor has no {precision} of its own, which makes it slower than "
            "mixed_precision no",
            stacklevel=2,
        )
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "no")


def check_precision(precision: str) -> None:
    """Refuse an unknown name.

    Raises:
        ErasureError: the near one is suggested.
    """
    if precision not in PRECISIONS:
        raise unknown("mixed precision", precision, PRECISIONS)


def in_hardware(precision: str) -> bool:
    """Whether the processor multiplies in this precision itself; said of one that torch knows
    nothing about, too."""
    ask = getattr(torch.cpu, "get_capabilities", None)  # torch 2.10 and later
    if precision not in IN_HARDWARE or ask is None:
        return True
    return any(ask().get(name) for name in IN_HARDWARE[precision])


def with_precision(
    module: nn.Module,
    half: torch.dtype | None,
) -> Iterator[tuple[str, nn.Parameter, torch.dtype]]:
    """Name, parameter, and the precision in which autocast would use it.

    Args:
        module: whose parameters they are.
        half: precision of matrix products; None: float32.
    """
    former = former_prefix(module)
    for prefix, layer in module.named_modules():
        for name, param in layer.named_parameters(prefix, recurse=False):
            dtype = half if half and isinstance(layer, IN_HALF) else param.dtype
            yield name.removeprefix(former), param, dtype


def pin_mkl_rounding() -> None:
    """Ask MKL, before its first product, for sums whose order does not follow from addresses; a
    choice made by the user stands.

    On Intel's processors its matrix products round differently for another address, of the same
    values: one checkpoint, read in two ways, gave two deltas. Elsewhere they were found not to, and
    are left alone. It costs no time (a training step on the embedded model).
    """
    if _made_by_intel():
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def _made_by_intel() -> bool:
    info = Path("/proc/cpuinfo")
    return "GenuineIntel" in (
        info.read_text(encoding="utf-8") if info.exists() else platform.processor()
    )
