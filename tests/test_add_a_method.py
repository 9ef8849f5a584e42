"""docs/add_a_method.md, followed to the letter: its files are written, its commands run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from erase.delta import ErasedDelta

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/add_a_method.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```(\w+)\n(.*?)```\n", re.S)
COMMANDS = {"erase-concept": "run_erase", "erase-list": "run_list"}


def blocks(section: str) -> list[tuple[str, str, str]]:
    """(the last name in backticks of the line before, language, text) of each block of a
    section."""
    text, found = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0], []
    for block in BLOCK.finditer(text):
        line = text[: block.start()].rstrip().splitlines()[-1]
        names = re.findall(r"`([^`]+)`", line)
        found.append((names[-1] if names else "", *block.groups()))
    return found


def write(folder: Path, section: str) -> None:
    """The files of a section."""
    for name, language, body in blocks(section):
        if language != "bash":
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(body, encoding="utf-8")


def follow(folder: Path, section: str, path: list[Path]) -> str:
    """Run the commands of a section where the reader stands; `pip` installs into the first folder
    of `path` instead of the environment.

    Returns:
        what they printed.
    """
    shims = folder / "shims"
    shims.mkdir(exist_ok=True)
    (shims / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for name, module in COMMANDS.items():  # as an installed command, which does not look around
        call = f"import sys; from erase.scripts.{module} import cli; sys.exit(cli())"
        (shims / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -c "{call}" "$@"\n')
    for shim in shims.iterdir():
        shim.chmod(0o755)

    own = os.pathsep.join(map(str, path))
    further = os.environ.get("PYTHONPATH", "")
    environment = {
        **os.environ,
        "PATH": f"{shims}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [own, further])),
        "OMP_NUM_THREADS": "1",
        "PIP_TARGET": str(path[0]),
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # of a flag that turns something off, 0 does
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    script = "".join(body for _, language, body in blocks(section) if language == "bash")
    # the page names the folder `.` alone; ours must stay behind it
    script = script.replace("PYTHONPATH=. ", 'PYTHONPATH=".:$PYTHONPATH" ')
    done = subprocess.run(
        ["bash", "-euc", script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def outside(tmp_path) -> Path:
    """A newcomer's folder, after the first section."""
    write(tmp_path, "The method")
    (tmp_path / "my_erasers/__init__.py").write_text("")
    return tmp_path


def test_the_method_has_thirty_lines_beside_its_imports():
    ((_, _, body),) = blocks("The method")
    lines = body.partition("@dataclass")[2].splitlines()
    assert len([line for line in lines if line.strip()]) <= 30


def test_it_is_tried_from_its_folder(outside):
    follow(outside, "Try it", [outside / "site"])
    delta = ErasedDelta.load(outside / "runs/tried/delta.safetensors")
    assert delta.count and delta.metadata["method"] == "my_erasers.blank:BLANK"


def test_it_is_a_package_with_a_name(outside):
    write(outside, "In a package of your own")
    told = follow(outside, "In a package of your own", [outside / "site"])
    assert re.search(r"^ +blank +Blank: under the concept's prompt", told, re.M)
    delta = ErasedDelta.load(outside / "runs/named/delta.safetensors")
    assert delta.count and delta.metadata["method"] == "blank"


@pytest.mark.slow
def test_it_is_one_of_ours_and_keeps_the_contract(tmp_path):
    """In a copy of the checkout."""
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("prompts", "erase", "eval", "scripts", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "Makefile"):
        shutil.copy(ROOT / name, tmp_path)

    ((_, _, body),) = blocks("The method")
    (file, _, last), (index, _, line), _ = blocks("In this package")
    (tmp_path / file).write_text(body[: body.index("BLANK = ")] + last, encoding="utf-8")
    listed = (tmp_path / index).read_text(encoding="utf-8")
    (tmp_path / index).write_text(
        listed.replace("    },\n    Method,", f"{line}    }},\n    Method,")
    )
    told = follow(tmp_path, "In this package", [tmp_path / ".links"])
    assert re.search(r"\b1\d passed", told) and "failed" not in told
