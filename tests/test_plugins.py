"""Methods and evaluators of other packages: installed, named, or refused in a sentence."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from erase.eval.evaluators import EVALUATORS
from erase.eval.report import EvalReport, summarise
from erase.methods import METHODS
from erase.plugins import PluginError
from erase.prompts.errors import ErasureError
from erase.scripts import run_erase, run_evaluate, run_export
from erase.scripts.cli import run
from tests.launching import launch
from tests.loaded import loaded, watched

TESTS = Path(__file__).parent
ENTRY_POINTS = """\
[concept_erasure.methods]
fade = outside.method:FADE

[concept_erasure.evaluators]
brightness = outside.evaluator:BRIGHTNESS
"""
NAMES = {
    "entry point": ("fade", "brightness"),
    "place": ("outside.method:FADE", "outside.evaluator:BRIGHTNESS"),
}
every_way = pytest.mark.parametrize(("method", "evaluator"), NAMES.values(), ids=NAMES)


def install(site: Path, package: str, entry_points: str) -> None:
    """The metadata of a package: it then counts as installed where `site` is on the path."""
    folder = site / f"{package}-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(entry_points)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the package `outside`, installed."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "outside").mkdir()
    (folder / "outside" / "__init__.py").write_text("")
    for name in ("method", "evaluator"):
        shutil.copy(TESTS / f"plugin_{name}.py", folder / "outside" / f"{name}.py")
    install(folder, "outside", ENTRY_POINTS)
    return folder


@pytest.fixture
def on_path(site, monkeypatch) -> Iterator[Path]:
    """This process has the package, as long as the test runs."""
    monkeypatch.syspath_prepend(site)
    yield site
    for name in [name for name in sys.modules if name.partition(".")[0] == "outside"]:
        del sys.modules[name]


def command(
    module: str, *flags: str, path: Path, cwd: Path, more: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A command of its own process, in a folder, with the packages of `path`."""
    environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", f"erase.scripts.{module}", *flags],
        cwd=cwd,
        env={**environment, **(more or {})},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


def told(capsys) -> str:
    """The one sentence of an error."""
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and "Traceback" not in error
    return error.split("error: ")[1].strip()


# ---- help ----------------------------------------------------------------------------------------

MOST = 2.5
"""CPU seconds of --help beside other work"""


@pytest.mark.parametrize(
    ("module", "flags", "shown", "hidden"),
    [
        ("run_erase", [], ["fade (of outside 1.0), or"], "--strength"),
        (
            "run_erase",
            ["--method", "fade"],
            ["--strength", "share of the cross-attention's values"],
            "--saliency_",
        ),
        (
            "run_erase",
            ["--method=outside.method:FADE"],
            ["--strength", "(type: float, default: 0.5)"],
            "--saliency_",
        ),
        ("run_evaluate", [], ["brightness (of outside 1.0), or"], "--brightness"),
        (
            "run_evaluate",
            ["--evaluators", "[brightness]"],
            ["--brightness.threshold", "how bright the images are"],
            "--density",
        ),
        (
            "run_evaluate",
            ["--evaluators=[outside.evaluator:BRIGHTNESS]"],
            ["--brightness.batch_size", "--clip."],
            "--density",
        ),
    ],
)
def test_help_names_what_is_installed_and_shows_the_options_of_what_is_named(
    module, flags, shown, hidden, site, tmp_path
):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    more = watched(tmp_path / "told", site)
    done = command(module, *flags, "--help", path=site, cwd=tmp_path, more=more)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    text = " ".join(done.stdout.split())
    assert loaded(tmp_path / "told") == []
    assert [words for words in shown if words not in text] == [] and hidden not in text
    assert (
        done.stderr == ""
        and after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < MOST
    )


def test_a_plugin_that_needs_a_real_library_for_its_help_gets_it(site, tmp_path):
    (tmp_path / "picky.py").write_text(
        "import torch\nfrom outside.method import FadeConfig, Method, edit\n"
        "assert torch.ones(2).sum() == 2\nPICKY = Method('picky', '', FadeConfig(), edit)\n"
    )
    assert (
        "--strength"
        in command("run_erase", "--method", "picky:PICKY", "--help", path=site, cwd=tmp_path).stdout
    )


# ---- the job -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(make_pico_pipeline, tmp_path_factory) -> Path:
    """A folder with a base and prompts."""
    folder = tmp_path_factory.mktemp("work")
    make_pico_pipeline().save_pretrained(folder / "base")
    (folder / "prompts.csv").write_text("prompt,evaluation_seed\na heart,1\na star,2\na moon,3\n")
    return folder


def erase_flags(method: str) -> list[str]:
    flags = [
        "--model",
        "base",
        "--concept",
        "heart",
        "--anchor",
        "star",
        "--retain",
        "a moon",
        "--method",
        method,
    ]
    return [
        *flags,
        "--strength",
        "0.25",
        "--latents.n_forget",
        "2",
        "--latents.n_retain",
        "2",
        "--latents.steps",
        "1",
    ]


def evaluate_flags(evaluator: str, delta: Path) -> list[str]:
    flags = ["--delta", str(delta), "--prompts", "prompts.csv", "--evaluators", f"[{evaluator}]"]
    return [
        *flags,
        "--brightness.threshold",
        "0.4",
        "--generate.steps",
        "1",
        "--generate.batch_size",
        "3",
    ]


def check_report(folder: Path, evaluator: str) -> EvalReport:
    """The plugin's scores stand in report.json and on the page, with how they were made."""
    report = EvalReport.load(folder / "report.json")
    for scores in report.rows.values():
        assert [(score.name, score.n, score.higher_is_better) for score in scores] == [
            ("bright images", 3, True),
            ("brightness gained", 3, True),
        ]
        assert [score.evaluator for score in scores] == [evaluator, "a light meter"]
    gained = report.score("base", "brightness gained"), report.score("erased", "brightness gained")
    assert gained[0].value == 0 and gained[1].value != 0
    assert (
        report.extras["brightness"]["base"]["moved"]
        == 0
        < report.extras["brightness"]["erased"]["moved"]
    )
    assert report.provenance["evaluation"]["evaluators"] == [evaluator]
    assert report.provenance["evaluation"]["brightness"] == {"threshold": 0.4, "batch_size": 16}
    versions = {"outside": "1.0"} if evaluator == "brightness" else {}  # a place has none
    assert report.provenance["versions"] == versions
    page = (folder / "report.html").read_text()
    assert "bright images" in page and "a light meter" in page
    assert [spread.name for spread in summarise([report, report])] == [
        "bright images",
        "brightness gained",
    ] * 2
    return report


def test_an_installed_package_erases_and_evaluates_from_the_command_line(site, work):
    flags = [*erase_flags("fade"), "--out", "installed"]
    launch("erase.scripts.run_erase", *flags, folder=work, path=site)
    flags = evaluate_flags("brightness", Path("installed/delta.safetensors"))
    flags += ["--out", "installed/report"]
    launch("erase.scripts.run_evaluate", *flags, folder=work, path=site)
    check_report(work / "installed" / "report", "brightness")
    assert json.loads((work / "installed" / "run.json").read_text())["method"] == "fade"


def test_a_place_erases_and_evaluates_again_and_goes_on_a_card(on_path, work, monkeypatch, capsys):
    method, evaluator = NAMES["place"]
    monkeypatch.chdir(work)
    assert run(run_erase.main, [*erase_flags(method), "--out", "placed"]) == 0
    flags = [
        *evaluate_flags(evaluator, work / "placed" / "delta.safetensors"),
        "--out",
        "placed/report",
    ]
    assert run(run_evaluate.main, flags) == 0
    first = check_report(work / "placed" / "report", evaluator)
    drawn = {path: path.stat().st_mtime_ns for path in (work / "placed" / "report").rglob("0*.png")}

    assert run(run_evaluate.main, flags) == 0, capsys.readouterr().err
    assert EvalReport.load(work / "placed" / "report" / "report.json") == first
    assert len(drawn) == 6 and all(path.stat().st_mtime_ns == made for path, made in drawn.items())

    given = [
        "--delta",
        "placed/delta.safetensors",
        "--report",
        "placed/report/report.json",
        "--out",
        "placed/model",
    ]
    assert run(run_export.main, [*given, "--model", "base"]) == 0
    card = (work / "placed" / "model" / "README.md").read_text()
    assert (
        "bright images" in card
        and "judged by a light meter: brightness gained" in card
        and method in card
    )


def test_what_check_refuses_is_refused_before_anything_is_drawn(
    on_path, work, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(work)
    assert run(run_erase.main, [*erase_flags("fade"), "--out", str(tmp_path / "run")]) == 0
    (tmp_path / "dark.csv").write_text("prompt,evaluation_seed\na dark heart,1\n")
    flags = evaluate_flags("brightness", tmp_path / "run" / "delta.safetensors")
    flags += ["--prompts", str(tmp_path / "dark.csv"), "--out", str(tmp_path / "report")]
    assert run(run_evaluate.main, flags) == 2
    assert (
        told(capsys).startswith("prompt set dark: brightness cannot judge 'a dark heart'")
        and not (tmp_path / "report").exists()
    )


@every_way
def test_settings_of_a_plugin_are_checked_as_ours_are(method, evaluator, on_path, capsys):
    assert run(run_erase.main, ["--concept", "heart", "--method", method, "--strength", "2"]) == 2
    assert "strength is 2" in told(capsys)
    assert (
        run(run_evaluate.main, ["--evaluators", f"[{evaluator}]", "--brightness.threshold", "low"])
        == 2
    )
    assert "--brightness.threshold is 'low', but it takes a number" in told(capsys)
    assert (
        run(run_evaluate.main, ["--evaluators", f"[{evaluator}]", "--brightness.thresold", "0.3"])
        == 2
    )
    assert "did you mean 'brightness.threshold'" in told(capsys)


# ---- what a config file may say ------------------------------------------------------------------


def test_a_config_file_may_name_what_is_installed_and_no_code(on_path, tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("evaluators: [brightness]\nbrightness: {threshold: 0.3}\n")
    with pytest.raises(SystemExit):
        run_evaluate.main(["--config", str(path), "--print_config"])
    assert "brightness:\n  threshold: 0.3\n" in capsys.readouterr().out

    for main, option, code in (
        (run_evaluate.main, "evaluators", "outside.evaluator:BRIGHTNESS"),
        (run_erase.main, "method", "outside.method:FADE"),
    ):
        path.write_text(f"{option}: {code}\n" if option == "method" else f"{option}: ['{code}']\n")
        assert run(main, ["--config", str(path)]) == 2
        error = told(capsys)
        assert (
            f"gives {option} the code {code!r}, which no file may" in error
            and f"--{option}" in error
        )


def test_what_print_config_prints_of_a_place_is_read_back_beside_that_place(
    on_path, tmp_path, capsys
):
    def printed(*flags: str) -> str:
        with pytest.raises(SystemExit):
            run_erase.main([*flags, "--print_config"])
        return capsys.readouterr().out

    first = printed("--method", "outside.method:FADE", "--strength", "0.125")
    (tmp_path / "c.yaml").write_text(first)
    assert "strength: 0.125" in first
    assert printed("--config", str(tmp_path / "c.yaml"), "--method", "outside.method:FADE") == first


def test_a_module_in_the_working_folder_is_found(tmp_path, monkeypatch, capsys):
    shutil.copy(TESTS / "plugin_method.py", tmp_path / "my_fade.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    with pytest.raises(SystemExit):
        run_erase.main(["--method", "my_fade:FADE", "--print_config"])
    assert "strength: 0.5" in capsys.readouterr().out


# ---- broken plugins ------------------------------------------------------------------------------

BROKEN = {
    "no such module": (
        "outside.nowhere:FADE",
        ["cannot be imported", "No module named 'outside.nowhere'", "uninstall broken 1.0"],
    ),
    "no such name": ("outside.method:FAED", ["is not there", "did you mean outside.method:FADE?"]),
    "another thing": (
        "outside.method:FadeConfig",
        ["is a type, not a Method", "did you mean outside.method:FADE?"],
    ),
    "another name": ("outside.method:FADE", ["calls itself 'fade'; give both one name"]),
    "no method at all": ("json:dumps", ["is a function, not a Method", "json has no Method"]),
}


@pytest.mark.parametrize(("place", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_ends_in_one_sentence_that_names_it(
    place, words, on_path, tmp_path, monkeypatch, capsys
):
    install(tmp_path, "broken", f"[concept_erasure.methods]\nshade = {place}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert run(run_erase.main, ["--method", "shade"]) == 2
    error = told(capsys)
    assert [
        word for word in ("the method 'shade' of broken 1.0", *words) if word not in error
    ] == []
    assert METHODS.get("fade").name == "fade", "the others still work"


@pytest.mark.parametrize(
    "fault", ["1 / 0", "import nothing_of_this_name", "def f(:", "raise ValueError('two\\nlines')"]
)
def test_whatever_a_module_raises_is_told_in_one_sentence(fault, tmp_path, monkeypatch):
    name = f"faulty_{abs(hash(fault))}"
    (tmp_path / f"{name}.py").write_text(fault + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        PluginError,
        match=f"the evaluator '{name}:X' cannot be imported .*python -c 'import {name}'",
    ) as error:
        EVALUATORS.get(f"{name}:X")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("index", "name"), [(METHODS, "salun"), (EVALUATORS, "clip")])
def test_a_name_that_ours_already_has_is_refused(index, name, on_path, tmp_path, monkeypatch):
    install(tmp_path, "thief", f"[concept_erasure.{index.kind}s]\n{name} = outside.method:FADE\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        PluginError,
        match=(
            f"thief 1.0 brings an? {index.kind} {name!r}, and ours has that name; uninstall thief"
        ),
    ):
        index.get(name)
    assert list(index).count(name) == 1


def test_a_name_that_two_packages_bring_is_refused(on_path, tmp_path, monkeypatch):
    install(tmp_path, "second", "[concept_erasure.methods]\nfade = outside.method:FADE\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        PluginError,
        match="second 1.0 brings a method 'fade', and that of outside 1.0 has that name",
    ):
        METHODS.get("fade")


CLASHES = {
    "another's name": (
        "Evaluator('clip', BrightnessConfig(), evaluate, check)",
        "is called 'clip', and another one has that name",
    ),
    "an option's name": (
        "Evaluator('model', BrightnessConfig(), evaluate, check)",
        "'model', has the name of another option",
    ),
    "a name that heads no options": (
        "Evaluator('a-b', BrightnessConfig(), evaluate, check)",
        "make it of letters, digits and _",
    ),
    "no settings": (
        "Evaluator('mine', None, evaluate, check)",
        "has a config that is no dataclass instance",
    ),
}


@pytest.mark.parametrize(("made", "says"), CLASHES.values(), ids=CLASHES)
def test_an_evaluator_whose_name_or_settings_make_no_options_is_refused(
    made, says, on_path, tmp_path, monkeypatch, capsys
):
    name = f"clash_{abs(hash(made))}"
    (tmp_path / f"{name}.py").write_text(f"from outside.evaluator import *\nMINE = {made}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert run(run_evaluate.main, ["--evaluators", f"[{name}:MINE]"]) == 2
    assert says in told(capsys)


def test_a_field_with_the_name_of_an_option_is_refused(on_path, tmp_path, monkeypatch, capsys):
    (tmp_path / "takes_model.py").write_text(
        "from dataclasses import dataclass\nfrom outside.method import Method, edit\n\n\n"
        "@dataclass\nclass Config:\n    model: str = 'mine'\n\n\nTAKER = Method('taker', '', "
        "Config(), edit)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert run(run_erase.main, ["--method", "takes_model:TAKER"]) == 2
    assert (
        "the field of Config, 'model', has the name of another option of erase-concept; rename it"
        in told(capsys)
    )


def test_an_unknown_name_gets_the_near_one_of_a_plugin(on_path):
    with pytest.raises(ErasureError, match="unknown method 'fad'; did you mean 'fade'"):
        METHODS.get("fad")
    with pytest.raises(
        ErasureError, match="unknown evaluator 'brightnes'; did you mean 'brightness'"
    ):
        EVALUATORS.get("brightnes")


def test_an_entry_point_and_its_place_are_one_thing(on_path):
    assert METHODS.get("fade") is METHODS.get("outside.method:FADE")
    assert EVALUATORS.get("brightness") is EVALUATORS.get("outside.evaluator:BRIGHTNESS")
    assert EVALUATORS.get("erase.eval.evaluators.clip:CLIP") is EVALUATORS.get("clip")
    assert [name for name in METHODS if name not in METHODS.ours] == ["fade"] and "fade" in METHODS
