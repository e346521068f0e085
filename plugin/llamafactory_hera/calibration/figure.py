"""``calibration.png``: CAF and I-SAL of every head, targets and anchors marked (RAH-LoRA, fig. 3)."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..heads.targets import Target
from ..selection.figure import new_figure, save_figure, tick_step

_CELL, _LABEL = 0.2, 0.22  # inches
_MAPS = (("caf", "CAF", "cividis"), ("isal_standardized", "I-SAL, standardised in each layer", "RdBu_r"))


def draw_calibration(report: dict[str, Any], target: Path) -> None:
    """Draws both heat maps one above the other.

    Args:
        report: Content of ``calibration.json``.
        target: The PNG to write.
    """
    n_layers, n_heads = np.array(report["caf"]).shape
    width, height = max(5.0, n_heads * _CELL), max(2.4, n_layers * _CELL)
    figure = new_figure(width + 2.0, 2 * height + 2.4)
    for axes, (name, title, colours) in zip(figure.subplots(2, 1), _MAPS, strict=True):
        _heat_map(figure, axes, np.array(report[name]), colours, symmetric=name != "caf", size=(width, height))
        axes.set_title(title, fontsize=10)
        handles = _mark(axes, report)
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    facts = report["provenance"]
    data = f"{facts['control']} images of {facts['dataset']}" if facts["control"] else facts["dataset"]
    outcome = report["nothing_because"] or f"KL {report['kl']['total']:.4f} of at most {report['kl']['delta']:g}"
    figure.suptitle(f"{facts['model']}, {facts['samples']['profiled']} samples of {data}\n{outcome}", fontsize=10)
    save_figure(figure, target)


def _heat_map(
    figure: Figure, axes: Axes, values: np.ndarray, colours: str, symmetric: bool, size: tuple[float, float]
) -> None:
    n_layers, n_heads = values.shape
    bound = np.abs(values).max() if symmetric else None
    limits = {"vmin": -bound, "vmax": bound} if symmetric else {}
    image = axes.imshow(values, cmap=colours, aspect="auto", interpolation="nearest", **limits)
    figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    axes.set_xticks(range(0, n_heads, tick_step(n_heads, size[0], _LABEL)))
    axes.set_yticks(range(0, n_layers, tick_step(n_layers, size[1], _LABEL)))
    axes.tick_params(labelsize=8)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")


def _mark(axes: Axes, report: dict[str, Any]) -> list[Line2D]:
    """Marks heads; returns what a legend shows of the marks that are there."""
    calibrated = set(report["calibrated"])
    targets = [target["head"] for target in report["targets"]]
    anchors = sorted({anchor["head"] for target in report["targets"] for anchor in target["anchors"]})
    marks = (
        ([head for head in targets if head in calibrated], "X", "white", "target, calibrated"),
        ([head for head in targets if head not in calibrated], "X", "none", "target, not changed"),
        (anchors, "o", "none", "anchor"),
    )
    shown = []
    for heads, marker, face, label in marks:
        places = [Target.parse(head) for head in heads]
        # a white line within a black one shows on every colour of the scale
        for colour, line_width in (("black", 3.0), ("white", 1.2)):
            axes.scatter(
                [place.head for place in places],
                [place.layer for place in places],
                marker=marker,
                s=46,
                facecolors=face,
                edgecolors="black" if face != "none" else colour,
                linewidths=1.0 if face != "none" else line_width,
            )
        if places:
            style = {"marker": marker, "markerfacecolor": face, "markeredgecolor": "black", "linestyle": "none"}
            shown.append(Line2D([], [], **style, label=f"{label} ({len(places)})"))
    return shown
