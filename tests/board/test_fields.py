"""Fields and texts of the web UI against the declared keys, what a run gets from them, and the host's lists."""

import re
import string

import pytest

from llamafactory_hera.backbones.table import LANGUAGE_MODELS, NATIVE_MODELS
from llamafactory_hera.calibration.settings import RahConfig
from llamafactory_hera.config import HeraConfig
from llamafactory_hera.integrations.llamaboard.fields import (
    FIELDS,
    default,
    locales,
    options,
    problem_with,
    takes,
    with_fields,
)
from llamafactory_hera.integrations.llamaboard.names import MODELS, message, texts

NAMED = "heads objective granularity layers teacher teacher_cache weight k temperature memory pooling select select_m"


def test_the_keys_of_heads_teacher_loss_and_selection_are_shown_with_their_defaults() -> None:
    assert {f"hera_{name}" for name in NAMED.split()} <= set(FIELDS)
    shown = {key: default(key) for key in FIELDS}
    declared = HeraConfig(heads="L0H1").keys() | RahConfig().keys() | {"hera_heads": None}
    assert shown == {key: "" if declared[key] is None else declared[key] for key in FIELDS}
    assert all(value in options(key) for key, value in shown.items() if options(key))
    # the host sends nothing for false, so that a ticked box could not be unticked
    assert [key for key, value in shown.items() if value is True] == []


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("hera_heads", "L1H2", 5),
        ("hera_k", 9, "nine"),
        ("hera_k", None, True),  # an emptied field
        ("hera_weight", 0.5, "0.5"),
        ("hera_fixed_temperature", True, 3),
        ("hera_pooling", "mean", "nonsense"),
        ("hera_objective", "cka", "nonsense"),
    ],
)
def test_a_field_takes_values_of_its_key(key: str, good: object, bad: object) -> None:
    assert takes(key, good)
    assert not takes(key, bad)


@pytest.mark.parametrize("lang", texts())
def test_each_language_says_everything(lang: str) -> None:
    def properties(lang: str) -> dict[str, list[str]]:
        return {name: list(shown) for name, shown in texts()[lang]["elements"].items()}

    def placeholders(text: str) -> set[str]:
        return {field for _, field, _, _ in string.Formatter().parse(text) if field}

    elements, messages, english = texts()[lang]["elements"], texts()[lang]["messages"], texts()["en"]["messages"]
    assert properties(lang) == properties("en")
    assert all(properties(lang)[key] == ["label", "info"] for key in FIELDS)
    assert list(messages) == list(english)
    assert {name: placeholders(messages[name]) for name in english} == {
        name: placeholders(text) for name, text in english.items()
    }
    labels = [elements[key]["label"] for key in FIELDS]
    assert len(set(labels)) == len(labels)
    words = [word for shown in elements.values() for word in shown.values()] + list(messages.values())
    assert all(word.strip() for word in words)
    own_letters = {"ru": "[а-я]", "zh": "[一-鿿]", "ko": "[가-힣]", "ja": "[ぁ-ヿ一-鿿]"}
    if lang in own_letters:
        assert [word for word in words if not re.search(own_letters[lang], word)] == []


def test_the_host_has_the_texts_in_its_languages() -> None:
    from llamafactory.webui.locales import LOCALES

    for name, by_language in locales([*texts(), "fr"]).items():
        assert by_language.pop("fr") == by_language["en"]
        assert set(by_language) == set(LOCALES["training_stage"])
        assert LOCALES[name] == by_language
    assert message("aborted", "fr") == "Aborted."  # a language that the host may gain
    assert LOCALES["hera_k"]["en"]["info"] == "Nearest neighbors in the teacher's space. Default: 10."


def test_extra_arguments_win_over_the_fields() -> None:
    values = {f"train.{key}": default(key) for key in FIELDS}
    values["train.hera_heads"] = " L1H2 "
    args = with_fields({"stage": "hera", "hera_k": 3, "hera_max_nan": 7}, "hera_", values.__getitem__)
    assert args["hera_heads"] == "L1H2"
    assert (args["hera_k"], args["hera_max_nan"]) == (3, 7)
    assert set(args) == {"stage", "hera_max_nan", *(key for key in FIELDS if key.startswith("hera_"))}


LAYER = {"hera_granularity": "layer", "hera_layers": "L1"}


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"hera_heads": ""}, "press Select heads"),
        ({"hera_heads": "L1"}, "'L1' is not a head"),
        ({"hera_heads": "gone.json"}, "cannot be read"),
        ({"hera_heads": "", **LAYER, "hera_layers": ""}, "hera_layers: no layer is named"),
        ({"hera_heads": "L1H2", **LAYER}, "hera_heads: L1H2 is for hera_granularity: head"),
        (
            {"hera_heads": "L1H2", "hera_objective": "viral"},
            "hera_granularity: head does not work with hera_objective: viral",
        ),
        ({"hera_heads": "L1H2", "hera_k": 0}, "hera_k: 0 is"),
        ({"hera_heads": "L1H2", "hera_weight": -3.0}, "hera_weight: -3.0 is"),
        ({"hera_heads": "L1H2", "hera_select_m": 0}, "hera_select_m: 0 is"),
    ],
)
def test_what_keeps_a_run_from_starting_is_named(args: dict, text: str) -> None:
    assert text in problem_with(args, "en")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"hera_heads": "", "hera_k": 0}, "hera_k: 0 is"),
        ({"hera_heads": "", "hera_weight": -3.0}, "hera_weight: -3.0 is"),
        ({"hera_heads": "", "hera_select_m": 0}, "hera_select_m: 0 is"),
        ({"hera_heads": "", **LAYER, "hera_layers": "auto"}, "write auto as decoder layers"),
        ({**LAYER, "hera_granularity": "head"}, "hera_layers: L1 is for hera_granularity: layer"),
    ],
)
def test_what_keeps_a_selection_from_starting_is_named(args: dict, text: str) -> None:
    assert text in problem_with(args, "en", selecting=True)


@pytest.mark.parametrize("args", [{"hera_heads": "auto"}, {"hera_heads": "L1H2,L3H4"}, {"hera_heads": "", **LAYER}])
def test_what_can_be_run_is_let_pass(args: dict) -> None:
    assert problem_with(args, "en") == ""
    assert problem_with({"hera_heads": ""}, "en", selecting=True) == ""


BACKBONES = [(f"models/{model.key}", model.template) for model in LANGUAGE_MODELS.values()]
BACKBONES += [(model.checkpoint, model.template) for model in NATIVE_MODELS.values()]


@pytest.mark.parametrize(("path", "template"), BACKBONES)
def test_each_backbone_is_listed_once_as_multimodal_with_its_template(path: str, template: str) -> None:
    from llamafactory.extras import constants

    names = [
        name
        for name, paths in constants.SUPPORTED_MODELS.items()
        if paths.get(constants.DownloadSource.DEFAULT) == path and constants.DEFAULT_TEMPLATE.get(name) == template
    ]
    assert len(names) == 1
    assert names[0] in constants.MULTIMODAL_SUPPORTED_MODELS


def test_a_model_that_the_host_lists_is_not_listed_again() -> None:
    from llamafactory.extras import constants

    assert len(MODELS) == len(set(MODELS)) < len(BACKBONES)
    assert all(name.endswith("-HeRA") for name in MODELS)
    assert "Qwen2.5-VL-7B-Instruct" in constants.SUPPORTED_MODELS
    assert "Qwen2.5-VL-7B-HeRA" not in constants.SUPPORTED_MODELS
