"""Puts HeRA into the stage list, and the plugin's backbones into the model list, of the web UI.

Why: both lists are dictionaries in the host's code. For a model that is not listed as multimodal, "Custom" among them,
the web UI sends no options for freezing parts and for pixels. Can go when the host lets plugins add stages, and sends
these options for every model.
"""

from typing import Any

WHAT = "HeRA in the web UI's stage list, backbones in its model list"
FUNCTIONS = {"register_model_group": "models template multimodal"}
_NAMES = ("SUPPORTED_MODELS", "MULTIMODAL_SUPPORTED_MODELS", "DEFAULT_TEMPLATE", "DownloadSource")


def check(module: Any) -> str | None:
    """Says what the host's module lacks, or None."""
    stages = getattr(module, "TRAINING_STAGES", None)
    if not isinstance(stages, dict) or "sft" not in stages.values():
        return "TRAINING_STAGES is not a dictionary with sft"
    missing = [name for name in _NAMES if not hasattr(module, name)]
    return f"no {', '.join(missing)}" if missing else None


def apply(module: Any) -> None:
    """Adds the stage, and the backbones that the host does not list."""
    from llamafactory_hera.integrations.llamaboard.names import STAGE, STAGE_TITLE, register_models

    if STAGE not in module.TRAINING_STAGES.values():
        module.TRAINING_STAGES[STAGE_TITLE] = STAGE
    register_models(module)
