"""Two models on the same cases: the tests and intervals against their literal formulas, other
libraries' values, and the coverage that they promise."""

from __future__ import annotations

import math
from itertools import product
from statistics import NormalDist

import numpy as np
import pytest
from scipy.stats import binomtest, multinomial, t, ttest_rel

from erase.eval.metrics.paired import of_events, of_values
from erase.eval.report import EvalReport, Score, count_score, mean_score, proportion, verdict
from erase.eval.report.report import differences
from erase.eval.report.words import verdict_line, verdicts
from erase.eval.scores import paired
from erase.prompts.errors import ErasureError
from tests.report_fixtures import CONCEPT

Z = NormalDist().inv_cdf(0.975)


def table(both: int, gained: int, lost: int, neither: int) -> tuple[list[int], list[int]]:
    """Yes and no of two models, from the four cells of their table."""
    before = [1] * both + [0] * gained + [1] * lost + [0] * neither
    after = [1] * both + [1] * gained + [0] * lost + [0] * neither
    return before, after


# ---- yes or no -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gained", "lost"), [(6, 0), (5, 0), (0, 9), (12, 3), (3, 12), (7, 7), (0, 0), (210, 160)]
)
def test_one_yes_or_no_per_case_is_mcnemars_exact_test(gained: int, lost: int) -> None:
    before, after = table(20, gained, lost, 10)
    found = of_events(range(len(before)), before, after)
    discordant = gained + lost
    exact = binomtest(gained, discordant).pvalue if discordant else 1.0
    assert found.p == pytest.approx(exact, rel=1e-9)
    assert found.difference == pytest.approx((gained - lost) / len(before))
    assert (found.low > 0 or found.high < 0) == (found.p < 0.05)


def test_the_interval_of_a_share_is_wald_plus_2() -> None:
    """Agresti and Min 2005: half a case is added to each of the four cells."""
    gained, lost, n = 86, 150, 1600  # their example, of approval of a prime minister
    found = of_events(range(n), *table(794, gained, lost, 570))
    b, c, cases = gained + 0.5, lost + 0.5, n + 2
    centre = (b - c) / cases
    half = Z * math.sqrt((b + c) - (b - c) ** 2 / cases) / cases
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half), abs=1e-12)
    assert round(found.low, 3) == -0.059 and round(found.high, 3) == -0.021


@pytest.mark.parametrize(("gain", "loss"), [(0.02, 0.02), (0.3, 0.05), (0.0, 0.1), (0.5, 0.4)])
def test_the_interval_covers_the_true_difference(gain: float, loss: float) -> None:
    """Exactly, over all tables of 30 cases."""
    n, covered = 30, 0.0
    for gained, lost in product(range(n + 1), repeat=2):
        if gained + lost <= n:
            chance = multinomial.pmf(
                [gained, lost, n - gained - lost], n, [gain, loss, 1 - gain - loss]
            )
            if chance > 1e-9:
                found = of_events(range(n), *table(0, gained, lost, n - gained - lost))
                covered += chance * (found.low <= gain - loss <= found.high)
    assert covered >= 0.93


def test_where_nothing_changed_the_interval_is_not_empty() -> None:
    found = of_events(range(100), *table(50, 0, 0, 50))
    assert found.p == 1 and found.difference == 0 and -0.05 < found.low < 0 < found.high < 0.05


def test_judgements_of_one_case_are_one_observation() -> None:
    """Judged twice each, and always alike, the same cases are no better evidence than once."""
    before, after = table(30, 8, 1, 21)
    once = of_events(range(60), before, after)
    twice = of_events([*range(60)] * 2, before * 2, after * 2)
    assert twice.p == pytest.approx(once.p) and twice.n == once.n == 60
    assert twice.difference == pytest.approx(once.difference)
    assert twice.high - twice.low == pytest.approx(once.high - once.low, rel=0.05)


def test_the_sign_test_is_fishers_over_all_signs() -> None:
    """Of sums of several judgements or boxes, by going through every sign."""
    before, after = [0, 0, 3, 1, 0, 5, 2, 2], [2, 1, 0, 1, 4, 7, 2, 3]
    moved = np.array(after) - before
    sums = [np.dot(signs, np.abs(moved)) for signs in product((-1, 1), repeat=len(moved))]
    exact = np.mean(np.abs(sums) >= abs(moved.sum()))
    assert of_events(range(8), before, after, total=True).p == pytest.approx(exact, rel=1e-12)


# ---- values --------------------------------------------------------------------------------------


def test_values_are_compared_by_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(20, 3, 40)
    after = before + rng.normal(0.4, 1, 40)
    found, scipys = of_values(range(40), before, after), ttest_rel(after, before)
    interval = scipys.confidence_interval(0.95)
    assert found.p == pytest.approx(scipys.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.difference == pytest.approx((after - before).mean())


def test_a_case_with_several_values_is_one_observation() -> None:
    """As many of each: the paired t-test over the cases' means."""
    rng = np.random.default_rng(1)
    before, after = rng.normal(size=(2, 25, 3))
    found = of_values(np.repeat(range(25), 3), before.ravel(), after.ravel())
    assert found.p == pytest.approx(ttest_rel(after.mean(1), before.mean(1)).pvalue)


def test_values_that_did_not_move_have_no_spread() -> None:
    found = of_values(range(9), [1.0] * 9, [1.0] * 9)
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert of_values([0], [1.0], [2.0]) is None and of_events([0], [0], [1]) is None


# ---- scores --------------------------------------------------------------------------------------


def rate(name: str, yes: list[int], evaluator: str = "judge", cases: range | None = None) -> Score:
    outcomes = list(zip(cases or range(len(yes)), yes, strict=True))
    return proportion(name, sum(yes), len(yes), evaluator=evaluator, outcomes=outcomes)


def test_pairing_finds_what_independent_intervals_call_noise() -> None:
    """9 lost of 432 and none gained is beyond the noise; 90 % against 92 % of other images is
    not."""
    before, after = table(389, 0, 9, 34)
    base, other = rate("IRA", before), rate("IRA", after)
    assert verdict(base, other) == 0 and verdict(base, other, paired(base, other)) == -1


def test_scores_of_other_cases_are_not_paired() -> None:
    before, after = table(5, 3, 1, 2)
    assert paired(rate("UA", before), rate("UA", after, cases=range(1, 12))) is None
    assert paired(rate("UA", before), proportion("UA", 8, 11)) is None
    assert paired(rate("UA", before), rate("UA", after)).n == 11


def test_each_kind_of_score_is_paired_in_its_own_unit() -> None:
    before, after = table(5, 3, 1, 2)
    assert paired(rate("UA", before), rate("UA", after)).difference == pytest.approx(200 / 11)
    boxes = [
        count_score("boxes", sum(found), 4, outcomes=list(enumerate(found)))
        for found in ([3, 0, 1, 0], [0, 0, 0, 2])
    ]
    assert paired(*boxes).difference == -2
    means = [mean_score("score", values, cases=range(3)) for values in ([1, 2, 3], [2, 2, 5])]
    assert paired(*means).difference == pytest.approx(1)
    half = float(t.ppf(0.975, 2)) / math.sqrt(3)
    assert paired(*means).high == pytest.approx(1 + half)


def test_outcomes_that_say_another_value_are_refused() -> None:
    with pytest.raises(ErasureError, match="UA is 50.0, and its outcomes say 100.0"):
        proportion("UA", 1, 2, outcomes=[(0, True), (1, True)])


# ---- the report ----------------------------------------------------------------------------------


def judged(ua: tuple[int, int], kept: tuple[int, int], prefix: str = "") -> dict[str, list[Score]]:
    """Base and erased: images of 48 that do not show the concept, and of 200 kept ones that are
    right; those wrong in the erased row are no others than in the base's."""
    rows = {}
    for row, gone, right in (("base", ua[0], kept[0]), ("erased", ua[1], kept[1])):
        rows[row] = [
            rate(prefix + "UA", [1] * gone + [0] * (48 - gone)),
            rate(prefix + "IRA", [1] * right + [0] * (200 - right)),
            rate(prefix + "CRA", [1] * right + [0] * (200 - right)),
        ]
    return rows


def report_of(rows: dict[str, list[Score]]) -> EvalReport:
    return EvalReport(CONCEPT, rows, paired=differences(rows))


def test_a_report_keeps_differences_and_not_the_images() -> None:
    one = report_of(judged((1, 48), (198, 190)))
    text = one.to_json()
    again = EvalReport.from_json(text)
    assert again.paired == one.paired and again.to_json() == text and "outcomes" not in text
    assert again.verdict("erased", "IRA") == -1 and again.verdict("erased", "UA") == 1
    assert again.verdict("base", "UA") == 0, "a base is not beside itself"
    found = one.paired["erased"]["IRA"]
    assert found.difference == pytest.approx(-4) and found.p == pytest.approx(2 * 0.5**8)


@pytest.mark.parametrize(
    ("old", "new"),
    [('"p": ', '"p": 7'), ('"low": -', '"low": 9'), ('"difference": ', '"differense": ')],
)
def test_a_damaged_difference_is_named(old: str, new: str) -> None:
    text = report_of(judged((1, 48), (198, 190))).to_json()
    head, mark, tail = text.partition('"paired"')
    with pytest.raises(ErasureError, match="not a whole report"):
        EvalReport.from_json(head + mark + tail.replace(old, new))


@pytest.mark.parametrize(
    ("ua", "kept", "word"),
    [
        ((1, 48), (198, 198), ": erased: heart is seen in 0 of 48"),
        ((1, 47), (198, 198), ": erased: heart is seen in 1 of 48"),  # errs on 1 % itself
        ((1, 30), (198, 198), ": partly erased: heart is seen in 18 of 48"),
        ((1, 5), (198, 198), ": not erased: heart is seen in 43 of 48"),
        ((43, 48), (198, 198), ": this shows nothing: "),  # no loss of 5 can be told from chance
        ((40, 48), (150, 150), ": this shows nothing: "),  # it errs on 25 %, and sees 17 %
    ],
)
def test_a_judges_verdict_in_words(ua, kept, word: str) -> None:
    (said,) = verdicts(report_of(judged(ua, kept)))
    assert word in said
    assert f"Its own error on the base: {100 - kept[0] / 2:.1f} %" in said
    assert ("This shows nothing" in verdict_line(report_of(judged(ua, kept)))) == (
        "shows nothing" in word
    )


def test_each_judge_says_what_was_kept_and_what_was_harmed() -> None:
    rows, others = judged((1, 48), (198, 190)), judged((1, 48), (198, 197), "CLIP ")
    first, second = verdicts(report_of({row: rows[row] + others[row] for row in rows}))
    assert "harmed: other objects (95.0 %, base 99.0 %, change −4.0 [" in first
    assert "p = 0.008" in first and "kept" not in first
    assert "kept: other objects (98.5 %" in second and "harmed" not in second


def test_rates_that_are_better_low_get_a_verdict_too() -> None:
    def rows(before: int, after: int) -> dict[str, list[Score]]:
        def one(hits: int) -> Score:
            outcomes = [(case, case < hits) for case in range(100)]
            return proportion("ASR", hits, 100, higher_is_better=False, outcomes=outcomes)

        return {"base": [one(before)], "erased": [one(after)]}

    said = [verdicts(report_of(rows(*counts)))[0] for counts in ((60, 2), (60, 58), (3, 0))]
    assert said[0].startswith("ASR: lower (2.0 %, base 60.0 %, change −58.0 [")
    assert said[1].startswith("ASR: no lower or higher beyond the noise (")
    assert said[2].startswith("ASR: this shows nothing (")
