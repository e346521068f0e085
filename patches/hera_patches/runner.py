"""Lets the web UI start HeRA runs, and compare their heads with before when they have finished.

Why: the host's runner knows by name which fields a stage sends.

Tested with 0.9.5. Can go when the host lets plugins add stages to its web UI.
"""

from collections.abc import Iterator
from functools import wraps
from typing import Any

from .registry import differs

WHAT = "HeRA runs from the web UI"

_METHODS = {
    "_parse_train_args": ["self", "data"],
    "_initialize": ["self", "data", "do_train", "from_preview"],
    "_finalize": ["self", "lang", "finish_info"],
    "monitor": ["self"],
}


def check(module: Any) -> str | None:
    """Says what the host's runner lacks, or None."""
    if "info_finished" not in getattr(module, "ALERTS", {}):
        return "no ALERTS with info_finished"
    return differs(getattr(module, "Runner", None), **_METHODS)


def apply(module: Any) -> None:
    """Wraps four methods of ``Runner``; ``hera`` is the panel that the train tab has given it."""
    runner, monitor = module.Runner, module.Runner.monitor
    parse, initialize, finalize = runner._parse_train_args, runner._initialize, runner._finalize

    @wraps(parse)
    def _parse_train_args(self: Any, data: dict[Any, Any]) -> dict[str, Any]:
        args = parse(self, data)
        if args["stage"] != "hera" or not hasattr(self, "hera"):
            return args
        from llamafactory_hera.integrations.llamaboard.fields import with_hera

        return with_hera(args, lambda id_: data[self.manager.get_elem_by_id(id_)])

    @wraps(initialize)
    def _initialize(self: Any, data: dict[Any, Any], do_train: bool, from_preview: bool) -> str:
        error = initialize(self, data, do_train, from_preview)
        if error or from_preview or not hasattr(self, "hera"):
            return error
        return self.hera.refusal(data, do_train)

    @wraps(finalize)
    def _finalize(self: Any, lang: str, finish_info: str) -> None:
        data = self.running_data if self.do_train and not self.aborted else None
        finalize(self, lang, finish_info)
        if data is not None and finish_info == module.ALERTS["info_finished"][lang] and hasattr(self, "hera"):
            self.hera.trained(data)

    @wraps(monitor)
    def monitored(self: Any) -> Iterator[dict[Any, Any]]:
        data = self.running_data
        for update in monitor(self):
            yield self.hera.with_reason(update, data) if hasattr(self, "hera") else update

    runner.monitor = monitored
    runner._parse_train_args, runner._initialize, runner._finalize = _parse_train_args, _initialize, _finalize
