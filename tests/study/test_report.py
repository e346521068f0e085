"""Intervals, the choice of the weight, methods as HeRA takes them, and jobs in processes of their own."""

import math
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

from llamafactory_hera.files import read_json
from report import mean_interval, paired_interval, shown
from settings import BATCHES, METHODS, PRIMARY, SIZES
from train import hera_config

from .conftest import main_module

T_TABLE = {1: 12.706, 2: 4.303, 4: 2.776, 7: 2.365}  # 97.5 % points of Student's t, from a printed table
main = main_module()


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_against_the_formula_and_scipy(count):
    values = [0.3 + 0.1 * math.sin(5 * i) for i in range(count)]
    found = mean_interval(values)
    mean = sum(values) / count
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    half = T_TABLE[count - 1] * deviation / math.sqrt(count)
    assert found == pytest.approx((mean, mean - half, mean + half), abs=1e-4)
    assert found[1:] == pytest.approx(stats.t.interval(0.95, count - 1, loc=mean, scale=stats.sem(values)))


def test_differences_and_ratios_are_taken_seed_by_seed():
    baseline = {0: 0.1, 1: 0.5, 2: 0.9, 3: 0.2}
    # the seeds differ much, the methods by little: unpaired the interval would be wide
    found = paired_interval({2: 0.92, 0: 0.12, 1: 0.51}, baseline)
    theirs = stats.ttest_rel([0.12, 0.51, 0.92], [0.1, 0.5, 0.9]).confidence_interval(0.95)
    assert found == pytest.approx((0.05 / 3, *theirs))
    assert shown(found, 1, 100, "+") == "+1.7 [+0.2, +3.1]"
    assert shown(paired_interval({2: 1.8, 0: 0.2}, baseline, ratio=True), 1) == "2.0 [2.0, 2.0]"
    assert shown(mean_interval([0.5]), 2) == "0.50"
    assert shown(paired_interval({9: 1.0}, baseline), 2) == ""


def test_the_weight_is_the_best_of_both_sets_and_the_smaller_of_equals():
    def record(seen: float, new: float) -> dict:
        return {"accuracy": {"seen": {"mean": seen, "color": 0.0}, "new": {"mean": new}}}

    assert main.choose_weight({0.1: record(0.5, 0.5), 0.3: record(0.4, 0.7), 1.0: record(0.7, 0.4)}) == 0.3


def test_every_method_is_a_configuration_of_its_own_and_aligns_its_heads():
    heads = {"worst": ["L0H1"], "top": ["L0H2"], "random": ["L0H3"]}
    made = {name: hera_config(Path("."), SIZES["default"], method, 0.3, heads) for name, method in METHODS.items()}
    assert made.pop("sft") is None
    assert len({f"{config} {METHODS[name].batch_size}" for name, config in made.items()}) == len(made)
    for name, config in made.items():
        config.check()
        assert config.weight == {"worst5_paper": 0.01, "viral": 0.5, "jarvis": 1.0, "cmar": 0.1}.get(name, 0.3)
    assert [made[name].heads for name in PRIMARY if name in made] == ["L0H1", "L0H1", "L0H2", "L0H3"]
    default = SIZES["default"]
    assert default.tuning_seed not in default.seeds
    runs = default.runs()
    assert [len([seed for name, seed in runs if name == method]) for method in ("random5", "viral")] == [10, 4]
    assert runs[:5] == [(name, 1) for name in PRIMARY]
    assert {name for name, _ in runs[:50]} == set(PRIMARY)
    assert not {name for name, _ in runs} & set(BATCHES)


def test_batches_are_compared_at_three_sizes_with_nothing_remembered():
    found = replace(SIZES["batches"], seeds=(1, 2))
    assert {name for name, _ in found.runs()} == {"sft", "worst5", *BATCHES}
    assert len(found.runs()) == 2 * (2 + 6)
    for name, method in BATCHES.items():
        config = hera_config(Path("."), found, method, 0.3, {"worst": ["L0H1"]})
        kind, size = name.split("_")
        assert (config.batches, method.batch_size, config.memory, config.heads) == (kind, int(size), 0, "L0H1")


def test_jobs_run_side_by_side_once_and_a_failed_one_is_named_and_tried_again(tmp_path, capsys):
    def job(name: str, seconds: float = 0.5):
        time.sleep(seconds)
        return {"name": name, "process": os.getpid()}

    def fails():
        print("the reason")
        raise ValueError("no")

    with pytest.raises(ValueError, match=r"b failed; see .*logs/b\.log"):
        main.work_through(tmp_path, {"b": fails, "a": lambda: job("a"), "x/c": lambda: job("c")}, 2)
    a, c = (main.done(tmp_path, name) for name in ("a", "x/c"))
    assert c["started"] < a["started"] + a["wall_s"]  # side by side
    assert re.search("b failed; [12] more", capsys.readouterr().out)
    assert "the reason" in (tmp_path / "logs/b.log").read_text()
    assert os.getpid() not in (a["process"], c["process"])
    before = read_json(tmp_path / "done/a.json")
    main.work_through(tmp_path, {"b": lambda: job("b", 0), "a": lambda: job("other")}, 1)
    assert main.done(tmp_path, "a") == before
    assert main.done(tmp_path, "b")["name"] == "b"
