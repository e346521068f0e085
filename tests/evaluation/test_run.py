"""The command: what is written, resumed and refused."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, DatasetDict
from PIL import Image

from llamafactory_hera.evaluation.card import write_index
from llamafactory_hera.evaluation.lines import read_json_lines
from llamafactory_hera.evaluation.models import model_folders, weights_digest
from llamafactory_hera.evaluation.run import evaluate, missing, run_task
from llamafactory_hera.evaluation.scoring import demo
from llamafactory_hera.evaluation.suites import SUITES

from ..e2e.runner import environment, run_command

TASK = "hera_demo_questions"


def command(model: Path, data: Path, *more: str) -> list[str]:
    return ["llamafactory-hera", "eval", str(model), "--data", str(data), *more]


def result(root: Path, name: str = "result.json") -> dict[str, Any]:
    (file,) = root.glob(f"saves/eval/*/{TASK}/{name}")
    return json.loads(file.read_text())


def lines(root: Path, name: str) -> list[dict[str, Any]]:
    (file,) = root.glob(f"saves/eval/*/{TASK}/{name}")
    return read_json_lines(file)


def answer_half(data: Path, answers: list[dict[str, Any]]) -> None:
    """Makes the model's answer to every second question the right one."""
    said = {line["doc_id"]: line["answer"] for line in answers}
    rows = json.loads((data / "demo_questions.json").read_text())
    for number, row in enumerate(rows):
        row["answer"] = said[number] if number % 2 else "never"
    (data / "demo_questions.json").write_text(json.dumps(rows))


@pytest.mark.slow
def test_scores_are_those_of_the_answers_and_nothing_is_done_twice(folder: Path, data: Path, tmp_path: Path) -> None:
    code, output = run_command(command(folder, data), tmp_path)
    assert code == 0, output
    answers = lines(tmp_path, "answers.jsonl")
    assert sorted(line["doc_id"] for line in answers) == list(range(24))
    answer_half(data, answers)  # other data, the same prompts
    (place,) = (tmp_path / "saves/eval").glob(f"*/{TASK}")
    before = (place / "answers.jsonl").read_text()
    code, output = run_command(command(folder, data), tmp_path)
    assert code == 0, output
    assert (place / "answers.jsonl").read_text() == before
    found = result(tmp_path)
    assert (found["n"], found["limit"], found["scores"]["accuracy"]) == (24, None, 50)
    assert found["prompt"] == next(line["prompt"] for line in answers if line["doc_id"] == 0)
    assert [record["right"] for record in lines(tmp_path, "records.jsonl")] == [0, 1] * 12

    whole = (place / "result.json").read_bytes()
    code, output = run_command(command(folder, data), tmp_path)
    assert (code, "accuracy 50.0" in output, "Loading weights" in output) == (0, True, False), output
    code, output = run_command(command(folder, data, "--limit", "5", "--batch-size", "2"), tmp_path)
    assert code == 0, output
    assert result(tmp_path, "result_limit.json")["n"] == 5
    assert (place / "result.json").read_bytes() == whole
    assert len(lines(tmp_path, "records.jsonl")) == 24
    (place / "result.json").write_bytes(whole[:50])  # of a full disk
    code, output = run_command(command(folder, data), tmp_path)
    assert (code, result(tmp_path)["scores"]) == (0, found["scores"]), output


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(folder: Path, data: Path, tmp_path: Path) -> None:
    run = command(folder, data, "--batch-size", "1")
    process = subprocess.Popen(run, cwd=tmp_path, env=environment(), start_new_session=True)
    deadline = time.monotonic() + 120
    while not [path for path in tmp_path.glob("saves/eval/*/*/answers.jsonl") if path.read_text().count("\n") > 2]:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (place,) = (tmp_path / "saves/eval").glob(f"*/{TASK}")
    kept = (place / "answers.jsonl").read_text()
    assert not (place / "result.json").exists()
    code, output = run_command(run, tmp_path)
    assert code == 0, output
    whole = kept[: kept.rindex("\n") + 1]
    assert whole.count("\n") < 24
    assert (place / "answers.jsonl").read_text().startswith(whole)
    assert sorted(line["doc_id"] for line in lines(tmp_path, "answers.jsonl")) == list(range(24))
    assert result(tmp_path)["n"] == 24


@pytest.mark.slow
def test_what_stops_a_task_is_named_and_its_answers_stay(folder: Path, data: Path, tmp_path: Path) -> None:
    rows = json.loads((data / "demo_questions.json").read_text())
    shortest = min(range(24), key=lambda i: len(rows[i]["question"]))  # one of the last to be asked
    torn = data / rows[shortest]["image"]
    image = torn.read_bytes()
    torn.write_bytes(image[: len(image) // 2])
    code, output = run_command(command(folder, data, "--batch-size", "1"), tmp_path)
    assert code == 1
    failed = output.rpartition("Failed:")[2]
    assert "built, demo_questions: " in failed
    assert re.search(rf"sample \d+ \(from 0\) of {TASK}: its image cannot be read", failed)
    kept = lines(tmp_path, "answers.jsonl")
    assert kept
    torn.write_bytes(image)
    code, output = run_command(command(folder, data, "--batch-size", "1"), tmp_path)
    assert code == 0, output
    assert lines(tmp_path, "answers.jsonl")[: len(kept)] == kept
    assert result(tmp_path)["n"] == 24


@pytest.mark.slow
def test_two_processes_answer_as_one_does(folder: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "two/data")
    for cwd, n in ((tmp_path, "1"), (tmp_path / "two", "2")):
        code, output = run_command(command(folder, cwd / "data"), cwd, NPROC_PER_NODE=n)
        assert code == 0, output
    said = [{line["key"]: line["answer"] for line in lines(tmp_path, "answers.jsonl")}]
    (place,) = (tmp_path / "two/saves/eval").glob(f"*/{TASK}")
    parts = [read_json_lines(path) for path in place.glob("answers*.jsonl")]
    assert [len(part) for part in parts] == [12, 12]
    said.append({line["key"]: line["answer"] for part in parts for line in part})
    assert said[0] == said[1]
    assert lines(tmp_path, "records.jsonl") == lines(tmp_path / "two", "records.jsonl")


@pytest.mark.slow
def test_a_published_dataset_from_our_command_and_from_lmms_eval(folder: Path, tmp_path: Path) -> None:
    import easy_vqa

    questions, answers, numbers = (column[:40] for column in easy_vqa.get_test_questions())
    paths = easy_vqa.get_test_image_paths()
    rows = [
        {"id": str(i), "source": str(number), "image": str(Path(paths[number]).absolute()), "category": "all"}
        | {"question": question, "answer": answer}
        for i, (question, answer, number) in enumerate(zip(questions, answers, numbers, strict=True))
    ]
    (tmp_path / "demo_questions.json").write_text(json.dumps(rows))
    code, output = run_command(command(folder, tmp_path), tmp_path)
    assert code == 0, output
    ours = {line["doc_id"]: line["answer"] for line in lines(tmp_path, "answers.jsonl")}
    right = [ours[i].rstrip(".").lower() == answer for i, answer in enumerate(answers)]
    assert result(tmp_path)["scores"]["accuracy"] == 100 * sum(right) / 40

    answer_half(tmp_path, lines(tmp_path, "answers.jsonl"))
    task = {
        "task": "easy_vqa",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "demo_questions.json")}},
        "test_split": "test",
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "generation_kwargs": {"max_new_tokens": 32},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "tasks").mkdir()
    text = yaml.safe_dump(task) + "doc_to_visual: !function tests.evaluation.test_run.opened\n"
    (tmp_path / "tasks/easy_vqa.yaml").write_text(text)
    plain = ["python", "-m", "lmms_eval", "--model", "hera_vlm", "--model_args", f"pretrained={folder}"]
    plain += ["--tasks", "easy_vqa", "--include_path", "tasks", "--batch_size", "8", "--output_path", "plain"]
    code, output = run_command([*plain, "--log_samples"], tmp_path, PYTHONPATH=os.pathsep.join(sys.path))
    (file,) = (tmp_path / "plain").rglob("*_results.json")
    assert json.loads(file.read_text())["results"]["easy_vqa"]["exact_match,none"] == 0.5, output
    (file,) = (tmp_path / "plain").rglob("*_samples_easy_vqa.jsonl")
    assert {sample["doc_id"]: sample["filtered_resps"] for sample in read_json_lines(file)} == ours


def opened(row: dict[str, Any]) -> list[Any]:
    return [Image.open(row["image"])]


def test_what_cannot_be_evaluated_is_named_before_anything_runs(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, base in (("orphan", "saves/gone"), ("unnamed", ""), ("bare", str(folder))):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    shutil.copytree(folder, "torn", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(folder, "cut")
    Path("cut/config.json").write_text("{")
    shutil.copytree(folder, "mute", ignore=shutil.ignore_patterns("*processor_config.json"))
    given = {"models": [str(folder)], "suite": "demo", "data": data}
    for changed, message in (
        ({"models": []}, "MODEL: none is named"),
        ({"models": ["nowhere"]}, "MODEL: the folder nowhere does not exist"),
        ({"models": [str(data)]}, "holds no config.json. Give the folder"),
        ({"models": ["orphan"]}, "base_model_name_or_path of the adapter orphan: .*saves/gone"),
        ({"models": ["unnamed"]}, "adapter unnamed: it names no model"),
        ({"models": ["torn"]}, "MODEL: torn holds no weights.*Copy or download the model again"),
        ({"models": ["cut"]}, "MODEL: cut/config.json is not JSON"),
        ({"models": ["mute"]}, "MODEL: the processor of mute cannot be loaded; copy or download it again"),
        ({"models": ["bare"]}, "MODEL: the adapter bare holds no adapter_model.safetensors"),
        ({"models": [str(folder)] * 2, "names": ["a", "a"]}, "--names: two models have the same name"),
        ({"names": ["a", "b"]}, "--names: 2 names for 1 models"),
        ({"suite": "vision"}, "--suite: vision is unknown; choose demo"),
        ({"tasks": ["demo_questions,pope"]}, "--tasks: pope is not in the suite demo; it has demo_questions"),
        ({"paper": "gpt_2"}, "--paper: gpt_2 is not a backbone of the paper; choose .*qwen3_8b"),
        ({"output": "orphan/adapter_config.json/x"}, "--output: orphan.* cannot be written"),
        ({"data": "nowhere"}, "--data: nowhere is not a folder"),
        ({"limit": 0}, "--limit: 0 is not a number of samples"),
        ({"batch_size": 0}, "--batch-size: 0 is not a number of samples"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(**given | changed)
    assert not (tmp_path / "saves").exists()
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(ValueError, match=r'pip install "llamafactory-hera\[eval\]"'):
        evaluate(**given)


def test_a_folder_in_use_and_a_task_without_data_are_named_and_end_in_one(
    folder: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    assert evaluate([str(folder)], "demo", output=tmp_path / "eval") == 1
    assert "built, demo_questions: its data: give --data" in capfd.readouterr().err
    assert list((tmp_path / "eval").iterdir()) == []
    place = tmp_path / f"eval/built-{weights_digest(model_folders(str(folder)))[:8]}/{TASK}"
    place.mkdir(parents=True)
    with (place / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert evaluate([str(folder)], "demo", data=data, output=tmp_path / "eval") == 1
    assert f"another evaluation writes into {place}" in capfd.readouterr().err
    assert [path.name for path in place.iterdir()] == [".lock"]


WHOLE = {"source": "a", "image": "a.png", "question": "Q?", "answer": "yes", "category": "exist"}


@pytest.mark.parametrize("rows, message", [
    ([{**WHOLE, "answer": 4}], "row 0 (from 0) of {} is not one of demo_questions: answer is 4; write a text"),
    ([WHOLE, {**WHOLE, "question": None}], "row 1 (from 0) of {} is not one of demo_questions: question is None"),
    ([{name: value for name, value in WHOLE.items() if name != "source"}], "it has no column 'source'"),
    ([{**WHOLE, "category": "accuracy"}], "category: accuracy is what the score of all questions is called"),
])  # fmt: skip
def test_questions_that_are_not_whole_are_named_before_a_model_is_loaded(rows, message: str, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "demo_questions.json").write_text(json.dumps(rows))
    job = {"folder": str(tmp_path), "suite": "demo", "task": TASK, "data": str(tmp_path), "limit": None}
    with pytest.raises(ValueError, match=re.escape(message.format(tmp_path / "demo_questions.json"))):
        run_task(job)


def test_a_benchmarks_rows_are_tried_before_a_model_is_loaded(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": "Q?", "answer": answer, "image_source": "x"} for answer in ("yes", None)]
    job = {"folder": str(tmp_path), "suite": "paper", "task": "hera_pope", "data": str(tmp_path), "limit": None}
    (tmp_path / "pope.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"row 1 \(from 0\) of .*pope\.json is not one of pope: .*NoneType"):
        run_task(job)
    del rows[0]["image_source"]
    (tmp_path / "pope.json").write_text(json.dumps(rows[:1]))
    with pytest.raises(ValueError, match=r"row 0 .*: it has no column 'image_source'"):
        run_task(job)


def test_a_full_stop_in_a_reference_is_of_no_matter() -> None:
    assert demo({**WHOLE, "answer": "Yes."}, "yes")
    assert not demo({**WHOLE, "answer": "Yes."}, "no")


def test_what_lies_in_data_is_opened_before_anything_runs(tmp_path: Path) -> None:
    (task,) = SUITES["demo"]
    path = tmp_path / "demo_questions.json"
    for text, message in (
        (json.dumps([WHOLE]), "is 'a.png', not a file's path from there"),
        (json.dumps([{**WHOLE, "image": 5}]), "image of row 0 (from 0)"),
        ("", "is not JSON"),
        ("[]", "is not a list of rows"),
        ('{"rows": []}', "is not a list of rows"),
    ):
        path.write_text(text)
        assert message in missing(task, tmp_path)[0]
    path.unlink()
    path.with_suffix("").mkdir()
    assert "is not a folder of save_to_disk" in missing(task, tmp_path)[0]
    rows = Dataset.from_list([WHOLE])
    rows.save_to_disk(str(path.with_suffix("")))
    assert "holds no split test" in missing(task, tmp_path)[0]
    shutil.rmtree(path.with_suffix(""))
    DatasetDict({"test": rows}).save_to_disk(str(path.with_suffix("")))
    assert missing(task, tmp_path) == []


def test_the_digest_is_of_what_decides_answers(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    first = weights_digest([folder])
    (tmp_path / "copy/README.md").write_text("of no matter")
    assert weights_digest([tmp_path / "copy"]) == first
    weights = tmp_path / "copy/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = weights_digest([tmp_path / "copy"])
    (tmp_path / "copy/chat_template.jinja").write_text("{{ messages }}")
    assert len({first, changed, weights_digest([tmp_path / "copy"])}) == 3


@pytest.mark.parametrize(
    "need, lacks",
    [
        ("token", "a token of the hub"),
        ("data", "its data: give --data"),
        ("nltk:corpora/wordnet", "nltk's corpora/wordnet"),
        ("spacy:en_core_web_lg", "spaCy's en_core_web_lg"),
        ("env:AMBER_BASE_DIR", "the folder that AMBER_BASE_DIR names"),
    ],
)
def test_the_check_says_what_a_task_lacks(
    need: str, lacks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "AMBER_BASE_DIR"):
        monkeypatch.delenv(name, raising=False)
    task = replace(SUITES["paper"][1], needs=(need,))
    assert any(what.startswith(lacks) for what in missing(task, tmp_path))
    (tmp_path / "pope.json").write_text('[{"image": "pope.json"}]')
    assert (missing(task, tmp_path) == []) == (need in ("token", "data"))


def test_scores_enter_the_card_of_a_run_and_no_others(tmp_path: Path) -> None:
    other, task, *_ = SUITES["paper"]
    text = "---\nlicense: apache-2.0\ntags:\n- hera\n---\n\n# A run\n\n<!-- llamafactory-hera -->\nSection\n"
    (tmp_path / "README.md").write_text(text)
    write_index(tmp_path, {task: {"scores": {"accuracy": 81.234}}})
    assert (tmp_path / "README.md").read_text() == text  # of a model that was not trained here
    (tmp_path / "trainer_state.json").touch()
    write_index(tmp_path, {task: {"scores": {"accuracy": 81.234}}, other: {"scores": {"accuracy": 60.0}}})
    write_index(tmp_path, {task: {"scores": {"accuracy": 82.0, "f1": 1.0}}})
    page = (tmp_path / "README.md").read_text()
    (index,) = yaml.safe_load(page.split("---")[1])["model-index"]
    assert [(each["dataset"]["name"], each["metrics"][0]["value"]) for each in index["results"]] == [
        ("POPE", 82.0),
        ("GQA", 60.0),
    ]
    assert page.endswith(text.partition("# A run")[2])
    assert yaml.safe_load(page.split("---")[1])["tags"] == ["hera"]


@pytest.mark.slow
def test_the_check_takes_no_time_and_loads_nothing(data: Path, tmp_path: Path) -> None:
    code, output = run_command(command(Path("gone"), data, "--check"), tmp_path)
    assert (code, output) == (0, "demo_questions: ready\n")
    code = "import sys; from llamafactory_hera.evaluation.run import evaluate; evaluate([], 'paper', check=True); "
    status, output = run_command(
        ["python", "-c", f"{code}assert not {{'torch', 'matplotlib'}} & set(sys.modules)"], tmp_path
    )
    assert status == 0, output
    assert "\npope: its data: HF_HUB_OFFLINE is set" in output
