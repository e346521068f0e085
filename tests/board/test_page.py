"""The report's HTML page in a browser: whole without a network, and its values where the pointer rests."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser

from llamafactory_hera.selection.page import write_page
from tests.selection.test_page import run

from .page import ARTIFACTS

pytestmark = pytest.mark.slow
__all__ = ["run"]


def test_the_page_asks_for_nothing_and_complains_of_nothing(browser: Browser, run: Path, tmp_path: Path) -> None:
    path = write_page([run], tmp_path / "page.html")
    page = browser.new_context(viewport={"width": 1400, "height": 1100}, offline=True).new_page()
    asked: list[str] = []
    told: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.goto(path.as_uri())
    page.wait_for_load_state("load")
    fetched = [url for url in asked if not url.startswith("data:")]
    assert (fetched, told) == ([path.as_uri()], [])
    drawn = page.locator("img").evaluate_all("images => images.map(image => image.complete && image.naturalWidth)")
    assert len(drawn) == 3
    assert all(width > 500 for width in drawn)
    cell = page.locator("td[title^='L0H1 ']").first
    assert cell.get_attribute("title") == "L0H1 0.1000, 10.00 × chance"
    assert cell.bounding_box()["width"] >= 15
    assert page.evaluate("document.documentElement.scrollWidth") <= 1400
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=ARTIFACTS / "20_report.png", full_page=True)
    page.context.close()
