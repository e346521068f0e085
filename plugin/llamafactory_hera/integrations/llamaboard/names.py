"""The names under which the web UI shows the plugin: stage, models, elements, and their texts in five languages."""

from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from llamafactory_hera.backbones.table import LANGUAGE_MODELS, NATIVE_MODELS

#: The entry of the stage list, and the value of ``stage`` behind it.
STAGE_TITLE, STAGE = "HeRA", "hera"

#: Names that :func:`register_models` has added to the host's list; found by typing "HeRA" into it.
MODELS: list[str] = []


@cache
def texts() -> dict[str, dict[str, dict[str, Any]]]:
    """Language -> ``elements`` (name -> properties) and ``messages``."""
    return yaml.safe_load(Path(__file__).with_name("texts.yaml").read_text(encoding="utf-8"))


def message(name: str, lang: str, **values: Any) -> str:
    """A message in a language of the host; English for one that the host has gained since."""
    return texts().get(lang, texts()["en"])["messages"][name].format(**values)


def register_models(constants: ModuleType) -> None:
    """Adds the backbones to the list in the host's ``extras.constants``, as multimodal, so that it sends more options.

    A LLaVA-style model is listed with the folder into which the recipes build it. A finished model is listed unless
    the host offers it under the same template.
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
