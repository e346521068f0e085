"""What a web UI without the plugin makes of settings with HeRA, and what the plugin adds to the network."""

import shutil
from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from .page import BoardPage
from .server import Board

pytestmark = pytest.mark.slow


def test_saved_settings_open_as_supervised_fine_tuning(
    board: Board, plain_board: Board, open_page: Callable[[Board], BoardPage]
) -> None:
    page = open_page(board)
    page.describe_run("plain", Attention_heads="L4H1")
    page.name("Config path", "plain.yaml")
    page.press("Save arguments")
    expect(page.page.get_by_text("Arguments have been saved at")).to_be_visible()
    folder = plain_board.folder / "llamaboard_config"
    folder.mkdir(exist_ok=True)
    shutil.copy(board.folder / "llamaboard_config/plain.yaml", folder)

    plain = open_page(plain_board)
    expect(plain.page.get_by_text("HeRA")).to_have_count(0)
    plain.name("Config path", "plain.yaml")
    plain.press("Load arguments")
    expect(plain.page.get_by_text("Arguments have been restored")).to_be_visible()
    expect(plain.field("Stage")).to_have_value("Supervised Fine-Tuning")
    expect(plain.field("Model name")).to_have_value("Custom")
    expect(plain.field("Learning rate")).to_have_value("1e-3")
    plain.fill("Model path", "some_model")
    command = plain.command()
    assert command["stage"] == "sft"
    assert not [key for key in command if key.startswith("hera_")]
    plain.shot("05_without_plugin")


def test_the_plugin_asks_no_further_host_and_opens_no_port(
    board: Board, plain_board: Board, open_page: Callable[[Board], BoardPage]
) -> None:
    hosts = []
    for one in (board, plain_board):
        page = open_page(one)
        page.choose("Stage", "HeRA" if one is board else "DPO")
        page.page.wait_for_timeout(1000)  # the page keeps a connection open, so it never falls silent
        hosts.append(page.hosts - {one.address})
    assert hosts[0] <= hosts[1]
    assert board.listening() == {int(board.address.rpartition(":")[2])}
