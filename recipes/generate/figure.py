"""Draws the figure of one training step, ``docs/method.png``, for the README and the pages."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from llamafactory_hera.plots import BLUE, GRAY, GREEN, ORANGE, new_figure, save_figure

_INK, _PAPER = "#1F2933", "white"


def draw(path: Path) -> None:
    """Draws how vectors are read from heads, gathered, and compared with the teacher's features."""
    figure = new_figure(10.4, 4.3)
    figure.set_layout_engine("none")
    figure.set_facecolor(_PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 10.4), ylim=(0, 4.3))
    axes.axis("off")
    _box(axes, 0.15, 1.75, 1.25, 0.8, "batch of images\nwith their text", GRAY)
    _model(axes)
    _box(axes, 1.95, 0.25, 2.3, 0.75, "frozen DINOv2\n(vision teacher)", BLUE)
    _box(axes, 5.15, 2.75, 1.75, 0.8, "one vector per head\nand sample, averaged\nover the answer", ORANGE)
    _box(axes, 5.15, 0.25, 1.75, 0.75, "one feature\nper image", BLUE)
    axes.add_patch(Rectangle((7.25, 0.05), 0.06, 4.0, color=GRAY, alpha=0.35, linewidth=0))
    axes.text(7.28, 4.12, "gathered over all GPUs", ha="center", va="bottom", fontsize=8, color=_INK)
    _neighbors(axes, 8.05, 2.75, ORANGE, "similarities in the head", (2, 4))
    _neighbors(axes, 8.05, 0.25, BLUE, "nearest neighbors by the teacher", (1, 3))
    axes.text(8.85, 1.93, "HeRA loss: the teacher's neighbors\nmust be near in the head, too", **_CENTER, color=GREEN)
    for start, end, color in (
        ((1.4, 2.3), (1.95, 2.75), _INK),
        ((1.4, 2.0), (1.95, 0.65), _INK),
        ((4.25, 3.1), (5.15, 3.15), ORANGE),
        ((4.25, 0.63), (5.15, 0.63), BLUE),
        ((6.9, 3.15), (7.95, 3.15), ORANGE),
        ((6.9, 0.63), (7.95, 0.63), BLUE),
        ((8.65, 1.25), (8.65, 1.68), GREEN),
        ((8.65, 2.65), (8.65, 2.18), GREEN),
    ):
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=color, linewidth=1.4))
    axes.text(3.1, 1.52, "language-modeling loss as usual", **_CENTER, color=GRAY, style="italic")
    save_figure(figure, path)


_CENTER = {"ha": "center", "va": "center", "fontsize": 8.5}


def _box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str) -> None:
    style = "round,pad=0.02,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=_PAPER, edgecolor=color, lw=1.6))
    axes.text(x + width / 2, y + height / 2, text, **_CENTER, color=_INK)


def _model(axes: Axes) -> None:
    """Draws the layers of the language model as rows of heads, with the aligned heads filled."""
    _box(axes, 1.95, 1.75, 2.3, 2.25, "", _INK)
    axes.text(3.1, 3.8, "multimodal LLM: layers of heads", **_CENTER, color=_INK)
    aligned = {(1, 2), (2, 5), (2, 6), (4, 1), (5, 4)}
    for layer in range(6):
        for head in range(8):
            color = ORANGE if (layer, head) in aligned else "#D9DEE3"
            axes.add_patch(Rectangle((2.13 + 0.245 * head, 1.92 + 0.28 * layer), 0.19, 0.2, color=color, linewidth=0))


def _neighbors(axes: Axes, x: float, y: float, color: str, title: str, near: tuple[int, int]) -> None:
    """Draws five samples on a line, with the two nearest neighbors filled."""
    axes.text(x + 0.6, y + 0.92, title, **_CENTER, color=_INK)
    for place in range(5):
        filled = place in near
        axes.add_patch(
            Rectangle((x - 0.05 + 0.28 * place, y + 0.35), 0.2, 0.3, facecolor=color if filled else _PAPER,
                      edgecolor=color, linewidth=1.3)
        )  # fmt: skip


if __name__ == "__main__":
    draw(Path(__file__).parents[2] / "docs/method.png")
