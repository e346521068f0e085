"""What the pictures have in common: a canvas without a display, colours that colour-blind readers can tell apart."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..files import whole_file

# From the palette of Okabe and Ito, which every common kind of colour blindness can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7F7F7F"
#: For things that stand side by side; the first is what the others are compared with.
SERIES = (GREY, ORANGE, BLUE, GREEN, "#CC79A7", "#E69F00", "#56B4E9")


def new_figure(width: float, height: float) -> Figure:
    """A figure of ``width`` by ``height`` inches that belongs to no window system."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(axes: Axes) -> None:
    """Takes away the frame lines that carry nothing."""
    axes.spines[["top", "right"]].set_visible(False)


def tick_step(count: int, room: float, label_size: float) -> int:
    """The smallest of 1, 2, 4, 5, 8, 10, … at which ``count`` labels do not touch.

    Args:
        count: How many places could have a label.
        room: Length of the axis, in inches.
        label_size: What one label needs, in inches.
    """
    return next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 50, 100, count) if count / step * label_size <= room)


def save_figure(figure: Figure, target: Path) -> None:
    """Writes a PNG; the file appears complete or not at all."""
    with whole_file(target) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
