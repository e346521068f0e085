"""Puts HeRA into the stage list of the web UI.

Why: the list is a dictionary in the host's code, read by the train tab and by what starts its runs.

Tested with 0.9.5. Can go when the host lets plugins add stages.
"""

from types import ModuleType

from .registry import NOT_NEEDED

WHAT = "HeRA in the web UI's stage list"


def check(module: ModuleType) -> str | None:
    """Says what the host's module lacks, or None."""
    stages = getattr(module, "TRAINING_STAGES", None)
    if not isinstance(stages, dict) or "sft" not in stages.values():
        return "TRAINING_STAGES is no dictionary with sft"
    return NOT_NEEDED if "hera" in stages.values() else None


def apply(module: ModuleType) -> None:
    """Adds the entry."""
    from llamafactory_hera.integrations.llamaboard.names import STAGE, STAGE_TITLE

    module.TRAINING_STAGES[STAGE_TITLE] = STAGE
