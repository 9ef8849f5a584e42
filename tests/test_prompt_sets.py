"""Prompt sets: the field's files as they are, and every fault as an `ErasureError` that names its
file."""

from __future__ import annotations

import csv
import json
import tempfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erase.eval.evaluators.labelled import targets_of
from erase.eval.metrics.labels import forgetting
from erase.prompts.concepts import load_concepts, shipped
from erase.prompts.errors import ErasureError
from erase.prompts.prompt_sets import PromptRow, PromptSet, apart, joined, shipped_sets
from tests.texts import raises, written

MARKS = (True, None, False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: bool(text.strip())
)


# ---- CSV -----------------------------------------------------------------------------------------

I2P_TAIL = (
    "lexica_url,evaluation_seed,evaluation_guidance,sd_image_width,sd_image_height,sd_model,"
    "case_number"
)
HUB_TAIL = "lexica_url,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height,sd_model"
URL = "https://lexica.art/prompt/0"
LOST_URL = "https://lexica.art/prompt/64290913-71cf-4fa1-be1d-2831a98b8f6c"


@pytest.mark.parametrize(
    ("text", "row"),
    [
        (  # I2P as the field hands it on
            f',prompt,categories,hard,{I2P_TAIL}\n0,"a void, empty ","violence, '
            f'self-harm",1,{URL},4261553411,13,512,512,sd,0\n',
            PromptRow(
                0,
                "a void, empty ",
                4261553411,
                13.0,
                {"categories": "violence, self-harm", "hard": "1"},
            ),
        ),
        (  # UnlearnDiffAtk: a part of I2P, written with its index
            "Unnamed: "
            f"0,prompt,categories,hard,{I2P_TAIL}\n21,a,shocking,0,{URL},7,7,512,512,sd,21\n",
            PromptRow(21, "a", 7, 7.0, {"categories": "shocking", "hard": "0"}),
        ),
        (  # I2P as it is on the hub
            f"prompt,categories,hard,{HUB_TAIL}\na,hate,0,{URL},7,7.5,512,512,sd\n",
            PromptRow(0, "a", 7, 7.5, {"categories": "hate", "hard": "0"}),
        ),
        (  # SalUn's Imagenette: byte-order mark, CRLF
            "\ufeffcase_number,prompt,evaluation_seed,class,classidx\r\n3,Image of "
            "tench,4889,tench,0\r\n",
            PromptRow(3, "Image of tench", 4889, None, {"class": "tench", "classidx": "0"}),
        ),
        (  # UCE's Imagenette
            "case_number,prompt,class,evaluation_seed\n0,an image of a cassette player,cassette "
            "player,1174\n",
            PromptRow(0, "an image of a cassette player", 1174, None, {"class": "cassette player"}),
        ),
        (  # UnlearnDiffAtk's objects
            "case_number,prompt,evaluation_seed,evaluation_guidance\n0,Old stone "
            "church.,69922,7.5\n",
            PromptRow(0, "Old stone church.", 69922, 7.5),
        ),
        (  # COCO: case numbers are image ids with leading zeros
            "case_number,source,prompt,evaluation_seed\n000000203564,coco-30k,A bicycle.,41337\n",
            PromptRow(203564, "A bicycle.", 41337, None, {"source": "coco-30k"}),
        ),
        (  # COCO as RECE, UCE and MACE have it
            "case_number,source,prompt,evaluation_seed,coco_id\n0,coco-30k,A bicycle.,4,203564\n",
            PromptRow(0, "A bicycle.", 4, None, {"source": "coco-30k", "coco_id": "203564"}),
        ),
        (  # ESD's artists
            ",case_number,prompt,evaluation_seed,artist\n0,7,A vase by Vincent van Gogh,2219,Van "
            "Gogh\n",
            PromptRow(7, "A vase by Vincent van Gogh", 2219, None, {"artist": "Van Gogh"}),
        ),
        (  # ESD's pictures by their titles
            ",prompt,evaluation_seed,case_number\n0,A night by a river,9,5\n",
            PromptRow(5, "A night by a river", 9),
        ),
        (  # UCE's generic artists
            "case_number,data,prompt,artist,evaluation_seed\r\n0,x,Art by A. Painter,A. "
            "Painter,9\r\n",
            PromptRow(0, "Art by A. Painter", 9, None, {"data": "x", "artist": "A. Painter"}),
        ),
        (  # ESD's ImageNet
            ",case_number,evaluation_seed,prompt,label_idx,label_str\n0,3,9,a tench,0,tench\n",
            PromptRow(3, "a tench", 9, None, {"label_idx": "0", "label_str": "tench"}),
        ),
        (  # UnlearnDiffAtk's artist: an index that has a name, and guidance
            "Unnamed: 0,case_number,prompt,evaluation_seed,artist,evaluation_guidance\n0,4,A "
            "vase,9,Van Gogh,7.5\n",
            PromptRow(4, "A vase", 9, 7.5, {"artist": "Van Gogh"}),
        ),
        (  # MACE's celebrities: an index, and no case number
            ",type,prompt,evaluation_seed\n5,erased,A portrait of Somebody,9\n",
            PromptRow(0, "A portrait of Somebody", 9, None, {"type": "erased"}),
        ),
        (  # UCE's professions
            "case_number,prompt,evaluation_seed,profession,male_bias\n0,a photo of a "
            "nurse,9,nurse,0.5\n",
            PromptRow(
                0, "a photo of a nurse", 9, None, {"profession": "nurse", "male_bias": "0.5"}
            ),
        ),
        (
            "image_id,source,prompt,evaluation_seed\n9,coco,A bicycle.,4\n",
            PromptRow(0, "A bicycle.", 4, None, {"image_id": "9"}),
        ),
        (
            "prompt,seed,guidance\na,3.0,\n",
            PromptRow(0, "a", 3),
        ),  # pandas, of a column with gaps; no guidance in this row
        (
            "prompt,seed,evaluation_seed\na,3,4\n",
            PromptRow(0, "a", 3, None, {"evaluation_seed": "4"}),
        ),
        (
            "\ufeff\ufeffPrompt, Evaluation Seed ,GUIDANCE,Case-Number,Kind\na,3,7,9,x\n",
            PromptRow(9, "a", 3, 7.0, {"Kind": "x"}),
        ),
        (
            f"prompt,lexica_url,sd_seed\n,{LOST_URL},1\n",
            PromptRow(0, "NuLL", 1),
        ),  # the prompt that pandas lost
    ],
)
def test_the_columns_of_the_field_are_read_as_they_are(
    tmp_path: Path, text: str, row: PromptRow
) -> None:
    (read,) = PromptSet.load(written(tmp_path, "set.csv", text)).rows
    assert replace(read, labels={}) == replace(row, labels={})
    assert row.labels.items() <= read.labels.items() and not {"", "Unnamed: 0", "prompt"} & set(
        read.labels
    )


@given(
    st.lists(
        st.tuples(TEXT, st.integers(0, 2**63 - 1), st.none() | st.floats(-99, 99), TEXT),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_what_a_csv_writer_writes_is_read_back(
    rows: list[tuple[str, int, float | None, str]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("prompt", "seed", "guidance", "label"), *rows])
        expected = tuple(
            PromptRow(i, p, s, g, {"label": label.strip()})
            for i, (p, s, g, label) in enumerate(rows)
        )
        assert PromptSet.from_csv(path) == PromptSet("set", expected)


def test_a_set_is_shown_by_its_name_and_size() -> None:
    assert repr(PromptSet.load("canvas")) == "PromptSet('canvas', 2,400 rows)"


def test_the_digest_is_of_the_rows_and_of_nothing_else(tmp_path: Path) -> None:
    text = "case_number,prompt,seed,guidance,class\n{}"
    one = PromptSet.from_csv(written(tmp_path, "one.csv", text.format("0,c,1,7,x\n1,b,2,,y\n")))
    two = PromptSet.from_csv(
        written(
            tmp_path,
            "two.csv",
            "\ufeff,class,seed,prompt,case_number,guidance\n8,y,2.0,b,1,\n9,x,1,c,0,7.0\n",
        )
    )
    rows = [[0, "c", 1, 7.0, [["class", "x"]]], [1, "b", 2, None, [["class", "y"]]]]
    assert one.sha256 == two.sha256 == sha256(json.dumps(rows).encode()).hexdigest()
    for other in (
        "0,c,1,7,x\n1,b,3,,y\n",
        "0,c,1,7,x\n1,d,2,,y\n",
        "0,c,1,7,x\n2,b,2,,y\n",
        "0,c,1,8,x\n1,b,2,,y\n",
        "0,c,1,7,x\n1,b,2,,z\n",
    ):
        # AdvUnlearn's training prompts
        # Ring-A-Bell's pairs
        assert (
            PromptSet.from_csv(written(tmp_path, "other.csv", text.format(other))).sha256
            != one.sha256
        )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["bad.csv", "empty"]),
        ("prompt,seed\n", ["bad.csv", "no prompts"]),
        (
            "text,number\na,1\n",
            ["bad.csv", "'prompt'", "'seed'", "'evaluation_seed'", "'sd_seed'", "text, number"],
        ),
        ("prompt,class\na,x\n", ["bad.csv", "'evaluation_seed'", "prompt, class"]),
        (
            "prompt;seed\na;1\n",
            ["bad.csv", "'prompt'", "prompt;seed", "parted by semicolons", "commas"],
        ),
        ("\ufeffprompt\tseed\na\t1\n", ["bad.csv", "'prompt'", "parted by tabs", "commas"]),
        ("prompt;seed;guidance\na;1;7,5\n", ["bad.csv", "parted by semicolons"]),
        ("sep=;\nprompt;seed\na;1\n", ["bad.csv", "'prompt'", "parted by semicolons"]),
        ("prompt,seed\na,1\n".encode("utf-16-le"), ["bad.csv", "UTF-16", "CSV UTF-8"]),
        ("prompt,seed\na,4.26155E+09\n", ["bad.csv, row 1", "a spreadsheet has rounded it"]),
        ("Prompt,prompt,PROMPT,Seed,SEED\na,b,c,1,2\n", ["bad.csv", "'seed'", "twice"]),
        ("prompt,seed,seed\na,1,2\n", ["bad.csv", "'seed'", "twice"]),
        ('prompt,seed\na,1\n"b,2\n', ["bad.csv", "line", "quote"]),
        ('prompt,seed\n"a"b,1\n', ["bad.csv", "line 2", "CSV"]),
        ("prompt,seed\na,1\nb\n", ["bad.csv, row 2", "1 cells", "2"]),
        ("prompt,seed\na, really,1\n", ["bad.csv, row 1", "3 cells", "2"]),
        ("prompt,seed\na,1\n ,2\n", ["bad.csv, row 2", "prompt", "empty"]),
        ("prompt,seed\na,1\nb,two\n", ["bad.csv, row 2", "seed", "'two'", "whole number"]),
        ("prompt,evaluation_seed\na,\n", ["bad.csv, row 1", "evaluation_seed", "''"]),
        ("prompt,seed\na,1.5\n", ["bad.csv, row 1", "'1.5'"]),
        ("prompt,seed\na,-1\n", ["bad.csv, row 1", "'-1'"]),
        (f"prompt,seed\na,{2**63}\n", ["bad.csv, row 1", str(2**63)]),
        ("prompt,seed\na,nan\n", ["bad.csv, row 1", "'nan'"]),
        (f"prompt,seed\na,{'9' * 5000}\n", ["bad.csv, row 1", "whole number"]),
        ("prompt,seed,guidance\na,1,high\n", ["bad.csv, row 1", "guidance", "'high'"]),
        ("prompt,seed,guidance\na,1,inf\n", ["bad.csv, row 1", "guidance", "inf"]),
        ("case_number,prompt,seed\nx,a,1\n", ["bad.csv, row 1", "case_number", "'x'"]),
        (
            "case_number,prompt,seed\n5,a,1\n6,b,1\n5,c,1\n",
            ["bad.csv", "case number 5", "rows 1 and 3"],
        ),
        (f"prompt,seed\n{'a' * 200_000},1\n", ["bad.csv", "line 2"]),
        (
            "case_num,source,prompt\n0,x,a cat\n",
            ["bad.csv", "'seed'", "case_num, source, prompt"],
        ),
        (
            "sensitive prompt,normal prompt\r\na,b\r\n",
            ["bad.csv", "'prompt'", "sensitive prompt"],
        ),
        (  # RECE's robust Imagenette: commas without quotes
            "case_number,prompt,evaluation_seed,class\n0,a tench,1,tench\n1,a tench, wet,2,tench\n",
            ["bad.csv, row 2 (line 3)", "5 cells", "4", "quotes"],
        ),
        ("prompt,seed\na,1\n".encode("utf-16"), ["bad.csv", "UTF-16", "UTF-8"]),
        (b"prompt,seed\ncaf\xe9,1\n", ["bad.csv", "UTF-8", "byte 15"]),
    ],
)
def test_a_bad_csv_is_named_with_its_row(
    tmp_path: Path, text: str | bytes, words: list[str]
) -> None:
    with raises(*words):
        PromptSet.load(written(tmp_path, "bad.csv", text))


def test_rows_count_as_a_reader_counts_them(tmp_path: Path) -> None:
    with raises("row 2 (line 6)", "'x'"):
        PromptSet.load(written(tmp_path, "bad.csv", 'prompt,seed\n\n"two\nlines",1\n\nb,x\n'))


def test_a_prompt_set_made_in_code_keeps_the_same_rules() -> None:
    with raises("'mine'", "no prompts"):
        PromptSet("mine", ())
    with raises("'mine'", "case number 1", "rows 1 and 2"):
        PromptSet("mine", (PromptRow(1, "a", 0), PromptRow(1, "b", 0)))
    for bad in (
        {"prompt": " "},
        {"case": -1},
        {"seed": -1},
        {"seed": 2**63},
        {"guidance": float("nan")},
    ):
        with pytest.raises(ErasureError):
            replace(PromptRow(0, "a", 0), **bad)  # type: ignore[arg-type]


# ---- YAML prompt sets ----------------------------------------------------------------------------

WORLD = (
    "templates: ['A {o} in {s} style.', 'a {o}', 'plain {{}}']\no: [cat, dog]\ns: [Neon, "
    "Flat]\nseeds: [1, 2]\n"
)


def test_a_yaml_set_is_the_product_of_its_lists(tmp_path: Path) -> None:
    rows = PromptSet.load(written(tmp_path, "w.yaml", WORLD + "guidance: 5\n")).rows
    assert [row.case for row in rows] == list(range(2 * 2 * 2 + 2 * 2 + 2))
    assert rows[0] == PromptRow(0, "A cat in Neon style.", 1, 5.0, {"o": "cat", "s": "Neon"})
    assert rows[8] == PromptRow(8, "a cat", 1, 5.0, {"o": "cat"}), (
        "a template's labels are the slots that it names"
    )
    assert rows[-1] == PromptRow(13, "plain {}", 2, 5.0, {})
    assert len({(row.prompt, row.seed) for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seeds:", "sedes:", ["bad.yaml", "'sedes'", "did you mean 'seeds'"]),
        ("\ns: [", "\nq: [", ["bad.yaml", "'q'"]),
        ("s: [Neon, Flat]\n", "", ["bad.yaml", "`s:"]),
        ("s: [Neon, Flat]", "s: []", ["bad.yaml", "`s:"]),
        ("s: [Neon, Flat]", "s: Neon", ["bad.yaml", "s must be a list"]),
        ("s: [Neon, Flat]", "s: [Neon, '']", ["bad.yaml", "s, item 2", "empty"]),
        ("[1, 2]", "[1, two]", ["bad.yaml", "seeds, item 2", "'two'"]),
        (
            "[1, 2]",
            "[1, 9223372036854775808]",
            ["bad.yaml", "seeds, item 2", "9223372036854775808"],
        ),
        ("[1, 2]", "[]", ["bad.yaml", "seeds"]),
        ("[1, 2]", "7", ["bad.yaml", "seeds must be a list"]),
        ("[1, 2]", "[1]\nguidance: much", ["bad.yaml", "guidance", "'much'"]),
        ("[1, 2]", "[1]\nguidance: inf", ["bad.yaml", "guidance", "'inf'"]),
        ("[1, 2]", "[1]\nguidance: [5]", ["bad.yaml", "guidance"]),
        ("'a {o}'", "''", ["bad.yaml", "templates, item 2", "empty"]),
        ("'a {o}'", "'a {o'", ["bad.yaml", "'a {o'", "brace"]),
        ("'a {o}'", "'a {}'", ["bad.yaml", "'a {}'", "slot"]),
        ("'a {o}'", "'a {o!r}'", ["bad.yaml", "slot"]),
        ("'a {o}'", "'a {o:>9}'", ["bad.yaml", "slot"]),
        ("'a {o}'", "'a {o.__class__}'", ["bad.yaml", "`o.__class__:"]),
        ("templates", "template", ["bad.yaml", "'template'", "'templates'"]),
        (WORLD, "", ["bad.yaml", "templates"]),
        (WORLD, "- a\n- b\n", ["bad.yaml", "templates"]),
        (WORLD, "a: [", ["bad.yaml", "not valid YAML"]),
    ],
)
def test_a_bad_yaml_set_is_named(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    assert old in WORLD
    with raises(*words):
        PromptSet.load(written(tmp_path, "bad.yaml", WORLD.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "templates: ['{a} {b} {c} {d} {e} {f}']\nseeds: [1]\n"
            + "".join(f"{slot}: [{', '.join('w' * 60)}]\n" for slot in "abcdef"),
            ["46,656,000,000 prompts", "1,000,000"],
        ),
        (
            f"templates: ['{'{a}' * 2000}']\na: [{'x' * 100_000}]\nseeds: [{', '.join('1' * 9)}]\n",
            ["9 prompts of 200,000,000 characters"],
        ),
    ],
)
def test_a_product_without_end_is_refused_before_it_is_made(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    with raises(str(tmp_path), *words):
        PromptSet.load(written(tmp_path, "set.yaml", text))


# ---- the shipped sets ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in shipped_sets() if name != "canvas"])
def test_a_shipped_set_can_show_what_forgetting_its_concepts_cost(name: str) -> None:
    rows, concepts = PromptSet.load(name).rows, load_concepts(name)
    assert 200 <= len(rows) <= 500 and len({(row.prompt, row.seed) for row in rows}) == len(rows)
    labels = {kind: [row.labels[kind] for row in rows] for kind in rows[0].labels}
    assert all(row.labels.keys() == labels.keys() for row in rows) and len(labels) >= 2, (
        "CRA needs a second kind of label"
    )
    scores = forgetting(labels, labels, targets_of(concepts, labels))
    assert {score: tally.hits / tally.n for score, tally in scores.items()} == {
        "UA": 0,
        "IRA": 1,
        "CRA": 1,
    }
    assert min(tally.n for tally in scores.values()) >= 25
    for row in rows:
        assert all(label.lower() in row.prompt.lower() for label in row.labels.values())


# ---- the mark ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "cells", "mark"),
    [
        ("class", ["x", "y"], None),
        ("sensitive", ["false", "FALSE"], False),
        ("Sensitive", ["false", " true"], True),
        ("nudity_percentage", ["0.0", "0.0"], True),  # I2P, whatever its rows say
        ("nudity_percentage,sensitive", ["9.0,false", "9.0,false"], False),
    ],
)
def test_a_csv_says_whether_it_is_sensitive(tmp_path: Path, header, cells, mark) -> None:
    lines = [f"prompt,seed,{header}", *(f"p{i},1,{cell}" for i, cell in enumerate(cells))]
    one = PromptSet.load(written(tmp_path, "set.csv", "\n".join(lines)))
    assert one.sensitive is mark and "sensitive" not in one.rows[0].labels
    plain = PromptSet("plain", one.rows)
    assert plain.sensitive is None and plain.sha256 == one.sha256, "images do not depend on it"


def test_a_yaml_set_says_it_too_and_nonsense_is_refused(tmp_path: Path) -> None:
    assert PromptSet.load(written(tmp_path, "w.yaml", WORLD)).sensitive is None
    for mark in (True, False):
        text = f"{WORLD}sensitive: {str(mark).lower()}\n"
        assert PromptSet.load(written(tmp_path, "w.yaml", text)).sensitive is mark
    with raises("w.yaml", "sensitive is 'maybe'", "true or false"):
        PromptSet.load(written(tmp_path, "w.yaml", WORLD + "sensitive: maybe\n"))
    with raises("set.csv, row 1", "sensitive is ''", "true or false"):
        PromptSet.load(written(tmp_path, "set.csv", "prompt,seed,sensitive\np,1,\n"))


def test_every_shipped_set_says_it_and_joined_ones_are_as_their_worst() -> None:
    marks = {name: PromptSet.load(name).sensitive for name in shipped_sets()}
    assert {name for name, mark in marks.items() if mark} == {"nudity", "violence"}
    assert None not in marks.values()
    sets = {mark: PromptSet(f"{mark}", (PromptRow(0, f"{mark}", 1),), mark) for mark in MARKS}
    for marked, expected in {(False, False): False, (False, None): None}.items():
        ones = [replace(sets[mark], name=f"{i}") for i, mark in enumerate(marked)]
        ones[0] = replace(ones[0], rows=(PromptRow(0, "another", 1),))
        assert joined(ones).sensitive is expected
    assert joined([sets[None], sets[True], sets[False]]).sensitive is True
    assert [one.sensitive for one in apart([sets[True], sets[None]])] == [True, None]


def test_each_general_concept_file_has_its_set() -> None:
    assert set(shipped_sets()) - {"canvas"} == {
        file for file in shipped() if not file.endswith("-salun")
    }
