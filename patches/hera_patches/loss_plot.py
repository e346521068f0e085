"""Draws HeRA's curves in the loss plot of the web UI.

Why: the host draws one curve, the sum of both losses. Can go when it draws every logged curve.
"""

from typing import Any

from .registry import around

FUNCTIONS = {"gen_loss_plot": "trainer_log", "smooth": "scalars"}


def apply(module: Any) -> None:

    @around(module)
    def gen_loss_plot(host: Any, trainer_log: list[dict[str, Any]]) -> Any:
        if not any("hera_loss" in line for line in trainer_log):
            return host(trainer_log)
        from llamafactory_hera.integrations.llamaboard.pictures import loss_figure

        return loss_figure(trainer_log, module.smooth)
