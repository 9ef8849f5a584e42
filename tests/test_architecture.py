"""The house rules that a machine can check: which package may import which, and the names that are
never used."""

from __future__ import annotations

import ast
import configparser
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("prompts", "erase", "eval", "scripts")  # each imports itself and those before it
# by setup.cfg, package_dir
PACKAGES = {layer: layer if layer == "erase" else f"erase.{layer}" for layer in LAYERS}
OUTSIDE = {"prompts", "eval", "scripts"}  # as top-level names these are a user's own
HEAVY = {
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "numpy",
    "open_clip",
    "nudenet",
}
ON_DEVICES = [("erase", "methods"), ("erase", "objectives"), ("erase", "training")]
"""folders whose tensors lie on any device"""
FILES = sorted(path for layer in (*LAYERS, "tests") for path in (ROOT / layer).rglob("*.py"))


def imports(tree: ast.AST, package: str) -> list[str]:
    """Dotted names of all imports, wherever in the file they stand; relative ones are made
    absolute."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def layer_of(name: str) -> str:
    """The folder that holds the module of a dotted name: all four are packages under `erase`
    (setup.cfg, package_dir)."""
    first, _, rest = name.partition(".")
    second = rest.partition(".")[0]
    return second if first == "erase" and second in LAYERS else first


def violations(path: str, source: str) -> list[str]:
    """The rules that a file breaks; `path` is relative to the repository."""
    layer, tree = Path(path).parts[0], ast.parse(source)
    parts = Path(path).parent.parts
    names = imports(tree, ".".join(parts if layer in ("erase", "tests") else ("erase", *parts)))
    broken = [
        f"imports {name}" for name in names if name.split(".")[0] == "tests" and layer != "tests"
    ]
    broken += [
        f"imports {name}: write erase.{name}" for name in names if name.split(".")[0] in OUTSIDE
    ]
    if layer in LAYERS:
        above = LAYERS[LAYERS.index(layer) + 1 :]
        broken += [
            f"imports {name}, which is a layer above" for name in names if layer_of(name) in above
        ]
    if layer == "prompts":
        broken += [
            f"imports {name}: words need no tensors"
            for name in names
            if name.split(".")[0] in HEAVY
        ]
    if layer == "eval":
        broken += [f"imports {name}" for name in names if f"{name}.".startswith("erase.methods.")]
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(level=0) if any(
                alias.name == "eval" or alias.asname == "eval" for alias in node.names
            ):
                broken.append("an import that is called `eval` hides the builtin")
            case ast.Call(func=ast.Name(id="eval")):
                broken.append("calls the builtin eval()")
            case ast.Call(
                func=ast.Name(id="import_module") | ast.Attribute(attr="import_module"),
                args=[first, *_],
            ):
                if layer == "eval" and "erase.methods" in ast.unparse(first):
                    broken.append("imports erase.methods by name")
            case ast.Call(func=ast.Attribute(attr="double")) if parts[:2] in ON_DEVICES:
                broken.append("float64 where the device may have none: call erase.tensors.exact")
    return broken


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_keeps_the_rules(path: Path) -> None:
    assert violations(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("prompts/a.py", "import torch.nn"),
        ("prompts/a.py", "def f():\n    from safetensors.torch import save_file"),
        ("prompts/a.py", "from erase.mask import SaliencyMask"),
        ("erase/a.py", "from erase.eval.images import ImageSet"),
        ("erase/methods/a.py", "from ..eval import images"),
        ("erase/a.py", "from erase.scripts import demo"),
        ("prompts/a.py", "from ..files import atomic_write"),
        ("eval/a.py", "from erase.methods.salun import Config"),
        ("eval/a.py", "from erase import methods"),
        ("eval/a.py", "import importlib\nimportlib.import_module('erase.methods.salun')"),
        ("eval/a.py", "from tests.conftest import pico"),
        ("scripts/a.py", "import eval"),
        ("scripts/a.py", "import eval.report as report"),
        ("scripts/a.py", "from eval import report"),
        ("tests/a.py", "from torch import eval"),
        ("tests/a.py", "eval('1')"),
        ("erase/methods/a.py", "weight.double()"),
    ],
)
def test_the_check_sees_a_broken_rule(path: str, source: str) -> None:
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "eval/a.py",
            "from erase.eval.scores import Score\nfrom erase.models import load_model\nfrom "
            "erase.prompts.errors import unknown",
        ),
        ("scripts/a.py", "from erase.methods.salun import Config\nmodel.eval()"),
        ("erase/methods/a.py", "import torch\nfrom erase.training.loop import fit"),
    ],
)
def test_the_check_lets_good_code_pass(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_no_file_has_a_name_that_shadows_or_says_nothing() -> None:
    assert not (ROOT / "scripts/erase.py").exists(), (
        "it would shadow the package for every script in the folder"
    )
    assert [path for path in FILES if path.stem == "utils"] == []
    # a package, for other distributions bring a package `tests` too
    assert list((ROOT / "tests").rglob("__init__.py")) == [ROOT / "tests" / "__init__.py"]
    # what tests start as processes of their own
    folders = (
        ROOT / "tests",
        ROOT / "tests" / "programs",
    )
    assert [path for path in (ROOT / "tests").rglob("*.py") if path.parent not in folders] == []
    assert [
        path for path in (ROOT / "tests" / "programs").iterdir() if path.name.startswith("test_")
    ] == []


def test_prompts_load_without_any_heavy_library() -> None:
    modules = [
        f"erase.prompts.{path.stem}"
        for path in (ROOT / "prompts").glob("*.py")
        if path.stem != "__init__"
    ]
    code = (
        f"import sys, {', '.join(modules)}; print([name for name in {sorted(HEAVY)} if name in "
        "sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


PUBLIC = {
    "erase.export": "export_diffusers",
    "erase.latents": "LatentConfig",
    "erase.training": "fit",
    "erase.eval.report": "EvalReport",
    "erase.models.single_file": "load_single_file",
}
"""package -> one of the names that users import from it, whichever of its modules defines them"""


@pytest.mark.parametrize("package", PUBLIC)
def test_a_package_hands_out_what_its_modules_define(package: str) -> None:
    module, name = importlib.import_module(package), PUBLIC[package]
    found = getattr(module, name)
    assert found.__module__.startswith(package)
    assert found is getattr(importlib.import_module(found.__module__), name)
    assert not hasattr(module, "absent")


FIRST = """
import importlib, sys
from erase.scripts.cli.light import stood_in

for name in sys.argv[1:]:
    with stood_in():  # which also forgets what was imported within
        importlib.import_module(name)
"""


def test_any_module_may_be_imported_first() -> None:
    """Else two import each other. The heavy libraries, which are not at issue, are stood in for."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in FILES]
    parts = [path.parts for path in paths if path.parts[0] in ("erase", "eval")]
    first = [".".join((PACKAGES[top], *rest)).removesuffix(".__init__") for top, *rest in parts]
    command = [sys.executable, "-c", FIRST, *first]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_four_folders_are_those_of_one_checkout() -> None:
    """An environment that was installed from another one would lend its prompts, eval and scripts;
    make a .venv in each."""
    found = {
        folder: Path(importlib.import_module(name).__path__[0]).resolve()
        for folder, name in PACKAGES.items()
    }
    assert found == {folder: ROOT / folder for folder in LAYERS}


SCRIPTS = [
    path.relative_to(ROOT).with_suffix("")
    for path in (ROOT / "scripts").rglob("*.py")
    if path.stem != "__init__"
]


@pytest.mark.parametrize("script", sorted(map(str, SCRIPTS)))
def test_every_script_finds_what_it_imports(script, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / Path(script).parent)  # as for `python scripts/NAME.py`
    importlib.import_module("erase." + script.replace("/", "."))


def test_every_installed_package_is_listed() -> None:
    """setup.cfg maps the four folders under one import name, which setuptools' own search
    cannot."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    made = {
        path.parent.relative_to(ROOT)
        for layer in LAYERS
        for path in (ROOT / layer).rglob("__init__.py")
    }
    installed = {
        path for path in made if path.parts[:2] not in {("scripts", "bench"), ("scripts", "canvas")}
    }
    names = {
        ".".join(path.parts if path.parts[0] == "erase" else ("erase", *path.parts))
        for path in installed
    }
    assert set(config["options"]["packages"].split()) == names


ROOMS = (
    ("files", "losses", "tensors"),
    ("tensor_files",),
    ("models", "plugins"),
    ("parallel",),
    ("mask", "claims", "delta", "latents"),
    ("compose", "task"),
    ("training",),
    ("attacks", "objectives"),
    ("methods", "export"),
    ("run",),
    ("foreign",),
)
"""rooms of erase/ by floor: each imports those of lower floors, and its own"""
MOST_AT_THE_TOP = 9


def room_of(name: str) -> str | None:
    """The room of erase/ that a dotted name lies in."""
    first, _, rest = name.partition(".")
    second = rest.partition(".")[0]
    return second if first == "erase" and second and second not in LAYERS else None


def upward(path: str, source: str) -> list[str]:
    """Imports of a file of erase/ that do not go down."""
    floors = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
    own = Path(path).parts[1].removesuffix(".py")
    broken = []
    for name in imports(ast.parse(source), "erase"):
        room = room_of(name)
        if room and room != own and floors[room] >= floors[own]:
            broken.append(f"{own} imports {name}")
    return broken


ERASE = [
    path
    for path in FILES
    if path.is_relative_to(ROOT / "erase") and path != ROOT / "erase/__init__.py"
]


@pytest.mark.parametrize("path", ERASE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_room_imports_upwards(path: Path) -> None:
    assert upward(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) == []


def test_an_import_upwards_would_be_seen() -> None:
    assert upward("erase/latents/batches.py", "from erase.task import Task")
    assert upward("erase/training/loop.py", "def f():\n    import erase.run")
    assert not upward("erase/methods/esd.py", "from erase.training.fine_tune import fine_tune")


def test_few_modules_stand_at_the_top_of_erase() -> None:
    tops = sorted(path.stem for path in (ROOT / "erase").glob("*.py") if path.stem != "__init__")
    assert len(tops) <= MOST_AT_THE_TOP, tops


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def folded(source: str) -> list[int]:
    """Lines of comprehensions that hold another one, or an assignment."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, COMPREHENSIONS):
            inner = [child for child in ast.walk(node) if child is not node]
            if any(isinstance(child, (*COMPREHENSIONS, ast.NamedExpr)) for child in inner):
                lines.append(node.lineno)
    return lines


SOURCES = [path for path in FILES if path.relative_to(ROOT).parts[0] in LAYERS]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_comprehension_holds_another_or_an_assignment(path: Path) -> None:
    assert folded(path.read_text(encoding="utf-8")) == []


def test_a_folded_comprehension_would_be_seen() -> None:
    assert folded("a = [[x for x in row] for row in rows]")
    assert folded("a = [y for x in xs if (y := f(x))]")
    assert not folded("a = [f(x) for x in xs]")
