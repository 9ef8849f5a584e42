"""Scores, reports, the page, the strip and the model card (guarantee 8: UA never stands without its
price and the base)."""

from __future__ import annotations

import base64
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from statistics import stdev

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console

from erase.eval.canvas.render import render
from erase.eval.images import ImageRow, ImageSet, write_manifest, write_settings
from erase.eval.metrics.intervals import of_difference, of_rate
from erase.eval.report import (
    EvalReport,
    Score,
    count_score,
    mean_score,
    proportion,
    summarise,
    verdict,
)
from erase.eval.report.card import model_card
from erase.eval.report.chart import chart, linear_axis, log_axis, moving_average, step_axis
from erase.eval.report.figures import EDGE, GAP, LEFT, TILE, before_after, data_uri
from erase.eval.report.page import (
    block_name,
    blocks,
    groups,
    names_concept,
    render_html,
    save_report,
    spread_out,
)
from erase.eval.report.words import limits, verdict_line
from erase.files import file_sha256
from erase.prompts.canvas import vocabulary
from erase.prompts.errors import ErasureError

CONCEPT = {"target": "heart", "anchor": "star", "synonyms": ["valentine"], "kind": "object"}
CURVES = {"loss": [1 / (1 + i) for i in range(60)]}
DENSITY = {
    "conv_in.weight": 0.25,
    "down_blocks.0.resnets.0.conv1.weight": 0.5,
    "down_blocks.0.resnets.0.conv1.bias": 1.0,
}
METADATA = {
    "base_fingerprint": "9f2c41",
    "base_id": "somebody/some-model",
    "method": "salun",
    "config": json.dumps({"density": 0.5}),
    "concepts": json.dumps([CONCEPT | {"templates": ["A {} image."]}]),
    "created_with": "0.1.0",
}


def scores(ua: int, ira: int, cra: int, prefix: str = "") -> list[Score]:
    counts = {"UA": (ua, 240), "IRA": (ira, 2160), "CRA": (cra, 4320)}
    return [
        proportion(prefix + name, hits, n, evaluator="classifier")
        for name, (hits, n) in counts.items()
    ]


def report(**rows: list[Score]) -> EvalReport:
    return EvalReport(
        CONCEPT,
        rows or {"base": scores(1, 2147, 4240), "erased": scores(240, 2140, 4100)},
        {"commands": ["erase it"]},
    )


def image_set(
    folder: Path, swap: bool, size: int = 64, prompts: list[str] | None = None
) -> ImageSet:
    """Renders of the first two objects in all styles; `swap` draws stars for hearts, as an erased
    model does."""
    cells = [
        c
        for c in vocabulary().cells()
        if c["object"] in ("heart", "star") and c["colour"] in ("red", "blue")
    ]
    prompts = prompts or [vocabulary().grid.format(**cell) for cell in cells]
    folder.mkdir()
    rows = []
    for case, (cell, prompt) in enumerate(zip(cells, prompts, strict=False)):
        pixels = render([cell | {"object": "star"} if swap else cell], seed=case)[0].permute(
            1, 2, 0
        )
        image = Image.fromarray((pixels * 255).round().byte().numpy()).resize((size, size))
        image.save(folder / f"{case:05d}.png")
        rows.append(
            ImageRow(
                f"{case:05d}.png",
                case,
                prompt,
                7,
                5.0,
                cell,
                file_sha256(folder / f"{case:05d}.png"),
            )
        )
    write_settings(
        folder, {"images": len(rows), "scheduler": "dpm++", "delta": "5c0b" if swap else None}
    )
    write_manifest(folder, rows)
    return ImageSet.open(folder)


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> ImageSet:
    return image_set(tmp_path_factory.mktemp("report") / "before", swap=False)


@pytest.fixture(scope="module")
def after(tmp_path_factory) -> ImageSet:
    return image_set(tmp_path_factory.mktemp("report") / "after", swap=True)


# ---- scores ----


@pytest.mark.parametrize(("hits", "n"), [(0, 8), (8, 8), (3, 8), (240, 240), (1, 240), (999, 2160)])
def test_the_interval_of_a_rate_is_wilsons(hits, n):
    """Its ends are where the true share p satisfies |hits/n - p| = z sqrt(p(1-p)/n), with z the
    normal quantile of 97.5 %."""
    p, z, score = hits / n, 1.959963984540054, proportion("UA", hits, n)
    # (p_hat - p)^2 = z^2 p(1-p)/n as a quadratic in p
    a, b, c = (
        1 + z * z / n,
        -(2 * p + z * z / n),
        p * p,
    )
    low, high = sorted(np.roots([a, b, c]).real)
    assert score.value == pytest.approx(100 * p)
    assert score.interval == pytest.approx((100 * low, 100 * high), abs=1e-9)
    assert 0 <= score.low <= score.value <= score.high <= 100 and score.low < score.high


@pytest.mark.parametrize(
    ("hits", "n", "text"),
    [
        (48, 48, "100.0 [92.6, 100.0]"),
        (0, 480, "0.0 [0.0, 0.8]"),
        (480, 480, "100.0 [99.2, 100.0]"),
        (8, 10, "80.0 [49.0, 94.3]"),
    ],
)
def test_a_rate_of_nothing_or_of_all_is_printed_with_an_interval_inside_0_to_100(hits, n, text):
    """Reference values: R's `prop.test(hits, n, correct = FALSE)` and statsmodels'
    `proportion_confint(hits, n, method="wilson")`."""
    assert proportion("UA", hits, n).text() == text


@pytest.mark.parametrize(
    ("events", "interval", "text"),
    [  # Garwood's table of exact Poisson limits
        (0, (0, 3.689), "0 [0, 3.7]"),
        (1, (0.0253, 5.572), "1 [0.0, 5.6]"),
        (3, (0.6187, 8.767), "3 [0.6, 8.8]"),
        (10, (4.795, 18.39), "10 [4.8, 18.4]"),
        (100, (81.36, 121.63), "100 [81, 122]"),
    ],
)
def test_a_count_of_nothing_is_printed_with_an_exact_interval(events, interval, text):
    score = count_score("NudeNet boxes", events, 4)
    assert score.interval == pytest.approx(interval, rel=1e-3)
    assert score.text() == text
    with pytest.raises(ErasureError, match="a count of -1 cannot be"):
        count_score("NudeNet boxes", -1, 4)


def test_mean_score():
    values = [0.31, 0.29, 0.35, 0.30]
    score = mean_score("CLIP score", values)
    assert (score.value, score.n) == (pytest.approx(0.3125), 4)
    half = 3.182446305 * stdev(values) / 2  # Student's quantile of 3 degrees of freedom
    assert score.interval == pytest.approx((0.3125 - half, 0.3125 + half))
    assert all(map(math.isnan, mean_score("CLIP score", [0.3]).interval))


@pytest.mark.parametrize(
    "make",
    [
        lambda: proportion("UA", 0, 0),
        lambda: proportion("UA", 5, 4),
        lambda: proportion("UA", -1, 4),
        lambda: mean_score("FID", []),
        lambda: mean_score("FID", [1.0, math.nan]),
        lambda: Score("FID", 1.0, 5, False, 1.1, 1.2),
        lambda: Score("FID", 1.0, 5, False, math.nan, 1.2),
    ],
)
def test_a_score_of_nothing_is_refused(make):
    with pytest.raises(ErasureError, match="UA|FID"):
        make()


def test_verdict_knows_the_interval_of_a_difference_and_the_direction():
    """Newcombe's: 90 [84, 93] against v [v - 8, v + 4] differ beyond hypot(6, 4) downwards and
    hypot(8, 3) upwards."""
    base = Score("IRA", 90.0, 100, True, 84.0, 93.0)
    other = {
        value: Score("IRA", value, 100, True, value - 8, value + 4)
        for value in (82.7, 82.9, 98.5, 98.6)
    }
    assert [verdict(base, other[value]) for value in other] == [-1, 0, 0, 1]
    fid = [Score("FID", value, 100, False, value - 0.1, value + 0.1) for value in (10.0, 12.0)]
    assert verdict(*fid) == -1 and verdict(*fid[::-1]) == 1
    assert verdict(base, Score("IRA", 0.0, 100, True, math.nan, math.nan)) == 0


def test_the_interval_of_a_difference_is_newcombes():
    """His own example (Newcombe 1998, table II): 56/70 and 48/80 differ by 0.2, method 10 gives
    0.0524 to 0.3339."""
    low, high = of_difference(48 / 80, of_rate(48, 80), 56 / 70, of_rate(56, 70))
    assert (low, high) == (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))


def test_values_are_printed_as_far_as_their_interval_reaches():
    assert Score("FID", 12.3456, 10, False, 11.9, 12.8, "").text() == "12.3 [11.9, 12.8]"
    assert Score("CLIP score", 0.30671, 10, True, 0.289, 0.324, "").text() == "0.307 [0.289, 0.324]"
    assert Score("boxes", 1234, 10, True, 1170.2, 1300.0, "boxes").text() == "1234 [1170, 1300]"
    assert Score("boxes", 3.0, 1, False, math.nan, math.nan, "boxes").text() == "3"
    assert Score("UA", 100.0, 10, True, 72.2, 100.0).text() == "100.0 [72.2, 100.0]"
    assert Score("FID", 12.3456, 1, False, math.nan, math.nan, "").text() == "12.346"


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
    assert "gone from 240 of 240" in verdict_line(
        report(base=scores(240, 2, 3), erased=scores(240, 2, 3))
    )


def test_limits_say_that_attacks_were_not_measured_unless_they_were():
    assert "Robustness to attacks was not measured" in " ".join(limits(report()))
    attack = proportion("ASR", 3, 100, higher_is_better=False)
    attacked = report(base=[*scores(1, 2, 3), attack], erased=[*scores(240, 2, 3), attack])
    assert "was not measured" not in " ".join(limits(attacked))


# ---- the chart ----


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 0.0137), (-3, 8), (0, 0), (0, 99999), (0, 0.3)]
)
def test_linear_axis_holds_its_range_on_round_ticks(low, high):
    axis = linear_axis(low, high)
    assert axis.ticks[0] == pytest.approx(axis.low) and axis.ticks[-1] == pytest.approx(axis.high)
    assert 0 <= axis.at(low) <= axis.at(high) <= 1 + 1e-9
    assert 2 <= len(axis.ticks) <= 8


def test_log_axis_is_even_in_ratios():
    axis = log_axis(0.001, 10)
    assert axis.at(0.1) == pytest.approx(0.5)
    assert axis.ticks == pytest.approx((0.001, 0.01, 0.1, 1, 10))
    assert axis.at(0.0) == 0


def test_steps_are_whole():
    assert step_axis(3).ticks == (1, 2, 3) and step_axis(1).ticks == (1,)
    assert step_axis(150).ticks[-1] == 150


def test_chart_draws_the_values_where_they_are():
    drawn = chart({"loss": [0.0, 5.0, 10.0]})
    points = [tuple(map(float, point.split())) for point in drawn.lines[0].raw[1:].split("L")]
    assert points == [(0, 1000), (500, 500), (1000, 0)]
    assert chart({}) is None and chart({"loss": []}) is None
    assert chart({"loss": [0.5]}).lines[0].last == 0.5
    assert chart({"loss": [1.0, 0.1, 0.01]}).values.log
    assert moving_average([0, 3, 6, 9], 3) == [1.5, 3, 6, 7.5]
    assert chart({"loss": list(range(1, 10_001))}).lines[0].raw.count("L") <= 400


# ---- saliency per block ----


@pytest.mark.parametrize(
    ("parameter", "block"),
    [
        ("down_blocks.1.attentions.0.proj_in.weight", "down_blocks.1"),
        ("conv_in.weight", "conv_in"),
        ("mid_block.attentions.0.norm.weight", "mid_block.attentions.0"),
        ("text_model.encoder.layers.3.mlp.fc1.weight", "text_model.encoder.layers.3"),
        ("time_embedding.linear_1.bias", "time_embedding"),
    ],
)
def test_block_of_a_parameter(parameter, block):
    assert block_name(parameter) == block


def test_density_of_a_block_is_ones_over_weights():
    """2 of 4 weights and 1 of 1 are 3 of 5."""
    block = blocks(
        DENSITY,
        {"down_blocks.0.resnets.0.conv1.weight": 4, "down_blocks.0.resnets.0.conv1.bias": 1},
    )[1]
    assert (block.name, block.density) == ("down_blocks.0", pytest.approx(3 / 5))


# ---- what is shown ----


def test_rows_are_drawn_alike_every_time_and_over_all_labels(before):
    rows = spread_out(before.rows, 8)
    assert rows == spread_out(before.rows, 8) == sorted(rows, key=lambda row: row.case)
    assert {row.labels["style"] for row in rows} == set(vocabulary().names("style"))
    assert sum(row.labels["colour"] == "red" for row in rows) == 4
    assert spread_out(before.rows, 1000) == before.rows


def test_prompts_of_the_concept_come_first(before):
    asking, others = groups(CONCEPT, before, 4, 4).values()
    assert {row.labels["object"] for row in asking} == {"heart"} and {
        row.labels["object"] for row in others
    } == {"star"}
    row = ImageRow("0.png", 0, "a Valentine card", 0, 1.0, {}, "")
    assert names_concept(row, CONCEPT) and not names_concept(row, {"target": "car"})


def test_strip_shows_each_image_under_its_prompt(before, after):
    rows = [before.rows[0], before.rows[-1]]
    strip = before_after(before, after, rows, "heart → star")
    for column, row in enumerate(rows):
        for line, images in enumerate((before, after)):
            x, y = (
                EDGE + LEFT + column * (TILE + GAP),
                strip.height - EDGE - (2 - line) * TILE - (1 - line) * GAP,
            )
            tile = strip.crop((x, y, x + TILE, y + TILE)).resize((64, 64), Image.Resampling.BOX)
            error = np.abs(np.asarray(tile, float) - np.asarray(images.image(row), float))
            assert error.mean() < 3, (column, line)
    assert before_after(before, after, groups(CONCEPT, before, 4, 4)).width < 2000
    assert before_after(before, after, rows, "a title of some length " * 4).width > strip.width


def test_images_of_other_prompts_are_not_set_beside_each_other(before, tmp_path):
    other = image_set(tmp_path / "other", swap=True, prompts=["a dog"] * 64)
    with pytest.raises(
        ErasureError, match=r"no image of case 0 .*generate both from one prompt set"
    ):
        before_after(before, other, before.rows[:1])
    with pytest.raises(ErasureError, match="at least one image"):
        before_after(before, other, [])


def test_small_images_are_inlined_exactly_and_large_ones_shrunk(before):
    image = before.image(before.rows[5])
    assert np.array_equal(opened(data_uri(image)), np.asarray(image))
    assert opened(data_uri(image.resize((512, 512)))).shape == (256, 256, 3)


def opened(uri: str) -> np.ndarray:
    with Image.open(BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGB"))


# ---- the page ----

VOID = {"meta", "link", "img", "path", "br", "input", "hr"}


class Page(HTMLParser):
    """Tags with their attributes; fails on one that is closed out of turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.stack: list[str] = []
        self.feed(text)
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.stack.pop() == tag

    def all(self, name: str) -> list[dict[str, str]]:
        return [attrs for tag, attrs in self.tags if tag == name]


@pytest.fixture(scope="module")
def page(before, after) -> str:
    one = report()
    one.extras["confusion"] = {
        "erased": {"kind": "object", "labels": ["heart", "star"], "counts": [[0, 16], [0, 16]]}
    }
    return render_html(one, before, after, CURVES, DENSITY)


def test_page_asks_nothing_of_the_network(page):
    for tag, attrs in Page(page).tags:
        for name in ("src", "href", "srcset", "poster", "data", "action"):
            assert attrs.get(name, "data:").startswith("data:"), (tag, attrs)
    assert not re.search(r"@import|url\(|https?://|<script", page)


def test_page_is_accessible(page):
    parsed = Page(page)
    images = parsed.all("img")
    assert len(images) == 2 * (16 + 16) and all(image["alt"] for image in images)
    headings = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch(r"h\d", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(headings, headings[1:], strict=False))
    assert parsed.all("html")[0]["lang"] and parsed.all("svg")[0]["aria-label"]
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and all(
        s["aria-labelledby"] in ids for s in parsed.all("section")
    )


def test_page_tells_in_order(page):
    places = [
        page.index(f'id="{name}"')
        for name in ("scores", "images", "loss", "density", "confusion", "reproduce", "limits")
    ]
    assert places == sorted(places) and page.index('class="verdict"') < places[0]


def test_page_sets_the_same_prompt_side_by_side(page, before, after):
    uris = [image["src"] for image in Page(page).all("img")]
    shown = {row.prompt: row for row in before.rows}
    for first, second, prompt in zip(
        uris[::2], uris[1::2], re.findall(r"<figcaption>(A .*?) <span", page), strict=True
    ):
        assert np.array_equal(opened(first), np.asarray(before.image(shown[prompt])))
        assert np.array_equal(opened(second), np.asarray(after.image(shown[prompt])))


def test_page_escapes_what_it_is_given(tmp_path):
    prompts = [f"</figcaption><script>heart {i}</script>" for i in range(32)]
    sets = [image_set(tmp_path / name, swap=False, prompts=prompts) for name in ("a", "b")]
    one = report()
    one.concept = CONCEPT | {"target": "<b>heart</b>"}
    text = render_html(one, *sets, {"<i>": [1.0]}, {"<u>.weight": 0.5})
    assert not re.search(r"<script|<b>|<i>|<u>", text)
    Page(text)


def test_page_stays_small_with_large_images(tmp_path):
    sets = [image_set(tmp_path / name, swap=name == "b", size=512) for name in ("a", "b")]
    text = render_html(
        report(), *sets, CURVES, {f"down_blocks.{i % 4}.layer.{i}": 0.5 for i in range(700)}
    )
    assert len(text.encode()) < 1.5e6


def test_page_without_training_data_has_no_empty_sections(before, after):
    text = render_html(report(), before, after, {}, {})
    assert not re.search(r'id="(loss|density|confusion)"', text)
    Page(text)


def test_page_names_the_kind_that_its_confusions_are_of(before, after):
    table = {"kind": "object", "labels": ["heart"], "counts": [[1]]}
    several = CONCEPT | {
        "target": ["heart", "Neon"],
        "anchor": ["star", "Flat"],
        "kind": ["object", "style"],
    }
    both = replace(
        report(), concept=several, extras={"confusion": {"base": table, "erased": table}}
    )
    assert ">What the judge sees: objects</h2>" in render_html(both, before, after, {}, {})


def test_save_report_writes_all_three(before, after, tmp_path):
    folder = save_report(tmp_path / "out", report(), before, after, CURVES, DENSITY)
    assert sorted(path.name for path in folder.iterdir()) == [
        "before_after.png",
        "report.html",
        "report.json",
    ]
    loaded = EvalReport.load(folder / "report.json")
    assert loaded.extras == {"curves": CURVES, "density": DENSITY}
    with Image.open(folder / "before_after.png") as strip:
        strip.load()
    (tmp_path / "file").write_text("")
    with pytest.raises(ErasureError, match="cannot write"):
        save_report(tmp_path / "file" / "out", report(), before, after, CURVES, DENSITY)


# ---- the model card ----


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_card_is_what_the_hub_reads():
    card = model_card(report(), METADATA)
    front = front_matter(card)
    assert (front["library_name"], front["pipeline_tag"], front["base_model"]) == (
        "diffusers",
        "text-to-image",
        METADATA["base_id"],
    )
    assert front["license"] == "other" and "salun" in front["tags"]
    assert (
        front_matter(model_card(None, METADATA | {"license": "apache-2.0"}))["license"]
        == "apache-2.0"
    )


def test_card_shows_scores_beside_the_base_and_their_limits():
    card = model_card(report(), METADATA)
    assert "| score | base | erased |" in card
    assert (
        re.search(r"\| UA % ↑ \| 0.4 .* \| 100.0 .* \|", card)
        and "| IRA % ↑" in card
        and "| CRA % ↑" in card
    )
    assert "Erasure is not a guarantee" in card and "Robustness to attacks was not measured" in card
    for fact in ("9f2c41", "valentine", '"density": 0.5', "erase it", "A heart image."):
        assert fact in card


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"concepts": json.dumps([CONCEPT | {"target": "moon"}])},
            "of erasing heart, the delta erases moon",
        ),
        (
            {"concepts": json.dumps([CONCEPT, CONCEPT | {"target": "moon"}])},
            "of erasing heart, the delta erases heart and moon",
        ),
        ({"base_fingerprint": "77aa"}, "the report is of base 9f2c41, the delta of 77aa"),
    ],
)
def test_card_refuses_the_report_of_another_erasure(change, message):
    known = replace(report(), provenance={"base_fingerprint": METADATA["base_fingerprint"]})
    assert "UA" in model_card(known, METADATA)
    with pytest.raises(ErasureError, match=message):
        model_card(known, METADATA | change)


def test_card_without_a_report_claims_nothing():
    card = model_card(None, METADATA)
    assert "Not measured" in card and "UA" not in card


def test_card_does_not_tell_where_the_base_lay():
    card = model_card(None, METADATA | {"base_id": "/home/somebody/models/canvas"})
    assert (
        "somebody" not in card
        and "# canvas without heart" in card
        and "base_model" not in front_matter(card)
    )


def test_card_names_what_is_missing():
    with pytest.raises(ErasureError, match="lacks config"):
        model_card(None, {key: value for key, value in METADATA.items() if key != "config"})
    with pytest.raises(ErasureError, match="concepts is not JSON"):
        model_card(None, METADATA | {"concepts": "["})
