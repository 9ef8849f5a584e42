"""The page of a report: its chart, its density per block, the images it shows, its HTML."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from erase.eval.images import ImageRow
from erase.eval.report import EvalReport
from erase.eval.report.chart import chart, linear_axis, log_axis, moving_average, step_axis
from erase.eval.report.figures import EDGE, GAP, LEFT, TILE, before_after, data_uri
from erase.eval.report.page import render_html, save_report
from erase.eval.report.tables import block_name, blocks
from erase.eval.report.wall import groups, names_concept, spread_out
from erase.prompts.canvas import vocabulary
from erase.prompts.errors import ErasureError
from tests.report_fixtures import CONCEPT, image_set, report
from tests.report_fixtures import after as after
from tests.report_fixtures import before as before

CURVES = {"loss": [1 / (1 + i) for i in range(60)]}
DENSITY = {
    "conv_in.weight": 0.25,
    "down_blocks.0.resnets.0.conv1.weight": 0.5,
    "down_blocks.0.resnets.0.conv1.bias": 1.0,
}


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
            x = EDGE + LEFT + column * (TILE + GAP)
            y = strip.height - EDGE - (2 - line) * TILE - (1 - line) * GAP
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
            assert attrs.get(name, "data:").startswith(("data:", "#")), (tag, attrs)
    assert not re.search(r"@import|url\(|https?://", page)


def test_page_runs_its_own_script_and_no_other(page):
    parsed = Page(page)
    policy = next(m["content"] for m in parsed.all("meta") if "http-equiv" in m)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert not any(name.startswith("on") for _, attrs in parsed.tags for name in attrs)


def test_page_is_accessible(page):
    parsed = Page(page)
    images = parsed.all("img")
    assert len(images) == 2 * (1 + 16 + 16) and all(image["alt"] for image in images)
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
        for name in (
            "verdict", "limits", "images", "scores", "plane", "confusion", "density", "loss",
            "reproduce",
        )
    ]  # fmt: skip
    assert places == sorted(places)


def test_contents_lead_to_what_is_there(page):
    parsed = Page(page)
    ids = {attrs["id"] for _, attrs in parsed.tags if "id" in attrs}
    leads = [a["href"][1:] for a in parsed.all("a") if a["href"].startswith("#")]
    assert len(leads) > 8 and set(leads) <= ids


def test_page_sets_the_same_prompt_side_by_side(page, before, after):
    uris = [image["src"] for image in Page(page).all("img")]
    assert "<figcaption>A " in page
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
    text = render_html(one, *sets, {"<q>": [1.0]}, {"<u>.weight": 0.5})
    body = text.partition("<main")[2]
    assert body.count("<script") == 1 and not re.search(r"<b>heart|<q>|<u>", body)
    Page(text)


def test_page_stays_small_with_large_images(tmp_path):
    sets = [image_set(tmp_path / name, swap=name == "b", size=512) for name in ("a", "b")]
    text = render_html(
        report(), *sets, CURVES, {f"down_blocks.{i % 4}.layer.{i}": 0.5 for i in range(700)}
    )
    assert len(text.encode()) < 1.6e6


def test_page_without_training_data_has_no_empty_sections(before, after):
    text = render_html(report(), before, after, {}, {})
    assert not re.search(r'id="(loss|density|confusion)"', text)
    Page(text)


def test_page_tells_how_far_forgetting_and_retaining_overlap_beside_chance(before, after):
    told = replace(report(), extras={"overlap": {"iou": 0.155, "chance": 0.0152}})
    text = render_html(told, before, after, {}, DENSITY)
    assert "15.5 % are the same" in text and "two random choices: 1.5 %" in text
    assert "are the same" not in render_html(report(), before, after, {}, DENSITY)


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
    text = render_html(both, before, after, {}, {})
    assert "<h3>Objects</h3>" in text and "<summary>Objects" not in text


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
