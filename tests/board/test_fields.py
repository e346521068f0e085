"""The fields of the web UI: their values in a run, their labels in each language, and the lists of the host."""

import re
from typing import Any

import pytest

from llamafactory_hera.backbones.table import LANGUAGE_MODELS
from llamafactory_hera.config import HeraConfig
from llamafactory_hera.integrations.llamaboard.fields import FIELDS, labels, texts, with_fields


def of_page(args: dict[str, Any] | None = None, **changed: Any) -> dict[str, Any]:
    """Returns the arguments of a run after only some fields of the page were changed."""
    values = {f"train.{key}": changed.get(key, declared.default) for key, declared in FIELDS.items()}
    return with_fields(args or {}, values.__getitem__)


def test_untouched_fields_give_the_default_of_every_key():
    assert HeraConfig.from_keys(of_page()) == HeraConfig()


def test_extra_arguments_win_over_the_fields():
    args = of_page({"stage": "hera", "hera_k": 3, "hera_max_nan": 7}, hera_heads=" L1H2 ")
    assert (args["hera_heads"], args["hera_k"], args["hera_max_nan"]) == ("L1H2", 3, 7)


@pytest.mark.parametrize("lang", texts())
def test_each_language_has_all_texts(lang):
    elements = texts()[lang]
    assert {name: list(each) for name, each in elements.items()} == {
        name: list(each) for name, each in texts()["en"].items()
    }
    assert all(list(elements[key]) == ["label", "info"] for key in FIELDS)
    assert len({elements[key]["label"] for key in FIELDS}) == len(FIELDS)
    letters = {"ru": "[а-я]", "zh": "[一-鿿]", "ko": "[가-힣]", "ja": "[ぁ-ヿ一-鿿]"}.get(lang, "[a-z]")
    assert [text for each in elements.values() for text in each.values() if not re.search(letters, text)] == []


def test_the_host_has_the_texts_in_its_languages():
    from llamafactory.webui.locales import LOCALES

    for name, by_language in labels([*texts(), "fr"]).items():
        assert by_language.pop("fr") == by_language["en"]  # a language that the host may add
        assert set(by_language) == set(LOCALES["training_stage"])
        assert LOCALES[name] == by_language


@pytest.mark.parametrize("model", LANGUAGE_MODELS.values(), ids=lambda model: model.key)
def test_the_host_lists_each_model_of_the_recipes_once_as_multimodal(model):
    from llamafactory.extras import constants

    folder = f"models/{model.key}"
    (name,) = (name for name, paths in constants.SUPPORTED_MODELS.items() if folder in paths.values())
    assert constants.DEFAULT_TEMPLATE[name] == model.template
    assert name in constants.MULTIMODAL_SUPPORTED_MODELS
