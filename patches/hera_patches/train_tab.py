"""Puts the HeRA accordion into the train tab of the web UI.

Why: the host builds the tab in one function, which also says what its buttons send. Can go when the host lets plugins
add elements to its pages.
"""

from typing import Any

from .registry import around

FUNCTIONS = {"create_train_tab": "engine", "change_stage": "training_stage"}
USED = {"create_train_tab": "get_base_elems mm_tab start_btn output_box training_stage"}


def apply(module: Any) -> None:
    """Wraps ``create_train_tab``, and ``change_stage`` as the tab sees it."""
    from llamafactory_hera.integrations.llamaboard import train_tab

    around(module)(train_tab.create_train_tab)
    around(module)(train_tab.change_stage)
