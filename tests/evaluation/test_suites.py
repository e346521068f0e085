"""Prompts and scores of every task in lmms-eval, and the table: its rows, its intervals, and the paper's numbers."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pytest
import yaml
from lmms_eval.api.task import ConfigurableMessagesTask
from PIL import Image

from llamafactory_hera.backbones.table import LANGUAGE_MODELS
from llamafactory_hera.evaluation import table
from llamafactory_hera.evaluation.suites import SUITES
from llamafactory_hera.evaluation.table import PAPER, write_table
from llamafactory_hera.files import read_json, write_json

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


@pytest.mark.parametrize("name", CASES)
def test_prompts_and_scores_match_the_suite(name, folder, monkeypatch):
    monkeypatch.setenv("AMBER_BASE_DIR", str(folder))
    task, answers = ConfigurableMessagesTask(config=TASKS[name].definition(folder)), CASES[name].answers
    records = [task.process_results(row, [text]) for row, text in zip(task.eval_docs, answers, strict=True)]
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


KINDS = ("existence", "OCR")


def put(folder: Path, name: str, records: list[dict], **changed) -> None:
    """Writes a result as the command does."""
    result = {"task": name, "n": len(records), "scores": TASKS[name].aggregate(records), "records": records}
    write_json(folder / name / "result.json", result | changed)


def write(folder: Path, suite: str, *models: str, paper: str | None = None) -> list[Path]:
    places = {model: {task: folder / model / task.name / "result.json" for task in SUITES[suite]} for model in models}
    return write_table(folder / suite, SUITES[suite], places, paper)


def rows_of(path: Path) -> dict[str, dict]:
    return {row["key"]: row for row in read_json(path)["rows"]}


def share(right: int, of: int = 10) -> list[dict]:
    return [{"right": int(i < right)} for i in range(of)]


def put_all(folder: Path, right: int) -> None:
    """Writes complete results of the 18 benchmarks with the same share of right answers; MME has 100 points."""
    for task in SUITES["paper"]:
        records = share(right)
        if task.name == "mme":
            records = [{"category": "OCR", "group": i // 2, "right": int(i < 2)} for i in range(4)]
        if task.name == "cv_bench":
            records = [record | {"category": kind} for record in records for kind in ("ADE20K", "COCO", "Omni3D")]
        put(folder, task.name, records, n=task.n)


@pytest.mark.parametrize("name, record", [
    ("gqa", lambda draw, i: {"right": draw(2), "group": f"image {i // 3}"}),
    ("mme", lambda draw, i: {"right": draw(2), "group": i // 2, "category": KINDS[i // 20]}),
    ("chair", lambda draw, i: {"mentioned": 3 + draw(3), "wrong": draw(3), "with_wrong": draw(2)}),
    ("amber_d", lambda draw, i: {"right": draw(2), "no": i % 2, "said_no": draw(2), "both_no": draw(2)}),
    ("hallusionbench", lambda draw, i: {"right": draw(2), "group": i // 2, "category": ("easy", "hard")[i % 2]}),
])  # fmt: skip
def test_a_resample_is_scored_like_a_list_of_its_records(monkeypatch, name, record):
    monkeypatch.setattr(table, "_RESAMPLES", 20)
    task, generator = TASKS[name], np.random.default_rng(7)
    models = [[record(lambda n: int(generator.integers(n)), i) for i in range(40)] for _ in range(2)]
    found = table._resample(task, [task.tally(records) for records in models], np.random.default_rng(3))
    again = np.random.default_rng(3)
    for draw in range(20):
        for scores, records in zip(found, models, strict=True):
            groups: dict = {}
            for i, one in enumerate(records):
                groups.setdefault(one.get("group", f"sample {i}"), []).append(one)
            if records is models[0]:
                picked = again.integers(len(groups), size=len(groups))
            named = [[one | {"group": f"{place}"} for one in list(groups.values())[group]]
                     for place, group in enumerate(picked)]  # fmt: skip
            naive = task.aggregate([one for group in named for one in group])
            assert {score: values[draw] for score, values in scores.items()} == pytest.approx(naive)


def test_differences_are_paired_with_the_first_model(tmp_path):
    """Equal answers give no difference; with 3 of 40 more answers right, the interval contains 7.5 but not 25."""
    for name, right in (("before", 20), ("same", 20), ("more", 23)):
        put(tmp_path / name, "gqa", share(right, 40))
    write(tmp_path, "paper", "before", "same", "more")
    found = rows_of(tmp_path / "paper.json")["gqa"]["differences"]
    assert found["same"] == [0, 0, 0]
    middle, low, high = found["more"]
    assert middle == pytest.approx(7.5)
    assert 0 <= low < 7.5 < high < 25
    put(tmp_path / "more", "gqa", [{"right": 1, "group": i} for i in range(40)])  # different groups cannot be paired
    write(tmp_path, "paper", "before", "same", "more")
    assert set(rows_of(tmp_path / "paper.json")["gqa"]["differences"]) == {"same"}


def test_a_row_of_a_category_counts_only_its_own_samples(tmp_path):
    records = [{"right": 1, "category": "shape" if i < 3 else "size"} for i in range(10)]
    put(tmp_path / "one", "demo_questions", records)
    page, *_ = write(tmp_path, "demo", "one")
    assert [row["n"] for row in rows_of(tmp_path / "demo.json").values()] == [10, 3, 7]
    assert page.read_text(encoding="utf-8").startswith("| benchmark | n | one |\n")  # nothing about the paper


def test_averages_need_complete_categories(tmp_path):
    """MME counts divided by 20: General is (4 · 60 + 100 / 20) / 5, and all 18 are (17 · 60 + 5) / 18."""
    for name, right in (("before", 6), ("after", 8)):
        put_all(tmp_path / name, right)
    (tmp_path / "after/pope/result.json").unlink()
    write(tmp_path, "paper", "before", "after")
    rows = rows_of(tmp_path / "paper.json")
    assert rows["General"]["values"] == pytest.approx({"before": 49})
    assert rows["All"]["values"] == pytest.approx({"before": (17 * 60 + 5) / 18})
    assert rows["Vision"]["values"] == pytest.approx({"before": 60, "after": 80})
    middle, low, high = rows["Vision"]["differences"]["after"]
    assert middle == pytest.approx(20)
    assert low < 20 < high
    assert rows["All"]["differences"] == rows["General"]["differences"] == {}

    put(tmp_path / "before", "vstar", share(5))
    write(tmp_path, "paper", "before")
    rows = rows_of(tmp_path / "paper.json")
    assert (rows["vstar"]["comparable"], rows["vstar"]["why"]) == ("no", "10 of 191 samples")
    assert rows["vstar"]["values"] == {"before": 50}
    assert rows["Vision"]["values"] == rows["All"]["values"] == {}
    assert rows["OCR"]["values"] == pytest.approx({"before": 60})


def test_the_page_lists_scores_differences_and_reasons(tmp_path):
    for name, wrong in (("LLaVA|x", 2), ("HeRA", 1)):
        put(tmp_path / name, "chair", [{"mentioned": 4, "wrong": wrong, "with_wrong": 1}] * 500)
    page, _ = write(tmp_path, "hallucination", "LLaVA|x", "HeRA")
    lines = page.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "| benchmark | n | LLaVA\\|x | HeRA | HeRA − LLaVA\\|x | comparable | why not |"
    assert lines[1].count("---") == 7
    cells = "| CHAIR: CHAIRi ↓ | 500 | 50.0 | 25.0 | −25.0 (−25.0 … −25.0) | close |"
    assert lines[3] == f"{cells} the paper does not say which 500 images it uses |"
    assert lines[4].startswith("| AMBER generative |  | – | – | – | close |")


def test_the_page_has_the_papers_columns(tmp_path):
    put_all(tmp_path / "one", 6)
    page, *_ = write(tmp_path, "paper", "one", paper="qwen3_8b")
    text = page.read_text(encoding="utf-8")
    assert "| **Vision, average** |  | **60.0** | **55.9** | **59.5** | **+3.6** | same |  |" in text
    assert "| GQA | 12578 | 60.0 | – | – | – | same |  |" in text


def test_the_papers_numbers_give_its_gains():
    """The nine backbones have the names of their recipes, and the gains in vision of the paper's project page."""
    known = read_json(PAPER)["backbones"]
    assert {key: one["title"] for key, one in known.items()} == {
        key: model.title for key, model in LANGUAGE_MODELS.items()
    }
    gains = [round(one["HeRA"]["Vision"] - one["LLaVA"]["Vision"], 1) for one in known.values()]
    assert gains == [2.4, 2.2, 2.3, 1.3, 0.7, 3.6, 1.2, 3.4, 0.7]
    mean = np.average([known["qwen2_5_3b"]["LLaVA"][name] for name in ("General", "Knowledge", "OCR", "Vision")],
                      weights=[5, 4, 4, 5])  # fmt: skip
    assert known["qwen2_5_3b"]["LLaVA"]["All"] == round(mean, 1)
