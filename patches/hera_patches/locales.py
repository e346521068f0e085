"""Adds the labels and hints of HeRA's fields to those of the web UI.

Why: the host takes them from one dictionary when the page's language changes. Can go when the
host lets plugins add elements to its pages.
"""

from typing import Any


def apply(module: Any) -> None:
    from llamafactory_hera.integrations.llamaboard.fields import locales

    module.LOCALES |= locales(module.LOCALES["training_stage"])
