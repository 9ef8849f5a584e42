"""When, how long and where an evaluation ran: for the page, and not for report.json, which is the
same whenever the same is measured."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch


@dataclass(frozen=True)
class Setting:
    """What a page tells beside the report."""

    facts: Mapping[str, str] = field(default_factory=dict)
    """date, duration, machine"""
    recipe: Mapping[str, str] = field(default_factory=dict)
    """file name -> text, of the files that make the erasure again"""
    folders: Mapping[str, Path] = field(default_factory=dict)
    """row of the report, and its set -> folder of the pictures that its evaluators keep"""


def facts_since(began: float) -> dict[str, str]:
    """Date, duration and machine.

    Args:
        began: `time.monotonic()` when the evaluation began.
    """
    seconds = round(time.monotonic() - began)
    minutes, rest = divmod(seconds, 60)
    return {
        "evaluated": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "duration": f"{minutes} min {rest} s" if minutes else f"{rest} s",
        "machine": machine(),
    }


def machine() -> str:
    """The accelerator, or the processors, and the system; without the machine's name."""
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {system}, torch {torch.__version__}"
    return f"{os.cpu_count()} processors, {system}, torch {torch.__version__}"
