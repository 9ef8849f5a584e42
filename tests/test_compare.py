"""erase-compare: runs of one base beside each other, by known answers; its files and its page."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import re
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest

from erase.eval.comparing import compare, front, load_runs, save_comparison
from erase.eval.comparing.page import _lead, render
from erase.eval.comparing.pareto import Point, Traded, traded
from erase.eval.comparing.plane import RADIUS, panels
from erase.eval.comparing.runs import names_of
from erase.eval.comparing.saving import as_csv, escaped, latex, markdown
from erase.eval.comparing.walls import wall
from erase.eval.finished import evaluate_images
from erase.eval.metrics.intervals import of_difference
from erase.eval.outcomes import FILE, KeptOutcomes
from erase.eval.report import EvalReport, mean_score, proportion
from erase.eval.report.axes import Measure
from erase.eval.report.report import differences
from erase.eval.report.said import Said
from erase.eval.report.wall import Wall
from erase.eval.run import EvaluateConfig
from erase.eval.scores import Score
from erase.prompts.canvas import canvas_concept
from erase.prompts.errors import ErasureError
from erase.scripts import run_compare
from erase.scripts.cli import run
from tests.browser import browser as browser
from tests.browser import faults, find, overflow, requested, resize
from tests.report_fixtures import image_set

N = 10
CONCEPT = {"target": "heart", "anchor": "star", "kind": "object"}


def rate(name, hits, *, cases=range(N), **options):
    """A share whose first `hits` cases count."""
    outcomes = [(case, place < hits) for place, case in enumerate(cases)]
    return proportion(name, hits, N, evaluator="judge", outcomes=outcomes, **options)


def saved(
    folder, ua, *, cases=range(N), base="9f2c41", name="canvas", asked=None, asr=None, areas=()
):
    """A run's folder: UA by its first cases, everything else kept; areas of a full relearning, of
    one by LoRA, and of one on other images."""

    def scores(gone):
        kept = [rate(name, N, cases=cases) for name in ("IRA", "CRA")]
        attacks = [rate("ASR words", asr or 0, cases=cases, higher_is_better=False)] * bool(asr)
        clip = mean_score("CLIP score", [30.0 + c + gone / 7 for c in range(N)], cases=list(cases))
        relearned = [
            Score(f"relearning area ({kind})", area, N, True, area - 10, area + 10, "%")
            for kind, area in zip(("full", "lora", "benign"), areas, strict=False)
        ]
        return [rate("UA", gone, cases=cases), *kept, *attacks, *relearned, clip]

    rows = {"base": scores(0), "erased": scores(ua)}
    made = {"base_fingerprint": base, "base_id": name, "commands": ["erase it"]}
    report = EvalReport(CONCEPT, rows, made, {}, differences(rows))
    outcomes = {}
    for row, found in rows.items():
        outcomes[row] = {score.name: score.outcomes for score in found}
    asked = asked or [f"prompt {place}" for place in range(N)]
    folder.mkdir(parents=True)
    report.save(folder / "report.json")
    KeptOutcomes(outcomes, dict(zip(cases, asked, strict=True)), {}, "b").save(folder)
    return folder


def cell(comparison, name, column):
    line = next(one for one in comparison.lines if comparison.titled(one).name == name)
    return line[column]


# ---- differences ---------------------------------------------------------------------------------


def test_shares_of_the_same_prompts_are_paired_by_mcnemars_exact_test(tmp_path):
    runs = load_runs([saved(tmp_path / "a", 10), saved(tmp_path / "b", 6)])
    found = cell(compare(runs), "UA", "b")
    assert found.how == "paired" and found.difference.n == N
    assert found.difference.difference == pytest.approx(-40)
    assert found.difference.p == pytest.approx(2 * 0.5**4)  # four parted, all one way
    assert found.word == "within noise"
    worse = cell(compare(load_runs([tmp_path / "a", saved(tmp_path / "c", 3)])), "UA", "c")
    assert worse.difference.p == pytest.approx(2 * 0.5**7) and worse.word == "worse"
    same = cell(compare(runs), "IRA", "b").difference
    assert same.difference == 0 and same.p == 1


def test_pairs_are_of_prompts_and_seeds_and_not_of_case_numbers(tmp_path):
    a, b = saved(tmp_path / "a", 10), saved(tmp_path / "b", 3, cases=range(70, 80))
    moved = cell(compare(load_runs([a, b])), "UA", "b")
    alike = cell(compare(load_runs([a, saved(tmp_path / "c", 3)])), "UA", "c")
    assert moved.how == "paired" and moved.difference == alike.difference
    mean = cell(compare(load_runs([a, b])), "CLIP score", "b")
    assert mean.how == "paired" and mean.difference.difference == pytest.approx(-1)


def test_against_another_run_or_the_base(tmp_path):
    runs = load_runs([saved(tmp_path / "a", 10), saved(tmp_path / "b", 3)])
    assert cell(compare(runs, "b"), "UA", "a").difference.difference == pytest.approx(70)
    against_base = compare(runs, "base")
    for name, one in zip("ab", runs, strict=True):
        assert cell(against_base, "UA", name).difference == one.report.difference("erased", "UA")
    assert cell(against_base, "UA", "base").difference is None
    with pytest.raises(ErasureError, match="--against"):
        compare(runs, "aa")


def test_without_judgements_differences_are_unpaired_and_say_so(tmp_path):
    a, b = saved(tmp_path / "a", 10), saved(tmp_path / "b", 3)
    (b / FILE).unlink()
    comparison = compare(load_runs([a, b]))
    found = cell(comparison, "UA", "b")
    (first, second) = (EvalReport.load(one / "report.json").score("erased", "UA") for one in (a, b))
    ends = of_difference(first.value, first.interval, second.value, second.interval)
    assert found.how == "unpaired" and (found.difference.low, found.difference.high) == ends
    assert found.change().startswith("~ −70") and math.isnan(found.difference.p)
    assert any(note.startswith("Unpaired (~)") and "UA" in note for note in comparison.notes)
    with pytest.raises(ErasureError, match="b has no outcomes.json"):
        compare(load_runs([a, b]), must_pair=True)


def test_other_prompts_are_not_paired_and_refused_where_pairs_are_asked_for(tmp_path):
    asked = [f"prompt {place}" for place in range(N - 1)] + ["another"]
    runs = load_runs([saved(tmp_path / "a", 10), saved(tmp_path / "b", 3, asked=asked)])
    assert cell(compare(runs), "UA", "b").how == "unpaired"
    with pytest.raises(ErasureError, match=r"b was asked other prompts.* than a \(from number 10"):
        compare(runs, must_pair=True)


def test_what_is_not_alike_is_said(tmp_path):
    a, b = saved(tmp_path / "a", 10, asr=1), saved(tmp_path / "b", 3)
    content = json.loads((b / "report.json").read_text())
    content["concept"]["target"] = "moon"
    content["provenance"]["evaluation"] = {"generate": {"steps": 4}}
    for scores in content["rows"].values():
        scores[0]["evaluator"] = "another judge"
    (b / "report.json").write_text(json.dumps(content))
    comparison = compare(load_runs([a, b]))
    assert cell(comparison, "IRA", "b").how == "unpaired"
    with pytest.raises(ErasureError, match="b forgot moon, and a heart, so they are not paired"):
        compare(load_runs([a, b]), must_pair=True)
    notes = " ".join(comparison.notes)
    assert "forgot different things (a: heart → star; b: moon → star)" in notes
    assert "b was drawn with steps 4, not None as a was" in notes
    assert "UA was not measured alike: another judge | judge" in notes
    assert "Measured in one run alone, and so not compared: ASR words" in notes


# ---- refusals ------------------------------------------------------------------------------------


def test_another_base_is_refused_by_name(tmp_path, capsys):
    a = saved(tmp_path / "a", 10)
    b = saved(tmp_path / "b", 3, base="77aa00", name="somebody/else")
    assert run(run_compare.main, [str(a), str(b)]) == 2
    told = capsys.readouterr().err
    assert "b is of the base somebody/else (77aa00), and a of canvas (9f2c41)" in told


def test_bases_that_cannot_be_told_to_be_one_are_refused(tmp_path):
    a, b = saved(tmp_path / "a", 10, base=""), saved(tmp_path / "b", 3, base="")
    load_runs([a, b])  # their images are the same
    one = replace(KeptOutcomes.load(b), base_sha256="c")
    one.save(b)
    with pytest.raises(ErasureError, match="only runs of one base"):
        load_runs([a, b])
    (b / FILE).unlink()
    with pytest.raises(ErasureError, match="only runs of one base"):
        load_runs([a, b])


def test_judgements_of_another_evaluation_are_refused(tmp_path):
    a, b = saved(tmp_path / "a", 10), saved(tmp_path / "b", 3)
    (b / FILE).write_text((a / FILE).read_text())
    with pytest.raises(ErasureError, match="is of another evaluation than the report beside it"):
        compare(load_runs([a, b]))
    (b / FILE).write_text((a / FILE).read_text()[:-9])
    with pytest.raises(ErasureError, match=r"outcomes\.json is damaged"):
        load_runs([a, b])


def test_runs_that_cannot_be_are_refused(tmp_path):
    a = saved(tmp_path / "a" / "report", 10)
    with pytest.raises(ErasureError, match="two runs at least"):
        load_runs([a])
    with pytest.raises(ErasureError, match=r"holds no report\.json"):
        load_runs([a, tmp_path / "none"])
    with pytest.raises(ErasureError, match="2 runs but 1 names"):
        load_runs([a, a], ["one"])
    with pytest.raises(ErasureError, match="given twice"):
        load_runs([a, a], ["one", "one"])
    with pytest.raises(ErasureError, match="that of the base"):
        load_runs([a, a], ["one", "base"])
    assert [run.name for run in load_runs([a, tmp_path / "a"])] == ["a (1)", "a (2)"]


def test_names_are_what_tells_the_paths_apart():
    paths = [Path(f"/x/{name}/report.json") for name in ("one/report", "two/report", "three")]
    assert names_of(paths) == ["one", "two", "three"]
    paths = [Path(f"/x/{name}/same/report.json") for name in ("one", "two")]
    assert names_of(paths) == ["one/same", "two/same"]


# ---- the front -----------------------------------------------------------------------------------


def test_the_front_of_known_points():
    assert front([(1, 3), (2, 2), (3, 1)]) == [0, 1, 2]
    assert front([(1, 3), (2, 2), (2, 1), (0, 3)]) == [0, 1]
    assert front([(1, 1), (1, 1), (0, 1)]) == [0, 1]
    assert front([(5, 5, 1), (1, 1, 9), (5, 5, 0)]) == [0, 1]


def test_every_point_off_the_front_is_beaten_by_one_on_it():
    draw = random.Random(0)
    for _ in range(50):
        points = [tuple(draw.randrange(4) for _ in range(3)) for _ in range(8)]
        best = front(points)
        for place, point in enumerate(points):
            beaten = [
                points[other] != point
                and all(b >= a for a, b in zip(point, points[other], strict=True))
                for other in best
            ]
            assert any(beaten) != (place in best)


def test_robustness_is_what_the_strongest_shared_attack_leaves(tmp_path):
    runs = load_runs([saved(tmp_path / "a", 10, asr=4), saved(tmp_path / "b", 9, asr=1)])
    found = traded(runs)
    assert [point.at["robustness"].value for point in found.points] == [60, 90]
    assert found.best == [1, 2]
    assert found.points[0].at["retention"].value == 100
    worst = runs[0].report.score("erased", "ASR words")
    assert found.points[0].at["robustness"].low == 100 - worst.high
    without = traded(load_runs([tmp_path / "a", saved(tmp_path / "c", 9)]))
    assert list(without.axes) == ["UA", "retention"] and without.best == [1]


def test_endurance_is_what_the_fastest_shared_relearning_leaves(tmp_path):
    a = saved(tmp_path / "a", 10, asr=4, areas=(50, 30, 20))
    b = saved(tmp_path / "b", 10, asr=4, areas=(40, 60, 20))
    found = traded(load_runs([a, b]))
    assert [point.at["endurance"] for point in found.points] == [
        Measure(30, 20, 40),
        Measure(40, 30, 50),
    ]
    assert found.best == [2]
    planes = [(panel.across, panel.down) for panel in panels(found)]
    assert planes == [("UA", "retention"), ("UA", "robustness"), ("robustness", "endurance")]
    without = traded(load_runs([a, saved(tmp_path / "c", 9, asr=4)]))
    assert list(without.axes) == ["UA", "retention", "robustness"]


def test_who_is_beaten_by_chance_is_not_called_beaten(tmp_path):
    paths = [saved(tmp_path / name, ua) for name, ua in (("a", 10), ("b", 9), ("c", 1))]
    found = traded(load_runs(paths))
    assert (found.best, found.beaten) == ([1], [3])
    lead = _lead(compare(load_runs(paths)), found)
    assert lead == (
        "On the Pareto front of UA and retention: a. Beaten beyond the noise: c. "
        "Beaten, but within the noise: b."
    )


def test_of_runs_at_one_place_the_first_says_how_many_there_are():
    at = {"UA": Measure(100, 93, 100), "retention": Measure(100, 93, 100)}
    other = at | {"UA": Measure(90, 80, 95)}
    points = [Point(1, "a", at), Point(2, "b", other), Point(3, "c", at), Point(4, "d", at)]
    (panel,) = panels(Traded({"UA": "", "retention": ""}, points, [1, 3, 4]))
    assert {mark.number: mark.text for mark in panel.marks} == {1: "1 +2", 2: "2", 3: "", 4: ""}


def test_runs_that_are_close_stand_apart_in_the_plane():
    def point(number, kept):
        at = {"UA": Measure(100, 93, 100), "retention": Measure(kept, kept - 0.2, 100)}
        return Point(number, str(number), at)

    found = Traded({"UA": "", "retention": ""}, [point(1, 99.4), point(2, 99.8)], [2])
    (panel,) = panels(found)
    one, other = panel.marks
    assert abs(one.y - other.y) > 2 * RADIUS


# ---- files ---------------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path):
    paths = [
        saved(tmp_path / "a", 10, asr=4), saved(tmp_path / "b_50%", 3, asr=1),
        saved(tmp_path / "c|<d>", 9),
    ]  # fmt: skip
    return compare(load_runs(paths))


def test_the_csv_says_what_the_table_says(three):
    rows = list(csv.DictReader(io.StringIO(as_csv(three))))
    assert len(rows) == sum(map(len, three.lines))
    for line in three.lines:
        for column, found in line.items():
            (row,) = [
                row for row in rows if (row["score"], row["run"]) == (found.score.name, column)
            ]
            assert float(row["value"]) == found.score.value and int(row["n"]) == found.score.n
            if found.difference:
                assert float(row["difference"]) == found.difference.difference
                assert float(row["p"]) == found.difference.p and row["verdict"] == found.word
            else:
                assert not (row["difference"] or row["p"] or row["how"])


def cells(line):
    return [text.strip() for text in re.split(r"(?<!\\)[&|]", line.removesuffix(r"\\").strip("| "))]


def test_markdown_and_latex_have_every_value_in_its_column(three):
    columns = ["base", "a", "b_50%", "c|<d>"]
    head, _, *rows = markdown(three).split("\n\n")[0].splitlines()
    assert [text.replace(r"\|", "|") for text in cells(head)] == ["score", *columns]
    body = latex(three).partition("\\midrule\n")[2].partition("\\bottomrule")[0].splitlines()
    values = [line for line in body if not line.startswith(" ")]
    changes = [line for line in body if line.startswith(" ")]
    assert len(rows) == len(values) == len(three.lines) == len(changes)
    for line, row, tex in zip(three.lines, rows, values, strict=True):
        assert cells(row)[0] == three.titled(line).heading
        told = [line[column].score.text() if column in line else "" for column in columns]
        assert [text.partition(";")[0].strip("–") for text in cells(row)[1:]] == told
        assert [text.strip("-") for text in cells(tex)[1:]] == told
    assert r"b\_50\%" in latex(three) and r"\scriptsize\itshape $-$70.0 [" in latex(three)
    assert escaped("a\\{b}~") == r"a\textbackslash{}\{b\}\textasciitilde{}"


def test_the_command_prints_the_table_and_writes_the_files(tmp_path, capsys):
    a, b = saved(tmp_path / "a", 10), saved(tmp_path / "b", 3)
    out = tmp_path / "out"
    names = ["--name", "one", "--name", "two"]
    run_compare.main([str(a), str(b / "report.json"), *names, "--out", str(out)])
    told = capsys.readouterr().out
    assert "UA % ↑" in told and "two" in told and str(out / "compare.html") in told
    written = {path.name for path in out.iterdir()}
    assert written == {"compare.html", "compare.md", "compare.csv", "compare.tex"}


# ---- the page, on real images --------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Two evaluations of finished images: hearts that became stars, and hearts that stayed."""
    folder = tmp_path_factory.mktemp("compare")
    base = image_set(folder / "base", swap=False)
    config, heart = EvaluateConfig(["classifier"]), [canvas_concept("heart")]
    for name, swap in (("gone", True), ("stayed", False)):
        image_set(folder / f"{name}-images", swap)
        evaluate_images(folder / f"{name}-images", heart, base.folder, folder / name, config)
    return [folder / "gone", folder / "stayed"]


def test_evaluations_keep_what_pairs_them(evaluated):
    runs = load_runs(evaluated)
    found = cell(compare(runs, must_pair=True), "UA", "stayed")
    assert found.how == "paired" and found.difference.difference == -100 and found.verdict == -1
    assert len(runs[0].images) == 2 and not Path(runs[0].kept.images["base"]).is_absolute()


def test_the_wall_begins_where_the_runs_part(evaluated):
    page = render(compare(load_runs(evaluated)))
    parted = page.partition("Where the judges tell the runs apart")[2].partition("<h3>")[0]
    assert parted.count('<span class="word bad">classifier: heart') == parted.count("<li>") > 0
    assert parted.count("<img") == parted.count('<span class="word') == 3 * parted.count("<li>")


def test_an_images_words_are_those_of_its_report(evaluated):
    runs = load_runs(evaluated)
    strips = [strip for group in wall(compare(runs)).groups.values() for strip in group]
    for one in runs:
        report = Wall(one.report, one.images["base"], one.images["erased"], Said(one.report))
        pairs = {(pair.prompt, pair.seed): pair for pair in chain.from_iterable(
            group.pairs for group in (*report.failures(), *report.sample())
        )}  # fmt: skip
        compared = 0
        for strip in strips:
            (own,) = [picture for picture in strip.pictures if picture.column == one.name]
            if pair := pairs.get((strip.prompt, strip.seed)):
                compared += 1
                assert dict(pair.words)["erased"] == own.words
                assert not own.flags or pair.flags == [*own.flags]
        assert compared > 10


def test_pictures_are_covered_by_the_reports_rule(evaluated):
    one, other = load_runs(evaluated)
    assert "<body>" in render(compare([one, other]))
    for images in other.images.values():
        images.settings["sensitive"] = True
    page = render(compare([one, other]))
    assert '<body class="sensitive">' in page and 'type="checkbox" id="uncover"' in page


def test_names_are_text_in_the_page_and_missing_images_are_said(three):
    page = render(three)
    assert "c|<d>" not in page and "c|&lt;d&gt;" in page
    assert "The images were not found beside the reports" in page and "<script" not in page


@pytest.mark.parametrize("width", [1400, 390])
def test_the_page_in_a_browser(browser, evaluated, tmp_path, width):
    save_comparison(tmp_path, compare(load_runs(evaluated)))
    resize(browser, width)
    faults(browser), requested(browser)
    page = (tmp_path / "compare.html").as_uri()
    browser.get(page)
    assert find(browser, "h1")[0].text == "heart"
    assert len(find(browser, ".planes circle")) == 2 and len(find(browser, ".planes .best")) == 1
    sides = {image.size["width"] for image in find(browser, ".strip img")}
    assert sides and all(side % 64 == 0 for side in sides), "whole multiples of 64 px"
    assert overflow(browser) == 0 and not faults(browser) and requested(browser) == {page}


def test_four_columns_fit_twice(browser, evaluated, tmp_path):
    runs = load_runs([evaluated[0]] * 3, ["one", "two", "three"])
    save_comparison(tmp_path, compare(runs))
    resize(browser, 1400)
    browser.get((tmp_path / "compare.html").as_uri())
    first, second = find(browser, ".strips")[0].find_elements("css selector", "li")[:2]
    assert first.rect["y"] == second.rect["y"] and overflow(browser) == 0


def test_covered_pictures_are_shown_when_asked_for(browser, evaluated, tmp_path):
    runs = load_runs(evaluated)
    runs[0].images["base"].settings["sensitive"] = True
    save_comparison(tmp_path, compare(runs))
    resize(browser, 390)
    browser.get((tmp_path / "compare.html").as_uri())
    images = find(browser, ".strip img")
    assert images and all("blur" in one.value_of_css_property("filter") for one in images)
    find(browser, ".uncover")[0].click()
    assert {one.value_of_css_property("filter") for one in images} == {"none"}
