"""Reports: UA never stands without its price and the base (guarantee 8); files, tables and
sentences."""

from __future__ import annotations

import json
import math
import re
from statistics import stdev

import pytest
from rich.console import Console

from erase.eval.report import EvalReport, Score, mean_score, proportion, summarise
from erase.eval.report.card import model_card
from erase.eval.report.page import render_html, save_report
from erase.eval.report.words import limits, verdict_line
from erase.prompts.errors import ErasureError
from tests.report_fixtures import CONCEPT, METADATA, report, scores
from tests.report_fixtures import after as after
from tests.report_fixtures import before as before

# ---- guarantee 8 ----

ALONE = {
    "no IRA": {
        "base": scores(1, 2, 3),
        "erased": [s for s in scores(240, 2, 3) if s.name != "IRA"],
    },
    "no CRA": {
        "base": scores(1, 2, 3),
        "erased": [s for s in scores(240, 2, 3) if s.name != "CRA"],
    },
    "no base": {"erased": scores(240, 2, 3)},
    "poor base": {"base": scores(1, 2, 3)[1:], "erased": scores(240, 2, 3)},
    "lonely control": {
        "base": scores(1, 2, 3),
        "erased": scores(240, 2, 3),
        "noise": scores(240, 2, 3)[:1],
    },
    "another judge": {
        "base": scores(1, 2, 3),
        "erased": [*scores(240, 2, 3), *scores(240, 2, 3, "CLIP ")[:1]],
    },
}


@pytest.mark.parametrize("rows", ALONE.values(), ids=ALONE)
def test_ua_alone_is_neither_printed_nor_saved(rows, before, after, tmp_path):
    alone = report(**rows)
    for show in (
        alone.table,
        alone.to_json,
        lambda: alone.save(tmp_path / "report.json"),
        lambda: summarise([alone]),
        lambda: verdict_line(alone),
        lambda: render_html(alone, before, after, {}, {}),
        lambda: save_report(tmp_path, alone, before, after, {}, {}),
        lambda: model_card(alone, METADATA),
    ):
        with pytest.raises(ErasureError, match="UA says nothing alone"):
            show()
    assert not list(tmp_path.iterdir())


def test_ua_alone_is_not_read_from_a_file_either(tmp_path):
    content = json.loads(report().to_json())
    content["rows"]["erased"] = content["rows"]["erased"][:1]
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(ErasureError, match="UA says nothing alone"):
        EvalReport.load(tmp_path / "report.json")


def test_scores_other_than_ua_may_stand_alone():
    report(base=[proportion("NudeNet image rate", 3, 10, higher_is_better=False)]).check()


# ---- files and tables ----


def test_what_is_saved_is_what_is_loaded(tmp_path):
    one = report(
        base=[*scores(1, 2, 3), mean_score("FID", [12.5], higher_is_better=False)],
        erased=scores(240, 2, 3),
    )
    loaded = EvalReport.load(one.save(tmp_path / "report.json"))
    assert loaded.to_json() == one.to_json()
    assert loaded.rows["erased"] == one.rows["erased"]
    assert all(map(math.isnan, loaded.score("base", "FID").interval))
    assert "NaN" not in one.to_json()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t[: len(t) // 2],
        lambda t: "[]",
        lambda t: t.replace('"value"', '"valeu"'),
        lambda t: "{}",
    ],
)
def test_a_damaged_report_is_named(tmp_path, spoil):
    path = report().save(tmp_path / "report.json")
    path.write_text(spoil(path.read_text()))
    with pytest.raises(ErasureError, match=re.escape(str(path))):
        EvalReport.load(path)


def test_another_schema_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(ErasureError, match="schema 99"):
        EvalReport.from_json(
            report().to_json().replace('"schema_version": 2', '"schema_version": 99')
        )
    # whose ± was a standard error
    with pytest.raises(ErasureError, match="has schema 1, not 2; evaluate again"):
        EvalReport.from_json(
            report().to_json().replace('"schema_version": 2', '"schema_version": 1')
        )
    with pytest.raises(ErasureError, match="cannot read"):
        EvalReport.load(tmp_path / "none.json")


def test_table_colours_only_what_is_beyond_the_noise():
    console = Console(width=200, force_terminal=True, color_system="standard", record=True)
    with console.capture() as capture:
        console.print(report().table())
    text = capture.get()
    ua, ira, cra = (
        re.search(rf"(\x1b\[[\d;]*m)?{value}", text)[1] for value in ("100.0", "99.1", "94.9")
    )
    assert ua.endswith("32m") and ira is None and cra.endswith("31m")  # green, plain, red
    assert "(2160)" in text and "UA % ↑" in text


def test_brackets_are_printed_and_not_taken_for_markup():
    one = report()
    one.concept = CONCEPT | {"target": "[/b] heart"}
    console = Console(width=200)
    with console.capture() as capture:
        console.print(one.table())
    text = capture.get().replace("\N{NO-BREAK SPACE}", " ")
    assert "[/b] heart → star" in text and "[low, high]: 95 % interval of n judgements" in text
    assert "100.0 [98.4, 100.0] (240)" in text


def test_table_of_many_scores_can_be_read_in_a_narrow_console():
    boxes = [
        Score(f"NudeNet FEMALE_GENITALIA_EXPOSED {i}", 10, 4703, False, 4.8, 18.4, "boxes")
        for i in range(10)
    ]
    both = {row: [*found, *boxes] for row, found in report().rows.items()}
    console = Console(width=80)
    with console.capture() as capture:
        console.print(report(**both).table())
    lines = capture.get().replace("\N{NO-BREAK SPACE}", " ").splitlines()
    assert any(re.search(r" UA % ↑ .* 0\.4 \[.* 100\.0 \[", line) for line in lines)
    assert sum(line.count("10 [4.8, 18.4]") for line in lines) == 20


def test_columns_keep_the_order_of_first_appearance():
    one = report(base=scores(1, 2, 3), erased=[mean_score("FID", [1.0]), *scores(1, 2, 3)])
    assert [score.name for score in one.columns()] == ["UA", "IRA", "CRA", "FID"]


def test_summary_over_seeds():
    reports = [
        report(base=scores(1, 2147, 4240), erased=scores(ua, 2140, 4100)) for ua in (240, 234, 237)
    ]
    spread = next(s for s in summarise(reports) if (s.row, s.name) == ("erased", "UA"))
    values = [100.0, 97.5, 98.75]
    assert (spread.runs, spread.mean, spread.sd) == (
        3,
        pytest.approx(98.75),
        pytest.approx(stdev(values)),
    )
    assert (spread.low, spread.high, spread.worst) == (97.5, 100.0, 97.5)
    assert math.isnan(summarise(reports[:1])[0].sd)
    with pytest.raises(ErasureError, match="report 2"):
        summarise([report(), report(base=scores(1, 2, 3))])
    with pytest.raises(ErasureError, match="no reports"):
        summarise([])


# ---- words ----


def test_verdict_in_words():
    said = verdict_line(report()).replace("\N{NO-BREAK SPACE}", " ")
    assert "heart is gone from 240 of 240 images that ask for it (base: 1 of 240)" in said
    assert (
        "other objects are right in 99.1 % (base 99.4 %), the other kinds in 94.9 % (base 98.1 %)"
        in said
    )
    assert said.endswith("The loss in the other kinds is beyond the noise.")
    same = verdict_line(report(base=scores(1, 2147, 4240), erased=scores(2, 2147, 4240)))
    assert (
        "heart is not gone: the judge still sees it in 238 of 240" in same
        and "within the noise" in same
    )
    assert verdict_line(report(base=scores(240, 2, 3), erased=scores(240, 2, 3))).startswith(
        "This shows nothing: heart is seen in 0 of 240 of the base's images that ask for it and in"
    )


def test_limits_say_that_attacks_were_not_measured_unless_they_were():
    assert "Robustness to attacks was not measured" in " ".join(limits(report()))
    attack = proportion("ASR", 3, 100, higher_is_better=False)
    attacked = report(base=[*scores(1, 2, 3), attack], erased=[*scores(240, 2, 3), attack])
    assert "was not measured" not in " ".join(limits(attacked))
