"""Fixtures for tests of pages in a headless browser, which runs the pages' scripts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start Debian's Chromium with selenium, in a window that is large enough for a whole page."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium is not installed: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument("--window-size=2200,3000")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


@pytest.fixture
def save_screenshot(browser: Any) -> Callable[[str], None]:
    """Return a function that saves a screenshot of the page under a name.

    The folder is $MEGALITE_SCREENSHOTS, or else build/screenshots.
    """
    default = Path(__file__).parents[2] / "build" / "screenshots"
    folder = Path(os.environ.get("MEGALITE_SCREENSHOTS") or default)

    def save(name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        assert browser.save_screenshot(str(folder / f"{name}.png"))

    return save
