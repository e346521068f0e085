"""Lets settings that were saved by the web UI with HeRA open in one without it.

Why: the host fails on an entry for which its page has no element.

Tested with 0.9.5. Can go when the host skips such entries.
"""

from functools import wraps
from typing import Any

from .registry import differs

WHAT = "settings saved by the web UI open without the plugin"


def check(module: Any) -> str | None:
    """Says what the host's module lacks, or None."""
    return differs(module, save_args=["config_path", "config_dict"], load_args=["config_path"])


def apply(module: Any) -> None:
    """Wraps ``save_args`` and ``load_args``."""
    from llamafactory_hera.integrations.llamaboard import saved

    save, load = module.save_args, module.load_args

    @wraps(save)
    def save_args(config_path: str, config_dict: dict[str, Any]) -> None:
        saved.write(config_path, config_dict, save)

    @wraps(load)
    def load_args(config_path: str) -> dict[str, Any] | None:
        return saved.read(config_path, load)

    module.save_args, module.load_args = save_args, load_args
