"""Plotting helpers of all pictures: figures without a window system, colors, heat maps, PNG files and inline SVG."""

import re
from collections.abc import Sequence
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any
from zlib import adler32

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import ArrayLike

from .files import whole_file

# The palette of Okabe and Ito, which stays distinguishable under every common kind of color blindness.
BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#7F7F7F"
#: Colors of several series; see :func:`series_colors`.
SERIES = (GRAY, ORANGE, BLUE, GREEN, "#CC79A7", "#E69F00", "#56B4E9")
_USUAL = {"before": GRAY, "base": GRAY, "sft": ORANGE, "hera": BLUE, "after": BLUE}

#: Prefix of a ``gid`` whose text :func:`inline_svg` shows as a tooltip.
TIP = "tip:"
_LABEL = 0.2  # inches that a tick label needs along its axis


def new_figure(width: float, height: float) -> Figure:
    """Makes a figure, with sizes in inches, that belongs to no window system."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def series_colors(names: Sequence[str]) -> dict[str, str]:
    """Gives each series a color by its name, the same in every picture unless an earlier name has taken it."""
    colors: dict[str, str] = {}
    for name in names:
        start = SERIES.index(_USUAL[name]) if name in _USUAL else adler32(name.encode()) % len(SERIES)
        order = [*SERIES[start:], *SERIES[:start]]
        colors[name] = next((color for color in order if color not in colors.values()), order[0])
    return colors


def plain(axes: Axes) -> None:
    """Removes the frame lines that carry no information."""
    axes.spines[["top", "right"]].set_visible(False)


def tick_step(count: int, room: float, label_size: float) -> int:
    """Returns the smallest of 1, 2, 4, 5, 8, 10, … at which ``count`` labels fit on an axis of ``room`` inches."""
    return next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 50, 100, count) if count / step * label_size <= room)


def heat_map(
    figure: Figure, axes: Axes, values: ArrayLike, size: tuple[float, float], title: str, **style: Any
) -> Colorbar:
    """Draws a value for each head, ``[L, H]``, on axes of ``size`` inches, and returns the color bar."""
    image = axes.imshow(values, **{"cmap": "cividis", "aspect": "auto", "interpolation": "nearest"} | style)
    for axis, count, room in zip((axes.yaxis, axes.xaxis), np.shape(values), reversed(size), strict=True):
        axis.set_ticks(range(0, count, tick_step(count, room, _LABEL)))
    axes.tick_params(labelsize=8)
    axes.set(xlabel="head", ylabel="layer")
    axes.set_title(title, fontsize=9)
    return figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, aspect=40)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG file, which appears complete or not at all."""
    _show_text_as_it_is(figure)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def inline_svg(figure: Figure, alt: str) -> str:
    """Renders a figure as SVG for an HTML page; elements with a ``gid`` that starts with :data:`TIP` get a tooltip."""
    drawn = StringIO()
    _show_text_as_it_is(figure)
    with rc_context({"svg.hashsalt": alt}):  # makes the file reproducible
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue()
    tipped = re.sub(rf'<g id="{TIP}(.*?)">', r"<g><title>\1</title>", text[text.index("<svg") :])
    return tipped.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)


def _show_text_as_it_is(figure: Figure) -> None:
    # matplotlib reads dollar signs, which names of models and datasets may contain, as formulas
    for text in figure.findobj(Text):
        text.set_parse_math(False)
