"""The same sums wherever their terms lie in memory."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def pin_mkl_rounding() -> None:
    """Ask MKL, before its first product, for sums whose order does not follow from addresses; a choice made by the user stands.

    On Intel's processors its matrix products round differently for another address, of the same values: one checkpoint, read in two
    ways, gave two deltas. Elsewhere they were found not to, and are left alone. It costs no time (a training step on the embedded model).
    """
    if _made_by_intel():
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def _made_by_intel() -> bool:
    info = Path("/proc/cpuinfo")
    return "GenuineIntel" in (info.read_text(encoding="utf-8") if info.exists() else platform.processor())
