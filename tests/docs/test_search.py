"""The site's search, used in a browser, finds the page with the answer."""

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from playwright.sync_api import Browser
from tests.board.conftest import browser  # noqa: F401

ROOT = Path(__file__).parents[2]
ANSWERS = {
    "batch size": "docs/distributed.html#batch-size-and-candidates",
    "install": "index.html#install",
    "out of memory": "docs/troubleshooting.html#out-of-memory",
    "which weight": "docs/method.html#which-weight",
}


@pytest.mark.slow
def test_the_page_with_the_answer_comes_first(tmp_path: Path, browser: Browser) -> None:  # noqa: F811
    pages, site = tmp_path / "pages", tmp_path / "site"
    pages.mkdir()
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "constraints.txt", "docs", "patches", "recipes"):
        (pages / name).symlink_to(ROOT / name)
    build(load_config(str(ROOT / "docs/mkdocs.yml"), docs_dir=str(pages), site_dir=str(site)))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=site)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        found, tab = {}, browser.new_page()
        for words in ANSWERS:
            tab.goto(f"http://127.0.0.1:{server.server_port}/index.html?q={words}")
            links = tab.locator(".md-search-result__item").first.locator("a")
            links.first.wait_for(state="attached")
            page, section = ((links.nth(place).get_attribute("href") or "").split("?")[0] for place in range(2))
            found[words] = (page.rsplit(f":{server.server_port}/")[-1], section.rpartition("#")[2])
        server.shutdown()
    assert found == {words: tuple(answer.split("#")) for words, answer in ANSWERS.items()}
