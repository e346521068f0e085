"""The ``eval`` command: its output, the reuse of results, and refused input."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llamafactory_hera.cli import main
from llamafactory_hera.evaluation.run import missing
from llamafactory_hera.evaluation.suites import SUITES

from ..e2e.runner import run_command


def command(model: Path, data: Path, *more: str) -> list[str]:
    return ["eval", str(model), "--data", str(data), "--output", str(data.parent / "eval"), *more]


def result(data: Path, task: str = "demo_questions") -> dict[str, Any]:
    """The newest result of a task."""
    files = sorted((data.parent / "eval").glob(f"*/{task}-*/result.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(files[-1].read_text())


def answers(data: Path) -> list[dict[str, Any]]:
    """The complete lines of all answer files."""
    text = "".join(file.read_text() + "\n" for file in (data.parent / "eval").glob("*/answers*.jsonl"))
    return [json.loads(line) for line in text.split("\n") if line.endswith("}")]


@pytest.mark.slow
def test_scores_follow_from_the_answers_and_nothing_runs_twice(folder, data, capfd, monkeypatch):
    assert main(command(folder, data)) == 0
    first = answers(data)
    assert sorted(line["doc_id"] for line in first) == list(range(24))
    given = {line["doc_id"]: line["answer"] for line in first}
    rows = json.loads((data / "demo_questions.json").read_text())
    for number, row in enumerate(rows):  # every second answer is right; the prompts stay the same
        row["answer"] = given[number] if number % 2 else "never"
    (data / "demo_questions.json").write_text(json.dumps(rows))
    assert main(command(folder, data)) == 0
    assert answers(data) == first
    found = result(data)
    assert (found["n"], found["limit"], found["scores"]["accuracy"]) == (24, None, 50)
    assert [record["right"] for record in found["records"]] == [0, 1] * 12
    assert "| Held-out questions: accuracy | 24 | 50.0 |" in capfd.readouterr().out

    assert main(command(folder, data, "--limit", "5", "--batch-size", "2")) == 0
    assert (result(data)["n"], len(answers(data))) == (5, 24)
    table = (data.parent / "eval/demo.md").read_text()
    assert "| 24 | 50.0 |" in table
    monkeypatch.setattr("llamafactory_hera.evaluation.vlm.HeraVLM", None)
    assert main(command(folder, data)) == 0  # without a model
    assert (data.parent / "eval/demo.md").read_text() == table


@pytest.mark.slow
def test_a_file_of_questions_is_a_separate_suite_with_any_name(folder, data):
    (data / "demo_questions.json").rename(data / "paper.json")
    run, output = data.parent / "run", data.parent / "eval"
    shutil.copytree(folder, run)
    (run / "trainer_log.jsonl").touch()
    assert main(["eval", str(run), "--suite", str(data / "paper.json"), "--output", str(output)]) == 0
    table = (output / "own_paper.md").read_text()
    assert "\n| paper: accuracy | 24 |" in table
    assert "average" not in table  # only the paper's suite has an average
    assert result(data, "paper")["settings"]["image_newline"] is True  # LLaMA-Factory wrote the log


@pytest.mark.slow
def test_a_failed_task_is_reported_and_its_answers_are_kept(folder, data, capfd):
    rows = json.loads((data / "demo_questions.json").read_text())
    broken = data / min(rows, key=lambda row: len(row["question"]))["image"]  # short questions are asked last
    image = broken.read_bytes()
    broken.write_bytes(image[: len(image) // 2])
    assert main(command(folder, data, "--batch-size", "1")) == 1
    failed = capfd.readouterr().err.rpartition("Failed:\n")[2]
    assert re.fullmatch(r"built, demo_questions: sample \d+ \(from 0\) of \w+: replace its image \(.*\n", failed)
    kept = answers(data)
    broken.write_bytes(image)
    assert main(command(folder, data, "--batch-size", "1")) == 0
    assert 0 < len(kept) < 24
    assert answers(data)[: len(kept)] == kept


@pytest.mark.slow
def test_two_processes_answer_like_one(folder, data, tmp_path):
    shutil.copytree(data, tmp_path / "two/data")
    assert main(command(folder, data)) == 0
    run = ["llamafactory-hera", *command(folder, tmp_path / "two/data")]
    code, output = run_command(run, tmp_path, FORCE_TORCHRUN="1", NPROC_PER_NODE="2")
    assert code == 0, output
    files = (tmp_path / "two/eval").glob("*/answers*.jsonl")
    assert [file.read_text().count('"key"') for file in files] == [12, 12]
    one, two = ({line["key"]: line["answer"] for line in answers(each)} for each in (data, tmp_path / "two/data"))
    assert one == two
    assert result(data)["records"] == result(tmp_path / "two/data")["records"]


def test_bad_arguments_are_refused_in_one_line(folder, data, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("orphan").mkdir()
    Path("orphan/adapter_config.json").write_text('{"base_model_name_or_path": "saves/gone"}')
    for arguments, message in (
        ([], "MODEL: give one or more models"),
        (["nowhere"], "MODEL: nowhere is not a folder"),
        (["orphan"], "base_model_name_or_path of the adapter orphan: saves/gone is not a folder"),
        ([str(folder), str(folder)], "each with a different name"),
        ([str(folder), "--suite", "vision"], "--suite: vision is unknown; choose demo, paper, hallucination, or a"),
        ([str(folder), "--tasks", "pope"], "--tasks: pope is not in the suite demo; choose from demo_questions"),
        ([str(folder), "--data", "nowhere"], "nowhere is not a folder; give the folder that contains demo_questions"),
    ):
        assert main(["eval", *arguments]) == 2
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("llamafactory-hera:")]
        assert message in line


@pytest.mark.parametrize("need, lacks", [
    ("token", "a hub token"),
    ("data", "its data (set --data"),
    ("nltk:corpora/wordnet", "nltk's corpora/wordnet"),
    ("spacy:en_core_web_lg", "spaCy's en_core_web_lg"),
    ("env:AMBER_BASE_DIR", "AMBER's data (set AMBER_BASE_DIR"),
])  # fmt: skip
def test_the_check_lists_what_a_task_lacks(need, lacks, tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "AMBER_BASE_DIR"):
        monkeypatch.delenv(name, raising=False)
    task = replace(SUITES["paper"][1], needs=(need,))
    assert any(what.startswith(lacks) for what in missing(task, tmp_path))
    (tmp_path / "pope").mkdir()
    assert (missing(task, tmp_path) == []) == (need in ("token", "data"))


@pytest.mark.parametrize("changes, message", [
    ({}, ""), ({"image": "b.png"}, "b.png"), ({"answer": 4}, "'int' object has no attribute"),
])  # fmt: skip
def test_the_check_reads_local_rows(changes, message, tmp_path):
    row = {"source": "a", "image": "a.png", "question": "Q?", "answer": "yes", "category": "exist"}
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "demo_questions.json").write_text(json.dumps([row, row | changes]))
    assert message in "".join(missing(SUITES["demo"][0], tmp_path))
    assert bool(message) == bool(missing(SUITES["demo"][0], tmp_path))
