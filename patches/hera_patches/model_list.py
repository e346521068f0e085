"""Puts the plugin's backbones into the model list of the web UI.

Why: for a model that is not listed as multimodal, "Custom" among them, the web UI sends no options for freezing parts
and for pixels.

Tested with 0.9.5. Can go when the host sends these options for every model, or lists LLaVA-style models itself.
"""

import inspect
from types import ModuleType

WHAT = "backbones in the web UI's model list"

_NAMES = ("SUPPORTED_MODELS", "MULTIMODAL_SUPPORTED_MODELS", "DEFAULT_TEMPLATE", "DownloadSource")


def check(module: ModuleType) -> str | None:
    """Says what the host's module lacks, or None."""
    missing = [name for name in (*_NAMES, "register_model_group") if not hasattr(module, name)]
    if missing:
        return f"no {', '.join(missing)}"
    parameters = list(inspect.signature(module.register_model_group).parameters)
    return None if parameters == ["models", "template", "multimodal"] else f"register_model_group takes {parameters}"


def apply(module: ModuleType) -> None:
    """Registers the backbones that the host does not list."""
    from llamafactory_hera.integrations.llamaboard.models import register

    register(module)
