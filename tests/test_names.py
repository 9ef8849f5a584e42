"""Names in every script: when two are the same concept, and which prompts name one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from erase.prompts.concepts import ConceptSpec, dump, load_concepts
from erase.prompts.names import Names, same
from erase.prompts.prompt_rows import asks_for
from erase.prompts.retain import without
from erase.prompts.several import check_after, check_together
from erase.run import erase_concept
from tests.texts import raises, written

NAMED = [
    # scripts without blanks between words
    ("猫", "一只黑猫在沙发上"),
    ("猫", "黒い猫の写真"),
    ("ネコ", "黒いネコの写真"),
    ("ゴッホ", "フィンセント・ファン・ゴッホの絵"),
    ("ファンゴッホ", "ファン・ゴッホの絵"),
    ("แมว", "รูปถ่ายแมวดำ"),
    ("แมว", "แมว\u200bสีดำ"),
    ("cat", "一只cat在沙发上"),
    # blanks, but particles on the words
    ("고양이", "고양이가 소파에 있다"),
    # underscores, hyphens, dashes, blanks, characters that are not seen
    ("chain saw", "a chain_saw on a bench"),
    ("chain_saw", "a photo of a chainsaw"),
    ("chainsaw", "a_chain_saw_photo"),
    ("Van Gogh", "by van_gogh, 1889"),
    ("van-gogh", "by Van\u2011Gogh"),
    ("Van Gogh", "by Van\u00a0Gogh"),
    ("Van Gogh", "by Van\u3000Gogh"),
    ("cat", "a c\u200bat"),
    ("cat", "a black\u200bcat"),
    ("chainsaw", "a chain\u00adsaw"),
    ("cat", "\ufeffcat on a sofa"),
    # case, accents, forms
    ("istanbul", "a view of İSTANBUL"),
    ("KAPI", "bir kapı"),
    ("Кошка", "чёрная КОШКА"),
    ("ёлка", "елка в снегу"),
    ("Οδυσσεύς", "ο ΟΔΥΣΣΕΥΣ"),
    ("Strasse", "eine Straße"),
    ("cafe\u0301", "a CAFÉ"),
    ("Café", "a cafe\u0301 in Paris"),
    ("Bjørn", "a portrait of Bjorn"),
    ("dog", "a photo of a ｄｏｇ"),
    ("पिकासो", "पिकासो का चित्र"),
    # possessives and plurals
    ("cat", "a cat's bowl"),
    ("Monet", "Monet’s garden"),
    ("O'Keeffe", "a flower by O’Keeffe"),
    ("church", "two churches"),
    ("puppy", "three puppies"),
    ("wolf", "wolves in snow"),
    ("knife", "KNIVES"),
    ("nude person", "nude people on a beach"),
    ("woman", "two women"),
    # emoji, signs of regular expressions
    ("😀", "a face😀here"),
    ("❤", "a big ❤\ufe0f"),
    ("👩\u200d🚀", "👩\u200d🚀 on the moon"),
    ("C++", "a C++ book"),
    ("C++", "C++20"),
    ("(x)", "a sign with (X) on it"),
    ("a.b", "file a.b"),
    ("[^", "[^ and ]"),
]
NOT_NAMED = [
    ("cat", "a cathedral"),
    ("cat", "concatenate"),
    ("art", "a cartoon"),
    ("art", "a_cartoon_image"),
    ("cat", "a catfish, scattered"),
    ("猫", "一只黑狗"),
    ("кот", "который час"),
    ("राम", "रामायण की कथा"),
    ("개", "무지개"),
    ("a.b", "axb"),
    ("[a-z]", "a dog"),
    ("C++", "a C# book"),
    ("😀", "a face 😃"),
    ("F-16", "an F-160"),
]


@pytest.mark.parametrize(("name", "prompt"), NAMED)
def test_a_retain_prompt_that_names_the_concept_is_left_out(name: str, prompt: str) -> None:
    assert without([prompt, "a red brick"], [name]) == ("a red brick",)


@pytest.mark.parametrize(("name", "prompt"), NOT_NAMED)
def test_a_retain_prompt_that_only_holds_its_letters_stays(name: str, prompt: str) -> None:
    assert without([prompt], [name]) == (prompt,)


@pytest.mark.parametrize(("name", "prompt"), NAMED)
def test_a_row_asks_for_the_concept_by_its_prompt_or_by_a_label(name: str, prompt: str) -> None:
    assert asks_for(prompt, {}, [name]) and asks_for("", {"object": prompt}, ["x", name])
    assert not asks_for(prompt, {"object": prompt}, ())


@pytest.mark.parametrize(("name", "prompt"), NOT_NAMED)
def test_a_row_that_only_holds_the_letters_asks_for_something_else(name: str, prompt: str) -> None:
    assert not asks_for(prompt, {"object": prompt}, [name])


def test_names_are_told_as_the_text_writes_them() -> None:
    named = Names(["heart", "chain saw"])
    assert named.written("two Hearts, a heart-shaped chainsaw") == ["chainsaw", "Hearts", "heart"]
    assert named.written("hearty") == []


def test_a_name_is_replaced_where_it_stands_and_the_rest_is_kept() -> None:
    by = {"Van Gogh": "an unknown artist", "Gogh": "someone", "猫": "狗", "cat": "dog"}
    named = Names(by)
    assert (
        named.replaced("A CAT by VAN_GOGH, 1889: ÉTÉ", by)
        == "A dog by an unknown artist, 1889: ÉTÉ"
    )
    assert named.replaced("by Gogh and Van  Gogh", by) == "by someone and an unknown artist"
    assert named.replaced("一只黑猫", by) == "一只黑狗"
    assert named.replaced("a cathedral", by) == "a cathedral"
    assert named.found("Van Gogh’s cats") == ["Van Gogh", "Gogh", "cat"]


# ---- what is the same concept --------------------------------------------------------------------

TWINS = [
    ("dog", "Dog "),
    ("dog", " DOG"),
    ("dog", "a dog"),
    ("dog", "ｄｏｇ"),
    ("dog", "do\u200bg"),
    ("chain saw", "chainsaw"),
    ("chain saw", "Chain-Saw"),
    ("chain saw", "chain_saw"),
    ("chain saw", "chain  saw"),
    ("café", "cafe\u0301"),
    ("café", "Cafe"),
    ("Straße", "STRASSE"),
    ("İstanbul", "istanbul"),
    ("кошка", "Кошка"),
    ("ΣΊΣΥΦΟΣ", "Σίσυφος"),
    ("O'Keeffe", "O’Keeffe"),
]


@pytest.mark.parametrize(("target", "anchor"), TWINS)
def test_an_anchor_that_is_the_concept_in_other_letters_is_refused(
    target: str, anchor: str
) -> None:
    with raises("itself as its anchor", repr(target), "choose another anchor"):
        ConceptSpec(target, anchor)
    with raises("its own synonym", "'thing'"):
        ConceptSpec("thing", anchor, (target,))


@pytest.mark.parametrize(
    ("target", "anchor"),
    [
        ("dog", "cat"),
        ("ハス", "バス"),
        ("glasses", "glass"),
        ("cat", "cathedral"),
        ("-", "—"),
        ("🐶", "🐱"),
    ],
)
def test_an_anchor_that_only_looks_alike_is_taken(target: str, anchor: str) -> None:
    assert same(target) != same(anchor) and ConceptSpec(target, anchor).anchor == anchor


def test_names_lose_the_blanks_that_are_typed_around_and_within_them() -> None:
    concept = ConceptSpec(
        "  Van \u00a0 Gogh\n", "an\tunknown  artist ", (" Vincent  van Gogh",), ("by {}",)
    )
    assert (concept.target, concept.anchor, concept.synonyms) == (
        "Van Gogh",
        "an unknown artist",
        ("Vincent van Gogh",),
    )
    assert concept.pairs()[0] == ("by Van Gogh", "by an unknown artist")


@pytest.mark.parametrize(("one", "other"), TWINS)
def test_a_concept_that_is_named_twice_is_refused(one: str, other: str, tmp_path: Path) -> None:
    with raises("twice"):
        check_together([ConceptSpec(one, "x"), ConceptSpec(other, "y")])
    with raises("twice", "'thing'", "'stuff'"):
        erase_concept([ConceptSpec("thing", "x", (one,)), ConceptSpec("stuff", "y", (other,))])
    listed = [ConceptSpec("thing", "x"), ConceptSpec(one, "x"), ConceptSpec("stuff", "y", (other,))]
    with raises("bad.yaml", "twice", "'stuff'"):
        load_concepts(written(tmp_path, "bad.yaml", dump(listed)))


def test_an_anchor_that_names_what_another_concept_forgets_is_refused() -> None:
    tree, apple = ConceptSpec("oak", "Apple trees"), ConceptSpec("pear", "x", ("apple tree",))
    with raises("'oak' is 'Apple trees', and 'apple tree' is to be forgotten as well"):
        check_together([tree, apple])
    with raises("'oak' is 'Apple trees', and runs/pear erased 'apple tree'"):
        check_after([tree], [apple], "runs/pear")
    with raises("runs/oak draws 'Apple trees' in the place of 'oak'", "'apple tree' must stay"):
        check_after([apple], [tree], "runs/oak")
    check_together([tree, replace(apple, synonyms=("pineapple tree",))])
    check_together([ConceptSpec("cat", "cat food"), apple])  # of its own name


@pytest.mark.parametrize(("one", "other"), TWINS)
def test_an_anchor_that_another_concept_forgets_is_refused(one: str, other: str) -> None:
    with raises(f"and {one!r} is to be forgotten as well; choose another anchor", "'thing'"):
        erase_concept([ConceptSpec("thing", other), ConceptSpec(one, "y")])
