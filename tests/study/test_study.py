"""The whole study at its smallest, through the real command."""

import json
import sys
from pathlib import Path

import pytest

from run import run_study
from world import CATEGORIES

from ..e2e.runner import run_command
from .conftest import STUDY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    command = [sys.executable, str(STUDY), "--size", "smoke", "--output", "smoke"]
    code, output = run_command(command, folder, timeout=900)
    assert code == 0, output
    assert "min left" in output
    return folder / "smoke"


@pytest.mark.timeout(1000)
def test_the_report_holds_every_measured_quantity(study):
    report = json.loads((study / "report.json").read_text())
    measured = report["measured"]
    assert measured["runs"] == 2
    for method in ("sft", "worst5"):
        assert set(measured["accuracy"][method]) == {*CATEGORIES, "mean"}
        assert measured["cost"][method]["step_s"]["mean"] > 0
        assert measured["cost"][method]["process_peak_mib"]["mean"] > 100
    for mode in ("llm", "mllm"):
        assert set(measured["mechanism"][mode]) == {"base", "sft", "worst5"}
    assert report["tuning"]["chosen"] == 0.1
    assert set(report["teacher"]["scenes"]["validation"]) == {"count", "colour", "shape", "size"}
    page = (study / "report.md").read_text()
    assert "HeRA worst-5" in page
    for picture in ("mechanism.png", "accuracy.png"):
        assert f"({picture})" in page
        assert (study / picture).stat().st_size > 5000


def test_selected_heads_are_those_that_the_run_aligned(study):
    heads = json.loads((study / "report.json").read_text())["measured"]["heads"]["0"]["worst5"]
    recipe = (study / "runs/worst5-s0/stage2.yaml").read_text()
    assert f"hera_heads: {','.join(heads)}\n" in recipe
    assert json.loads((study / "runs/worst5-s0/stage2/hera/heads.json").read_text())["heads"] == heads


def test_a_rerun_does_nothing_and_other_settings_are_refused(study, capsys):
    before = {path: path.stat().st_mtime_ns for path in (study / "done").rglob("*.json")}
    run_study(study, "smoke")
    assert {path: path.stat().st_mtime_ns for path in (study / "done").rglob("*.json")} == before
    with pytest.raises(ValueError, match=r"other settings .*scenes.*choose another folder"):
        run_study(study, "default")
    with pytest.raises(ValueError, match="holds no study"):
        run_study(study / "data", "smoke")
    with pytest.raises(ValueError, match="holds no study"):
        run_study(study / "report.md", "smoke")
