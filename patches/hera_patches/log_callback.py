"""Lets the HeRA curves reach ``trainer_log.jsonl``, which the host's web UI plots.

Why: the host's callback writes a fixed set of keys.

Tested with 0.9.5. Can go when the host writes every logged key.
"""

from functools import partial, wraps
from typing import Any

from .registry import differs

WHAT = "lm_loss and hera_* in trainer_log.jsonl"


def check(module: Any) -> str | None:
    """Says what the host's callback lacks, or None."""
    parameters = ["self", "args", "state", "control", "kwargs"]
    if difference := differs(
        getattr(module, "LogCallback", None), on_log=parameters, _write_log=["self", "output_dir", "logs"]
    ):
        return difference
    called = module.LogCallback.on_log.__code__.co_names
    return None if "_write_log" in called else "LogCallback.on_log does not call _write_log"


def _write_with(write: Any, extra: dict[str, Any], output_dir: str, logs: dict[str, Any]) -> None:
    write(output_dir, {**logs, **extra})


def apply(module: Any) -> None:
    """Wraps ``LogCallback.on_log``."""
    callback = module.LogCallback
    original = callback.on_log

    @wraps(original)
    def on_log(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = state.log_history[-1] if state.log_history else {}
        extra = {key: value for key, value in last.items() if key == "lm_loss" or key.startswith("hera_")}
        if not extra:
            return original(self, args, state, control, **kwargs)
        # the line is written by another thread: bind its values now
        self._write_log = partial(_write_with, self._write_log, extra)
        try:
            return original(self, args, state, control, **kwargs)
        finally:
            del self._write_log

    callback.on_log = on_log
