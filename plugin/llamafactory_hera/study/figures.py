"""The study's two pictures, in colours that colour-blind readers can tell apart."""

from pathlib import Path
from typing import Any

from ..selection.figure import BLUE, GREY, ORANGE, new_figure, plain, save_figure
from .methods import BASELINE
from .questions import CATEGORIES
from .results import label

_GROUPS = (("worst5", "worst-5", ORANGE, "o"), ("top5", "top-5", BLUE, "s"))
_NOTHING = {"mean": float("nan"), "low": None, "high": None}  # no seed in common with the baseline
_MODES = {"llm": "captions alone", "mllm": "image and caption"}


def draw_mechanism(measured: dict[str, Any], target: Path) -> None:
    """MKNN of worst and top heads for every method, with its interval, in both modes of scoring."""
    modes = measured["mechanism"]
    rows = list(next(iter(modes.values())))
    figure = new_figure(10, 1.4 + 0.36 * len(rows))
    for axes, (mode, found) in zip(figure.subplots(1, len(modes), sharey=True), modes.items(), strict=True):
        for group, name, colour, marker in _GROUPS:
            values = [found[row][group] for row in rows]
            _points(axes, values, colour, marker, name, 0.12 if group == "top5" else -0.12)
        axes.axvline(measured["chance"][mode], color="black", linestyle="--", linewidth=1, label="chance")
        axes.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=8)
        axes.set_xlabel("MKNN")
        axes.set_title(_MODES[mode], fontsize=10)
        plain(axes)
    axes.invert_yaxis()
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    save_figure(figure, target)


def draw_accuracy(measured: dict[str, Any], target: Path) -> None:
    """Each method's accuracy minus the baseline's, with its interval, by category."""
    rows = [row for row in measured["accuracy"] if row != BASELINE]
    names = (*CATEGORIES, "mean")
    figure = new_figure(12, 1.2 + 0.34 * max(2, len(rows)))
    for axes, name in zip(figure.subplots(1, len(names), sharey=True, sharex=True), names, strict=True):
        values = [_scaled(measured["accuracy"][row][name].get("minus_baseline", _NOTHING)) for row in rows]
        _points(axes, values, BLUE if name == "mean" else GREY, "o", None, 0)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=8)
        sft, text = measured["accuracy"][BASELINE][name]["mean"], measured["floor"]["text_alone"][name]
        axes.set_title(f"{name}\nSFT {100 * sft:.1f} %\ntext {100 * text:.1f} %", fontsize=9)
        plain(axes)
    axes.invert_yaxis()
    figure.supxlabel(f"accuracy minus {label(BASELINE)}'s, percentage points", fontsize=9)
    save_figure(figure, target)


def _points(axes: Any, values: list[dict[str, Any]], colour: str, marker: str, name: str | None, shift: float) -> None:
    means = [value["mean"] for value in values]
    low = [value["mean"] - value["low"] if value["low"] is not None else 0 for value in values]
    high = [value["high"] - value["mean"] if value["high"] is not None else 0 for value in values]
    places = [place + shift for place in range(len(values))]
    axes.errorbar(means, places, xerr=[low, high], fmt=marker, color=colour, label=name, capsize=2, markersize=4)


def _scaled(value: dict[str, Any]) -> dict[str, Any]:
    return {key: 100 * number if number is not None and key != "count" else number for key, number in value.items()}
