"""Adds the labels and hints of HeRA's fields to those of the web UI.

Why: the host takes them from one dictionary when the page's language changes. Can go when the
host lets plugins add elements to its pages.
"""

from typing import Any

WHAT = "labels of HeRA's fields in the web UI's five languages"


def apply(module: Any) -> None:
    """Adds the texts; English stands for a language that the plugin does not have."""
    from llamafactory_hera.integrations.llamaboard.names import locales

    languages = module.LOCALES["training_stage"]
    for name, texts in locales().items():
        module.LOCALES[name] = {lang: texts.get(lang, texts["en"]) for lang in languages}
