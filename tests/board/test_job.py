"""Scoring jobs as processes, the commands of a comparison, and the reason of a run that has failed."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml

from llamafactory_hera.integrations.llamaboard.job import SELECT, Job, compare_job, recipe_job
from llamafactory_hera.teachers.fill import PROGRESS, Progress


def job(folder: Path, *commands: list[str]) -> Job:
    return Job(SELECT, commands, folder, "en")


def ended(started: Job, timeout: float = 120) -> Job:
    until = time.monotonic() + timeout
    while started.running and time.monotonic() < until:
        time.sleep(0.05)
    assert not started.running
    return started


def test_commands_run_in_order_until_one_fails(tmp_path: Path) -> None:
    started = job(tmp_path, ["--version"], ["report", "missing.json", "other.json"], ["--version"])
    started.start()
    ended(started)
    assert started.code == 2
    version, error = started.output().splitlines()
    assert version.startswith("llamafactory-hera ")
    assert "missing.json cannot be read" in error
    assert not started.aborted


def test_a_job_is_aborted_with_its_processes(tmp_path: Path) -> None:
    others = set(psutil.Process().children(recursive=True))  # of tests before this one
    started = job(tmp_path, ["demo", "--output", str(tmp_path / "demo"), "--size", "demo"], ["--version"])
    started.start()
    until = time.monotonic() + 60
    while not (processes := set(psutil.Process().children(recursive=True)) - others) and time.monotonic() < until:
        time.sleep(0.05)
    assert processes
    started.abort()
    ended(started)
    assert started.aborted
    assert started.code != 0
    assert not psutil.wait_procs(processes, timeout=10)[1]
    assert "llamafactory-hera " not in started.output()  # the command behind it was not run
    started.abort()  # does nothing


def test_progress_is_the_last_line_that_a_bar_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    started = job(tmp_path)
    started.log.parent.mkdir()
    started.progress_log.touch()
    assert started.progress() is None
    monkeypatch.setenv(PROGRESS, str(started.progress_log))
    for phase, done in (("teacher", 96), ("scoring pass", 64)):
        bar = Progress(phase, 96)
        bar.update(done)
        bar.close()
        assert started.progress() == (phase, done, 96)
    with started.progress_log.open("a") as lines:
        lines.write('["scoring pass", 9')  # by a process that was killed
    assert started.progress() == ("scoring pass", 64, 96)
    started.log.write_text("[transformers] a warning\n" + capfd.readouterr().err)
    assert started.output() == "[transformers] a warning"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run."""
    (tmp_path / "training_args.yaml").write_text(yaml.safe_dump({"stage": "hera"}))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "hera").mkdir()
    return tmp_path


def test_a_selection_runs_a_recipe_of_the_page_s_arguments(tmp_path: Path) -> None:
    args = {"stage": "hera", "output_dir": str(tmp_path / "run"), "hera_k": 3, "empty": "", "unset": None}
    started = recipe_job(SELECT, args, "en")
    assert started.commands == [["select", str(tmp_path / "run/hera/select.yaml")]]
    content = yaml.safe_load(Path(started.commands[0][1]).read_text())
    assert content == {"stage": "hera", "output_dir": args["output_dir"], "hera_k": 3}
    assert started.log == tmp_path / "run/hera/select.log"


def test_a_comparison_scores_the_trained_model_as_the_selection_did(run: Path) -> None:
    facts = {"mode": "mllm", "samples_asked": 64, "k": 5, "seed": 3, "stored_dtype": "fp16", "pooling": "mean"}
    content = {"heads": ["L0H1"], "provenance": facts | {"similarity": "dot", "scores": [[0.1, 0.2]]}}
    (run / "hera/heads.json").write_text(json.dumps(content))
    score, report = compare_job(run, "en").commands
    assert score[:2] == ["score", str(run)]
    expected = ["mode=mllm", "samples=64", "k=5", "seed=3", "dtype=fp16"]
    assert {f"hera_select_{setting}" for setting in expected} <= set(score)
    assert {"hera_pooling=mean", "hera_similarity=dot"} <= set(score)
    assert report[1:3] == [str(run / "hera/heads.json"), str(run / "hera/scores.json")]
    assert report[-2:] == ["--html", str(run / "hera/report.html")]


def test_heads_without_scores_have_the_model_before_training_scored_first(run: Path) -> None:
    (run / "hera/heads.json").write_text('{"heads": ["L0H1"]}')
    before, score, report = compare_job(run, "en").commands
    assert before == ["score", str(run / "training_args.yaml"), "--output", str(run / "hera/before.json")]
    assert score[1] == str(run)
    assert report[1] == str(run / "hera/before.json")


@pytest.mark.parametrize("missing", ["config.json", "training_args.yaml"])
def test_there_is_nothing_to_compare_before_a_run_has_finished(missing: str, run: Path) -> None:
    (run / missing).unlink()
    assert compare_job(run, "en") is None


FAILED = """Failed. Exit code: 1

```
[INFO] loading
ValueError: an earlier one that was handled
Traceback (most recent call last):
  File "cli.py", line 1, in main
    raise ValueError(
{last}
[INFO] the end
```
"""


@pytest.mark.parametrize(
    ("text", "lang", "shown"),
    [
        (FAILED.format(last="ValueError: hera_heads: wrong"), "en", "ValueError: hera_heads: wrong"),
        (FAILED.format(last="[rank0]: ValueError: hera_heads: wrong"), "en", "ValueError: hera_heads: wrong"),
        ("训练出错。 Exit code: 1\n\n```\nRuntimeError: 内存\n```\n", "zh", "RuntimeError: 内存"),
        ("Finished.\n\n```\nValueError: no\n```", "en", None),
        (FAILED.split("Value")[0], "en", None),
        ("Aborted, wait", "en", None),
    ],
)
def test_the_last_error_of_a_failed_run_comes_first(text: str, lang: str, shown: str | None) -> None:
    from llamafactory_hera.integrations.llamaboard.panel import reason_first

    head, gap, rest = text.partition("\n\n")
    assert reason_first(text, lang) == (text if shown is None else f"{head}{gap}**{shown}**{gap}{rest}")


def test_what_is_shown_of_a_run(tmp_path: Path) -> None:
    from llamafactory_hera.integrations.llamaboard import panel

    elements = dict.fromkeys(panel._CHANGED)
    manager = SimpleNamespace(get_elem_by_id=lambda id_: id_)
    runner = SimpleNamespace(_parse_train_args=lambda data: {"output_dir": tmp_path})
    shown = {"eval.output_box": FAILED.format(last="ValueError: wrong")}
    made = panel.Panel(SimpleNamespace(manager=manager, runner=runner), elements)
    # the evaluation tab sends no stage: as it is
    assert made.with_reason(shown, {"top.lang": "en"}) == shown
    assert made.refusal({"top.lang": "en"}, do_train=False) == ""
    hera = made.with_reason(shown, {"top.lang": "en", "train.training_stage": "HeRA"})
    assert "**ValueError: wrong**" in hera["eval.output_box"]

    curves = {"train.loss_viewer": "curves"}
    log, started = tmp_path / "trainer_log.jsonl", tmp_path / "llamaboard_config.yaml"
    log.touch()
    started.touch()
    for age, kept in ((0, True), (60, False)):  # of what is in the log
        os.utime(log, (time.time() + 1 - age,) * 2)
        seen = made.with_reason(curves, {"top.lang": "en", "train.training_stage": "HeRA"})
        assert (seen == curves) is kept
        assert kept or seen["train.loss_viewer"].value is None
