"""The measurements on the embedded world: which images judge an erasure, and the tables."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from erase.prompts.canvas import canvas_concept
from erase.prompts.names import Names
from erase.prompts.prompt_sets import canvas_grid
from erase.prompts.several import check_together, retained_prompts
from erase.scripts.canvas import sequence
from erase.scripts.canvas.curve import drawn
from erase.scripts.canvas.leaderboard import BOARD, board, standing
from erase.scripts.canvas.leaderboard import table as leaderboard
from erase.scripts.canvas.many import world
from erase.scripts.canvas.measuring import Job, read_rows
from erase.scripts.canvas.results import asked_for
from erase.scripts.canvas.robustness import called
from erase.scripts.canvas.tables import grid, paired, prediction, spread, summary
from erase.scripts.canvas.variants import groups

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize(("name", "own"), [("heart", 48), ("Neon", 60), ("red", 80)])
def test_all_prompts_of_the_concept_are_asked_and_some_of_every_other(name, own):
    concept, prompts = canvas_concept(name), canvas_grid((188,))
    few = asked_for(prompts, concept, 96).rows
    named = [row for row in few if row.labels[concept.kind] == concept.target]
    others = [row for row in few if row not in named]
    assert len(named) == own and len(others) == 96
    assert {row.labels[concept.kind] for row in others} == {
        row.labels[concept.kind] for row in prompts.rows
    } - {concept.target}
    assert asked_for(prompts, concept, None).rows == prompts.rows
    assert [row.case for row in few] == sorted({row.case for row in few})


def row(variant, density, ua, held, seed=0):
    scores = {"UA": ua, "IRA": 99.0, "CRA": 100.0}
    return {
        "concept": "heart",
        "kind": "object",
        "variant": variant,
        "seed": seed,
        "settings": {"mask": {"density": density}},
        "base": {"UA": 2.0, "IRA": 99.5, "CRA": 100.0},
        "erased": scores,
        "held": held,
    }


ROWS = [
    row("benefit 1 %", 0.01, 100.0, 0.7),
    row("benefit 1 %", 0.01, 98.0, 0.6, seed=1),
    row("random 1 %", 0.01, 0.0, 0.02),
    row("benefit 0.1 %", 0.001, 40.0, 0.4),
]


def test_the_grid_has_a_mean_and_a_range_in_each_cell():
    lines = grid(ROWS).splitlines()
    assert lines[0] == "| UA | 0.1% | 1.0% |"
    assert lines[2:] == ["| benefit | 40.0 | 99.0 (98.0 to 100.0) |", "| random |  | 0.0 |"]


def test_runs_are_paired_by_image_and_a_shared_image_counts_once():
    judged = {"IRA": [[1, 2, 3, 4], "1111", "0111"]}
    runs = [row("ours", 0.04, 100.0, 0.5, seed) | {"judged": judged} for seed in range(3)]
    lines = paired(runs).splitlines()[2:]
    assert len(lines) == 2  # of objects, and of all
    # three judgements of twelve were lost, all of one image: no more than chance
    assert "| -25.00 [" in lines[0] and "p 1, 12" in lines[0]

    apart = [
        row("ours", 0.04, 100.0, 0.5) | {"judged": {"IRA": [[*range(96)], "1" * 96, bits]}}
        for bits in ("0" * 6 + "1" * 90,)
    ]
    assert "| -6.25 [" in paired(apart) and "p 0.031, 96" in paired(apart)
    assert paired([row("ours", 0.04, 100.0, 0.5)]).count("\n") == 1  # older rows hold no outcomes


def test_masks_are_counted_by_the_share_that_they_held():
    lines = prediction(ROWS).splitlines()[2:]
    assert lines == [
        "| 1% to 3% | 1 | 0.0 | 0 |",
        "| 30% to 50% | 1 | 40.0 | 0 |",
        "| 50% to 100% | 2 | 99.0 (98.0 to 100.0) | 2 |",
    ]


def test_the_summary_tells_the_worst_and_what_was_lost():
    assert "| benefit 1 % | object | 2 | 99.0 (98.0) | -0.5 (-0.5) | +0.0 (+0.0) |" in summary(ROWS)


def test_a_spread_without_range_is_one_number():
    assert (spread([]), spread([1.0, 1.0]), spread([1.0, 2.0])) == ("", "1.0", "1.5 (1.0 to 2.0)")


def test_every_variant_has_a_file_name_of_its_own():
    names = [name for group in groups("no").values() for name in group]
    slugs = {Job("heart", name, 0).slug for name in names}
    assert len(slugs) == len(set(names)) and not any("/" in slug for slug in slugs)


def test_the_leaderboard_has_the_base_beside_every_variant_and_seeds_in_one_cell():
    def suite(variant, seed, ua):
        scores = {"erased": {"UA": ua, "SSIM": 0.9}, "base": {"UA": 2.0}}
        return {"concept": "heart", "variant": variant, "seed": seed, "bytes": 1.2e6, **scores}

    ours = [suite("salun", 0, 100.0) | {"seconds": 30.0}, suite("salun", 1, 98.0)]
    assert leaderboard([*ours, suite("uce", 0, 96.0)]).splitlines() == [
        "| heart | base | salun | uce |",
        "|---|---|---|---|",
        "| UA | 2.0 | 99.0 (98.0 to 100.0) | 96.0 |",
        "| SSIM |  | 0.900 | 0.900 |",
        "| CPU seconds |  | 30.0 |  |",  # of a delta that was found nothing is known
        "| delta, MB |  | 1.2 | 1.2 |",
    ]


def suite_row(variant, ua, found, area, cra=90.0):
    names = {name for scores in BOARD.values() for name in scores}
    scores = dict.fromkeys(names, 0.0) | {"UA": ua, "IRA": 100.0, "CRA": cra}
    scores |= {"ASR seed_search": found, "SSIM to base": 0.9, "KID x 1000 to base": -0.25}
    scores["CLIP score of the forgotten"] = 31.2
    scores |= dict.fromkeys(BOARD["relearning area, full"], area)
    scores |= dict.fromkeys(BOARD["relearning area, LoRA"], area + 10)
    base = {"IRA": 100.0, "CRA": 94.0}
    return {"concept": "heart", "variant": variant, "bytes": 1.2e6, "erased": scores, "base": base}


def test_the_board_shows_the_strongest_attack_and_ranks_by_four_shares_alike():
    weak, strong = suite_row("weak", 100.0, 40.0, 20.0), suite_row("strong", 96.0, 10.0, 60.0)
    strong["peak_bytes"] = 1.5e9
    assert standing([weak]) == (100 + 90 + 60 + 20) / 4
    assert standing([strong]) == (96 + 90 + 90 + 60) / 4
    first, second = board([weak, strong]).splitlines()[2:]
    shown = "96.0 | 100.0 | 90.0 | 0.0 | 0.0 | 10.0 | 0.0 | 60.0 | 70.0 | 0.900 | -0.250 | 31.2"
    assert first == f"| strong | 1 | {shown} |  | 1.5 | 1.2 |"
    assert second.startswith("| weak | 1 | 100.0 |")


def test_what_harms_or_leaves_stands_behind_what_does_neither():
    weak = suite_row("weak", 95.0, 90.0, 5.0)
    harms, leaves = suite_row("harms", 100.0, 0.0, 90.0, 88.9), suite_row("leaves", 94.9, 0.0, 90.0)
    assert standing([weak]) < standing([leaves]) < standing([harms])
    named = [line.split(" | ")[0] for line in board([leaves, harms, weak]).splitlines()[2:]]
    assert named == ["| weak", "| harms", "| leaves"]


def test_a_word_of_no_meaning_stands_for_every_name_of_the_concept():
    concept = canvas_concept("heart")
    worded = called(concept, "zorb")
    for name in concept.names:
        assert worded(f"A green {name} image in Neon style.") == "A green zorb image in Neon style."
    assert called(concept, None)("a heart") == "a heart"


# ---- requests one after another ------------------------------------------------------------------

FOUR = [canvas_concept(name) for name in ("heart", "Neon", "red", "tree")]


def measured(way, count, ua):
    erased = {"UA": [ua, 40, ua - 5, 100], "IRA": [90, 80, 80, 95], "CRA": [95, 80, 90, 99]}
    base = {"UA": [2, 40, 0, 8], "IRA": [99, 80, 95, 100], "CRA": [100, 80, 96, 100]}
    names = [concept.target for concept in FOUR[:count]]
    facts = {"seconds": 45.2, "changed": 1000, "erased": erased, "base": base}
    return {"way": way, "concepts": names, **facts}


def test_a_sequence_is_judged_by_images_of_each_concept_and_of_none():
    rows = sequence.asked_for(FOUR, 10, 40).rows
    for concept in FOUR:
        own = [row for row in rows if row.labels[concept.kind] == concept.target]
        assert len(own) >= 10 and len({tuple(row.labels.values()) for row in own}) == len(own)
    named = {(concept.kind, concept.target) for concept in FOUR}
    assert sum(not named & set(row.labels.items()) for row in rows) == 40


def test_the_table_and_the_curves_of_a_sequence_tell_every_measurement():
    rows = [measured("sum", 2, 60), measured("sequential", 1, 99), measured("sequential", 2, 97)]
    lines = sequence.table(rows).splitlines()[2:]
    assert [line.split(" | ")[:3] for line in lines] == [
        ["| 1", "heart", "sequential"],
        ["| 2", "Neon", "sequential"],
        ["| 2", "Neon", "sum"],
    ]
    assert "60.0 [55.0, 100.0], base 2.0 (n 40)" in lines[2]
    drawing = ElementTree.fromstring(drawn(rows, sequence.WAYS))
    circles = [one for one in drawing.iter() if one.tag.endswith("circle")]
    # of each score: the base's two, and both ways' from the one first request
    assert len(circles) == 3 * (2 + 2 + 2)
    texts = [one.text for one in drawing.iter() if one.tag.endswith("text")]
    assert {"sequential", "sum", "base", "UA %"} <= set(texts) and "joint" not in texts


def test_a_single_concept_is_erased_once_for_all_ways():
    slugs = {sequence.Job(way, ("heart",), "salun", 0).slug for way in sequence.WAYS}
    assert slugs == {"alone-heart-salun-0"}
    both = {sequence.Job(way, ("heart", "Neon"), "salun", 0).slug for way in sequence.WAYS}
    assert len(both) == len(sequence.WAYS)


@pytest.mark.parametrize("count", [10, 30, 100])
def test_many_concepts_leave_their_anchors_and_the_rest(count):
    """No anchor is forgotten too, no retained prompt asks for a concept, and each kind of image is
    asked for as often as said."""
    here = world(count, 60)
    check_together(here.concepts)
    assert len(here.concepts) == len(here.gone) == count
    asked = [bool(here.asks(row)) for row in here.prompts.rows]
    assert sum(asked) == 60 and len(asked) == 120

    named = Names([name for concept in here.concepts for name in concept.names])
    retained = retained_prompts(here.concepts)
    assert len(retained) > 80 and not any(named.found(prompt) for prompt in retained)
    for row, one in zip(here.prompts.rows, asked, strict=True):
        assert one or not named.found(row.prompt)


def test_many_concepts_are_ten_thirty_or_a_hundred():
    with pytest.raises(SystemExit, match="unknown count '11'"):
        world(11, 60)


@pytest.mark.parametrize("concept", ["heart", "Neon", "red"])
def test_the_docs_show_the_board_of_what_was_measured(concept):
    """`python scripts/canvas/leaderboard.py --board --out docs/measured --concepts CONCEPT`."""
    rows = read_rows(DOCS / "measured" / "suite.jsonl")
    own = [row for row in rows if row["concept"] == concept]
    assert board(own) in (DOCS / "results" / "leaderboard.md").read_text(encoding="utf-8")
