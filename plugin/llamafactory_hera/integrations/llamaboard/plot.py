"""The loss plot of a HeRA run in the web UI."""

from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llamafactory_hera.plots import BLUE, GRAY, GREEN, ORANGE, new_figure

_Smooth = Callable[[list[float]], list[float]]


def loss_figure(trainer_log: list[dict[str, Any]], smooth: _Smooth) -> Figure:
    """Draws the LM loss and the HeRA loss of a run on two axes, and the MKNN with the teacher below them.

    ``smooth`` is the host's function that smooths a curve. The HeRA loss begins once the memory is full.
    """
    end = trainer_log[-1]["current_steps"]
    # a resumed run repeats steps, and the later line of a step replaces the earlier one
    by_step = {line["current_steps"]: line for line in trainer_log if "lm_loss" in line}
    lines = [line for step, line in sorted(by_step.items()) if step <= end]
    measured = any("hera_mknn" in line for line in lines)  # false for some objectives, and until the memory is full
    figure = new_figure(4.6, 5.4 if measured else 3.6)  # fits a narrow column of the page
    panels = figure.subplots(1 + measured, 1, sharex=True, squeeze=False, height_ratios=[3, 2][: 1 + measured])[:, 0]
    losses, below = panels[0], panels[-1]
    _draw(losses, lines, "lm_loss", "LM loss", BLUE, smooth)
    hera = losses.twinx()
    _draw(hera, lines, "hera_loss", "HeRA loss", ORANGE, smooth)
    smoothed = [axes.get_lines()[-1] for axes in (losses, hera)]
    losses.legend(handles=smoothed, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    if measured:
        _draw(below, lines, "hera_mknn", "MKNN", GREEN, smooth)
        # the chance level varies with the number of images in a batch
        chance = {line["current_steps"]: line["hera_mknn_chance"] for line in lines if "hera_mknn_chance" in line}
        if chance:
            style = {"color": GRAY, "linestyle": "--", "linewidth": 1}
            below.plot(list(chance), list(chance.values()), label="chance", **style)
            below.legend(frameon=False, fontsize=8)
    below.set_xlabel("step")
    return figure


def _draw(axes: Axes, lines: list[dict[str, Any]], key: str, label: str, color: str, smooth: _Smooth) -> None:
    steps = [line["current_steps"] for line in lines if key in line]
    values = [line[key] for line in lines if key in line]
    axes.plot(steps, values, color=color, alpha=0.35, linewidth=1)
    axes.plot(steps, smooth(values), color=color, label=label, marker="o" if len(steps) == 1 else None)
    axes.set_ylabel(label, color=color)
    axes.tick_params(axis="y", labelcolor=color)
    axes.spines["top"].set_visible(False)
