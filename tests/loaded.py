"""Which of the large libraries a command of its own process has loaded, told at its end."""

from __future__ import annotations

import os
from pathlib import Path

LIBRARIES = ("torch", "diffusers", "transformers")
NOTE = "loaded.txt"
# Python imports a module of this name by itself; stand-ins of libraries have no file
AT_EXIT = f"""import atexit, sys
from pathlib import Path

def tell():
    found = [name for name in {LIBRARIES} if getattr(sys.modules.get(name), "__file__", None)]
    (Path(__file__).parent / "{NOTE}").write_text(" ".join(found))

atexit.register(tell)
"""


def watched(folder: Path, *paths: Path) -> dict[str, str]:
    """An environment whose Python process tells in `folder` what it has loaded; it finds packages
    in `paths`."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(AT_EXIT)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (folder, *paths)))}


def loaded(folder: Path) -> list[str]:
    """What the process told."""
    return (folder / NOTE).read_text().split()
