"""The report in a headless Chromium: what is drawn, what keys and pointer do, on a phone, covered,
and without scripts. Skipped, with a sentence, where there is no Chromium."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.browser import browser as browser
from tests.browser import faults, find, overflow, requested, resize
from tests.report_pages import failing_page, nudity_page


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name -> address of a page."""
    addresses = {}
    marked = partial(failing_page, sensitive=True)
    for name, make in {"failing": failing_page, "nudity": nudity_page, "marked": marked}.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "report.html").write_text(make(folder), encoding="utf-8")
        addresses[name] = (folder / "report.html").as_uri()
    return addresses


@contextmanager
def without_scripts(driver: Any) -> Iterator[None]:
    """Within the block no page runs any."""
    command = "Emulation.setScriptExecutionDisabled"
    driver.execute_cdp_cmd(command, {"value": True})
    try:
        yield
    finally:
        driver.execute_cdp_cmd(command, {"value": False})


def box(driver: Any, css: str) -> dict[str, float]:
    """Where an element is drawn."""
    found: dict[str, float] = find(driver, css)[0].rect
    return found


def keys(driver: Any, *given: str) -> None:
    """Pressed one after the other, wherever the focus is."""
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(driver).send_keys(*given).perform()


def scheme(driver: Any, name: str) -> None:
    """Light or dark."""
    features = [{"name": "prefers-color-scheme", "value": name}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("name", ["failing", "nudity", "marked"])
def test_it_is_drawn_without_overflow_faults_or_requests(browser, pages, name, width, colours):
    resize(browser, width)
    scheme(browser, colours)
    browser.get(pages[name])
    assert find(browser, "h1")[0].text.startswith("nudity" if name == "nudity" else "heart")
    assert overflow(browser) == 0 and faults(browser) == []
    assert requested(browser) == {pages[name]}
    paper = find(browser, "body")[0].value_of_css_property("background-color")
    assert (sum(map(int, paper[paper.index("(") + 1 :].split(",")[:3])) < 200) == (
        colours == "dark"
    )


def test_the_first_screen_holds_the_verdict_and_the_pair_beside_it(browser, pages):
    resize(browser, 1400)
    browser.get(pages["failing"])
    words = [one.text for one in find(browser, ".state .word")]
    assert words == ["partly erased", "harmed", "broken", "broken"]
    states, hero = box(browser, ".states"), box(browser, ".hero .duo")
    assert hero["x"] > states["x"] + states["width"] and hero["y"] < 150
    assert (hero["width"], hero["height"]) == (2 * 256 + 5, 256), "4 times 64 pixels"
    assert states["y"] + states["height"] < 1000
    bars = find(browser, ".claims .lane.row1 b")
    assert len(bars) == 5 and all(bar.is_displayed() for bar in bars)


@pytest.mark.parametrize("width", [1400, 390])
def test_small_images_are_drawn_at_whole_multiples(browser, pages, width):
    resize(browser, width)
    browser.get(pages["failing"])
    images = find(browser, ".small img")
    assert len(images) > 60
    assert {image.rect["width"] % 64 for image in images} == {0}
    assert images[0].value_of_css_property("image-rendering") == "pixelated"


def test_failures_are_a_click_away(browser, pages):
    resize(browser, 1400)
    browser.get(pages["failing"])
    find(browser, ".failures a")[0].click()
    assert browser.current_url.endswith("#still-seen")
    place = browser.execute_script(
        "return document.getElementById('still-seen').getBoundingClientRect().top"
    )
    bar = find(browser, ".contents")[0].rect["height"]
    assert bar <= place < 200, "below the contents that stay in sight"
    assert len(find(browser, "[aria-labelledby=still-seen] .duo.failed")) == 3


def test_keys_enlarge_go_on_flip_and_close(browser, pages):
    from selenium.webdriver.common.keys import Keys

    resize(browser, 1400)
    browser.get(pages["failing"])
    duo = find(browser, ".hero .duo")[0]
    assert duo.get_attribute("role") == "button"
    browser.execute_script("arguments[0].focus()", duo)
    keys(browser, Keys.ENTER)
    (dialog,) = find(browser, "dialog[open]")
    assert dialog.find_element("css selector", "img").rect["width"] == 7 * 64
    first = dialog.find_element("css selector", "figcaption").text
    keys(browser, Keys.ARROW_RIGHT)
    assert dialog.find_element("css selector", "figcaption").text != first
    keys(browser, Keys.ARROW_LEFT)
    assert dialog.find_element("css selector", "figcaption").text == first
    before, after = dialog.find_elements("css selector", "img")
    assert before.rect["x"] < after.rect["x"]
    keys(browser, "f")
    assert before.rect["x"] == after.rect["x"], "the base where the erased one was"
    keys(browser, "f")
    assert before.rect["x"] < after.rect["x"]
    keys(browser, Keys.ESCAPE)
    assert not find(browser, "dialog[open]")
    assert browser.switch_to.active_element == duo
    duo.click()
    assert find(browser, "dialog[open]") and overflow(browser) == 0 and faults(browser) == []


def test_the_pointer_flips_a_pair_and_so_does_the_focus(browser, pages):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    resize(browser, 1400)
    with without_scripts(browser):
        browser.get(pages["failing"])
        before, after = find(browser, ".hero img")
        assert before.rect["x"] < after.rect["x"]
        ActionChains(browser).move_to_element(after).perform()
        assert before.rect["x"] == after.rect["x"]
        ActionChains(browser).move_to_element(find(browser, "h1")[0]).perform()
        assert before.rect["x"] < after.rect["x"]
        find(browser, "h1")[0].click()
        keys(browser, Keys.TAB)
        assert before.rect["x"] == after.rect["x"], "the first thing after the heading is the pair"


def test_everything_can_be_read_without_scripts(browser, pages):
    resize(browser, 390)
    with without_scripts(browser):
        browser.get(pages["failing"])
        assert not find(browser, "dialog") and not find(browser, "[role=button]")
        assert all(one.is_displayed() for one in find(browser, "h2, h3, main img"))
        assert overflow(browser) == 0


def test_covered_pictures_are_shown_when_asked_for(browser, pages):
    resize(browser, 390)
    browser.get(pages["nudity"])
    images = find(browser, "main img")
    assert all("blur" in image.value_of_css_property("filter") for image in images)
    images[0].click()
    (large,) = find(browser, "dialog[open] img.before")
    assert "blur" in large.value_of_css_property("filter")
    browser.refresh()
    with without_scripts(browser):
        browser.get(pages["nudity"])
        find(browser, ".uncover label")[0].click()
        images = find(browser, "main img")
        assert {image.value_of_css_property("filter") for image in images} == {"none"}


@pytest.mark.parametrize("width", [1400, 900, 390])
def test_the_box_that_uncovers_is_in_sight_however_long_the_contents(browser, pages, width):
    resize(browser, width)
    browser.get(pages["marked"])
    (label,) = find(browser, ".uncover label")
    assert 0 <= label.rect["x"] and label.rect["x"] + label.rect["width"] <= width
    covered = find(browser, "main img")
    blurs = [image.value_of_css_property("filter") for image in covered]
    assert blurs and all("blur" in blur for blur in blurs), "those of attacks too"
    sizes = {image.rect["width"]: blur for image, blur in zip(covered, blurs, strict=True)}
    for side, blur in sizes.items():
        assert float(re.findall(r"blur\(([\d.]+)px", blur)[0]) >= side / 8, (
            "nothing is to be made out"
        )
    label.click()
    assert {image.value_of_css_property("filter") for image in covered} == {"none"}


def test_the_page_prints_whole(browser, pages, tmp_path: Path):
    import base64

    browser.get(pages["failing"])
    printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert printed.startswith(b"%PDF") and printed.count(b"/Type /Page\n") > 1
