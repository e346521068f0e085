"""Backbones of the table that the host's model list does not have."""

from types import ModuleType

from llamafactory_hera.backbones.table import LANGUAGE_MODELS, NATIVE_MODELS

#: So that they are found by typing it into the list.
_SUFFIX = "HeRA"

#: Names that :func:`register` has added to the list.
REGISTERED: list[str] = []


def register(constants: ModuleType) -> None:
    """Adds the backbones to the host's model list as multimodal, so that it sends options such as freezing.

    A LLaVA-style model is listed with the folder into which the recipes build it. A finished model is listed unless
    the host offers it under the same template.

    Args:
        constants: The host's ``extras.constants``.
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
            name = f"{title}-{_SUFFIX}"
            constants.register_model_group({name: {hub: path}}, template=template, multimodal=True)
            REGISTERED.append(name)
