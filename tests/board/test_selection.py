"""Selecting heads in the page: started, followed, reloaded, aborted, looked at again, refused."""

import os
import re
from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from llamafactory_hera.heads.targets import Targets

from .page import SLOW, BoardPage
from .server import Board

pytestmark = pytest.mark.slow

FOLDER = "saves/LLaVA-Qwen3-4B-HeRA/full"


@pytest.fixture(scope="module")
def selected(board: Board, browser) -> str:
    """Path of the heads file of a selection that was made in the page."""
    page = BoardPage(browser.new_page(viewport={"width": 1400, "height": 1100}), board.address)
    page.describe_run("selected", Selection_batch_size="2")
    page.press("Select heads")
    expect(page.status).to_contain_text("Selecting heads")
    page.open()  # a reload while it runs
    expect(page.page.get_by_text(re.compile(r"Scoring pass \d+/96"))).to_be_visible(timeout=SLOW)
    page.shot("10_selecting")
    expect(page.status).to_contain_text("Selected heads:", timeout=SLOW)
    expect(page.picture).to_be_visible()
    page.shot("11_selected")
    expect(page.field("Selection batch size")).to_have_value("2")
    expect(page.field("Output dir")).to_have_value("selected")
    path = page.field("Attention heads").input_value()
    page.page.close()
    return path


def test_the_heads_field_gets_the_selected_heads(selected: str, board: Board) -> None:
    assert selected == f"{FOLDER}/selected/hera/heads.json"
    heads = Targets.load(board.folder / selected)
    assert len(heads.items) == 5
    assert heads.provenance["samples"] == 96


def test_an_earlier_selection_is_loaded_and_looked_at(selected: str, board: Board, page: BoardPage) -> None:
    page.choose("Model name", "LLaVA-Qwen3-4B-HeRA")
    page.choose("Stage", "HeRA")
    page.field("Earlier selection").click()
    page.page.get_by_role("option", name="full/selected").click()
    expect(page.field("Attention heads")).to_have_value(selected)
    names = str(Targets.load(board.folder / selected)).replace(",", " ")
    expect(page.status).to_contain_text(f"Heads: {names}")
    expect(page.picture).to_be_visible()
    (board.folder / "by_hand.json").write_text('{"heads": ["L1H2"]}')
    page.name("Earlier selection", "by_hand.json")
    expect(page.status).to_contain_text("no scores")
    expect(page.picture).not_to_be_visible()
    page.name("Earlier selection", "missing.json")
    expect(page.status).to_contain_text("cannot be read")
    expect(page.field("Attention heads")).to_have_value("by_hand.json")


def test_a_selection_is_aborted_with_all_its_processes(
    board: Board, page: BoardPage, open_page: Callable[[Board], BoardPage]
) -> None:
    page.describe_run("aborted")
    page.press("Select heads")
    expect(page.status).to_contain_text("Selecting heads")
    assert any("llamafactory_hera.cli select" in line for line in board.processes())
    page.press("Start")  # nothing else may start meanwhile
    expect(page.page.get_by_text("A process is in running").first).to_be_visible()
    other = open_page(board)
    expect(other.status).to_contain_text("Selecting heads")
    other.press("Abort job")
    expect(other.status).to_have_text("Aborted.")
    expect(page.status).to_have_text("Aborted.")
    assert not any("llamafactory_hera.cli" in line for line in board.processes())
    expect(page.field("Attention heads")).to_have_value("")
    page.shot("12_aborted")
    page.press("Select heads")  # it was aborted elsewhere
    expect(page.status).to_contain_text("Selecting heads")
    refusal = page.page.get_by_test_id("toast-body").filter(has_text="A process is in running")
    expect(refusal).to_have_count(0)
    page.press("Select heads")  # while this page follows the job
    expect(refusal).to_be_visible()
    page.press("Abort job")
    expect(page.status).to_have_text("Aborted.")
    other.open()
    expect(other.status).to_have_text("")  # of a job that another page has started


def test_a_model_is_calibrated_without_training(page: BoardPage, board: Board) -> None:
    page.describe_run("moved", Calibration_samples="48", Calibrated_layers="all", extra={"rah_held_out": 16})
    page.press("Calibrate")
    expect(page.status).to_contain_text("Calibrating")
    expect(page.status).to_contain_text("RAH-LoRA on the data as they are", timeout=SLOW)
    expect(page.picture).to_be_visible()
    folder = board.folder / FOLDER.replace("/full", "/lora") / "moved"
    assert {"adapter_config.json", "adapter_model.safetensors", "calibration.json"} <= set(os.listdir(folder))
    page.shot("14_calibrated")


def test_why_a_selection_has_failed_is_shown(page: BoardPage) -> None:
    page.describe_run("refused", Teacher="no_such_teacher")
    page.press("Select heads")
    expect(page.status).to_contain_text("Failed with exit code 2", timeout=SLOW)
    reason = page.status.locator("p").filter(has_text="hera_teacher: the folder no_such_teacher does not exist")
    expect(reason).to_be_visible()  # where lines are wrapped
    page.shot("13_missing_teacher")


def test_without_a_dataset_nothing_is_started(page: BoardPage, board: Board) -> None:
    page.choose("Stage", "HeRA")
    page.choose("Model name", "LLaVA-Qwen3-4B-HeRA")
    page.press("Select heads")
    expect(page.status).to_contain_text("Please choose a dataset")
    page.choose("Stage", "Supervised Fine-Tuning")
    expect(page.button("Select heads")).not_to_be_visible()
    assert not any("llamafactory_hera.cli" in line for line in board.processes())
