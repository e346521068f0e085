"""The study: its splits, its intervals, and a run of its smallest size from start to end."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from scipy import stats

from llamafactory_hera.files import read_json
from recipes.study.report import format_interval, paired_interval, without_looking
from recipes.study.settings import METHODS, SIZES
from recipes.study.train import hera_config
from recipes.study.world import CATEGORIES, Sample, make_world
from tests.e2e.runner import ROOT


def combinations(samples: list[Sample]) -> set[tuple]:
    return {(item.shape, item.color, item.row, item.column) for sample in samples for item in sample.scene.objects}


def test_splits_share_no_held_out_combination_and_text_alone_fails_on_traps():
    world = make_world(replace(SIZES["smoke"], scenes=1500, questions=60, asked=4))
    trained = combinations(world.captions)
    unseen = [combinations(questions["new"]) - trained for questions in (world.validation, world.test)]
    assert [len(trained), *map(len, unseen)] == [4 * 4 * 4, 4 * 4, 4 * 4]  # four, one and one color per shape and cell
    assert not unseen[0] & unseen[1]
    for questions, reserved in zip((world.validation, world.test), unseen, strict=True):
        assert all(combinations([sample]) & reserved for sample in questions["new"])
        assert combinations(questions["seen"]) <= trained
    assert all(without_looking(world, kind)["text_alone"]["trap"] == 0 for kind in world.test)


def test_intervals_are_paired_by_seed():
    # Seeds differ more than methods do, so an unpaired interval would be wide.
    found = paired_interval({2: 0.92, 0: 0.12, 1: 0.51}, {0: 0.1, 1: 0.5, 2: 0.9, 3: 0.2})
    expected = stats.ttest_rel([0.12, 0.51, 0.92], [0.1, 0.5, 0.9]).confidence_interval(0.95)
    assert found == pytest.approx((0.05 / 3, *expected))
    assert format_interval(found, 1, 100, "+") == "+1.7 [+0.2, +3.1]"


def test_every_method_is_a_different_valid_configuration():
    heads = {"worst": ["L0H1"], "top": ["L0H2"], "random": ["L0H3"]}
    configs = [hera_config(Path("."), SIZES["default"], method, 0.3, heads) for method in METHODS.values()]
    assert len(set(map(str, configs))) == len(METHODS)


@pytest.mark.slow
def test_the_smallest_study_runs_and_a_second_call_runs_nothing(server, tmp_path):
    run = partial(server.script, ROOT / "recipes/study", "--size", "smoke", "--output", "smoke", cwd=tmp_path)
    code, output = run()
    assert code == 0, output
    measured = read_json(tmp_path / "smoke/report.json")["measured"]
    for category in (*CATEGORIES, "mean"):
        assert measured[f"accuracy/new/{category}"].keys() == {"sft", "worst5"}
    assert measured["mknn/mllm/worst5"].keys() == {"base", "sft", "worst5"}
    assert "HeRA worst-5 − SFT" in (tmp_path / "smoke/report.md").read_text()
    code, output = run()
    assert (code, "more," in output) == (0, False), output
