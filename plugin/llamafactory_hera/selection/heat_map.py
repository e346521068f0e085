"""``heads.png``: the score of every head, and beside it layers against heads (paper, fig. 3 left); ``layers.png``."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..heads.layer_set import LayerSet
from .figure import BLUE, GREY, ORANGE, new_figure, plain, save_figure, tick_step
from .score_file import ScoreFile

_CELL = 0.16  # inches
_LABEL = 0.2  # inches along the axis that a tick label needs


def draw_scores(scored: ScoreFile, target: Path) -> None:
    """Draws the MKNN of each layer beside its best and worst head, and the choice: all heads, chosen ones framed, in a
    picture beside it, or the chosen layers in the curve.

    Args:
        scored: The scores.
        target: The PNG to write.
    """
    scores = np.array(scored.scores)
    if isinstance(scored.chosen, LayerSet):
        figure = new_figure(7.0, 5.0)
        _curves(figure.subplots(), scores, scored)
    else:
        figure = _beside_a_map(scores, scored)
    provenance = scored.provenance
    figure.suptitle(
        f"{provenance['model']} ({provenance['mode']}) against {provenance['teacher']}\n"
        f"{scored.n_samples} samples of {provenance['dataset']}, k={scored.k}",
        fontsize=10,
    )
    save_figure(figure, target)


def _beside_a_map(scores: np.ndarray, scored: ScoreFile) -> Figure:
    n_layers, n_heads = scores.shape
    map_width, height = max(4.0, n_heads * _CELL), max(3.6, n_layers * _CELL)
    figure = new_figure(map_width + 6.2, height + 1.2)
    heat, curves = figure.subplots(1, 2, width_ratios=[map_width + 1.2, 5.0])
    _heat_map(figure, heat, scores, scored, (map_width, height))
    _curves(curves, scores, scored)
    return figure


def _heat_map(figure: Figure, axes: Axes, scores: np.ndarray, scored: ScoreFile, size: tuple[float, float]) -> None:
    n_layers, n_heads = scores.shape
    axes.set_facecolor("white")
    image = axes.imshow(np.ma.masked_invalid(scores), cmap="cividis", aspect="auto", interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, aspect=40)
    bar.set_label(f"MKNN (chance {scored.chance:.3f})")
    for layer, head in np.argwhere(np.isnan(scores)):
        axes.text(head, layer, "×", ha="center", va="center", fontsize=7, color=GREY)
    for layer, head in scored.chosen.heads:
        # a dark line around a light one shows on both ends of the colour scale
        for colour, width in (("black", 3.4), ("white", 1.4)):
            corner = (head - 0.5, layer - 0.5)
            axes.add_patch(
                Rectangle(corner, 1, 1, fill=False, edgecolor=colour, linewidth=width, clip_on=False, zorder=3)
            )
    axes.set_xticks(range(0, n_heads, tick_step(n_heads, size[0], _LABEL)))
    axes.set_yticks(range(0, n_layers, tick_step(n_layers, size[1], _LABEL)))
    axes.tick_params(labelsize=8)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_title(f"framed: {_selected(scored)}", fontsize=9)


def _selected(scored: ScoreFile) -> str:
    names = scored.chosen.names
    return f"selected ({scored.strategy}) {' '.join(names[:8])}{' …' if len(names) > 8 else ''}"


def _curves(axes: Axes, scores: np.ndarray, scored: ScoreFile) -> None:
    layers = np.arange(scores.shape[0])
    known = np.ma.masked_invalid(scores)
    best, worst = known.max(axis=1).filled(np.nan), known.min(axis=1).filled(np.nan)
    axes.fill_between(layers, worst, best, color=GREY, alpha=0.15, linewidth=0)
    axes.plot(layers, best, color=BLUE, marker="^", markersize=4, label="best head of the layer")
    axes.plot(layers, scored.layer_scores, color="black", marker="o", markersize=3, label="layer output")
    axes.plot(layers, worst, color=ORANGE, marker="v", markersize=4, label="worst head of the layer")
    if isinstance(scored.chosen, LayerSet):
        chosen = list(scored.chosen.layers)
        values = [scored.layer_scores[layer] for layer in chosen]
        ring = {"facecolors": "none", "edgecolors": ORANGE, "linewidths": 1.8}
        axes.scatter(chosen, values, s=110, **ring, label=_selected(scored), zorder=3)
    axes.axhline(scored.chance, color=GREY, linestyle="--", linewidth=1, label="chance")
    axes.set_xlabel("layer")
    axes.set_ylabel("MKNN")
    axes.set_xticks(range(0, len(layers), tick_step(len(layers), 4.0, 0.3)))
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=8)
    plain(axes)
    axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
