"""The log of a training for those who watch it, by one of Accelerate's trackers; what is trained
does not depend on it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from erase.claims import flat
from erase.files import atomic_write
from erase.parallel.processes import processes
from erase.prompts.errors import ErasureError, reason, unknown

TRACKERS = ("tensorboard", "wandb", "trackio")
PROJECT, FOLDER = "concept-erasure", "logs"
"""of every log with a service; where in a run's folder"""
Track = Callable[[Mapping[str, float], int], None]
"""(values by name, number of the step that gave them, from 1)"""


def check_tracker(name: str | None) -> None:
    """Refuse, before any work, a tracker that is unknown or not installed.

    Raises:
        ErasureError: such a tracker.
    """
    if name is None:
        return
    if name not in TRACKERS:
        raise unknown("train.log_with", name, TRACKERS)
    if find_spec(name) is None:
        raise ErasureError(
            f"train.log_with {name} needs {name}, which is not installed; pip install {name}, or "
            "leave train.log_with out"
        )
    if name not in LOGGER_TYPE_TO_CLASS:
        raise ErasureError(
            f"train.log_with {name} needs a newer accelerate; pip install -U accelerate, or take "
            "tensorboard"
        )


def check_log(name: str | None, place: Path | None) -> None:
    """Refuse a log without a folder to keep it in."""
    if name is not None and place is None:
        raise ErasureError(
            f"train.log_with {name} keeps its log in the run's folder, and there is none; give "
            "out, or leave train.log_with out"
        )


def logging_to(name: str | None, folder: Path | None) -> dict[str, Any]:
    """What an Accelerator is made with, to log into a run's folder."""
    if name is None or folder is None:
        return {}
    return {"log_with": name, "project_dir": str(folder / FOLDER)}


@contextmanager
def tracked(
    accelerator: Accelerator, name: str | None, config: object, state: Path | None, step: int
) -> Iterator[Track]:
    """A log that is open within the block, or one that keeps nothing.

    Args:
        accelerator: made with `logging_to`.
        name: of the tracker; None: nothing is logged.
        config: told to a service that keeps settings beside a run.
        state: file of the training's state, by whose name the log is known: a method that trains
            several times has a log of each.
        step: steps that are done. A resumed run goes on in its own log; what a tensorboard holds of
            steps that are taken again is superseded.

    Raises:
        ErasureError: the tracker cannot be started.
    """
    check_log(name, state)
    if name is None or state is None:
        yield lambda values, number: None
        return
    project, settings = state.stem, None
    options: dict[str, Any] = {"purge_step": step + 1}
    if name != "tensorboard":
        project = PROJECT
        run = _name(state.parent / FOLDER / f"{state.stem}.txt", fresh=step == 0)
        options = {"id" if name == "wandb" else "name": run, "resume": "allow"}
        settings = flat(dict(vars(config)))
    try:
        accelerator.init_trackers(project, settings, {name: options})
    except Exception as error:  # a service's own, of no common class
        raise ErasureError(
            f"train.log_with {name} cannot start ({reason(error)}); see to that, or leave it out: "
            "the same command goes on"
        ) from error
    try:
        yield _timed(accelerator)
    finally:
        for tracker in accelerator.trackers:  # `end_training` would end the processes' group too
            tracker.finish()
        accelerator.trackers = []


def _timed(accelerator: Accelerator) -> Track:
    """A log that adds the rows per second of each step."""
    since = perf_counter()

    def track(values: Mapping[str, float], number: int) -> None:
        nonlocal since
        now = perf_counter()
        rate = values["rows"] / (now - since)
        since = now
        told = {key: value for key, value in values.items() if key != "rows"}
        accelerator.log({**told, "rows_per_second": rate}, step=number)

    return track


def _name(path: Path, fresh: bool) -> str:
    """By which a service knows the training: the one that this file keeps, or a new one."""
    if not fresh and path.is_file():
        return path.read_text(encoding="utf-8").strip()
    name = uuid.uuid4().hex[:12]
    if processes().is_main_process:
        with atomic_write(path) as aside:
            aside.write_text(name, encoding="utf-8")
    return name
