"""HeRA's entries in the web UI: the stage, the models, the fields of the keys, and the labels in five languages.

A field has the type, default and choices from the declaration of its key. Users write the other keys into the
host's "Extra arguments" field.
"""

import dataclasses
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from llamafactory_hera.backbones.table import LANGUAGE_MODELS
from llamafactory_hera.config import HeraConfig

#: The entry in the list of stages, and the value of ``stage`` that it selects.
STAGE_TITLE, STAGE = "HeRA", "hera"

#: The rows of fields in the accordion. Keys that are rarely needed have no field.
ROWS = (
    ["hera_heads"],
    ["hera_objective", "hera_granularity", "hera_layers", "hera_pooling"],
    ["hera_teacher", "hera_teacher_cache"],
    ["hera_weight", "hera_k", "hera_memory", "hera_accumulate"],
    ["hera_select", "hera_select_m", "hera_select_mode", "hera_select_samples"],
)
#: Each key with a field -> its declaration. The element of a key has the id ``train.<key>``.
FIELDS: dict[str, dataclasses.Field] = {key: HeraConfig.knobs()[key] for row in ROWS for key in row}


def with_fields(args: dict[str, Any], value_of: Callable[[str], Any]) -> dict[str, Any]:
    """Adds the values of the fields to the arguments of a run; keys in "Extra arguments" keep their values.

    ``value_of`` maps the id of an element to its value.
    """
    values = {key: value_of(f"train.{key}") for key in FIELDS}
    return {key: value.strip() if isinstance(value, str) else value for key, value in values.items()} | args


@cache
def texts() -> dict[str, dict[str, dict[str, str]]]:
    """Returns the texts of the page's elements, by language, element and property."""
    return yaml.safe_load(Path(__file__).with_name("texts.yaml").read_text(encoding="utf-8"))


def labels(languages: Iterable[str]) -> dict[str, dict[str, dict[str, str]]]:
    """Returns the texts in the form of the host's ``LOCALES``: element, language, property.

    A language without a translation gets the English texts.
    """
    english = texts()["en"]
    return {name: {lang: texts().get(lang, english)[name] for lang in languages} for name in english}


def register_models(constants: ModuleType) -> None:
    """Adds the LLaVA-style models of the recipes to the list in the host's ``extras.constants``.

    Each model is listed under a name that ends with ``-HeRA``, with the folder where its recipe builds the model.
    """
    for model in LANGUAGE_MODELS.values():
        path = {constants.DownloadSource.DEFAULT: f"models/{model.key}"}
        name = f"LLaVA-{model.title}-{STAGE_TITLE}"
        constants.register_model_group({name: path}, template=model.template, multimodal=True)
