"""Helpers for all plots: figures that need no display, colors, heat maps, and image files."""

from collections.abc import Sequence
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from .files import PICTURE, whole_file

# The palette of Okabe and Ito, which stays distinguishable under every common kind of color blindness.
BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#7F7F7F"
_SERIES = {"chance": "#B8BDC2", "before": GRAY, "sft": ORANGE, "hera": BLUE, "after": BLUE}
_OTHERS = (GREEN, "#CC79A7", "#E69F00", "#56B4E9")
_LABELS = {"layer": 0.2, "head": 0.34}  # inches that a tick label needs along its axis


def new_figure(width: float, height: float) -> Figure:
    """Creates a figure that needs no display; the size is in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def series_colors(names: Sequence[str]) -> dict[str, str]:
    """Returns a color for each series; chance, before, SFT, HeRA and after have the same color in every picture."""
    known = {name: _SERIES[name.lower()] for name in names if name.lower() in _SERIES}
    rest = cycle(color for color in (*_OTHERS, *_SERIES.values()) if color not in known.values())
    return {name: known.get(name) or next(rest) for name in names}


def plain(axes: Axes) -> None:
    """Removes the top and right frame lines."""
    axes.spines[["top", "right"]].set_visible(False)


def heat_map(
    figure: Figure, axes: Axes, values: ArrayLike, size: tuple[float, float], title: str, **style: Any
) -> Colorbar:
    """Plots one value per head, ``[L, H]``, on axes of ``size`` inches, and returns the color bar."""
    image = axes.imshow(values, **{"cmap": "cividis", "aspect": "auto", "interpolation": "nearest"} | style)
    axes.set(xlabel="head", ylabel="layer")
    for axis, count, room in zip((axes.yaxis, axes.xaxis), np.shape(values), reversed(size), strict=True):
        name = axis.get_label_text()
        axis.set_major_locator(MaxNLocator(min(count, int(room / _LABELS[name])), integer=True))
        axis.set_major_formatter(f"{name[0].upper()}{{x:.0f}}")
    axes.tick_params(labelsize=8)
    axes.set_title(title, fontsize=9)
    return figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, aspect=40)


def render(figure: Figure, file_type: str = "png") -> bytes:
    """Renders a figure as an image file, by default as PNG."""
    for text in figure.findobj(Text):  # dollar signs in a model's name would start a formula
        text.set_parse_math(False)
    image = BytesIO()
    metadata = {"Software": PICTURE} if file_type == "png" else None  # check_replaceable() looks for it
    figure.savefig(image, dpi=150, format=file_type, metadata=metadata)
    return image.getvalue()


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure to a PNG file atomically."""
    with whole_file(path) as temporary:
        temporary.write_bytes(render(figure))
