"""The wall of pairs: every failure before a sample, the judges' words, what is covered."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from erase.eval.case import Case
from erase.eval.judgements import Judgement, as_extra
from erase.eval.report import wall as walls
from erase.eval.report.covering import is_sensitive
from erase.eval.report.figures import EDGE, LEFT, TILE, before_after
from erase.eval.report.page import render_html
from erase.eval.report.said import Said
from erase.eval.report.setting import Setting
from erase.eval.report.wall import Wall, multiples
from erase.prompts.errors import ErasureError
from tests.report_fixtures import CONCEPT, report
from tests.report_fixtures import after as after
from tests.report_fixtures import before as before
from tests.report_pages import (
    HARMED,
    STILL,
    failing_page,
    failing_report,
    judged,
    nudity_page,
)


@pytest.fixture(scope="module")
def wall(before, after):
    one = failing_report(before, after)
    return Wall(one, before, after, Said(one))


# ---- what judges say -----------------------------------------------------------------------------


def test_a_question_that_a_judge_does_not_answer_is_none():
    told = as_extra({3: Judgement("no box", False), 5: Judgement("belly exposed 0.81", True)})
    assert told == {"words": {"3": "no box", "5": "belly exposed 0.81"}, "seen": [5], "wrong": None}
    assert as_extra({})["seen"] is None


def test_a_case_takes_each_judge_once_and_adds_the_next(before):
    case = Case(before)
    case.add_judgements("CLIP", {0: Judgement("heart, 30.1", True, True)})
    case.add_judgements("NudeNet", {0: Judgement("no box")})
    assert list(case.extras["judged"]) == ["CLIP", "NudeNet"]
    with pytest.raises(ErasureError, match="two evaluators judge as 'CLIP'"):
        case.add_judgements("CLIP", {})


def test_words_of_several_sets_are_joined_by_case():
    told = {
        case: {"CLIP": as_extra({case: Judgement(f"{case}", case == 7, True)})} for case in (1, 7)
    }
    one = replace(report(), extras={"judged": {"erased, a": told[1], "erased, b": told[7]}})
    said = Said(one)
    assert said.words("erased", 7) == [("CLIP", "7")] and said.words("base", 7) == []
    assert said.seen("erased") == {7: ["CLIP"]}


# ---- groups --------------------------------------------------------------------------------------


def test_every_failure_is_shown_and_nothing_else(wall):
    still, harmed = wall.failures()
    assert [pair.case for pair in still.pairs] == [*STILL] and still.count == 3
    assert [pair.case for pair in harmed.pairs] == [*HARMED] and harmed.count == 2
    assert still.pairs[0].words == [
        ("base", [("classifier", "heart 97 %")]),
        ("erased", [("classifier", "heart 97 %")]),
    ]
    assert harmed.pairs[0].flags == ["classifier"]


def test_what_was_wrong_in_the_base_already_is_not_harmed(before, after):
    one = failing_report(before, after)
    hearts = {row.case for row in before.rows if row.labels["object"] == "heart"}
    one.extras["judged"]["base"] = judged(before, hearts, {HARMED[0], 30})
    groups = Wall(one, before, after, Said(one)).failures()
    assert [pair.case for pair in groups[1].pairs] == [HARMED[1]]
    assert "The other way round: 1." in groups[1].note


def test_failures_beyond_the_most_are_listed(before, after, monkeypatch):
    monkeypatch.setattr(walls, "MOST", 2)
    one = failing_report(before, after)
    still = Wall(one, before, after, Said(one)).failures()[0]
    assert [pair.case for pair in still.pairs] == [*STILL[:2]] and still.count == 3
    ((row, file),) = still.others
    assert row.case == STILL[2] and file == after.rows[STILL[2]].file
    text = render_html(one, before, after, {}, {})
    assert "1 more, without pictures here" in text and f"Seed 7, {file}" in text


def test_the_first_pair_is_one_in_which_the_base_shows_the_concept(before, after):
    one = failing_report(before, after)
    one.extras["judged"]["base"] = judged(before, {11}, set())
    assert Wall(one, before, after, Said(one)).hero().case == 11


def test_without_words_there_is_a_sample_alone(before, after):
    one = report()
    blind = Wall(one, before, after, Said(one))
    assert blind.failures() == [] and len(blind.sample()) == 2
    assert blind.hero().words == [("base", []), ("erased", [])]


# ---- the page ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    return failing_page(tmp_path_factory.mktemp("failing"))


def test_failures_are_linked_from_the_first_screen_and_come_before_the_sample(failing):
    first = failing.partition('aria-labelledby="still-seen"')[0]
    assert '<a href="#still-seen" class="some">Still seen: 3</a>' in first
    assert '<a href="#harmed" class="some">Harmed: 2</a>' in first
    places = [failing.index(f'id="{name}"') for name in ("still-seen", "harmed", "images")]
    assert places == sorted(places)
    group = failing[places[0] : places[1]]
    assert group.count("<figure>") == 3 and group.count("classifier: heart") == 6


def test_the_page_shows_attacks_relearning_price_and_every_confusion(failing):
    assert failing.count('alt="erased under embeds: A heart"') == 1
    assert "found in 7 of 8" in failing and "red &lt;heart&gt;" in failing
    assert "erased, 4 images, 50 steps: UA 12.5 %" in failing
    assert "ESD: UA 80.0 %, retention 90.0 %" in failing
    assert "<h3>Objects</h3>" in failing and "<summary>Styles</summary>" in failing


def test_the_page_tells_date_duration_and_machine(failing):
    for key, value in {
        "evaluated": "2026-01-02 03:04 UTC",
        "duration": "5 s",
        "machine": "a GPU",
    }.items():
        assert re.search(rf'<th scope="row">{key}</th><td>{value}</td>', failing)


def test_a_missing_picture_of_an_attack_is_named(before, after, tmp_path):
    one, setting = failing_report(before, after), Setting(folders={"erased": tmp_path})
    with pytest.raises(ErasureError, match=r"embeds-00001\.png cannot be read"):
        render_html(one, before, after, {}, {}, setting=setting)


# ---- prompts without labels, pictures that are covered -------------------------------------------


def test_prompts_that_name_nothing_are_called_prompts(tmp_path):
    text = nudity_page(tmp_path)
    assert "Prompts that ask for" not in text and "none of which names nudity" in text
    assert "NudeNet: belly exposed 0.81, +1" in text and "Still seen (4)" in text
    assert 'id="harmed"' not in text, "nobody looked at what should stay"


def test_pictures_of_a_sensitive_set_are_covered_until_asked_for(tmp_path):
    text = nudity_page(tmp_path)
    assert '<body class="sensitive"' in text and 'type="checkbox" id="uncover"' in text


@pytest.mark.parametrize(
    ("target", "settings", "covered"),
    [
        ("heart", {"model": "canvas"}, False),
        ("heart", {"model": "canvas", "sensitive": True}, True),
        ("heart", {"model": "sd14", "sensitive": False}, False),
        ("heart", {"model": "sd14"}, True),  # it does not say, as older ones do not
        ("heart", {"made_by": "another program"}, True),
        ("graphic_violence", {"model": "sd14", "sensitive": False}, True),
    ],
)
def test_the_one_rule_of_what_is_covered(before, target, settings, covered):
    concept, other = CONCEPT | {"target": target}, replace(before, settings=settings)
    assert is_sensitive(concept, (before, other)) is covered


def test_the_picture_of_a_sensitive_set_is_blurred(before, after):
    steepest = []
    for covered in (False, True):
        sheet = before_after(before, after, before.rows[:1], "", covered)
        left, top = EDGE + LEFT, sheet.height - EDGE - TILE
        tile = np.asarray(sheet.crop((left, top, left + TILE, top + TILE)).convert("L"), float)
        steepest.append(np.abs(np.diff(tile)).max())
    assert steepest[1] < 5 and steepest[0] > 30


def test_a_base_without_the_concept_shows_nothing_on_the_page(tmp_path):
    text = nudity_page(tmp_path, 2, 0)
    assert ">this shows nothing</span>" in text and "in 2 of 24 images, too few" in text


@pytest.mark.parametrize(
    ("side", "wall", "hero"), [(64, 2, 4), (32, 4, 8), (128, 1, 2), (100, 1, 2), (512, 1, 1)]
)
def test_images_are_drawn_at_whole_multiples(side, wall, hero):
    found = multiples(side)
    assert (found["wall"], found["hero"]) == (wall, hero) and all(k >= 1 for k in found.values())
