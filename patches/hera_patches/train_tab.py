"""Puts the HeRA accordion into the train tab of the web UI.

Why: the host builds the tab in one function, which also says what its buttons send.

Tested with 0.9.5. Can go when the host lets plugins add elements to its pages.
"""

import inspect
from functools import wraps
from types import ModuleType
from typing import Any

WHAT = "the HeRA accordion in the web UI's train tab"

_USED = ("get_base_elems", "mm_tab", "start_btn", "output_box", "training_stage")


def check(module: ModuleType) -> str | None:
    """Says what the host's module lacks, or None."""
    create = getattr(module, "create_train_tab", None)
    if create is None:
        return "no function create_train_tab"
    parameters = list(inspect.signature(create).parameters)
    if parameters != ["engine"]:
        return f"create_train_tab takes {parameters}"
    known = create.__code__.co_names + create.__code__.co_varnames
    missing = [name for name in _USED if name not in known]
    if missing:
        return f"create_train_tab does not use {', '.join(missing)}"
    return None if hasattr(module, "change_stage") else "no function change_stage"


def apply(module: ModuleType) -> None:
    """Wraps ``create_train_tab``, and ``change_stage`` as the tab sees it."""
    original, original_change = module.create_train_tab, module.change_stage

    @wraps(original)
    def create_train_tab(engine: Any) -> dict[str, Any]:
        from llamafactory_hera.integrations.llamaboard import train_tab

        return train_tab.create_train_tab(engine, original)

    @wraps(original_change)
    def change_stage(training_stage: str) -> tuple[Any, Any]:
        from llamafactory_hera.integrations.llamaboard import train_tab

        return train_tab.change_stage(training_stage, original_change)

    module.create_train_tab, module.change_stage = create_train_tab, change_stage
