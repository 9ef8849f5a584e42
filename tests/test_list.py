"""erase-list: everything that a command line can name, told in a line, quickly."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from erase.attacks import ATTACKS
from erase.eval.evaluators import EVALUATORS
from erase.eval.protocols import protocol_names
from erase.methods import METHODS, get_method
from erase.models import load_model
from erase.models.families import FAMILIES
from erase.models.scopes import ABOUT, SCOPES, select
from erase.prompts.concepts import shipped
from erase.prompts.prompt_sets import shipped_sets
from erase.scripts import run_compare, run_list
from erase.scripts.cli import run
from erase.scripts.cli.catalogue import SECTIONS, first_sentence
from erase.scripts.cli.recipes import recipes
from tests.test_plugins import install, told
from tests.test_plugins import on_path as on_path
from tests.test_plugins import site as site

ROOT = Path(__file__).parents[1]
LISTED = {
    "methods": METHODS,
    "evaluators": EVALUATORS,
    "attacks": ATTACKS,
    "protocols": protocol_names(),
    "concepts": ["canvas", *shipped()],
    "prompts": shipped_sets(),
    "recipes": recipes(),
    "families": FAMILIES,
    "scopes": SCOPES,
}


@pytest.fixture
def listed(capsys):
    """The lists, as programs read them."""

    def lists(*flags: str):
        run_list.main([*flags, "--json"])
        return json.loads(capsys.readouterr().out)

    return lists


def test_every_list_has_every_name_and_a_line_for_each(listed):
    lists = listed()
    assert lists.keys() == LISTED.keys() == SECTIONS.keys()
    for title, names in LISTED.items():
        assert [entry["name"] for entry in lists[title]] == list(names), title
        for entry in lists[title]:
            assert len(entry["text"]) > 10 and "\n" not in entry["text"], entry
            assert entry["text"] != "None" and not entry["text"].endswith("."), entry
    for entry in lists["methods"]:
        assert entry["paper"] == get_method(entry["name"]).paper
    assert len({entry["text"] for entry in lists["methods"]}) == len(lists["methods"])
    assert lists["prompts"][0]["text"].startswith("2400 images; labels object, style, colour")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("One. Two.", "One"),
        ("By Fan et al., ICLR 2024.\n\nMore.", "By Fan et al., ICLR 2024"),
        ("By Fan et al. 2024, for version 1.4 of it. `More`.", "By Fan et al. 2024, for version "
         "1.4 of it"),
        ("Over\n  two lines", "Over two lines"),
        (None, ""),
    ],
)  # fmt: skip
def test_a_line_is_the_first_sentence(text, sentence):
    assert first_sentence(text) == sentence


def test_the_weights_of_each_scope_are_counted_in_a_checkpoint(
    make_pico_pipeline, tmp_path, listed
):
    base = tmp_path / "base"
    make_pico_pipeline().save_pretrained(base)
    params = load_model(str(base)).parameters()
    counted = {entry["name"]: entry["weights"] for entry in listed("scopes", "--model", str(base))[
        "scopes"
    ]}  # fmt: skip
    for name in ABOUT:
        assert counted[name] == sum(param.numel() for param in select(params, name).values())
    assert counted["xattn"] + counted["noxattn"] == counted["full"] > counted["xattn_kv"] > 0


def test_all_is_listed_at_once_without_the_libraries_in_80_columns():
    code = (
        "import sys\nfrom erase.scripts.run_list import main, run\n"
        "assert run(main, [], libraries=False) == 0\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and done.stderr.startswith("what they are: erase-list LIST")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) < 50
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == list(SECTIONS)
    words = set(done.stdout.replace(",", "").split())
    assert words >= {name for names in LISTED.values() for name in names}


def test_a_list_that_is_asked_for_says_what_its_entries_are_and_each_paper_once(capsys):
    run_list.main(["protocols"])
    told = capsys.readouterr().out
    assert told.count("arxiv.org/abs/2402.11846") == 1 and "UA, IRA and CRA over 51 styles" in told


def test_no_list_needs_to_be_named_and_none_is_called_required():
    for made in (run_list.make_parser(), run_compare.make_parser()):
        assert "(required)" not in made.format_help()


def test_what_another_package_brings_is_marked_and_what_is_broken_is_told(
    on_path, tmp_path, monkeypatch, listed, capsys
):
    install(tmp_path, "broken", "[concept_erasure.methods]\nshade = outside.nowhere:X\n")
    monkeypatch.syspath_prepend(tmp_path)
    lists = listed("methods", "evaluators")
    assert lists.keys() == {"methods", "evaluators"}
    entries = {entry["name"]: entry for entries in lists.values() for entry in entries}
    assert entries["fade"]["package"] == entries["brightness"]["package"] == "outside"
    assert "package" not in entries["salun"]
    assert entries["shade"]["package"] == "broken"
    assert "cannot be used" in entries["shade"]["text"] and "nowhere" in entries["shade"]["text"]
    for flags in (["methods"], []):
        assert run(run_list.main, flags) == 0
        assert "(of outside)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["metods"], ["unknown list 'metods'", "did you mean 'methods'?"]),
        (["methods", "--model", "canvas"], ["--model is for the list of scopes"]),
        (["--jsn"], ["did you mean 'json'?"]),
    ],
)
def test_what_cannot_be_listed_is_a_sentence(flags, words, capsys):
    assert run(run_list.main, flags) == 2
    error = told(capsys)
    assert [word for word in words if word not in error] == []
