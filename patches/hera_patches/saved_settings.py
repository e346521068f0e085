"""Lets settings that were saved by the web UI with HeRA open in one without it.

Why: the host fails on an entry for which its page has no element. Can go when it skips such entries.
"""

from typing import Any

from .registry import around

FUNCTIONS = {"save_args": "config_path config_dict", "load_args": "config_path"}


def apply(module: Any) -> None:
    from llamafactory_hera.integrations.llamaboard import saved

    around(module)(saved.save_args)
    around(module)(saved.load_args)
