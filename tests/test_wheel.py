"""What is installed lives under one name: it neither hurts nor is hurt by a user's own
`prompts.py`, `eval/` or `scripts/`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("prompts", "erase", "eval", "scripts")


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run([*command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)

    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        "dist",
    ]
    run(*build, "--disable-pip-version-check", cwd=source)
    return next((source / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel, and with the dependencies of this one.

    Returns:
        its interpreter.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(
        run(
            str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
        ).strip()
    )
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    dependencies = [path for path in sys.path if path.endswith("-packages")]
    # their own .pth files are not run
    (site / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    return python


@pytest.fixture
def beside(tmp_path) -> Path:
    """A user's folder, whose modules have the names of ours."""
    (tmp_path / "prompts.py").write_text("MINE = 1\n")
    for package in ("eval", "scripts"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("MINE = 2\n")
    return tmp_path


def test_the_wheel_holds_one_package_and_all_of_its_data(wheel):
    names = zipfile.ZipFile(wheel).namelist()

    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"erase"}
    for needed in (
        "erase/prompts/data/nudity.yaml",
        "erase/eval/report/templates/report.html.j2",
        "erase/eval/report/fonts/DejaVuSans.ttf",
        "erase/models/canvas/model_index.json",
        "erase/models/canvas_flow/model_index.json",
        "erase/scripts/recipes/canvas.yaml",
        "erase/scripts/launch/fsdp.yaml",
    ):
        assert needed in names
    assert not [
        name for name in names if name.startswith(("erase/scripts/bench", "erase/scripts/canvas"))
    ]


def test_a_command_and_an_import_work_beside_a_users_own_modules(installed, beside):
    shown = run(str(installed), "-m", "erase.scripts.run_erase", "--help", cwd=beside)
    assert "usage: erase-concept" in shown

    code = (
        "import erase.run, erase.eval.run, prompts, eval, scripts; print(erase.run.__file__, "
        "prompts.MINE, eval.MINE, scripts.MINE)"
    )
    said = run(str(installed), "-c", code, cwd=beside).split()
    assert said[1:] == ["1", "2", "2"]
    assert not said[0].startswith(str(ROOT))
