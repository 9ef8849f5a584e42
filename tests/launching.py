"""Programs of tests/programs in processes of their own: their command and environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAMS = ROOT / "tests" / "programs"


def command(program: str, *args: str | Path, processes: int = 0) -> list[str]:
    """The command of a program: by torchrun in so many processes, or (0) by Python alone."""
    count = ["--nproc_per_node", str(processes)]
    launcher = ["-m", "torch.distributed.run", "--standalone", *count] if processes else []
    return [sys.executable, *launcher, str(PROGRAMS / f"{program}.py"), *map(str, args)]


def environment(threads: int = 1) -> dict[str, str]:
    """This process's, in which a program finds `erase` and `tests`."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}


def launch(
    program: str,
    folder: Path,
    *args: str | Path,
    processes: int = 0,
    threads: int = 1,
) -> subprocess.CompletedProcess[str]:
    """Run a program in a folder to its end, which must be a good one."""
    done = subprocess.run(
        command(program, *args, processes=processes),
        cwd=folder,
        env=environment(threads),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done
