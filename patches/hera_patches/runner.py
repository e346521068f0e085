"""Lets the web UI start HeRA runs, and compare their heads with before when they have finished.

Why: the host's runner knows by name which fields a stage sends. Can go when the host lets plugins add stages.
"""

from collections.abc import Iterator
from typing import Any

from .registry import around

FUNCTIONS = {
    "Runner._parse_train_args": "self data",
    "Runner._initialize": "self data do_train from_preview",
    "Runner._finalize": "self lang finish_info",
    "Runner.monitor": "self",
}


def apply(module: Any) -> None:
    """Wraps four methods of ``Runner``; ``hera`` is the panel that the train tab has given it."""
    finished = module.ALERTS["info_finished"]

    @around(module.Runner)
    def _parse_train_args(host: Any, self: Any, data: dict[Any, Any]) -> dict[str, Any]:
        args = host(self, data)
        return self.hera.with_hera(args, data) if args["stage"] == "hera" and hasattr(self, "hera") else args

    @around(module.Runner)
    def _initialize(host: Any, self: Any, data: dict[Any, Any], do_train: bool, from_preview: bool) -> str:
        error = host(self, data, do_train, from_preview)
        return error if error or from_preview or not hasattr(self, "hera") else self.hera.refusal(data, do_train)

    @around(module.Runner)
    def _finalize(host: Any, self: Any, lang: str, finish_info: str) -> None:
        data = self.running_data if self.do_train and not self.aborted else None
        host(self, lang, finish_info)
        if data is not None and finish_info == finished[lang] and hasattr(self, "hera"):
            self.hera.trained(data)

    @around(module.Runner)
    def monitor(host: Any, self: Any) -> Iterator[dict[Any, Any]]:
        data = self.running_data
        for update in host(self):
            yield self.hera.with_reason(update, data) if hasattr(self, "hera") else update
