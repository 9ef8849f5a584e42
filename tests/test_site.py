"""The documentation: every page stands in the site's navigation, every link leads somewhere, every
command has the options that it is given, and the site builds without a warning."""

from __future__ import annotations

import importlib.util
import io
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from contextlib import redirect_stdout
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from erase.methods import METHODS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = sorted([*(ROOT / name for name in TOP), *DOCS.rglob("*.md")])
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")
COMMAND = re.compile(r"^ *(erase-[a-z]+ .*)$", re.MULTILINE)
COMMANDED = [page for page in PAGES if page.name != "add_a_method.md"]
"""that page's commands have a method of their own, and tests/test_add_a_method.py runs them"""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def hook():
    """docs/theme/pages.py, which MkDocs loads by its place too."""
    spec = importlib.util.spec_from_file_location("pages", DOCS / "theme" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def leaves(nav: object) -> Iterator[str]:
    """The pages of a navigation, in order."""
    if isinstance(nav, str):
        yield nav
    else:
        for below in nav.values() if isinstance(nav, dict) else nav:
            yield from leaves(below)


def anchors(page: Path) -> set[str]:
    """Of the headings, as far as the site and a repository's host make the same ones."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    words = [
        re.sub(r"[^\w\s-]", "", heading).strip().lower()
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    ]
    return {re.sub(r"[-\s]+", "-", word) for word in words} & {re.sub(r"\s", "-", w) for w in words}


def test_every_page_stands_in_the_navigation_once():
    pages = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")]
    assert sorted(leaves(CONFIG["nav"])) == sorted([*pages, *hook().PAGES])


def test_the_top_of_the_repository_is_included_with_links_that_docs_can_follow():
    seen = hook().as_seen_from_docs("[a](docs/x.md#y) [b](CONTRIBUTING.md#adding) [c](https://d/e)")
    assert seen == "[a](x.md#y) [b](contributing.md#adding) [c](https://d/e)"
    assert (
        hook().on_page_markdown("[b](../CONTRIBUTING.md#adding)") == "[b](contributing.md#adding)"
    )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading(page):
    generated = {DOCS / name: ROOT / source for name, source in hook().PAGES.items()}
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        target = generated.get(target, target)
        assert target.is_file(), f"{link}: there is no such file"
        assert not heading or heading in anchors(target), f"{link}: there is no such heading"


def test_every_method_has_a_page_and_a_line_in_the_table():
    table = (DOCS / "methods" / "index.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| [`")]
    assert sorted(re.findall(r"`([^`]+)`", "".join(rows))) == sorted(METHODS.ours)
    pages = {path.name for path in (DOCS / "methods").iterdir()} - {"index.md"}
    assert {name for row in rows for name in LINK.findall(row)} == pages


@cache
def options_of(command: str, method: str) -> frozenset[str]:
    """What --help lists."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    scripts = config["options.entry_points"]["console_scripts"].split()
    module = dict(zip(scripts[::3], scripts[2::3], strict=True))[command].partition(":")[0]
    with redirect_stdout(io.StringIO()) as told, pytest.raises(SystemExit):
        import_module(module).main([*(["--method", method] if method else []), "--help"])
    return frozenset(re.findall(r"--[a-z_0-9.]+", told.getvalue()))


@pytest.mark.parametrize("page", COMMANDED, ids=name_of)
def test_every_command_has_its_options(page):
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    for line in COMMAND.findall(text):
        words = shlex.split(line, comments=True)
        method = words[words.index("--method") + 1] if "--method" in words else ""
        given = {word for word in words if word.startswith("--")}
        known = options_of(words[0], method if method in METHODS.ours else "")
        assert given <= known, f"{line}: {sorted(given - known)}"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    pytest.importorskip("mkdocstrings_handlers.python", reason="the extra docs is not installed")
    if not (ROOT / ".links").is_dir():
        subprocess.run([shutil.which("make") or "make", ".links"], cwd=ROOT, check=True)
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "before_after.png" in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert 'id="erase.run.erase_concept"' in (tmp_path / "api/erase.html").read_text("utf-8")
