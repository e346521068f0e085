"""The ``hera_*`` keys: types, ranges, and values that contradict each other."""

import math
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from llamafactory_hera.config import FIXED_KEYS, OBJECTIVE_KEYS, RESUMABLE_KEYS, SCORE_KEYS, SELECTION_KEYS, HeraConfig
from llamafactory_hera.keys import changes
from llamafactory_hera.objectives import find

KEYS = HeraConfig.knobs()
LAYER = {"hera_heads": "auto", "hera_granularity": "layer", "hera_layers": "L1"}


def read(**keys: Any) -> HeraConfig:
    return HeraConfig.from_keys({"hera_heads": "L0H1", **keys})


# -- the declarations ------------------------------------------------------------------------------------------------


def test_every_key_has_a_help_text_and_lists_of_keys_contain_only_keys():
    assert all(key.startswith("hera_") and declared.metadata["help"].endswith(".") for key, declared in KEYS.items())
    for names in (SELECTION_KEYS, SCORE_KEYS, FIXED_KEYS, RESUMABLE_KEYS, OBJECTIVE_KEYS):
        assert {*names} <= {*KEYS}
    assert {*SCORE_KEYS} <= {*SELECTION_KEYS}
    assert not {*FIXED_KEYS} & {*RESUMABLE_KEYS}


def test_the_defaults_are_those_of_the_paper_and_of_the_package():
    paper = {"hera_weight": 0.01, "hera_k": 10, "hera_temperature": 0.07, "hera_teacher": "facebook/dinov2-large"}
    ours = {"hera_pooling": "answer", "hera_similarity": "cosine", "hera_memory": "auto"}
    selection = {"hera_select": "worst", "hera_select_m": 5, "hera_select_mode": "auto", "hera_select_samples": 1000}
    selection |= {"hera_heads": "auto", "hera_layers": "auto"}
    assert {key: KEYS[key].default for key in paper | ours | selection} == paper | ours | selection
    # the host's web UI never sends False, so it could not switch off a key that defaults to True
    assert not [key for key, declared in KEYS.items() if declared.default is True]


def test_every_key_is_read_from_a_mapping_and_from_an_object():
    values = {
        **{"hera_heads": None, "hera_granularity": "layer", "hera_layers": "L3,L1", "hera_objective": "contrastive"},
        **{"hera_weight": 0.5, "hera_k": 3, "hera_temperature": 0.2},
        **{"hera_teacher": "a/b", "hera_teacher_cache": "cache", "hera_pooling": "text", "hera_similarity": "dot"},
        **{"hera_memory": 7, "hera_accumulate": "gradcache", "hera_image_index": -1, "hera_max_nan": 2},
        **{"hera_projector": "separate", "hera_objective_lr": 1e-4, "hera_objective_from": "saves/one"},
        **{"hera_visual_attention": "causal"},
        **{"hera_heads_force": True, "hera_select": "top", "hera_select_m": 2, "hera_select_mode": "mllm"},
        **{"hera_select_samples": 77, "hera_select_k": 4, "hera_select_batch_size": 8, "hera_select_seed": 9},
        **{"hera_select_dataset": "captions", "hera_select_mixers": "all"},
    }
    assert values.keys() == KEYS.keys()
    config = HeraConfig.from_keys(values)
    assert config.keys() == values
    assert HeraConfig.from_keys(SimpleNamespace(**values, other=1)) == config
    assert (config.select, config.select_m, config.normalize) == ("top", 2, False)


def test_an_unknown_key_is_refused_with_a_suggestion():
    for name, part in (("wieght", "did you mean {}weight?"), ("lr", "choose one of {0}heads, .*, {0}select_seed.")):
        part = part.replace("?", r"\?")
        with pytest.raises(ValueError, match=rf"^hera_{name}: no such key; {part.format('hera_')}"):
            read(**{f"hera_{name}": 1})
        with pytest.raises(ValueError, match=rf"^{name}: no such key; {part.format('')}"):
            HeraConfig(**{name: 1})


# -- one value -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("hera_heads_force", "false", False),
        ("hera_heads_force", "True", True),
        ("hera_heads_force", False, False),
        ("hera_weight", "1e-2", 0.01),
        ("hera_weight", 1, 1.0),
        ("hera_k", "7", 7),
        ("hera_memory", 32.0, 32),
        ("hera_memory", "64", 64),
        ("hera_memory", "auto", "auto"),
        ("hera_heads", ["L0H1", "L1H2"], "L0H1,L1H2"),
        ("hera_teacher_cache", None, None),
    ],
)
def test_values_are_converted_as_yaml_and_command_lines_give_them(key, value, expected):
    found = read(**{key: value}).keys()[key]
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("hera_weight", -0.1, "-0.1 is out of range; choose 0 to 1000 (the default is 0.01)"),
        ("hera_weight", math.inf, "inf is out of range; choose 0 to 1000"),
        ("hera_weight", "much", "'much' is not a number; correct the value, or remove the key"),
        ("hera_weight", True, "True is not a number"),
        ("hera_weight", None, "None is not a number"),
        ("hera_k", 0, "0 is out of range; choose 1 "),
        ("hera_k", 2.5, "2.5 is not a whole number"),
        ("hera_memory", "much", "'much' is not a whole number or one of auto; correct"),
        ("hera_heads_force", "maybe", "'maybe' is not true or false"),
        ("hera_teacher", "", "the value is empty; give a folder or a hub id"),
        *(("hera_teacher_cache", value, f"{value} is not text") for value in (False, {"a": 1})),
        ("hera_pooling", "cls", "'cls' is not one of answer, text, mean, last"),
        ("hera_objective", "cosine", "'cosine' is unknown; choose one of cka, contrastive, feature, "),
        ("hera_select_samples", 11, "11 is out of range; choose 12 or more"),
        *(("hera_heads", value, "is not a head") for value in (3, [3, 4], 0.5)),
    ],
)
def test_the_error_for_a_bad_value_names_key_value_and_remedy(key, value, part):
    with pytest.raises(ValueError) as error:
        read(**{key: value})
    assert str(error.value).startswith(f"{key}: ")
    assert part in str(error.value)


# -- combinations of values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hera_heads": ","}, "hera_heads: no head is given; write heads as L<layer>H<head>"),
        ({"hera_layers": "L1"}, "hera_layers: L1 needs hera_granularity: layer; set it, or remove"),
        (LAYER | {"hera_heads": "L0H1"}, "hera_heads: L0H1 needs hera_granularity: head; set it, or remove"),
        (LAYER | {"hera_layers": "missing/layers.json"}, "hera_layers: missing/layers.json cannot be read"),
        *((LAYER | {"hera_layers": value}, "hera_layers: .* is not a layer") for value in ("last", 3, [3, 4], 0.5)),
        (LAYER | {"hera_layers": "auto", "hera_select": "middle"}, "hera_select: middle .* set hera_layers: middle"),
        (
            {"hera_objective": "viral"},
            "hera_granularity: head does not work with .* viral; .* hera_granularity: layer",
        ),
    ],
)
def test_contradictory_values_are_refused(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        read(**change)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"hera_objective": "cka", "hera_memory": 4}, "hera_memory: 4"),
        ({"hera_objective": "feature", "hera_accumulate": "gradcache"}, "hera_accumulate: gradcache"),
        ({"hera_visual_attention": "two_way"}, "hera_visual_attention: two_way"),
        (LAYER | {"hera_objective": "ross", "hera_teacher_cache": "cache"}, "hera_teacher_cache: cache"),
    ],
)
def test_a_key_that_the_objective_does_not_read_gives_a_warning(change, key):
    with pytest.warns(UserWarning, match=f"^{key} has no effect with hera_objective: .*, which does not read it"):
        read(**change)


def test_changes_lists_the_named_entries_that_existed_before_and_differ():
    before, now = {"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 5, "d": 4}
    assert changes(before, now, ("a", "b", "d")) == ["b was 2, is 5"]
    assert changes(before, now, ("c",)) == ["c was 3, is None"]


def test_more_heads_than_the_paper_recommends_give_a_warning():
    heads = "L0H0,L0H1,L0H2,L0H3,L0H4"
    for keys, named in (
        ({"hera_heads": "auto", "hera_select_m": 10}, "_select_m: 10"),
        ({"hera_heads": f"{heads},L1H1"}, "_heads: 6"),
    ):
        with pytest.warns(UserWarning, match=f"hera{named} heads are more than the 5"):
            read(**keys)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(hera_heads=heads)


def test_a_custom_objective_is_loaded_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_package_of_a_test").mkdir()
    (tmp_path / "my_package_of_a_test/mine.py").write_text(
        "from llamafactory_hera.objectives import Objective, register\n"
        "@register('mine_of_a_test')\n"
        "class Mine(Objective):\n"
        "    granularities = ('layer',)\n"
        "    def forward(self, batch):\n"
        "        return batch.z.sum(dim=(1, 2))\n"
        "class Other:\n"
        "    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    path, mine = list(sys.path), "my_package_of_a_test.mine:Mine"
    assert find(read(**LAYER | {"hera_objective": mine}).objective) is find("mine_of_a_test") is find(mine)
    assert sys.path == path
    for name, message in (
        (mine, "hera_granularity: head does not work with hera_objective: my_package.*:Mine"),
        (
            "my_package_of_a_test.mine:Other",
            "hera_objective: .* cannot be used .it is not a subclass of .*Objective.; give",
        ),
        (
            "my_package_of_a_test.mine:Third",
            "hera_objective: .* cannot be used .*Third.*; give module:Class for a module",
        ),
        ("missing_module_of_a_test:Mine", "hera_objective: .* cannot be used .No module named .*missing_module"),
        (":Mine", "hera_objective: ':Mine' cannot be used"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            read(hera_objective=name)
