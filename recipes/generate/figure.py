"""Draws the figure of one training step, ``docs/method.png``, for the README and the pages."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from llamafactory_hera.plots import BLUE, GRAY, GREEN, ORANGE, new_figure, save_figure

_INK, _PAPER, _PALE = "#1F2933", "white", "#D9DEE3"
_SIZE = (10.8, 5.0)


def draw(path: Path) -> None:
    """Draws how a step reads vectors from the model, gathers them, and compares them."""
    figure = new_figure(*_SIZE)
    figure.set_layout_engine("none")
    figure.set_facecolor(_PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, _SIZE[0]), ylim=(0, _SIZE[1]))
    axes.axis("off")
    for x, title in ((3.05, "1  read"), (6.25, "2  gather"), (9.05, "3  compare")):
        _text(axes, x, 4.78, title, fontsize=10, weight="bold")
    _box(axes, 0.15, 2.0, 1.1, 0.8, "images\nwith text", GRAY)
    _model(axes)
    _box(axes, 1.75, 0.35, 2.6, 0.75, "teacher: frozen DINOv2\none feature per image", BLUE)
    axes.add_patch(Rectangle((5.55, 0.2), 1.4, 4.35, facecolor="#F4F6F8", edgecolor=_PALE))
    _text(axes, 6.25, 3.3, "samples of\nall processes,\nwith gradients")
    _text(axes, 6.25, 1.85, "and earlier samples\n(hera_memory),\nwithout gradients")
    _rows(axes, 2.78, ORANGE, [[4, 9, 2, 8, 3, 1], [9, 3, 4, 2, 1, 7], [2, 5, 1, 3, 9, 8]])
    _text(axes, 9.05, 4.37, "each head: similarity of samples to their candidates")
    _rows(axes, 0.42, BLUE, [[0, 10, 0, 10, 0, 0], [10, 0, 10, 0, 0, 0], [0, 0, 0, 0, 10, 10]])
    _text(axes, 9.05, 0.2, "teacher: the k nearest neighbors of each sample")
    _text(axes, 9.05, 2.3, "HeRA loss: in the head, too, these\nmust be the most similar", color=GREEN, weight="bold")
    for start, end, color in (
        ((1.25, 2.6), (1.75, 2.9), _INK),
        ((1.25, 2.2), (1.72, 0.85), _INK),
        ((4.15, 2.72), (5.55, 2.72), ORANGE),
        ((4.35, 0.72), (5.55, 0.72), BLUE),
        ((6.95, 3.5), (7.75, 3.5), ORANGE),
        ((6.95, 0.95), (7.75, 0.95), BLUE),
        ((9.05, 2.74), (9.05, 2.53), GREEN),
        ((9.05, 1.85), (9.05, 2.07), GREEN),
    ):
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=color, linewidth=1.4))
    _text(axes, 4.96, 3.08, "one vector\nper head\nand sample", color=ORANGE)
    save_figure(figure, path)


def _text(axes: Axes, x: float, y: float, text: str, color: str = _INK, fontsize: float = 8.5, **style: Any) -> None:
    axes.text(x, y, text, ha="center", va="center", color=color, fontsize=fontsize, **style)


def _box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str) -> None:
    style = "round,pad=0.02,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=_PAPER, edgecolor=color, lw=1.6))
    _text(axes, x + width / 2, y + height / 2, text)


def _model(axes: Axes) -> None:
    """Draws one layer of the language model: its heads, two of them aligned, and the output projection."""
    _box(axes, 1.75, 1.5, 2.6, 2.95, "", _INK)
    _text(axes, 3.05, 4.22, "a layer of the language model")
    _text(axes, 3.05, 1.72, "to the LM loss, as without HeRA", color=GRAY, style="italic")
    for head in range(8):
        color = ORANGE if head in (2, 5) else _PALE
        axes.add_patch(Rectangle((1.95 + 0.28 * head, 3.8), 0.22, 0.22, color=color, linewidth=0))
    _text(axes, 3.05, 3.52, "outputs of two heads,\naveraged over the answer", color=ORANGE)
    _box(axes, 1.95, 2.45, 2.2, 0.55, "output projection W_O", GRAY)
    for x, start, end, color in ((2.62, 3.3, 3.02, ORANGE), (3.46, 3.3, 3.02, ORANGE), (3.05, 2.43, 1.88, GRAY)):
        axes.add_patch(FancyArrowPatch((x, start), (x, end), arrowstyle="-|>", mutation_scale=9, color=color, lw=1.4))


def _rows(axes: Axes, y: float, color: str, shares: Sequence[Sequence[float]]) -> None:
    """Draws a square for each of three samples and six candidates; the last two, from memory, are dashed."""
    for row, values in enumerate(shares):
        for place, share in enumerate(values):
            corner = (7.85 + 0.42 * place, y + 0.96 - 0.45 * row)
            axes.add_patch(Rectangle(corner, 0.34, 0.36, facecolor=color, alpha=share / 10, linewidth=0))
            axes.add_patch(
                Rectangle(corner, 0.34, 0.36, fill=False, edgecolor=color, lw=1.1, ls="--" if place > 3 else "-")
            )


if __name__ == "__main__":
    draw(Path(__file__).parents[2] / "docs/method.png")
