"""Puts HeRA into the stage list, and the plugin's backbones into the model list, of the web UI.

Why: both lists are dictionaries in the host's code. For a model that is not listed as multimodal, "Custom" among them,
the web UI sends no options for freezing parts and for pixels. Can go when the host lets plugins add stages, and sends
these options for every model.
"""

from typing import Any

FUNCTIONS = {"register_model_group": "models template multimodal"}


def apply(module: Any) -> None:
    from llamafactory_hera.integrations.llamaboard.names import STAGE, STAGE_TITLE, register_models

    stages = module.TRAINING_STAGES
    register_models(module)
    if STAGE not in stages.values():
        stages[STAGE_TITLE] = STAGE
