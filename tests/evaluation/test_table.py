"""The table: what enters it, intervals against a naive bootstrap, the paper's numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llamafactory_hera.backbones.table import LANGUAGE_MODELS
from llamafactory_hera.evaluation import table
from llamafactory_hera.evaluation.suites import SUITES, aggregate, tally
from llamafactory_hera.evaluation.table import PAPER, write_table
from llamafactory_hera.files import read_json, write_json, write_text

KINDS = ("existence", "OCR")


def put(folder: Path, task: str, records: list[dict], **changed) -> None:
    """A result as a run leaves it."""
    result = {"task": task, "n": len(records), "scores": aggregate(task, records)}
    write_json(folder / task / "result.json", result | changed)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_text(folder / task / "records.jsonl", lines)


def share(right: int, of: int = 10) -> list[dict]:
    return [{"right": int(i < right)} for i in range(of)]


def whole_suite(folder: Path, right: int) -> None:
    """The 18 benchmarks with all their samples, the same part of them right in each but MME, which has 100 points."""
    for task in SUITES["paper"]:
        records = share(right)
        if task.name == "hera_mme":
            records = [{"category": "OCR", "group": i // 2, "right": int(i < 2)} for i in range(4)]
        if task.name == "hera_cv_bench":
            records = [record | {"category": kind} for record in records for kind in ("ADE20K", "COCO", "Omni3D")]
        put(folder, task.name, records, n=task.n)


def rows_of(path: Path) -> dict[str, dict]:
    return {row["key"]: row for row in read_json(path)["rows"]}


@pytest.mark.parametrize("task, record", [
    ("hera_gqa", lambda draw, i: {"right": draw(2), "group": f"image {i // 3}"}),
    ("hera_mmvp", lambda draw, i: {"right": draw(2), "group": i // 2}),
    ("hera_mme", lambda draw, i: {"right": draw(2), "group": i // 2, "category": KINDS[i // 20]}),
    ("hera_cv_bench", lambda draw, i: {"right": draw(2), "category": ("ADE20K", "COCO", "Omni3D")[i % 3]}),
    ("hera_chair", lambda draw, i: {"mentioned": 3 + draw(3), "wrong": draw(3), "with_wrong": draw(2)}),
    ("hera_amber_d", lambda draw, i: {"right": draw(2), "no": i % 2, "said_no": draw(2), "both_no": draw(2)}),
    ("hera_hallusionbench", lambda draw, i: {"right": draw(2), "group": i // 2, "category": ("easy", "hard")[i % 2]}),
])  # fmt: skip
def test_resamples_are_scored_as_lists_of_their_records(monkeypatch, task: str, record) -> None:
    monkeypatch.setattr(table, "_RESAMPLES", 20)
    generator = np.random.default_rng(7)
    models = [[record(lambda n: int(generator.integers(n)), i) for i in range(40)] for _ in range(2)]
    found = table._resample(task, [tally(task, records) for records in models], np.random.default_rng(3))
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
            naive = aggregate(task, [one for group in named for one in group])
            assert {name: values[draw] for name, values in scores.items()} == pytest.approx(naive)


def test_differences_are_paired_to_the_first_model(tmp_path: Path) -> None:
    """The same answers: no difference at all; 3 of 40 more are right: the interval holds 7.5, and not 25."""
    right = {"before": share(20, 40), "same": share(20, 40), "more": share(23, 40)}
    for name, records in right.items():
        put(tmp_path / name, "hera_gqa", [{**record, "id": "a\u2028b"} for record in records])  # no end of a line
    write_table(tmp_path, {name: tmp_path / name for name in right}, "paper")
    found = rows_of(tmp_path / "paper.json")["hera_gqa"]["differences"]
    assert found["same"] == [0, 0, 0]
    middle, low, high = found["more"]
    assert middle == pytest.approx(7.5)
    assert 0 <= low < 7.5 < high < 25
    assert set(found) == {"same", "more"}


def test_a_row_of_a_category_counts_its_own_samples(tmp_path: Path) -> None:
    records = [{"right": 1, "category": "shape" if i < 3 else "size"} for i in range(10)]
    put(tmp_path / "one", "hera_demo_questions", records)
    write_table(tmp_path, {"one": tmp_path / "one"}, "demo")
    assert [row["n"] for row in rows_of(tmp_path / "demo.json").values()] == [10, 3, 7]


def test_averages_are_of_whole_categories(tmp_path: Path) -> None:
    """General with MME / 20: (4 · 60 + 100 / 20) / 5; all 18: (17 · 60 + 5) / 18."""
    for name, right in (("before", 6), ("after", 8)):
        whole_suite(tmp_path / name, right)
    (tmp_path / "after/hera_pope/result.json").unlink()
    write_table(tmp_path, {name: tmp_path / name for name in ("before", "after")}, "paper")
    rows = rows_of(tmp_path / "paper.json")
    assert rows["General"]["values"] == pytest.approx({"before": 49})
    assert rows["All"]["values"] == pytest.approx({"before": (17 * 60 + 5) / 18})
    assert rows["Vision"]["values"] == pytest.approx({"before": 60, "after": 80})
    middle, low, high = rows["Vision"]["differences"]["after"]
    assert middle == pytest.approx(20)
    assert low < 20 < high
    assert "All" not in [key for key, row in rows.items() if row["differences"]]


def test_what_is_limited_or_smaller_is_not_compared(tmp_path: Path) -> None:
    whole_suite(tmp_path / "one", 6)
    (tmp_path / "one/hera_gqa/result.json").rename(tmp_path / "one/hera_gqa/result_limit.json")
    put(tmp_path / "one", "hera_vstar", share(5))
    write_table(tmp_path, {"one": tmp_path / "one"}, "paper")
    rows = rows_of(tmp_path / "paper.json")
    assert rows["hera_gqa"]["values"] == {}
    assert (rows["hera_vstar"]["comparable"], rows["hera_vstar"]["why"]) == ("no", "10 of 191 samples")
    assert rows["hera_vstar"]["values"] == {"one": 50}
    assert rows["General"]["values"] == rows["Vision"]["values"] == rows["All"]["values"] == {}
    assert rows["OCR"]["values"] == pytest.approx({"one": 60})


def test_other_samples_have_no_difference(tmp_path: Path) -> None:
    put(tmp_path / "one", "hera_gqa", [{"right": 1, "group": "a"}])
    put(tmp_path / "two", "hera_gqa", [{"right": 1, "group": "b"}])
    write_table(tmp_path, {name: tmp_path / name for name in ("one", "two")}, "paper")
    assert rows_of(tmp_path / "paper.json")["hera_gqa"]["differences"] == {}


def test_the_page_and_the_picture(tmp_path: Path) -> None:
    for name, wrong in (("LLaVA|x", 2), ("HeRA", 1)):
        put(tmp_path / name, "hera_chair", [{"mentioned": 4, "wrong": wrong, "with_wrong": 1}] * 500)
    page, data, picture = write_table(tmp_path, {n: tmp_path / n for n in ("LLaVA|x", "HeRA")}, "hallucination")
    lines = page.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "| benchmark | n | LLaVA\\|x | HeRA | HeRA − LLaVA\\|x | comparable | why not |"
    assert lines[1].count("---") == 7
    assert lines[3] == "| CHAIR: CHAIRi ↓ | 500 | 50.0 | 25.0 | −25.0 (−25.0 … −25.0) | close | " + (
        "which 500 images is not said |"
    )
    assert lines[4].startswith("| AMBER generative |  | – | – | – | close |")
    assert Image.open(picture).width > 500
    assert data == tmp_path / "hallucination.json"


def test_the_papers_columns(tmp_path: Path) -> None:
    whole_suite(tmp_path / "one", 6)
    page, *_ = write_table(tmp_path, {"one": tmp_path / "one"}, "paper", "qwen3_8b")
    text = page.read_text(encoding="utf-8")
    assert "| **Vision, average** |  | **60.0** | **55.9** | **59.5** | **+3.6** | same |  |" in text
    assert "| GQA | 12578 | 60.0 | – | – | – | same |  |" in text


def test_the_papers_numbers() -> None:
    """The nine backbones by the names of their recipes, and the gains in vision that the project page prints."""
    known = read_json(PAPER)["backbones"]
    assert {key: one["title"] for key, one in known.items()} == {
        key: model.title for key, model in LANGUAGE_MODELS.items()
    }
    gains = [round(one["HeRA"]["Vision"] - one["LLaVA"]["Vision"], 1) for one in known.values()]
    assert gains == [2.4, 2.2, 2.3, 1.3, 0.7, 3.6, 1.2, 3.4, 0.7]
    mean = np.average([known["qwen2_5_3b"]["LLaVA"][name] for name in ("General", "Knowledge", "OCR", "Vision")],
                      weights=[5, 4, 4, 5])  # fmt: skip
    assert known["qwen2_5_3b"]["LLaVA"]["All"] == round(mean, 1)
