"""What a name alone is taken for: shipped concepts by any name, the rules of each kind, and a
question where nothing is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from erase.prompts.concepts import ConceptSpec, load_concepts, shipped
from erase.prompts.errors import ErasureError
from erase.prompts.proposals import bare, kinds, propose
from erase.prompts.retain import load_retain, retain_lists, without
from erase.scripts.cli import read_concepts, run
from erase.scripts.run_erase import main
from tests.texts import raises, written

GENERAL = [file for file in shipped() if not file.endswith("-salun")]


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("nudity", "nude person"),
        ("a naked woman", "nude person"),
        ("Violence", "violence"),
        ("vincent VAN gogh", "Van Gogh"),
        ("van-gogh", "Van Gogh"),
        ("Van Gogh style", "Van Gogh"),
        ("einstein", "Albert Einstein"),
        ("the church", "church"),
        ("chainsaw", "chain saw"),
    ],
)
def test_shipped_concepts_are_found_by_any_of_their_names(name: str, target: str) -> None:
    assert propose(name) in [
        c for file in GENERAL for c in load_concepts(file) if c.target == target
    ]


@pytest.mark.parametrize(
    ("name", "kind", "target", "anchor", "axis"),
    [
        ("Claude Monet", None, "Claude Monet", "an unknown artist", "style"),
        ("salvador dali", None, "salvador dali", "an unknown artist", "style"),
        ("cubism", None, "cubism", "realistic", "style"),
        ("my own style", None, "my own", "realistic", "style"),
        ("a golden retriever", None, "golden retriever", "dog", "object"),
        ("Dog", None, "Dog", "animal", "object"),
        ("animal", None, "animal", "wooden box", "object"),
        ("Marie Curie", None, "Marie Curie", "a person", "person"),
        ("garden gnome", "object", "garden gnome", "wooden box", "object"),
        ("a wooden box", "object", "wooden box", "grey stone", "object"),
        ("Jane Doe", "person", "Jane Doe", "a person", "person"),
        ("Jane Doe", "artist", "Jane Doe", "an unknown artist", "style"),
        ("realistic", "style", "realistic", "plain", "style"),
        (
            "Van Gogh",
            "person",
            "Van Gogh",
            "an unknown artist",
            "style",
        ),  # shipped names win over the kind
        ("nudity", "artist", "nude person", "person wearing clothes", "subject"),
    ],
)
def test_a_kind_gives_anchor_templates_and_retain(
    name: str, kind: str | None, target: str, anchor: str, axis: str
) -> None:
    found = propose(name, kind)
    assert (found.target, found.anchor, found.kind) == (target, anchor, axis)
    assert len(found.templates) >= 10 and len(found.retain) >= 60


def test_what_is_retained_never_names_the_concept() -> None:
    monet = set(load_retain("artists")) - set(propose("Claude Monet").retain)
    assert len(monet) == 3 and all("Monet" in prompt for prompt in monet)
    assert propose("Sigismund Monet", "artist").retain == propose("Monet").retain, (
        "the last word of a name is a name"
    )
    gone = set(load_retain("objects")) - set(propose("vehicle").retain)
    assert {"a photo of a bicycle", "a yellow school bus"} <= gone, "nor a member of the group"


def test_every_known_name_is_proposed_for_and_is_of_one_kind() -> None:
    for kind in kinds().values():
        assert kind.retain in retain_lists()
        for anchor, names in kind.known.items():
            assert len(set(map(bare, names))) == len(names)
            for name in (*names, anchor):
                found = propose(name)
                assert bare(found.anchor) not in map(bare, found.names)
                assert without(found.retain, found.names) == found.retain


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        (
            "garden gnome",
            None,
            ["'garden gnome'", "--kind", "artist, object, person, style", "--anchor"],
        ),
        ("garden gnome", "objct", ["'objct'", "did you mean 'object'"]),
        (" ", None, ["empty"]),
        ("\ud800", "object", ["Unicode"]),
    ],
)
def test_what_cannot_be_known_is_asked(name: str, kind: str | None, words: list[str]) -> None:
    with raises(*words):
        propose(name, kind)


# ---- by the command ------------------------------------------------------------------------------


def test_the_proposal_is_printed_edited_and_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", "some/model", "--out", str(tmp_path / "out")]
    assert run(main, [*flags, "--concept", "Monet", "--propose"]) == 0
    printed = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    path = written(
        tmp_path,
        "mine.yaml",
        printed.replace("anchor: an unknown artist", "anchor: a school child"),
    )
    (edited,) = load_concepts(path)
    assert edited.anchor == "a school child" and edited.retain == propose("Monet").retain
    assert run(main, [*flags, "--concepts", str(path), "--propose"]) == 0
    assert capsys.readouterr().out == path.read_text()


def test_what_is_not_given_is_proposed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = read_concepts(["Van Gogh"], [], None, "some/model", [])
    assert found == propose("Van Gogh")
    shown = capsys.readouterr().err
    assert all(
        word in shown
        for word in ("Van Gogh -> an unknown artist", repr(found.retain[0]), "--propose")
    )
    (found,) = read_concepts(["Van Gogh"], ["a child"], None, "some/model", [])
    assert (found.anchor, found.retain) == ("a child", propose("Van Gogh").retain)
    (found,) = read_concepts(["gnome"], [], None, "some/model", ["a dwarf"], "object")
    assert (found.anchor, found.retain) == ("wooden box", ("a dwarf",))
    capsys.readouterr()
    assert read_concepts(["x"], ["y"], None, "some/model", ["z"]) == [
        ConceptSpec("x", "y", retain=("z",))
    ]
    assert capsys.readouterr().err == "", "nothing was proposed"


def test_some_concepts_of_a_file() -> None:
    found = read_concepts(["church", "tench"], [], "imagenette", "some/model", [])
    assert [concept.target for concept in found] == ["tench", "church"]
    with raises("imagenette", "'chruch'", "did you mean 'church'"):
        read_concepts(["chruch"], [], "imagenette", "some/model", [])
    with raises("canvas", "--retain"):
        read_concepts(["heart"], [], None, "canvas", ["a moon"])
    for extra in ({"anchors": ["a"]}, {"retain": ["a"]}, {"kind": "object"}):
        with pytest.raises(ErasureError, match="do not go with --concepts"):
            read_concepts(
                **{
                    "names": [],
                    "anchors": [],
                    "file": "imagenette",
                    "model": "m",
                    "retain": [],
                    **extra,
                }
            )
