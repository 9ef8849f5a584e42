"""A headless Chromium for pages that are served here: Debian's chromium and chromium-driver, driven
by selenium. Where one of them is missing, a test that asks for it is skipped, and says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync --hide-scrollbars"
).split()
PATIENCE = 60  # seconds until what was asked for must be there


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    """A driver with a log of its console and of its requests."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, chromedriver = map(shutil.which, ("chromium", "chromedriver"))
    if not (chromium and chromedriver):
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


def wait(driver: Any, there: Callable[[Any], Any]) -> Any:
    """What `there` gives, once it is something; elements that the page replaces meanwhile are
    looked for again."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, PATIENCE, 0.2, [StaleElementReferenceException]).until(there)


def find(driver: Any, css: str) -> list[Any]:
    """The elements of a CSS selector."""
    found: list[Any] = driver.find_elements("css selector", css)
    return found


def resize(driver: Any, width: int, height: int = 1000) -> None:
    """The size of what is seen; a window cannot be as narrow as a phone."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def overflow(driver: Any) -> int:
    """By how many pixels the page is wider than what is seen."""
    script = "return document.documentElement.scrollWidth - window.innerWidth"
    return max(int(driver.execute_script(script)), 0)


def shoot(driver: Any, path: Path) -> None:
    """A picture of what is seen."""
    driver.save_screenshot(str(path))


def faults(driver: Any) -> list[str]:
    """Errors that the console has told since it was last asked."""
    return [one["message"] for one in driver.get_log("browser") if one["level"] == "SEVERE"]


def requested(driver: Any) -> set[str]:
    """The addresses that the page has asked for since it was last asked, without what is in the
    page itself."""
    addresses = set()
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            addresses.add(message["params"]["request"]["url"])
    return {url for url in addresses if not url.startswith(("data:", "blob:", "chrome", "about:"))}
