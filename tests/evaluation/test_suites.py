"""Prompts and scores of every task in lmms-eval, on local rows with the columns of the real data."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
import yaml
from lmms_eval.api.task import ConfigurableMessagesTask
from PIL import Image

from llamafactory_hera.evaluation.suites import SUITES

TASKS = {task.name: task for suite in SUITES.values() for task in suite}


class Case(NamedTuple):
    """Rows and a model's answers, with the expected prompt and scores."""

    rows: list[dict[str, Any]]
    answers: list[str]
    prompt: str
    scores: dict[str, float]


def _case(rows: list[dict], images: dict[str, bool] | None = None, **expected: Any) -> Case:
    picture = Image.new("RGB", (8, 8), (200, 30, 30))
    columns = {name: picture if filled else None for name, filled in (images or {"image": True}).items()}
    return Case([row | columns for row in rows], **expected)


_ENTRIES = yaml.safe_load(Path(__file__).with_name("benchmarks.yaml").read_bytes())
CASES = {name: _case(**entry) for name, entry in _ENTRIES.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local data of all cases."""
    folder = tmp_path_factory.mktemp("data")
    for name, case in CASES.items():
        split = TASKS[name].definition()["test_split"]
        datasets.DatasetDict({split: datasets.Dataset.from_list(case.rows)}).save_to_disk(folder / name)
    (folder / "metadata").mkdir()
    truth = [{"id": 1005 + i, "truth": answer} for i, answer in enumerate(["no", "no", "no", "yes", "yes"])]
    (folder / "metadata/annotations.json").write_text(json.dumps(truth))
    return folder


def judged(config: dict, answers: list[str]) -> tuple[ConfigurableMessagesTask, list[dict]]:
    """Builds a task of lmms-eval, and returns it with its results for the answers."""
    task = ConfigurableMessagesTask(config=config)
    return task, [task.process_results(row, [text]) for row, text in zip(task.eval_docs, answers, strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_prompts_and_scores_match_the_suite(name, folder, monkeypatch):
    monkeypatch.setenv("AMBER_BASE_DIR", str(folder))
    task, records = judged(TASKS[name].definition(folder), CASES[name].answers)
    [turn] = task.doc_to_messages(task.eval_docs[0])
    assert [part["type"] for part in turn["content"]] == ["image", "text"]
    assert turn["content"][1]["text"] == CASES[name].prompt
    kept = json.loads(json.dumps([record["hera"] for record in records]))
    assert TASKS[name].aggregate(kept) == pytest.approx(CASES[name].scores, abs=0.01)


def test_every_task_is_defined_and_has_a_case():
    assert set(TASKS) - {"chair", "amber_g"} == set(CASES)
    assert [len(SUITES["paper"]), len(SUITES["hallucination"])] == [18, 4]
    for task in TASKS.values():
        config = task.definition()
        assert config["generation_kwargs"]["until"] == []  # lmms-eval's default would end answers at empty lines
        assert bool((config.get("dataset_kwargs") or {}).get("token")) == ("token" in task.needs), task.name


def test_caption_scores_follow_the_formulas_of_their_authors():
    """CHAIR: 1 of 4, 0 of 1 and 0 of 0 objects are not in the image. AMBER: two descriptions."""
    names = ("mentioned", "wrong", "with_wrong")
    chair = [dict(zip(names, counts, strict=True)) for counts in [(4, 1, 1), (1, 0, 0), (0, 0, 0)]]
    assert TASKS["chair"].aggregate(chair) == pytest.approx({"CHAIRs ↓": 100 / 3, "CHAIRi ↓": 20})
    names = [f"{kind}_{what}" for kind in ("chair", "safe_cover", "hallu_cover") for what in ("score", "num")]
    names += ["hallu_score", "non_hallu_num"]
    amber = [dict(zip(names, counts, strict=True)) for counts in [(1, 4, 2, 7, 1, 3, 1, 1), (0, 1, 3, 3, 0, 2, 0, 1)]]
    scores = {"CHAIR ↓": 20, "Cover": 50, "Hal ↓": 50, "Cog ↓": 20}
    assert TASKS["amber_g"].aggregate(amber) == pytest.approx(scores)


def test_without_a_positive_answer_every_score_is_zero():
    records = [{"right": 0, "no": 1, "said_no": 0, "both_no": 0}]
    assert set(TASKS["amber_d"].aggregate(records).values()) == {0.0}
