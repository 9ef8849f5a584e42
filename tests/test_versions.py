"""What a fresh machine installs: bounds that were tested, tools of exact versions, and a `make
test` that tests whatever lint says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "tests" / "constraints"
SETS = ("newest", "oldest", "torch-2.14")


def setup_cfg():
    found = ConfigParser()
    found.read(ROOT / "setup.cfg")
    return found


def requirements(lines):
    """Name -> requirement, of a list in setup.cfg or of a constraints file."""
    kept = [
        line.strip()
        for line in lines.splitlines()
        if line.strip() and not line.startswith(("#", "-c"))
    ]
    return {Requirement(line).name.lower(): Requirement(line) for line in kept}


def pins(name):
    found = requirements((CONSTRAINTS / f"{name}.txt").read_text())
    assert all(re.fullmatch(r"==[\w.]+", str(each.specifier)) for each in found.values()), name
    return {key: str(each.specifier)[2:] for key, each in found.items()}


def test_every_lower_bound_of_a_dependency_is_the_version_that_the_oldest_set_tests():
    config = setup_cfg()
    extras = [config["options.extras_require"][name] for name in ("xformers", "8bit", "live")]
    bounds = requirements("\n".join([config["options"]["install_requires"], *extras]))
    assert {name: str(each.specifier) for name, each in bounds.items()} == {
        name: f">={version}" for name, version in pins("oldest").items()
    }


def test_tools_have_exact_versions_in_every_set():
    extras = setup_cfg()["options.extras_require"]
    tools = requirements("\n".join([extras["dev"], extras["docs"]]))
    assert tools.keys() == pins("tools").keys()
    for name in SETS:
        assert "-c tools.txt" in (CONSTRAINTS / f"{name}.txt").read_text().splitlines()


def test_no_set_holds_back_what_runs_but_the_sets_that_say_so():
    assert not pins("newest") and pins("torch-2.14").keys() == {"torch", "torchvision"}


STUB = """#!/bin/sh
echo "${0##*/} $*" >> calls.txt
case "$FAILING" in *"${0##*/}"*) exit 3;; esac
"""
"""a tool that writes down that it was called, and fails if its name is in FAILING"""
PYTHON = """#!/bin/sh
[ "$1" = -c ] && exit 0
echo "${0##*/} $*" >> calls.txt
bin=.venv/bin
case "$*" in "-m venv"*) rm -rf .venv; mkdir -p $bin; cp python ruff mypy mkdocs $bin;; esac
case "$FAILING" in *"$2"*) exit 3;; esac
"""
"""likewise, an interpreter: its venv module makes a folder of these stubs; it fails if the module
it runs is in FAILING"""

OLD_PYTHON = """#!/bin/sh
[ "$1" = -c ] || exec echo "$*" >> calls.txt
exec {python} -c "import sys; sys.version_info = (3, 10, 4)
$2"
"""


@pytest.fixture
def clone(tmp_path):
    """What make looks at, in a folder with a blank in its name, with stubs for the tools; returns a
    function that calls make."""
    folder = tmp_path / "a clone"
    shutil.copytree(CONSTRAINTS, folder / "tests" / "constraints")
    for name in ("Makefile", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for name, text in (("python", PYTHON), ("ruff", STUB), ("mypy", STUB), ("mkdocs", STUB)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    def make(*words, failing=""):
        """The exit status, and the calls that make made."""
        (folder / "calls.txt").write_text("")
        environment = os.environ | {"FAILING": failing}
        done = subprocess.run(
            ["make", "PYTHON=./python", *words],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        return (
            done.returncode,
            (folder / "calls.txt").read_text().splitlines(),
            done.stdout + done.stderr,
        )

    make.folder = folder
    return make


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
class TestMake:
    def test_first_installs_then_tests_and_lints(self, clone):
        status, calls, _ = clone("test")
        assert status == 0
        venv, install, *rest = map(str.strip, calls)
        assert venv == "python -m venv --clear .venv"
        assert install.endswith("-e .[dev] -c tests/constraints/newest.txt")
        lint = ["ruff check", "ruff format --check", "mypy"]
        assert sorted(rest) == sorted(["python -m pytest -n 2 --dist worksteal", *lint])

    @pytest.mark.parametrize("failing", ["pytest", "ruff", "mypy"])
    def test_runs_tests_and_lint_whichever_fails_and_says_so(self, clone, failing):
        status, calls, _ = clone("test", failing=failing)
        assert status != 0
        assert {"python -m pytest -n 2 --dist worksteal", "ruff check"} <= set(calls)

    def test_installs_again_when_constraints_change_and_not_else(self, clone):
        clone("demo")
        assert not [call for call in clone("lint")[1] if "install" in call]
        for name in ("setup.cfg", "tests/constraints/tools.txt", "tests/constraints/newest.txt"):
            later = (clone.folder / ".venv" / ".installed-newest").stat().st_mtime + 10
            os.utime(clone.folder / name, (later, later))
            assert [call for call in clone("lint")[1] if "install" in call], name
            os.utime(clone.folder / name, (0, 0))

    def test_docs_installs_what_builds_the_site_and_nothing_else_does(self, clone):
        status, calls, _ = clone("docs")
        installs = [call for call in calls if "install" in call]
        assert status == 0 and calls[-1].strip() == "mkdocs build --strict"
        assert ["-e .[dev]" in installs[0], "-e .[docs]" in installs[1]] == [True, True]
        assert not [call for name in ("docs", "test") for call in clone(name)[1] if "pip" in call]
        (clone.folder / ".venv" / ".installed-newest").unlink()
        assert not [call for call in clone("test")[1] if "docs" in call]

    def test_lint_reads_a_module_that_is_new_and_none_that_is_gone(self, clone):
        """mypy takes what it cannot find for untyped, so links of yesterday would hide a module
        from it."""
        rooms, links = clone.folder / "erase", clone.folder / ".links" / "erase"
        (rooms / "models").mkdir(parents=True)
        (rooms / "old.py").touch()
        clone("lint")
        assert {path.name for path in links.iterdir()} == {
            "eval",
            "models",
            "old.py",
            "prompts",
            "scripts",
        }

        (rooms / "old.py").rename(rooms / "new.py")
        later = (clone.folder / ".links").stat().st_mtime + 10
        os.utime(rooms, (later, later))
        clone("lint")
        assert {path.name for path in links.iterdir()} == {
            "eval",
            "models",
            "new.py",
            "prompts",
            "scripts",
        }

    def test_another_set_of_versions_is_installed_from_nothing(self, clone):
        clone("lint")
        for name in ("oldest", "newest"):
            calls = clone("lint", f"VERSIONS={name}")[1]
            assert "python -m venv --clear .venv" in calls
            assert [call for call in calls if call.endswith(f"-c tests/constraints/{name}.txt")]

    def test_a_set_that_failed_to_install_is_installed_again(self, clone):
        assert clone("test", failing="pip")[0] != 0
        assert "python -m pytest -n 2 --dist worksteal" in clone("test")[1]

    def test_an_older_python_is_refused_in_a_sentence(self, clone):
        (clone.folder / "python").write_text(OLD_PYTHON.format(python=sys.executable))
        status, calls, said = clone("test")
        assert status != 0 and not calls
        assert (
            "Python 3.11 or newer is needed, and ./python is 3.10" in said
            and "Traceback" not in said
        )
