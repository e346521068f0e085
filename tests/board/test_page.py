"""HeRA in the web UI, used in a browser: setting up a run, saving it, training, and looking at results."""

import json
import shlex

import pytest
from playwright.sync_api import expect

from llamafactory_hera import cli
from llamafactory_hera.integrations.llamaboard.fields import FIELDS, texts
from llamafactory_hera.selection.page import write_report
from llamafactory_hera.selection.report import compare
from tests.selection.test_gallery import write_seen
from tests.selection.tiny import write_scores

from .page import SLOW

pytestmark = pytest.mark.slow

MODEL = "LLaVA-Qwen3-4B-HeRA"


def label(key: str) -> str:
    return texts()["en"][key]["label"]


def test_the_keys_of_a_run_are_sent_and_saved(page):
    page.describe_run("saved", Memory=32, extra={"hera_max_nan": 3})
    command = page.command(stage="hera", hera_memory="32")
    assert (command["hera_heads"], command["hera_max_nan"]) == ("auto", "3")
    assert command["template"] == "llava_qwen3"
    assert command["freeze_vision_tower"] == "True"  # sent for multimodal models only
    # the host does not send empty fields
    sent = FIELDS.keys() - {"hera_teacher_cache"}
    assert {key for key in command if key.startswith("hera_")} == sent | {"hera_max_nan"}
    page.name("Config path", "saved.yaml")
    page.press("Save arguments")
    page.see("Arguments have been saved at")
    page.open()
    page.name("Config path", "saved.yaml")
    page.press("Load arguments")
    expect(page.field("Stage")).to_have_value("HeRA")
    page.fill("Model path", "hera_demo/model")  # the host does not save it
    assert page.command(hera_memory="32") | {"output_dir": ""} == command | {"output_dir": ""}
    page.choose("Stage", "Supervised Fine-Tuning")
    page.choose("Dataset", "hera_demo")  # the host empties this list
    assert not FIELDS.keys() & page.command(stage="sft").keys()


def test_a_run_shows_its_progress_its_scores_its_commands_and_its_report(page, board, monkeypatch):
    monkeypatch.chdir(board.folder)
    page.describe_run("trained", Selection_samples=96, **{"Neighbors_(k)": 3}, extra={"max_steps": 12})
    page.press("Start")
    expect(page.page.locator("[data-testid=matplotlib] img")).to_be_visible(timeout=SLOW)
    page.open()  # the host fills a reloaded page while a run goes on
    expect(page.field("Attention heads")).to_have_value("auto")
    page.see("Finished.", timeout=SLOW)
    run = f"saves/{MODEL}/full/trained"
    log = [json.loads(line) for line in (board.folder / run / "trainer_log.jsonl").read_text().splitlines()]
    assert [line["lm_loss"] > 0 for line in log[:-1]] == [True] * 12
    assert log[-2]["hera_loss"] > 0

    scores = page.page.locator(".image-frame img")
    scores.evaluate("element => element.scrollIntoView()")  # the browser loads it when it comes into view
    expect(scores).to_be_visible()
    lines = page.page.locator(".cm-line").all_inner_texts()
    commands = {line.split()[1]: shlex.split(line) for line in lines}
    assert list(commands) == ["select", "score", "report", "calibrate", "eval"]
    for command in commands.values():
        cli._parser().parse_args(command[1:])
    for name in ("score", "report"):
        assert cli.main(commands[name][1:]) == 0

    page.open()
    page.choose("Model name", MODEL)
    page.choose("Finetuning method", "full")
    page.name("Output dir", "trained")  # the host loads the run's settings, and the page shows its results
    report = page.page.frame_locator("iframe[srcdoc]")
    expect(report.get_by_role("heading").first).to_be_visible()
    page.page.get_by_test_id("toast-close").first.click()  # the host's warning covers the commands


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_report_fits_a_phone_and_is_light_or_dark(browser, tmp_path, scheme):
    files = [write_scores(tmp_path / f"{name}/hera/scores.json", [[0.1] * 32] * 8) for name in ("m" * 60, "run")]
    for file in files:
        write_seen(file, tmp_path / "images", 0, heads=32, layers=8)
    report = write_report(compare(files), tmp_path / "report")
    page = browser.new_context(viewport={"width": 420, "height": 900}, color_scheme=scheme).new_page()
    page.goto(report.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == 420
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    page.context.close()


def test_the_reason_for_a_refusal_is_shown(page):
    page.describe_run("refused", Attention_heads="L99H0")
    page.press("Start")
    page.see("L99H0 does not exist: the model has layers L0 to L4", timeout=SLOW)
    expect(page.page.get_by_text("Traceback")).to_have_count(0)
