"""Intervals, exact match, and the report of several seeds from files as a finished study leaves them."""

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
from scipy import stats

from llamafactory_hera.files import read_json, write_json
from llamafactory_hera.heads.targets import Targets
from pool import mark_of
from results import accuracy, mean_interval, paired_interval
from run import write_study_report
from settings import CONTROL, KEY, MODES, SIZES, TUNING, Seed, final_run
from world import CATEGORIES

SEEDS, METHODS = (1, 2, 3), ("sft", "worst5", "cmar")
SETTINGS = replace(SIZES["default"], seeds=SEEDS, methods=METHODS)
N_LAYERS, N_HEADS = 2, 6
#: Of the four questions of each category, how many a method's run gets right, by seed.
RIGHT = {"sft": (1, 2, 2), "worst5": (2, 3, 3), "cmar": (1, 1, 4)}


def scores(shift: float) -> list[list[float]]:
    return [
        [round(0.1 + 0.01 * (layer * N_HEADS + head) + shift, 4) for head in range(N_HEADS)]
        for layer in range(N_LAYERS)
    ]


def write_scores(path: Path, shift: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"scores": scores(shift), "layer_scores": [0.2, 0.3], "samples": 50, "k": 10, "chance_level": 10 / 49}
    Targets(Targets.parse("L0H0").items, facts).save(path)  # any head: the study takes its own from the scores


def write_run(root: Path, key: list[dict], method: str, seed: int) -> None:
    run = final_run(method, seed)
    right = RIGHT[method][SEEDS.index(seed)]
    lines = []
    for number, entry in enumerate(key):
        answer = entry["answer"] if number % 4 < right else "wrong"
        lines.append(json.dumps({"prompt": "", "predict": f" {answer}", "label": entry["answer"]}))
    folder = root / run.stage(2)
    folder.mkdir(parents=True)
    (root / run.predictions).write_text("\n".join(lines))
    factor = 1.0 + 0.1 * METHODS.index(method)
    write_json(folder / "train_results.json", {"train_runtime": 100.0 * seed * factor})
    write_json(folder / "trainer_state.json", {"global_step": 100})
    for mode in MODES:
        write_scores(root / run.scores(mode), 0.02 * METHODS.index(method) + 0.001 * seed)
    for number, unit in enumerate(("stage1", "stage2", "score")):
        process = {"command": "", "wall_s": 1.0, "cpu_s": 50.0 * factor, "peak_mib": 900.0}
        mark = {"kind": unit, "started": 1000 + 10 * number, "wall_s": 10.0, "processes": [process]}
        write_json(mark_of(root, f"{run.path}/{unit}"), mark | {"workers": 2, "versions": {"torch": "2.11.0"}})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    key = [
        {"image": "a.png", "category": category, "question": f"{category}?", "answer": str(number % 2)}
        for category in CATEGORIES
        for number in range(4)
    ]
    write_json(tmp_path / KEY, {"study_test": key})
    training = [
        {"messages": [{"content": f"<image>\n{category}?"}, {"content": answer}]}
        for category in CATEGORIES
        for answer in ("1", "1", "0", "red")
    ]
    write_json(tmp_path / "data/study_train.json", training)
    shares = dict.fromkeys((*CATEGORIES, "mean"), 0.5)
    tried = [{"weight": 0.1, "method": "worst5", "seed": 100, "accuracy": shares}]
    write_json(tmp_path / TUNING, {"chosen": 0.1, "tried": tried})
    cell = {"accuracy": 0.9, "majority": 0.4}
    known = dict.fromkeys(("count", "colour", "shape", "size"), cell)
    write_json(tmp_path / CONTROL, {"k": 10, "scenes": {"validation": known}})
    for seed in SEEDS:
        write_scores(tmp_path / Seed(seed).heads, 0.0)
        for mode in MODES:
            write_scores(tmp_path / Seed(seed).scores("test", mode), -0.01)
        write_json(mark_of(tmp_path, f"{Seed(seed).folder}/selection"), {"kind": "s", "started": 0, "wall_s": 5.0})
        for method in METHODS:
            write_run(tmp_path, key, method, seed)
    return tmp_path


def measured(root: Path) -> dict:
    write_study_report(root, SETTINGS, 1, "default")
    return read_json(root / "report.json")["measured"]


def test_accuracy_is_paired_by_seed(root):
    found = measured(root)["accuracy"]["worst5"]["colour"]
    assert found["by_seed"] == {"1": 0.5, "2": 0.75, "3": 0.75}
    assert found["mean"] == pytest.approx(2 / 3)
    difference = found["minus_baseline"]
    assert (difference["mean"], difference["low"], difference["high"]) == pytest.approx((0.25, 0.25, 0.25))
    assert difference["count"] == 3


def test_the_mechanism_is_compared_with_before_and_with_the_baseline(root):
    found = measured(root)["mechanism"]["llm"]
    worst = mean(0.1 + 0.01 * head for head in range(5))
    assert found["base"]["worst5"]["mean"] == pytest.approx(worst - 0.01)
    assert "minus_base" not in found["base"]["worst5"]
    assert found["worst5"]["worst5"]["minus_base"]["mean"] == pytest.approx(0.01 + 0.02 + 0.002)
    assert found["worst5"]["top5"]["minus_baseline"]["mean"] == pytest.approx(0.02)
    assert found["sft"]["all"]["minus_base"]["low"] > 0


def test_costs_are_ratios_of_the_runs_of_a_seed(root):
    found = measured(root)["cost"]["cmar"]
    assert found["step_s"]["mean"] == pytest.approx(2.4)
    assert found["step_s"]["over_baseline"]["low"] == pytest.approx(1.2)
    assert found["process_peak_mib"]["over_baseline"]["mean"] == 1


def test_readers_without_the_image_and_the_order_of_heads_are_in_the_record(root):
    found = measured(root)
    assert found["floor"]["text_alone"] == dict.fromkeys((*CATEGORIES, "mean"), 0.5)
    assert found["floor"]["one_answer"]["mean"] == 0.5
    assert found["selection"]["rank_correlation"]["by_seed"] == pytest.approx({"1": 1, "2": 1, "3": 1})
    page = (root / "report.md").read_text()
    assert "the question alone" in page
    assert "torch 2.11.0" in page
    assert "; 2 runs side by side" in page  # as the units say, not this call
    assert "Failed" not in page


def test_a_run_that_failed_is_named_and_the_others_stay(root):
    mark_of(root, "runs/cmar-s2/score").unlink()
    mark_of(root, "runs/worst5-s3/score").unlink()
    found = measured(root)
    assert found["missing"] == ["worst5-s3", "cmar-s2"]
    assert found["runs"] == 7
    assert found["accuracy"]["cmar"]["colour"]["by_seed"] == {"1": 0.25, "3": 1.0}
    assert found["accuracy"]["cmar"]["colour"]["minus_baseline"]["count"] == 2
    assert "**Failed, and in no row below: worst5-s3, cmar-s2.**" in (root / "report.md").read_text()
    for seed in SEEDS:
        mark_of(root, f"runs/cmar-s{seed}/score").unlink(missing_ok=True)
    assert "cmar" not in measured(root)["accuracy"]


# 97.5 % points of Student's t, from a printed table
T_TABLE = {1: 12.706, 2: 4.303, 4: 2.776, 7: 2.365}


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_against_the_formula_and_scipy(count):
    values = [0.3 + 0.1 * math.sin(5 * i) for i in range(count)]
    found = mean_interval(values)
    mean = sum(values) / count
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    half = T_TABLE[count - 1] * deviation / math.sqrt(count)
    assert found.mean == pytest.approx(mean)
    assert (found.low, found.high) == (pytest.approx(mean - half, abs=1e-4), pytest.approx(mean + half, abs=1e-4))
    theirs = stats.t.interval(0.95, count - 1, loc=mean, scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx(theirs)


def test_differences_are_taken_seed_by_seed():
    baseline = {0: 0.1, 1: 0.5, 2: 0.9}
    # the seeds differ much, the methods by little: unpaired the interval would be wide
    found = paired_interval({2: 0.92, 0: 0.12, 1: 0.51}, baseline)
    theirs = stats.ttest_rel([0.12, 0.51, 0.92], [0.1, 0.5, 0.9]).confidence_interval(0.95)
    assert found.mean == pytest.approx(0.05 / 3)
    assert (found.low, found.high) == pytest.approx(tuple(theirs))
    assert found.high - found.low < 0.05


def test_one_value_has_no_interval():
    found = mean_interval([0.5])
    assert (found.mean, found.low, found.high, found.count) == (0.5, None, None, 1)


def rows(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"predict": predicted, "label": f"{label}\n"} for predicted, label in pairs]


ANSWERS = [
    {"category": "colour", "answer": "red"},
    {"category": "colour", "answer": "red"},
    {"category": "colour", "answer": "red"},
    {"category": "size", "answer": "the red circle"},
]


def test_only_the_exact_answer_counts():
    given = rows((" red\n", "red"), ("red circle", "red"), ("Red", "red"), ("the red circle", "the red circle"))
    found = accuracy(given, ANSWERS)
    assert found["colour"] == pytest.approx(1 / 3)
    assert found["size"] == 1
    assert found["mean"] == pytest.approx((1 / 3 + 1) / 2)  # each category counts the same


def test_predictions_of_another_dataset_are_refused():
    with pytest.raises(ValueError, match="row 3"):
        accuracy(rows(("red", "red"), ("red", "red"), ("red", "red"), ("red", "red")), ANSWERS)
    with pytest.raises(ValueError, match="1 for 4 questions"):
        accuracy(rows(("red", "red")), ANSWERS)
