"""Fields and texts of the web UI against the dataclass, and the arguments that a run gets from them."""

import re
import string
from typing import get_args, get_type_hints

import pytest

from llamafactory_hera.integrations.llamafactory.arguments import HeraArguments
from llamafactory_hera.integrations.llamaboard.arguments import lacking, with_hera
from llamafactory_hera.integrations.llamaboard.fields import FIELDS
from llamafactory_hera.integrations.llamaboard.texts import LANGUAGES, locales, message
from llamafactory_hera.objectives import names


def test_defaults_and_choices_are_the_dataclass_s() -> None:
    defaults, hints = HeraArguments(), get_type_hints(HeraArguments)
    for key, field in FIELDS.items():
        assert field.default == ("" if getattr(defaults, key) is None else getattr(defaults, key))
        declared = tuple(names()) if key == "hera_objective" else get_args(hints[key])
        assert field.choices == (declared if field.kind == "choice" else ())
    assert {field.kind for field in FIELDS.values()} == {"text", "integer", "number", "switch", "choice"}


def test_the_keys_of_heads_teacher_loss_and_selection_are_shown() -> None:
    named = (
        "heads objective granularity layers teacher teacher_cache weight k temperature memory pooling select select_m"
    )
    assert {f"hera_{name}" for name in named.split()} <= set(FIELDS)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_each_language_says_everything(lang: str) -> None:
    texts, english = LANGUAGES[lang], LANGUAGES["en"]
    assert list(texts.FIELDS) == list(FIELDS)
    assert {name: set(shown) for name, shown in texts.WIDGETS.items()} == {
        name: set(shown) for name, shown in english.WIDGETS.items()
    }
    assert list(texts.MESSAGES) == list(english.MESSAGES)
    for name, text in texts.MESSAGES.items():
        placeholders = {field for _, field, _, _ in string.Formatter().parse(text) if field}
        assert placeholders == {field for _, field, _, _ in string.Formatter().parse(english.MESSAGES[name]) if field}
    words = [word for pair in texts.FIELDS.values() for word in pair]
    words += [word for shown in texts.WIDGETS.values() for word in shown.values()] + list(texts.MESSAGES.values())
    assert all(word.strip() for word in words)
    labels = [label for label, _ in texts.FIELDS.values()]
    assert len(set(labels)) == len(labels)
    own_letters = {"ru": "[а-я]", "zh": "[一-鿿]", "ko": "[가-힣]", "ja": "[ぁ-ヿ一-鿿]"}
    if lang in own_letters:
        assert [word for word in words if not re.search(own_letters[lang], word)] == []


def test_locales_have_the_host_s_form() -> None:
    from llamafactory.webui.locales import LOCALES

    for name, texts in locales().items():
        assert set(texts) == set(LOCALES["training_stage"])
        assert LOCALES[name] == texts
    assert message("aborted", "fr") == "Aborted."  # a language that the host may gain


def test_extra_arguments_win_over_the_fields() -> None:
    values = {f"train.{key}": field.default for key, field in FIELDS.items()}
    values["train.hera_heads"] = " L1H2 "
    args = with_hera({"stage": "hera", "hera_k": 3, "hera_max_nan": 7}, values.__getitem__)
    assert args["hera_heads"] == "L1H2"
    assert (args["hera_k"], args["hera_max_nan"]) == (3, 7)
    assert set(args) == {"stage", "hera_max_nan", *FIELDS}


@pytest.mark.parametrize(
    ("heads", "said"), [("", "press Select heads"), ("L1", "'L1' is not a head"), ("gone.json", "cannot be read")]
)
def test_heads_that_cannot_be_are_named(heads: str, said: str) -> None:
    assert said in lacking({"hera_heads": heads}, "en")


@pytest.mark.parametrize("heads", ["auto", "L1H2,L3H4"])
def test_heads_that_may_be_are_let_pass(heads: str) -> None:
    assert lacking({"hera_heads": heads}, "en") == ""


def test_layers_need_no_heads() -> None:
    layers = {"hera_heads": "", "hera_granularity": "layer", "hera_layers": "L1"}
    assert lacking(layers, "en") == ""
    assert "hera_layers: no layer is named" in lacking(layers | {"hera_layers": ""}, "en")
    assert "hera_heads: L1H2 is for hera_granularity: head" in lacking(layers | {"hera_heads": "L1H2"}, "en")
    assert "hera_layers: L1 is for hera_granularity: layer" in lacking(
        layers | {"hera_granularity": "head"}, "en", True
    )


def test_layers_are_not_selected_before_a_run() -> None:
    said = lacking({"hera_heads": "", "hera_granularity": "layer", "hera_layers": "auto"}, "en", selecting=True)
    assert "write auto as decoder layers" in said


def test_an_objective_that_aligns_no_heads_says_so_in_the_page() -> None:
    assert "hera_granularity: head does not work with hera_objective: viral" in lacking(
        {"hera_heads": "L1H2", "hera_objective": "viral"}, "en"
    )


@pytest.mark.parametrize(("key", "value"), [("hera_k", 0), ("hera_weight", -3.0), ("hera_select_m", 0)])
def test_values_out_of_range_are_named_before_anything_starts(key: str, value: float) -> None:
    assert f"{key}: {value} is" in lacking({"hera_heads": "L1H2", key: value}, "en")
    assert f"{key}: {value} is" in lacking({"hera_heads": "", key: value}, "en", selecting=True)
    assert lacking({"hera_heads": ""}, "en", selecting=True) == ""
