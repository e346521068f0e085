"""Puts the HeRA accordion into the train tab of the web UI.

Why: the host builds the tab in one function, which also says what its buttons send.

Tested with 0.9.5. Can go when the host lets plugins add elements to its pages.
"""

from functools import wraps
from typing import Any

from .registry import differs

WHAT = "the HeRA accordion in the web UI's train tab"

_USED = ("get_base_elems", "mm_tab", "start_btn", "output_box", "training_stage")


def check(module: Any) -> str | None:
    """Says what the host's module lacks, or None."""
    if difference := differs(module, create_train_tab=["engine"], change_stage=["training_stage"]):
        return difference
    code = module.create_train_tab.__code__
    known = code.co_names + code.co_varnames
    missing = [name for name in _USED if name not in known]
    return f"create_train_tab does not use {', '.join(missing)}" if missing else None


def apply(module: Any) -> None:
    """Wraps ``create_train_tab``, and ``change_stage`` as the tab sees it."""
    from llamafactory_hera.integrations.llamaboard import train_tab

    original, original_change = module.create_train_tab, module.change_stage

    @wraps(original)
    def create_train_tab(engine: Any) -> dict[str, Any]:
        return train_tab.create_train_tab(engine, original)

    @wraps(original_change)
    def change_stage(training_stage: str) -> tuple[Any, Any]:
        return train_tab.change_stage(training_stage, original_change)

    module.create_train_tab, module.change_stage = create_train_tab, change_stage
