"""Progress bars, ours alone: in place on a terminal, a widget in a notebook, few whole lines in a
log, none where they are not wanted."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from tqdm import auto, tqdm

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


def _is_widget() -> bool:
    """Whether tqdm has chosen a notebook's bar."""
    notebook = sys.modules.get("tqdm.notebook")
    return notebook is not None and issubclass(auto.tqdm, notebook.tqdm_notebook)


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
    # in a notebook its own widget, where ipywidgets are installed
    if sys.stderr.isatty() or _is_widget():
        return auto.tqdm(**options)
    return _Lines(
        **options, mininterval=LOG_SECONDS, maxinterval=LOG_SECONDS, ncols=100, ascii=" .:-=#"
    )
