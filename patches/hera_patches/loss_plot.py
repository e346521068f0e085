"""Draws HeRA's curves in the loss plot of the web UI.

Why: the host draws one curve, the sum of both losses.

Tested with 0.9.5. Can go when the host draws every logged curve.
"""

from functools import wraps
from typing import Any

from .registry import differs

WHAT = "LM loss, HeRA loss and MKNN in the web UI's plot"


def check(module: Any) -> str | None:
    """Says what the host's module lacks, or None."""
    return differs(module, gen_loss_plot=["trainer_log"], smooth=["scalars"])


def apply(module: Any) -> None:
    """Wraps ``gen_loss_plot``."""
    original = module.gen_loss_plot

    @wraps(original)
    def gen_loss_plot(trainer_log: list[dict[str, Any]]) -> Any:
        if not any("hera_loss" in line for line in trainer_log):
            return original(trainer_log)
        from llamafactory_hera.integrations.llamaboard.pictures import loss_figure

        return loss_figure(trainer_log, module.smooth)

    module.gen_loss_plot = gen_loss_plot
