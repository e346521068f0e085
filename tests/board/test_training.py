"""Training in the page: curves, reload, abort, resume, the comparison afterwards, and errors."""

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

from .page import SLOW, BoardPage
from .server import Board

pytestmark = pytest.mark.slow

HEADS = "L4H1,L3H5"
STEPS_PER_EPOCH = 8


def folder_of(board: Board, run: str) -> Path:
    return board.folder / "saves/LLaVA-Qwen3-4B-HeRA/full" / run


def log_of(board: Board, run: str) -> list[dict]:
    text = (folder_of(board, run) / "trainer_log.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines() if '"hera_loss"' in line]


def test_train_reload_abort_resume_and_compare(board: Board, page: BoardPage) -> None:
    weights = {"HeRA_weight": "0.3", "Neighbors_(k)": "3"}
    page.describe_run("trained", Attention_heads=HEADS, Epochs="50", Save_steps="25", **weights)
    page.press("Start")
    expect(page.plot).to_be_visible(timeout=SLOW)
    first = page.plot.get_attribute("src")
    expect(page.plot).not_to_have_attribute("src", first)
    page.shot("20_training", top=page.button("Start"))

    page.open()  # a reload while it runs
    expect(page.plot).to_be_visible(timeout=SLOW)
    expect(page.field("Stage")).to_have_value("HeRA")
    expect(page.field("Attention heads")).to_have_value(HEADS)
    page.shot("21_reloaded", top=page.button("Start"))
    second = page.plot.get_attribute("src")
    expect(page.plot).not_to_have_attribute("src", second)

    # there is a checkpoint of step 25; far from the last step, so that the abort is in time at any speed
    expect(page.page.get_by_text(re.compile(r"Running (2[7-9]|[3-9]\d|\d{3})/400"))).to_be_visible(timeout=SLOW)
    page.press("Abort")
    expect(page.page.get_by_text("Finished.", exact=True).first).to_be_visible(timeout=SLOW)
    aborted = log_of(board, "trained")
    assert 25 < len(aborted) < 400
    last_step = aborted[-1]["current_steps"] // STEPS_PER_EPOCH * STEPS_PER_EPOCH + 2 * STEPS_PER_EPOCH
    assert not any("llamafactory_hera.cli" in line for line in board.processes())  # no comparison of half a run

    page.open()
    page.choose("Model name", "LLaVA-Qwen3-4B-HeRA")
    page.choose("Finetuning method", "full")
    page.name("Output dir", "trained")
    expect(page.page.get_by_text("will resume training from here").first).to_be_visible()
    expect(page.field("Attention heads")).to_have_value(HEADS)
    expect(page.field("Stage")).to_have_value("HeRA")
    page.fill("Model path", "hera_demo/model")
    page.fill("Epochs", last_step // STEPS_PER_EPOCH)
    page.press("Start")
    expect(page.page.get_by_text("Finished.", exact=True).first).to_be_visible(timeout=SLOW)
    resumed = log_of(board, "trained")[len(aborted) :]
    assert resumed[0]["current_steps"] % 25 == 1
    assert resumed[0]["current_steps"] > 25
    assert resumed[-1]["current_steps"] == last_step
    assert all(line["hera_loss"] > 0 and line["lm_loss"] > 0 and 0 <= line["hera_mknn"] <= 1 for line in resumed)
    page.shot("22_finished", top=page.button("Start"))

    expect(page.status).to_contain_text("Before and after training", timeout=SLOW)
    expect(page.status).to_contain_text("worst-5 mean")
    expect(page.picture).to_be_visible()
    with page.page.expect_download() as download:
        page.page.locator("#hera_report a").first.click()
    assert "Head alignment before and after" in Path(download.value.path()).read_text()
    page.shot("23_compared", top=page.button("Select heads"))


def test_the_evaluation_of_a_finished_run_is_shown(board: Board, page: BoardPage) -> None:
    page.describe_run("evaluated", Attention_heads=HEADS, extra={"max_steps": 2})
    page.choose("Evaluation", "demo")
    page.press("Start")
    expect(page.page.get_by_role("cell", name="Held-out questions: accuracy")).to_be_visible(timeout=SLOW)
    (file,) = folder_of(board, "evaluated").glob("hera/eval/*/*/result.json")
    accuracy = json.loads(file.read_text())["scores"]["accuracy"]
    expect(page.page.get_by_role("cell", name=f"{accuracy:.1f}", exact=True).first).to_be_visible()
    page.shot("25_evaluated", top=page.button("Start"))
    expect(page.status).to_contain_text("Before and after training", timeout=SLOW)  # nothing runs any more


def test_why_a_run_has_failed_is_shown_first(page: BoardPage) -> None:
    page.describe_run("failed", Attention_heads="L99H0")
    page.press("Start")
    reason = "L99H0 does not exist: this model has layers L0 to L4"
    expect(page.page.locator("strong").filter(has_text=reason)).to_be_visible(timeout=SLOW)
    page.shot("24_failed", top=page.button("Start"))


@pytest.mark.parametrize(("heads", "reason"), [("", "press Select heads"), ("L4-1", "is not a head")])
def test_heads_that_cannot_be_are_refused_at_once(heads: str, reason: str, page: BoardPage, board: Board) -> None:
    page.describe_run("refused_heads", Attention_heads=heads)
    page.press("Start")
    expect(page.page.get_by_text(reason).first).to_be_visible()
    assert not folder_of(board, "refused_heads").exists()
