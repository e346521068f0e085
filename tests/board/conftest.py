"""The web UI with the plugin, and one browser."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from .page import BoardPage
from .server import Board

_FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """A headless Chromium: Debian's, or the one that `playwright install chromium` fetched."""
    with sync_playwright() as playwright:
        paths = (Path("/usr/bin/chromium"), Path(playwright.chromium.executable_path))
        path = next(filter(Path.is_file, paths), None)
        assert path, "No Chromium found. Run `apt-get install chromium` or `playwright install chromium`."
        browser = playwright.chromium.launch(executable_path=path, args=_FLAGS, headless=True)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def board(tmp_path_factory: pytest.TempPathFactory, copy_demo: Callable[[Path], Path]) -> Iterator[Board]:
    """The web UI with the plugin, started in a folder that holds the demo."""
    board = Board(copy_demo(tmp_path_factory.mktemp("board")))
    yield board
    board.close()


@pytest.fixture
def page(browser: Browser, board: Board) -> Iterator[BoardPage]:
    """A fresh page of the web UI; at the end, none of its scripts may have failed."""
    page = BoardPage(browser.new_context(viewport={"width": 1400, "height": 1100}).new_page(), board.address)
    yield page
    page.page.context.close()
    assert page.errors == []
