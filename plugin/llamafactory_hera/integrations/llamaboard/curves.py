"""The loss plot of a HeRA run: both losses on an axis of their own, and the agreement with the teacher below."""

from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llamafactory_hera.selection.figure import BLUE, GREEN, GREY, ORANGE, new_figure

Smooth = Callable[[list[float]], list[float]]


def loss_figure(trainer_log: list[dict[str, Any]], smooth: Smooth) -> Figure | None:
    """Draws the curves of a training log.

    Args:
        trainer_log: Lines of ``trainer_log.jsonl``.
        smooth: The host's smoothing.

    Returns:
        None for a log without HeRA's curves.
    """
    lines = _latest(trainer_log)
    if not any("hera_loss" in line for line in lines):
        return None
    measured = any("hera_mknn" in line for line in lines)  # not every objective has it
    figure = new_figure(4.6, 5.4 if measured else 3.6)  # it is shown in a narrow column
    panels = figure.subplots(1 + measured, 1, sharex=True, squeeze=False, height_ratios=[3, 2][: 1 + measured])[:, 0]
    losses, below = panels[0], panels[-1]
    _draw(losses, lines, "lm_loss", "LM loss", BLUE, smooth)
    hera = losses.twinx()
    _draw(hera, lines, "hera_loss", "HeRA loss", ORANGE, smooth)
    hera.spines["top"].set_visible(False)
    handles = [*losses.get_lines(), *hera.get_lines()]
    named = [handle for handle in handles if not handle.get_label().startswith("_")]
    losses.legend(handles=named, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    if measured:
        _draw(below, lines, "hera_mknn", "MKNN", GREEN, smooth)
        # it falls while the memory fills: of few candidates many are neighbours by chance
        chance = {line["current_steps"]: line["hera_mknn_chance"] for line in lines if "hera_mknn_chance" in line}
        if chance:
            alone = "_" if len(chance) == 1 else None
            below.plot(
                list(chance),
                list(chance.values()),
                color=GREY,
                linestyle="--",
                linewidth=1,
                marker=alone,
                label="chance",
            )
            below.legend(frameon=False, fontsize=8)
    below.set_xlabel("step")
    return figure


def _latest(trainer_log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The log without the steps that a resumed run has made again."""
    lines: list[dict[str, Any]] = []
    for line in trainer_log:
        # a line without a loss, such as the closing one, repeats the number of the last step
        while lines and "loss" in line and lines[-1]["current_steps"] >= line["current_steps"]:
            lines.pop()
        lines.append(line)
    return lines


def _draw(axes: Axes, lines: list[dict[str, Any]], key: str, label: str, colour: str, smooth: Smooth) -> None:
    steps = [line["current_steps"] for line in lines if key in line]
    values = [line[key] for line in lines if key in line]
    axes.plot(steps, values, color=colour, alpha=0.35, linewidth=1)
    axes.plot(steps, smooth(values), color=colour, label=label, marker="o" if len(steps) == 1 else None)
    axes.set_ylabel(label, color=colour)
    axes.tick_params(axis="y", labelcolor=colour)
    axes.spines["top"].set_visible(False)
