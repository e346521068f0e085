"""The demo model, the web UI with and without the plugin, and one browser."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Playwright, sync_playwright

from .page import BoardPage
from .server import FLAGS, SYSTEM_CHROMIUM, Board


def _chromium(playwright: Playwright) -> str:
    for path in (SYSTEM_CHROMIUM, Path(playwright.chromium.executable_path)):
        if path.is_file():
            return str(path)
    raise AssertionError(
        "There is no Chromium. Install Debian's package (`apt-get install chromium`), or run `playwright install "
        "chromium`; `make test` does either."
    )


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """A headless Chromium with a profile of its own."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_chromium(playwright), args=FLAGS, headless=True)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def board(tmp_path_factory: pytest.TempPathFactory, copy_demo: Callable[[Path], Path]) -> Iterator[Board]:
    """The web UI with the plugin, started in a folder with the demo."""
    board = Board(copy_demo(tmp_path_factory.mktemp("board")))
    yield board
    board.close()


@pytest.fixture(scope="package")
def plain_board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    """The web UI without the plugin."""
    board = Board(tmp_path_factory.mktemp("plain"), plugin=False)
    yield board
    board.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[[Board], BoardPage]]:
    """Opens web UIs in pages that share nothing, and checks at the end that none of their scripts failed."""
    pages: list[BoardPage] = []

    def open_page(board: Board) -> BoardPage:
        page = browser.new_context(viewport={"width": 1400, "height": 1100}).new_page()
        pages.append(BoardPage(page, board.address))
        return pages[-1]

    yield open_page
    for page in pages:
        page.page.context.close()
    assert [error for page in pages for error in page.errors] == []


@pytest.fixture
def page(board: Board, open_page: Callable[[Board], BoardPage]) -> BoardPage:
    """A fresh page of the web UI with the plugin, in which nothing runs."""
    board.wait_until_idle()
    return open_page(board)
