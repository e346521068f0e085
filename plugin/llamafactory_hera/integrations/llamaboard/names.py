"""The names under which the web UI lists HeRA: the stage, the models, and the labels in five languages."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType

import yaml

from llamafactory_hera.backbones.table import LANGUAGE_MODELS, NATIVE_MODELS

#: The entry in the list of stages, and the value of ``stage`` that it selects.
STAGE_TITLE, STAGE = "HeRA", "hera"

#: The models that :func:`register_models` added to the host's list.
MODELS: list[str] = []


@cache
def texts() -> dict[str, dict[str, dict[str, str]]]:
    """Returns the properties of each element of the page, by language and element."""
    return yaml.safe_load(Path(__file__).with_name("texts.yaml").read_text(encoding="utf-8"))


def labels(languages: Iterable[str]) -> dict[str, dict[str, dict[str, str]]]:
    """Returns the same in the form of the host's ``LOCALES``: element, language, property.

    A language without a translation gets the English texts.
    """
    english = texts()["en"]
    return {name: {lang: texts().get(lang, english)[name] for lang in languages} for name in english}


def register_models(constants: ModuleType) -> None:
    """Adds the models of :mod:`~llamafactory_hera.backbones.table` to the list in the host's ``extras.constants``.

    A LLaVA-style model is listed with the folder in which the recipes build it. A finished model is added unless the
    host lists it with the same template. All names end with ``-HeRA``.
    """
    hub = constants.DownloadSource.DEFAULT
    offered = {
        (path.get(hub), constants.DEFAULT_TEMPLATE.get(name))
        for name, path in constants.SUPPORTED_MODELS.items()
        if name in constants.MULTIMODAL_SUPPORTED_MODELS
    }
    built = [(f"LLaVA-{model.title}", f"models/{model.key}", model.template) for model in LANGUAGE_MODELS.values()]
    finished = [(model.title, model.checkpoint, model.template) for model in NATIVE_MODELS.values()]
    for title, path, template in built + finished:
        if (path, template) not in offered:
            name = f"{title}-{STAGE_TITLE}"
            constants.register_model_group({name: {hub: path}}, template=template, multimodal=True)
            MODELS.append(name)
