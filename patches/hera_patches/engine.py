"""Fills a reloaded page of the web UI again while heads are being scored.

Why: the host does so while it trains, and knows nothing of what else may run. Can go when the host lets plugins add
elements to its pages.
"""

from collections.abc import Iterator
from typing import Any

from .registry import around

FUNCTIONS = {"Engine.resume": "self"}


def apply(module: Any) -> None:
    """Wraps ``Engine.resume``; ``hera`` is the panel that the train tab has given the runner."""

    @around(module.Engine)
    def resume(host: Any, self: Any) -> Iterator[dict[Any, Any]]:
        yield from host(self)
        if hasattr(self.runner, "hera"):
            yield from self.runner.hera.settings_after_reload()
