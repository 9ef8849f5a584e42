"""Programs in processes of their own, which are forked where the libraries are loaded: to import
them takes each process seven seconds. Cold starts are tested where they are at issue."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Mapping
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAMS = ROOT / "tests" / "programs"
STREAMS = {1: "stdout", 2: "stderr"}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
        "erase.methods.salun",
        "erase.run",
        "erase.eval.run",
    ]
)


def environment(threads: int = 1, path: Path = ROOT) -> dict[str, str]:
    """This process's, in which a program finds the packages of a folder."""
    return os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": str(threads)}


def start(
    program: str | Path, *args: str | Path, folder: Path, environment: Mapping[str, str]
) -> BaseProcess:
    """Start a program, a file or the name of a module, as Python would; what it writes is appended
    to the files `stdout` and `stderr` of its folder."""
    for name in STREAMS.values():
        (folder / name).touch()
    command = [str(program), *map(str, args)]
    process = FORKS.Process(target=_run, args=(command, str(folder), dict(environment)))
    process.start()
    return process


def launch(
    program: str | Path,
    *args: str | Path,
    folder: Path,
    processes: int = 0,
    threads: int = 1,
    path: Path = ROOT,
) -> str:
    """Run a program to its end, which must be a good one: in so many processes, as torchrun does,
    or (0) in one that knows of no others.

    Returns:
        what they wrote to stderr.
    """
    own, started = environment(threads, path), []
    for place in _places(processes) if processes else [{}]:
        started.append(start(program, *args, folder=folder, environment=own | place))
    left = {process.sentinel: process for process in started}
    while left:
        for sentinel in wait(list(left)):
            process = left.pop(sentinel)
            process.join()
            if process.exitcode:  # the others would wait for it
                for other in left.values():
                    other.kill()
    said = (folder / STREAMS[2]).read_text()
    assert not any(process.exitcode for process in started), said
    return said


def _places(processes: int) -> list[dict[str, str]]:
    """What torchrun tells each process of itself and the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    return [shared | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) for rank in range(processes)]


def _run(command: list[str], folder: str, environment: dict[str, str]) -> None:
    import torch

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    for number, name in STREAMS.items():
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
        setattr(sys, name, open(number, "w", buffering=1, closefd=False))

    paths = environment["PYTHONPATH"].split(os.pathsep)
    sys.path[:0] = [path for path in paths if path not in sys.path]
    sys.argv = command
    if command[0].endswith(".py"):
        runpy.run_path(command[0], run_name="__main__")
    else:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
