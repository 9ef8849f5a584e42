"""What the benchmarks share: when the device is done, the most memory that was taken, a process for
each measurement."""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from erase.models.precision import in_hardware

Measure = Callable[[str, str, argparse.Namespace], dict[str, Any]]
"""(what is measured, variant, the benchmark's arguments) -> figures"""


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
    """Forget the peak so far (of a process: on Linux alone); returns the memory that is held now,
    in bytes."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return host_peak()
    return _status("VmHWM")


def new_peak(device: str | torch.device) -> int:
    """Peak memory since `start_peak`, in bytes."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM") if Path("/proc/self/status").exists() else host_peak()


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def in_own_process(
    script: str, name: str, variant: str, args: argparse.Namespace
) -> dict[str, Any] | None:
    """What `begin` prints for one model and variant in a fresh process, whose memory is its own;
    None: it did not finish."""
    options = json.dumps({key: value for key, value in vars(args).items() if key != "json"})
    done = subprocess.run(
        [sys.executable, script, "--one", name, variant, options], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        print(f"{name} {variant} did not finish (exit code {done.returncode}): out of memory?")
        return None
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def begin(parser: argparse.ArgumentParser, measure: Measure) -> argparse.Namespace:
    """The arguments of a benchmark, those that all have among them; says what machine it runs on.

    In a process that `in_own_process` started, this measures what it was started for, prints that
    and ends.
    """
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--json", type=Path, help="also write the figures, and what they were measured on, here"
    )
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, variant, options = args.one
        print(json.dumps(measure(name, variant, argparse.Namespace(**json.loads(options)))))
        raise SystemExit
    print(*(f"{key}: {value}" for key, value in machine().items()), sep=", ")
    return args


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "torch": torch.__version__,
        "processor": processor(),
        "bf16": in_hardware("bf16"),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def processor() -> str:
    """Its name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    named = (
        [
            line
            for line in info.read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return (
        named[0].partition(":")[2].strip() if named else platform.processor() or platform.machine()
    )


def write_rows(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Measurements and the settings behind them, as JSON, where `--json` asks for it."""
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items()}
        args.json.write_text(
            json.dumps({**machine(), "settings": settings, "rows": rows}, indent=1),
            encoding="utf-8",
        )
