"""Lets the HeRA curves reach ``trainer_log.jsonl``, which the host's web UI plots.

Why: the host's callback writes a fixed set of keys. Can go when it writes every logged key.
"""

from typing import Any

from .registry import around

FUNCTIONS = {"LogCallback.on_log": "self args state control kwargs", "LogCallback._write_log": "self output_dir logs"}
USED = {"LogCallback.on_log": "_write_log"}


def apply(module: Any) -> None:

    @around(module.LogCallback)
    def on_log(host: Any, self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = state.log_history[-1] if state.log_history else {}
        extra = {key: value for key, value in last.items() if key == "lm_loss" or key.startswith("hera_")}
        if not extra:
            return host(self, args, state, control, **kwargs)
        write = self._write_log
        # the line is written by another thread: its values are bound now
        self._write_log = lambda output_dir, logs: write(output_dir, {**logs, **extra})
        try:
            return host(self, args, state, control, **kwargs)
        finally:
            del self._write_log
