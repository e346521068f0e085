"""Fixtures: the web UI with the plugin, a browser, and a page."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.e2e.runner import environment, free_port

from .page import BoardPage

_FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


class Board:
    """A running ``llamafactory-cli webui``; ``close`` kills it with all processes that it started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"127.0.0.1:{free_port()}"
        self._log = folder / "webui.log"
        host, port = self.address.split(":")
        self._environment = environment(
            GRADIO_SERVER_NAME=host,
            GRADIO_SERVER_PORT=port,
            GRADIO_ANALYTICS_ENABLED="False",
            BROWSER="/bin/true",
            PYTHONUNBUFFERED="1",  # `_answers` waits for a line of the log
        )
        for _ in range(3):  # on busy cores, Gradio may give up because its own first request takes seconds
            self._process = self._start()
            if self._answers():
                return
            self.close()
        raise AssertionError(f"The web UI did not start:\n{self._log.read_text(errors='replace')[-3000:]}")

    def _start(self) -> subprocess.Popen:
        with self._log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "llamafactory.cli", "webui"],
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _answers(self, timeout: float = 240) -> bool:
        until = time.monotonic() + timeout
        while time.monotonic() < until and self._process.poll() is None:
            # Gradio prints this line after it has reached its own server
            if "To create a public link" in self._log.read_text(errors="replace"):
                return True
            time.sleep(0.3)
        return False

    def close(self) -> None:
        """Kills the process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=10)


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """A headless Chromium: the installed one, or the one from `playwright install chromium`."""
    with sync_playwright() as playwright:
        paths = (Path("/usr/bin/chromium"), Path(playwright.chromium.executable_path))
        path = next(filter(Path.is_file, paths), None)
        assert path, "No Chromium found. Run `apt-get install chromium` or `playwright install chromium`."
        browser = playwright.chromium.launch(executable_path=path, args=_FLAGS, headless=True)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def board(tmp_path_factory: pytest.TempPathFactory, copy_demo: Callable[[Path], Path]) -> Iterator[Board]:
    """The web UI with the plugin, started in a folder that contains the demo."""
    board = Board(copy_demo(tmp_path_factory.mktemp("board")))
    yield board
    board.close()


@pytest.fixture
def page(browser: Browser, board: Board) -> Iterator[BoardPage]:
    """A fresh page of the web UI; the test fails if one of the page's scripts fails."""
    page = BoardPage(browser.new_context(viewport={"width": 1400, "height": 1100}).new_page(), board.address)
    yield page
    page.page.context.close()
    assert page.errors == []
