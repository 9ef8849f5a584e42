"""Progress bars, ours alone: in place on a terminal, few whole lines in a log, none where they are
not wanted."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 30  # between two lines of a log
OFF = ("", "0", "false", "no")


class _Lines(tqdm):  # type: ignore[type-arg]
    """A bar whose every state is a line of its own, for files and pipes: there a carriage return is
    no way back."""

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """A writer of states; an empty one is no line."""

        def write(state: str) -> None:
            if state.strip():
                file.write(state.strip() + "\n")
                file.flush()

        return write


def bar(what: str, unit: str, total: int, initial: int = 0, shown: bool = True) -> Any:
    """A progress bar on stderr; `TQDM_DISABLE=1`, or `--quiet` of a command, turns it off."""
    shown = shown and os.environ.get("TQDM_DISABLE", "").strip().lower() in OFF
    options: dict[str, Any] = {
        "desc": what,
        "unit": unit,
        "total": total,
        "initial": initial,
        "disable": not shown,
    }
    if sys.stderr.isatty():
        return tqdm(**options)
    return _Lines(
        **options, mininterval=LOG_SECONDS, maxinterval=LOG_SECONDS, ncols=100, ascii=" .:-=#"
    )
