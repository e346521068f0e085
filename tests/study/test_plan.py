"""Every method is a row of keys that HeRA accepts, and differs from the others."""

from typing import Any

import pytest

import plan
from llamafactory_hera.config import HeraConfig
from settings import BASELINE, METHODS, PAPER_WEIGHT, SIZES, TUNED, Settings, final_run, tuning_run

SETTINGS = SIZES["default"]


def select(strategy: str, m: int) -> list[str]:
    return [f"L{('worst', 'top', 'random').index(strategy)}H{i}" for i in range(m)]


def stage2(method: str) -> dict[str, Any]:
    keys = METHODS[method].hera_keys(2, lambda: 0.3, select)
    return plan.stage2(SETTINGS, 1, "model", "out", keys, "test")


@pytest.mark.filterwarnings("ignore:hera_heads. 10 heads")
@pytest.mark.parametrize("method", [name for name in METHODS if name != BASELINE])
def test_its_keys_are_valid(method):
    recipe = stage2(method)
    HeraConfig.from_keys(recipe).check()  # refuses a key that it does not know
    assert recipe["stage"] == "hera"


def test_weights_and_heads_are_those_of_the_method():
    assert stage2("worst5_paper")["hera_weight"] == PAPER_WEIGHT == 0.01
    assert stage2("worst5")["hera_weight"] == 0.3
    assert stage2("viral")["hera_weight"] == 0.5
    assert METHODS["viral"].hera_keys(1, lambda: 0.3, select) is None
    assert stage2("worst10")["hera_heads"].count(",") == 9
    assert stage2("random5")["hera_heads"] == "L2H0,L2H1,L2H2,L2H3,L2H4"
    assert not [key for key in stage2(BASELINE) if key.startswith("hera_")]
    assert TUNED in METHODS


def test_rows_of_a_fixed_weight_do_not_wait_for_the_chosen_one(tmp_path):
    """The study starts them while the choice is still being made."""

    def ready(unit, units):
        return "tuning/choice" not in unit.after and all(ready(units[name], units) for name in unit.after)

    units = {unit.name: unit for unit in plan.plan(tmp_path, SETTINGS)}
    early = [f"runs/{name}-s1/stage1" for name in ("sft", "worst5_paper", "viral")]
    assert [name for name in units if name.endswith("-s1/stage1") and ready(units[name], units)] == early
    units["runs/viral-s1/stage2"].prepare()
    assert (tmp_path / final_run("viral", 1).recipe("stage2")).is_file()


def test_no_two_methods_are_the_same():
    seen = [sorted((key, str(value)) for key, value in stage2(name).items()) for name in METHODS]
    assert len({str(row) for row in seen}) == len(METHODS)


@pytest.mark.parametrize("size", SIZES)
def test_settings_survive_their_file_and_final_seeds_choose_nothing(size):
    assert Settings.from_dict(SIZES[size].to_dict()) == SIZES[size]
    if size != "smoke":
        assert SIZES[size].tuning_seed not in SIZES[size].seeds
        assert len(SIZES[size].seeds) >= 3
    assert final_run(TUNED, 1).path != tuning_run(0.1, 1).path
