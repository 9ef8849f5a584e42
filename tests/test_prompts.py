"""Concepts and the embedded world's words: what they promise, and that every fault is an
`ErasureError` that names the thing."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erase.prompts.canvas import KINDS, canvas_concept, vocabulary
from erase.prompts.concepts import ConceptSpec, dump, load_concepts, shipped, to_yaml
from erase.prompts.errors import reason
from erase.prompts.prompt_sets import ANSWER_SEEDS, PromptSet, canvas_grid
from erase.prompts.retain import load_retain, without
from erase.prompts.several import anchored_pairs
from tests.texts import raises, written

HEART = ConceptSpec(
    "heart", "star", ("valentine",), ("a {}", "a picture of a {}"), ("a moon",), "object"
)
ALL_CANVAS = [name for kind in KINDS for name in vocabulary().names(kind)]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: bool(text.strip())
)


# ---- concepts ------------------------------------------------------------------------------------


def test_pairs_differ_only_where_the_concept_stands() -> None:
    assert HEART.pairs() == [
        ("a heart", "a star"),
        ("a valentine", "a star"),
        ("a picture of a heart", "a picture of a star"),
        ("a picture of a valentine", "a picture of a star"),
    ]
    assert ConceptSpec("x", "y", templates=("{}", "{}")).pairs() == [("x", "y")]


def test_no_anchor_prompt_names_what_is_forgotten_with_it() -> None:
    heart = ConceptSpec("heart", "star", ("valentine",), ("a {}", "a GLOWING {}", "{} in neon"))
    neon = ConceptSpec("Neon", "Flat", ("glowing",), ("{}", "a valentine, {}", "a moon, {}"))
    of_heart, of_neon = anchored_pairs([heart, neon])
    assert dict(of_heart) == {
        "a heart": "a star",
        "a valentine": "a star",
        "a GLOWING heart": "a Flat star",
        "a GLOWING valentine": "a Flat star",
        "heart in neon": "star in Flat",
        "valentine in neon": "star in Flat",
    }
    assert dict(of_neon) == {
        "Neon": "Flat",
        "glowing": "Flat",
        "a valentine, Neon": "a star, Flat",
        "a valentine, glowing": "a star, Flat",
        "a moon, Neon": "a moon, Flat",
        "a moon, glowing": "a moon, Flat",
    }
    assert anchored_pairs([heart]) == [heart.pairs()]


def test_a_concept_is_frozen_and_hashable_whatever_sequence_it_was_given() -> None:
    listed = ConceptSpec(
        "heart", "star", ["valentine"], ["a {}", "a picture of a {}"], ["a moon"], "object"
    )  # type: ignore[arg-type]
    assert listed == HEART and hash(listed) == hash(HEART)
    with pytest.raises(FrozenInstanceError):
        HEART.target = "moon"  # type: ignore[misc]


ALIKE = st.text("aA é-#", min_size=1, max_size=4).filter(lambda text: bool(text.strip()))


@given(TEXT | ALIKE | st.just("x" * 60), TEXT | ALIKE | st.just("x" * 61))
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_slugs_are_safe_file_names_and_tell_targets_apart(one: str, other: str) -> None:
    slugs = [ConceptSpec(target, "\u2020\u2020").slug for target in (one, other)]
    for slug in slugs:
        assert 0 < len(slug) <= 57 and set(slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    plain = [" ".join(target.lower().replace("-", " ").split()) for target in (one, other)]
    assert plain[0] == plain[1] or slugs[0] != slugs[1]


@pytest.mark.parametrize(
    ("target", "slug"),
    [("a nude person", "a-nude-person"), ("Van Gogh", "van-gogh"), ("heart", "heart")],
)
def test_a_plain_target_keeps_its_name_in_the_slug(target: str, slug: str) -> None:
    assert ConceptSpec(target, "?").slug == slug


@given(
    st.builds(
        ConceptSpec,
        TEXT,
        st.just("\u2020"),
        st.lists(TEXT),
        st.just(("a {}", "{}: b")),
        st.lists(TEXT),
        st.none() | TEXT,
    )
)
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_texts_give_the_same_concept_back(concept: ConceptSpec) -> None:
    assert [ConceptSpec.from_dict(item) for item in json.loads(dump([concept]))] == [concept]
    with tempfile.TemporaryDirectory() as folder:
        assert load_concepts(written(Path(folder), "c.yaml", to_yaml([concept]))) == [concept]


def test_a_dump_is_a_concept_file(tmp_path: Path) -> None:
    concepts = [
        HEART,
        ConceptSpec("Zoë’s 😀", "人", templates=("“{}”: no",)),
        canvas_concept("Neon"),
    ]
    for text in (dump(concepts), to_yaml(concepts)):
        assert load_concepts(written(tmp_path, "dump.yaml", text)) == concepts


def test_yaml_words_stay_words(tmp_path: Path) -> None:
    path = written(tmp_path, "c.yaml", "target: no\nanchor: 007\nsynonyms: [2001-99-99, off]\n")
    assert load_concepts(path) == [ConceptSpec("no", "007", ("2001-99-99", "off"))]


def test_one_mapping_or_a_list_of_them(tmp_path: Path) -> None:
    one = load_concepts(written(tmp_path, "one.yaml", "target: heart\nanchor: star\n"))
    two = load_concepts(
        written(
            tmp_path,
            "two.yaml",
            "- target: heart\n  anchor: star\n- {target: moon, anchor: ring}\n",
        )
    )
    assert two == [*one, ConceptSpec("moon", "ring")]


def test_the_published_settings_are_shipped() -> None:
    (nudity,) = load_concepts("nudity-salun")
    assert nudity.pairs() == [("a photo of a nude person", "a photo of a person wearing clothes")]
    assert nudity.retain == ("a photo of a person wearing clothes",)
    classes = load_concepts("imagenette-salun")
    assert [concept.target for concept in classes][:2] == ["tench", "English springer"] and len(
        classes
    ) == 10
    for i, concept in enumerate(classes):
        assert concept.anchor == classes[(i + 1) % 10].target
        assert concept.templates == ("an image of a {}",) and concept.kind == "class"
        assert concept.retain == tuple(
            f"an image of a {other.target}" for other in classes if other is not concept
        )


GENERAL = {file: load_concepts(file) for file in shipped() if not file.endswith("-salun")}


def test_there_is_a_general_set_for_each_need() -> None:
    assert list(GENERAL) == ["einstein", "imagenette", "nudity", "van-gogh", "violence"]
    assert [c.target for c in GENERAL["imagenette"]] == [
        c.target for c in load_concepts("imagenette-salun")
    ]
    everything = [concept for concepts in GENERAL.values() for concept in concepts]
    gone = {name.casefold() for concept in everything for name in concept.names}
    assert not gone & {concept.anchor.casefold() for concept in everything}, (
        "all of them can be erased in one go"
    )


@pytest.mark.parametrize("file", GENERAL)
def test_a_general_set_has_names_templates_and_a_retain_set_that_leaves_it_out(file: str) -> None:
    for concept in GENERAL[file]:
        assert concept.synonyms and len(concept.pairs()) >= 40 and concept.kind
        assert 60 <= len(set(concept.retain)) == len(concept.retain) <= 100
        for prompt in concept.retain:
            assert not any(name.lower() in prompt.lower() for name in concept.names), prompt
        openings = Counter(" ".join(prompt.split()[:2]) for prompt in concept.retain)
        assert max(openings.values()) <= 0.6 * len(concept.retain), (
            "the retain prompts are all of one shape"
        )


def test_retain_lists_are_read_by_name_less_what_names_the_concept(tmp_path: Path) -> None:
    text = "target: {}\nanchor: thing\nsynonyms: [{}]\nretain: objects\n"
    (cat,) = load_concepts(written(tmp_path, "c.yaml", text.format("cat", "Golden-Retrievers")))
    left_out = set(load_retain("objects")) - set(cat.retain)
    assert left_out == {"a photo of a cat on a sofa"}, (
        '"golden retriever" is not the plural that was asked for'
    )
    (saw,) = load_concepts(
        written(tmp_path, "c.yaml", text.format("chainsaw", "golden  RETRIEVER"))
    )
    assert set(load_retain("objects")) - set(saw.retain) == {
        "an image of a chain saw",
        "a photo of a golden retriever",
    }
    with raises("c.yaml", "'object'", "did you mean 'objects'", "list"):
        load_concepts(written(tmp_path, "c.yaml", "target: a\nanchor: b\nretain: object\n"))


def test_names_are_found_as_whole_words() -> None:
    prompts = ("a cathedral", "two cats", "CAT-like", "concat", "a Café")
    assert without(prompts, ["cat"]) == ("a cathedral", "concat", "a Café")
    assert without(prompts, ["cafe"]) == prompts[:4]
    assert without(("a.b", "axb", "a - b"), ["a.b", "-"]) == ("axb",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": ""}, ["target", "empty"]),
        ({"target": 3}, ["target", "text"]),
        ({"target": "\ud800"}, ["target", "Unicode"]),
        ({"anchor": "  "}, ["anchor", "'heart'", "empty"]),
        ({"anchor": "Heart "}, ["'heart'", "anchor"]),
        ({"anchor": "valentine"}, ["'heart'", "anchor"]),
        ({"templates": ()}, ["no templates"]),
        ({"templates": ("a {}", "a photo")}, ["'a photo'", "{}"]),
        ({"templates": ("{} and {}",)}, ["'{} and {}'"]),
        ({"templates": "a {}"}, ["templates", "list"]),
        ({"retain": "a moon"}, ["retain", "list"]),
        ({"retain": ("a moon", " ")}, ["retain", "item 2", "empty"]),
        ({"synonyms": ("",)}, ["synonyms", "item 1", "empty"]),
        ({"kind": ""}, ["kind", "empty"]),
    ],
)
def test_a_concept_refuses(change: dict[str, object], words: list[str]) -> None:
    with raises(*words):
        replace(HEART, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("target: heart\nancor: star\n", ["bad.yaml", "'ancor'", "did you mean 'anchor'"]),
        ("- {target: a, anchor: b}\n- {target: c}\n", ["bad.yaml, concept 2", "'anchor'"]),
        (
            "- {target: a, anchor: b}\n- {target: c, anchor: c}\n",
            ["bad.yaml, concept 2", "'c'", "anchor"],
        ),
        ("- {target: a, anchor: b}\n- {target: a, anchor: c}\n", ["bad.yaml", "'a'", "twice"]),
        ("target: heart\nanchor: star\ntarget: moon\n", ["bad.yaml", "'target'", "twice"]),
        ("target: a\nanchor: b\nsynonyms: c\n", ["bad.yaml", "synonyms", "list"]),
        ("target: a\nanchor: [b]\n", ["bad.yaml", "anchor", "text"]),
        ("target: [a\n", ["bad.yaml, line", "not valid YAML"]),
        ("[" * 5000, ["bad.yaml", "not valid YAML"]),
        ('target: "\\UFFFFFFFF"\n', ["bad.yaml", "not valid YAML"]),
        ("&a [*a]", ["bad.yaml", "not valid YAML"]),
        ("? [a]\n: b\n", ["bad.yaml", "not valid YAML"]),
        ("", ["bad.yaml", "target"]),
        ("[]", ["bad.yaml", "no concept"]),
        ("just words", ["bad.yaml", "target"]),
        ("- just words", ["bad.yaml, concept 1", "target"]),
        (b"target: caf\xe9\nanchor: b\n", ["bad.yaml", "UTF-8"]),
        (b"target: a\x00\nanchor: b\n", ["bad.yaml", "not valid YAML"]),
    ],
)
def test_a_bad_concept_file_is_named(tmp_path: Path, text: str | bytes, words: list[str]) -> None:
    with raises(*words):
        load_concepts(written(tmp_path, "bad.yaml", text))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for read in (load_concepts, PromptSet.from_csv, PromptSet.from_yaml):
        for path in (
            tmp_path / "absent.yaml",
            tmp_path,
            tmp_path / "nul\0.yaml",
            tmp_path / ("long" * 100 + ".yaml"),
        ):
            with raises(str(path)[:60]):
                read(path)
    with raises("'nudty'", "did you mean 'nudity'"):
        load_concepts("nudty")
    with raises("'canvs'", "did you mean 'canvas'", ".csv"):
        PromptSet.load("canvs")


# ---- the embedded world --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_CANVAS)
def test_a_canvas_concept_forgets_its_names_and_retains_everything_else(name: str) -> None:
    vocab, concept = vocabulary(), canvas_concept(name)
    kind = concept.kind or ""
    assert name in vocab.names(kind) and concept.synonyms == tuple(vocab.synonyms[kind][name])
    assert len(set(concept.templates)) == len(concept.templates)
    grid = {vocab.grid.format(**cell) for cell in vocab.cells() if cell[kind] == name}
    assert grid <= {forget for forget, _ in concept.pairs()}
    others = {vocab.grid.format(**cell) for cell in vocab.cells() if cell[kind] != name}
    assert others <= set(concept.retain)
    forgotten = {word.lower() for word in concept.names}
    kept = {
        word.lower()
        for other in vocab.names(kind)
        if other != name
        for word in (other, *vocab.synonyms[kind][other])
    }
    for prompt in concept.retain:
        words = set(prompt.lower().replace(",", " ").replace(":", " ").replace(".", " ").split())
        assert not words & forgotten, "a retain prompt names what must go"
        assert words & kept, "a retain prompt leaves open whether it shows what must go"
    assert 300 <= len(concept.retain) == len(set(concept.retain)) <= 2000


def test_canvas_retain_prompts_are_well_mixed() -> None:
    for name in ALL_CANVAS:
        concept = canvas_concept(name)
        first = " ".join(concept.retain[:100]).lower()
        for kind in KINDS:
            for other, synonyms in vocabulary().synonyms[kind].items():
                assert other == name or any(word.lower() in first for word in (other, *synonyms))


def test_a_style_becomes_the_next_one() -> None:
    names, seen = vocabulary().names("style"), []
    name = names[0]
    while name not in seen:
        seen.append(name)
        name = canvas_concept(name).anchor
    assert seen == names and name == names[0]


def test_objects_become_what_is_drawn_most_reliably() -> None:
    anchors = {name: canvas_concept(name).anchor for name in vocabulary().names("object")}
    assert anchors.pop("mushroom") == anchors.pop("star") == "moon"
    assert set(anchors.values()) == {"mushroom"}


def test_a_colour_becomes_the_one_across_the_wheel_unless_another_measured_better() -> None:
    names = vocabulary().names("colour")  # in the order of the wheel
    across = dict(zip(names, names[3:] + names[:3], strict=True))
    measured = {"pink": "red", "green": "yellow", "cyan": "pink"}
    assert {name: canvas_concept(name).anchor for name in names} == across | measured


def test_canvas_concepts_refuse_what_this_world_does_not_have() -> None:
    assert canvas_concept("heart", "ring").anchor == "ring"
    with raises("'haert'", "did you mean 'heart'"):
        canvas_concept("haert")
    with raises("'Noen'", "did you mean 'Neon'"):
        canvas_concept("Noen")
    with raises("'strr'", "did you mean 'star'"):
        canvas_concept("heart", "strr")
    with raises("'Neon'", "no object", "star"):
        canvas_concept("heart", "Neon")
    with raises("'heart'", "anchor"):
        canvas_concept("heart", "heart")


def test_the_grid_is_every_cell_from_every_seed() -> None:
    grid = canvas_grid()
    assert len(grid.rows) == 10 * 8 * 6 * 5 and PromptSet.load("canvas") == grid
    cells = Counter((row.seed, *(row.labels[kind] for kind in KINDS)) for row in grid.rows)
    assert set(cells.values()) == {1} and {key[0] for key in cells} == set(ANSWER_SEEDS)
    for row in grid.rows:
        assert row.prompt == "A {colour} {object} image in {style} style.".format(**row.labels)


def test_a_part_of_the_grid_is_the_same_images() -> None:
    whole = {row.case: row for row in canvas_grid().rows}
    for part in (
        canvas_grid(where={"object": "heart"}),
        canvas_grid(seeds=(188, 288)),
        canvas_grid((188,), {"style": "Neon"}),
    ):
        assert 0 < len(part.rows) < len(whole) and all(whole[row.case] == row for row in part.rows)
    hearts = canvas_grid(where={"object": "heart", "colour": "red"}).rows
    assert len(hearts) == 8 * 5 and {row.labels["object"] for row in hearts} == {"heart"}


@pytest.mark.parametrize(
    ("seeds", "where", "words"),
    [
        ((), {}, ["seeds"]),
        ((1, 1), {}, ["seeds"]),
        ((-1,), {}, ["-1"]),
        ((1,), {"color": "red"}, ["'color'", "'colour'"]),
        ((1,), {"object": "haert"}, ["object", "'haert'", "'heart'"]),
    ],
)
def test_the_grid_refuses(seeds: tuple[int, ...], where: dict[str, str], words: list[str]) -> None:
    with raises(*words):
        canvas_grid(seeds, where)


def test_the_reason_of_anothers_error_is_one_line_and_never_empty() -> None:
    assert reason(OSError("\n no space left\non device")) == "no space left"
    assert reason(ValueError(" \n")) == "ValueError"


def test_more_prompts_than_anybody_could_draw_are_refused_before_they_are_made() -> None:
    with raises("'cat'", "2,000 templates for 1,001 names", "1,000,000"):
        ConceptSpec(
            "cat",
            "dog",
            tuple(f"cat {i}" for i in range(1000)),
            tuple(f"{i} {{}}" for i in range(2000)),
        )
