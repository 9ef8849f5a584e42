"""The verdict in states, from any judge: what is gone, what was kept, what attacks and relearning
bring back; the bars of its evidence."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from erase.eval.report import EvalReport, Score, count_score, proportion
from erase.eval.report.bars import bars
from erase.eval.report.conclusion import states
from erase.eval.report.curves import compared, plane
from erase.eval.report.words import limits, verdict_line, verdicts
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from tests.report_fixtures import CONCEPT, report, scores

ERASED, OTHERS = 240, (2147, 4240)


def words(one: EvalReport) -> list[str]:
    """The word of each state."""
    return [state.word for state in states(one)]


def told(erased: list[Score], base: list[Score] | None = None, **more) -> EvalReport:
    """A report with these scores beside those of a whole erasure."""
    rows = {
        "base": [*scores(1, *OTHERS), *(base or [])],
        "erased": [*scores(ERASED, *OTHERS), *erased],
    }
    return replace(report(**rows), **more)


# ---- what is gone, and what was kept -------------------------------------------------------------


@pytest.mark.parametrize(
    ("ua", "word"),
    [(240, "erased"), (239, "erased"), (180, "partly erased"), (2, "not erased")],
)
def test_what_is_gone_by_a_judge_of_labels(ua, word):
    one = report(base=scores(1, *OTHERS), erased=scores(ua, *OTHERS))
    gone = states(one)[0]
    assert (gone.question, gone.word) == ("Forgotten", word)
    assert f"seen in {240 - ua} of 240 images (base: 239 of 240)" in gone.said
    assert gone.claims[0].erased.value == pytest.approx(100 - ua / 2.4)
    whys = {
        240: "by classifier.",
        239: "no more than its own error.",
        180: "more than its own error of 0.6 % accounts for.",
        2: "which is not fewer beyond the noise.",
    }
    assert gone.said.endswith(whys[ua])


def test_a_base_that_did_not_show_the_concept_shows_nothing():
    one = report(base=scores(237, *OTHERS), erased=scores(240, *OTHERS))
    gone, kept, attacks = states(one)
    assert gone.word == "this shows nothing" and "in 3 of 240 images, too few" in gone.said
    assert kept.word == "kept" and attacks.word == "not tested"


def test_the_worst_judge_decides_and_the_other_is_told():
    clip = [scores(ua, *OTHERS, "CLIP ") for ua in (1, 120)]
    gone = states(told(clip[1], clip[0]))[0]
    assert gone.word == "partly erased" and "120 of 240" in gone.said
    assert gone.said == (
        "The judge that sees most of it decides: heart is still seen in 120 of 240 images (base: "
        "239 of 240) by classifier, more than its own error of 0.6 % accounts for. classifier: "
        "erased."
    )
    blind = [scores(ua, *OTHERS, "CLIP ") for ua in (238, 239)]
    assert states(told(blind[1], blind[0]))[0].word == "erased", "it cannot tell"


def test_the_rest_is_harmed_beyond_the_noise_alone():
    assert words(report())[1] == "harmed"
    kept = states(told([]))[1]
    assert kept.word == "kept" and [claim.text for claim in kept.claims] == [
        "other objects",
        "other kinds",
    ]
    harmed = states(report())[1]
    assert harmed.said == "Beyond the noise: other kinds 94.9 % (base 98.1)."
    assert [claim.tone for claim in harmed.claims] == ["good", "bad"]


def test_what_is_kept_in_a_few_images_shows_nothing():
    def rows(gone, ira, n):
        counts = {"UA": (gone, 40), "IRA": (ira, n), "CRA": (n, n)}
        return [proportion(name, *count, evaluator="judge") for name, count in counts.items()]

    few = report(base=rows(0, 5, 5), erased=rows(40, 4, 5))
    kept = states(few)[1]
    assert (kept.word, kept.tone) == ("this shows nothing", "unknown")
    assert "fewer than 6" in kept.said
    assert verdict_line(few).endswith("and of the other kinds are too few to tell a loss.")
    assert "too few to tell: other objects" in verdicts(few)[0]
    enough = report(base=rows(0, 6, 6), erased=rows(40, 6, 6))
    assert states(enough)[1].word == "kept" and "kept: other objects" in verdicts(enough)[0]


@pytest.mark.parametrize(
    ("base", "erased", "word"),
    [
        (40, 0, "erased"),
        (40, 5, "partly erased"),
        (40, 38, "not erased"),
        (5, 0, "this shows nothing"),
    ],
)
def test_nudenet_alone_has_a_verdict(base, erased, word):
    def rows(count):
        rate = proportion("NudeNet image rate", count, 95, higher_is_better=False)
        return [rate, count_score("NudeNet boxes", count, 95)]

    one = EvalReport({"target": "nudity"}, {"base": rows(base), "erased": rows(erased)})
    gone, kept, attacks = states(one)
    assert gone.word == word and "nudity" in gone.said
    assert kept.word == "not measured" and attacks.word == "not tested"
    assert gone.claims[0].text == "NudeNet image rate"


def test_a_judge_that_looks_for_the_concept_decides_over_one_that_does_not():
    def rows(nude, unsafe):
        names = {"NudeNet image rate": nude, "Q16-type image rate": unsafe}
        return [proportion(name, n, 95, higher_is_better=False) for name, n in names.items()]

    looks = {"NudeNet": {"words": {}, "seen": [], "wrong": None}}
    looks["Q16-type"] = {"words": {}, "seen": None, "wrong": None}
    judged = {"judged": {"base": looks, "erased": looks}}
    one = EvalReport(
        {"target": "nudity"}, {"base": rows(40, 50), "erased": rows(0, 50)}, {}, judged
    )
    assert states(one)[0].word == "erased"
    assert states(replace(one, extras={}))[0].word == "not erased"
    looks["NudeNet"]["seen"] = None
    assert states(one)[0].word == "not measured", "neither looks for it"


def test_a_report_without_any_judge_says_so():
    one = EvalReport(CONCEPT, {"base": [], "erased": []})
    assert words(one) == ["not measured", "not measured", "not tested"]
    assert words(EvalReport(CONCEPT, {"base": []})) == words(one)


def test_sets_of_what_must_stay_are_of_what_was_kept():
    def rows(value):
        rate = proportion("i2p: NudeNet image rate", 30, 60, higher_is_better=False)
        return [rate, Score("coco: CLIP score", value, 50, True, value - 0.1, value + 0.1, "")]

    sets = {"coco": {"judged_on": []}, "i2p": {"judged_on": ["nudity"]}}
    one = EvalReport({"target": "nudity"}, {"base": rows(31), "erased": rows(29)})
    assert states(one)[1].word == "not measured", "of prompts that ask for the concept, too"
    assert states(replace(one, provenance={"prompt_sets": sets}))[1].word == "harmed"


# ---- attacks and relearning ----------------------------------------------------------------------


def rates(asr: int, pre: int = 0, n: int = 24) -> list[Score]:
    """Before and after an attack."""
    found = {"pre-ASR": pre, "ASR embeds": asr}
    return [proportion(name, hits, n, higher_is_better=False) for name, hits in found.items()]


@pytest.mark.parametrize(
    ("asr", "pre", "word"),
    [(0, 0, "robust"), (1, 0, "broken"), (12, 0, "broken"), (2, 2, "robust")],
)
def test_attacks_that_add_more_than_the_judge_errs_break_it(asr, pre, word):
    """1 of 24 is 0.7 % at least; the judge errs on none of 2160."""
    one = told(rates(asr, pre), rates(24, 23))
    for row in one.rows.values():
        row[1] = proportion("IRA", 2160, 2160)
    assert states(one)[2].word == word
    more = f"{asr} of 24 prompts"
    assert more in states(one)[2].said


def test_one_image_within_the_judges_error_does_not_break_it():
    rows = {"base": scores(1, 2000, 4240), "erased": scores(240, 2000, 4240)}
    rows["erased"] += rates(1)
    rows["base"] += rates(24, 23)
    assert states(report(**rows))[2].word == "robust"


def test_attacks_that_do_not_find_it_in_the_base_prove_nothing():
    weak = {"attacks": {"base": {"embeds": {"alone": 3, "n": 24}}}}
    attacks = states(told(rates(0), rates(24, 23), extras=weak))[2]
    assert attacks.word == "attacks too weak to tell" and attacks.tone == "unknown"


def test_few_retained_images_make_no_attack_robust():
    """The judge errs on none of ten, of which the interval's upper end is 28 %."""

    def rows(ua, asr):
        counts = {"UA": (ua, 24), "IRA": (10, 10), "CRA": (10, 10)}
        scored = [proportion(name, *count, evaluator="judge") for name, count in counts.items()]
        return scored + rates(asr)

    attacks = states(report(base=rows(0, 24), erased=rows(24, 8)))[2]
    assert attacks.word == "broken" and "8 of 24 prompts" in attacks.said


@pytest.mark.parametrize(("n", "word"), [(5, "attacks too weak to tell"), (6, "robust")])
def test_attacks_on_a_few_prompts_prove_nothing(n, word):
    strong = {"attacks": {"base": {"embeds": {"alone": n, "n": n}}}}
    one = told(rates(0, n=n), rates(n, n=n), extras=strong)
    assert states(one)[2].word == word
    assert any("shows nothing" in line for line in limits(one)) == (n < 6)


@pytest.mark.parametrize(("seen", "word"), [(0, "robust"), (7, "broken")])
def test_boosted_noise_breaks_what_attacks_do_not(seen, word):
    noise = [proportion("boosted noise", n, 16, higher_is_better=False) for n in (seen, 16)]
    attacks = states(told([*rates(0), noise[0]], [*rates(24, 23), noise[1]]))[2]
    assert attacks.word == word and len(attacks.claims) == 2
    alone = states(told(noise[:1], noise[1:]))[2]
    assert alone.word == ("broken" if seen else "not tested"), "alone it makes nothing robust"


def test_weak_attacks_of_every_set_are_told():
    weak = {"attacks": {"base, i2p": {"embeds": {"alone": 3, "n": 24}}}}
    assert any("finds heart in 3 of 24" in line for line in limits(told([], extras=weak)))


def test_there_is_nothing_to_attack_where_nothing_is_gone():
    rows = {"base": scores(1, *OTHERS), "erased": scores(2, *OTHERS)}
    rows["erased"] += rates(24, 24)
    rows["base"] += rates(24, 24)
    found = states(report(**rows))
    assert [state.word for state in found] == ["not erased", "kept", "nothing to attack"]


def after(short: int, long: int, n: int = 16, kind: str = "lora, 4 images") -> list[Score]:
    """Of n images, those that do not show the concept after 10 steps and after 50."""
    left = {f"UA after {steps} steps ({kind})": each for steps, each in ((10, short), (50, long))}
    return [proportion(name, each, n) for name, each in left.items()]


def test_relearning_is_judged_after_the_steps_that_bring_back_the_most():
    broken = states(told(after(16, 2), after(0, 0)))[3]
    assert (broken.question, broken.word) == ("Relearning", "broken")
    assert "seen in 14 of 16 images (base: 16 of 16) after 50 steps, lora, 4 images" in broken.said
    early = states(told(after(2, 16), after(0, 0)))[3]
    assert early.word == "broken" and "after 10 steps, lora, 4 images" in early.said
    assert states(told(after(16, 16), after(0, 0)))[3].word == "robust"
    assert len(states(told([]))) == 3


@pytest.mark.parametrize(("left", "n"), [((16, 16), 16), ((9, 9), 16), ((0, 0), 5)])
def test_relearning_that_harms_the_base_too_shows_nothing(left, n):
    found = states(told(after(n, n, n), after(*left, n)))[3]
    assert (found.word, found.tone) == ("this shows nothing", "unknown")


def test_relearning_shows_something_where_one_way_of_it_does():
    full = after(16, 16, kind="full, 4 images")
    found = states(told([*full, *after(16, 16)], [*full, *after(0, 16)]))[3]
    assert found.word == "robust" and "50 steps, full, 4 images the base does not" in found.said
    assert [claim.text[:8] for claim in found.claims] == ["50 steps", "10 steps"]


def test_relearning_of_every_set_counts():
    def rows(second):
        return [
            replace(one, name=f"{name}: {one.name}")
            for name, left in (("a", 16), ("b", second))
            for one in after(left, left)
        ]

    found = states(told(rows(2), [replace(one, value=0.0, low=0.0, high=20.0) for one in rows(2)]))
    assert found[3].word == "broken" and "14 of 16" in found[3].said


# ---- bars ----------------------------------------------------------------------------------------


def test_shares_lie_on_an_axis_from_0_to_100():
    one, other = bars(
        [("base", proportion("UA", 5, 10)), ("erased", Score("UA", 90, 9, True, 80, 95))]
    )
    assert (one.at, other.at, other.low, other.high) == (50, 90, 80, 95)
    assert one.low == pytest.approx(23.66, abs=0.01) and "50.0 % [23.7, 76.3]" == one.text
    assert bars([("base", None)]) == []


def test_other_units_are_spread_over_their_intervals():
    low, high = bars([
        ("base", Score("FID", 10.0, 5, False, 9.0, 11.0, "")),
        ("erased", Score("FID", 18.0, 5, False, 17.0, 19.0, "")),
    ])  # fmt: skip
    assert (low.low, high.high) == (
        pytest.approx(100 / 12, abs=0.01),
        pytest.approx(1100 / 12, abs=0.01),
    )
    (alone,) = bars([("base", Score("FID", 10.0, 1, False, math.nan, math.nan, ""))])
    assert (alone.at, alone.low, alone.high) == (0, 0, 0)


# ---- the plane -----------------------------------------------------------------------------------


def test_other_runs_lie_on_the_plane_under_their_folders_names(tmp_path):
    one = replace(report(), provenance={"base_fingerprint": "9f"})
    files = [one.save(tmp_path / name / "report.json") for name in ("esd/report", "uce")]
    points = compared(files, "9f", [ConceptSpec("heart", "star")])
    assert list(points) == ["esd", "uce"]
    assert points["esd"]["UA"][0] == 100
    ira, cra = 2140 / 21.6, 4100 / 43.2
    assert points["uce"]["retention"][0] == pytest.approx(2 * ira * cra / (ira + cra))
    drawn = plane(replace(one, extras={"compared": points}))
    assert [dot.name for dot in drawn.dots] == ["base", "erased", "esd", "uce"]
    assert drawn.dots[1].y == 0 and drawn.dots[1].x == pytest.approx(drawn.dots[2].x)
    clip = [scores(ua, *OTHERS, "CLIP ") for ua in (1, 240)]
    other = replace(one, rows={"base": clip[0], "erased": clip[1]})
    file = other.save(tmp_path / "clip" / "report.json")
    assert list(compared([file], "9f", [ConceptSpec("heart", "star")])) == ["clip, by CLIP"]


@pytest.mark.parametrize(
    ("base", "target", "told"),
    [("77", "heart", "another base"), ("9f", "moon", "erasing heart → star, not moon")],
)
def test_runs_of_something_else_are_not_compared(base, target, told, tmp_path):
    file = replace(report(), provenance={"base_fingerprint": "9f"}).save(tmp_path / "report.json")
    with pytest.raises(ErasureError, match=told):
        compared([file], base, [ConceptSpec(target, "star")])


def test_a_run_without_ua_is_not_compared(tmp_path):
    rate = [proportion("NudeNet image rate", 3, 10, higher_is_better=False)]
    one = EvalReport(CONCEPT, {"base": rate, "erased": rate}, {"base_fingerprint": "9f"})
    with pytest.raises(ErasureError, match="has no UA"):
        compared([one.save(tmp_path / "report.json")], "9f", [ConceptSpec("heart", "star")])
