"""The pictures: scores of all heads, layers against heads (paper, fig. 3 left), runs side by side (fig. 3 right)."""

import os
import re
from collections.abc import Sequence
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from ..files import whole_file, write_text, writing
from .scores import Comparison, ScoreFile, compare, render_markdown, render_table

# From the palette of Okabe and Ito, which every common kind of color blindness can tell apart.
BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#7F7F7F"
# For things that stand side by side; the first is what the others are compared with.
_SERIES = (GRAY, ORANGE, BLUE, GREEN, "#CC79A7", "#E69F00", "#56B4E9")

_TIP = "tip:"  # before the text of a ``gid``
_CELL = 0.16  # inches
_LABEL = 0.2  # inches along the axis that a tick label needs


def new_figure(width: float, height: float) -> Figure:
    """A figure, in inches, that belongs to no window system."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(axes: Axes) -> None:
    """Takes away the frame lines that carry nothing."""
    axes.spines[["top", "right"]].set_visible(False)


def tick_step(count: int, room: float, label_size: float) -> int:
    """The smallest of 1, 2, 4, 5, 8, 10, … at which ``count`` labels do not touch on an axis of ``room`` inches."""
    return next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 50, 100, count) if count / step * label_size <= room)


def save_figure(figure: Figure, target: Path) -> None:
    """Writes a PNG; the file appears complete or not at all."""
    with whole_file(target) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def inline_svg(figure: Figure, alt: str) -> str:
    """A figure as a part of an HTML page; what has a ``gid`` of ours shows it when the pointer rests there."""
    drawn = StringIO()
    with rc_context({"svg.hashsalt": alt}):  # the same page twice is the same file
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue()
    tipped = re.sub(rf'<g id="{_TIP}(.*?)">', r"<g><title>\1</title>", text[text.index("<svg") :])
    return tipped.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)


def show(path: Path) -> None:
    """Prints the table of a score file and draws its picture, of the same name with the suffix ``.png``."""
    scored = ScoreFile.load(path)
    print(render_table(scored))
    draw_scores(scored, path.with_suffix(".png"))


def draw_scores(scored: ScoreFile, target: Path) -> None:
    """Draws the MKNN of each layer and its best and worst head, and beside it all heads, if heads are chosen."""
    if scored.chosen.granularity == "layer":
        figure = new_figure(7.0, 5.0)
        _curves(figure.subplots(), scored)
    else:
        n_layers, n_heads = scored.scores.shape
        width, height = max(4.0, n_heads * _CELL), max(3.6, n_layers * _CELL)
        figure = new_figure(width + 6.2, height + 1.2)
        heat, curves = figure.subplots(1, 2, width_ratios=[width + 1.2, 5.0])
        _draw_heads(figure, heat, scored, (width, height))
        _curves(curves, scored)
    provenance = scored.provenance
    figure.suptitle(
        f"{provenance['model']} ({provenance['mode']}) against {provenance['teacher']}\n"
        f"{provenance['samples']} samples of {provenance['dataset']}, k={provenance['k']}",
        fontsize=10,
    )
    save_figure(figure, target)


def heat_map(
    figure: Figure, axes: Axes, values: ArrayLike, size: tuple[float, float], title: str, **style: Any
) -> Colorbar:
    """Draws values ``[L, H]`` of all heads on axes of ``size`` inches, and returns the scale of their colors."""
    image = axes.imshow(values, **{"cmap": "cividis", "aspect": "auto", "interpolation": "nearest"} | style)
    for axis, count, room in zip((axes.yaxis, axes.xaxis), np.shape(values), reversed(size), strict=True):
        axis.set_ticks(range(0, count, tick_step(count, room, _LABEL)))
    axes.tick_params(labelsize=8)
    axes.set(xlabel="head", ylabel="layer")
    axes.set_title(title, fontsize=9)
    return figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, aspect=40)


def _draw_heads(figure: Figure, axes: Axes, scored: ScoreFile, size: tuple[float, float]) -> None:
    bar = heat_map(figure, axes, np.ma.masked_invalid(scored.scores), size, f"framed: {_selected(scored)}")
    bar.set_label(f"MKNN (chance {scored.chance:.3f})")
    for layer, head in np.argwhere(np.isnan(scored.scores)):
        axes.text(head, layer, "×", ha="center", va="center", fontsize=7, color=GRAY)
    for target in scored.chosen.items:
        assert target.head is not None
        corner = (target.head - 0.5, target.layer - 0.5)
        # a dark line around a light one shows on both ends of the color scale
        for color, line in (("black", 3.4), ("white", 1.4)):
            axes.add_patch(
                Rectangle(corner, 1, 1, fill=False, edgecolor=color, linewidth=line, clip_on=False, zorder=3)
            )


def _selected(scored: ScoreFile) -> str:
    names = scored.chosen.names
    return f"selected ({scored.provenance['strategy']}) {' '.join(names[:8])}{' …' if len(names) > 8 else ''}"


def _curves(axes: Axes, scored: ScoreFile) -> None:
    layers = np.arange(len(scored.scores))
    known = np.ma.masked_invalid(scored.scores)
    best, worst = known.max(axis=1).filled(np.nan), known.min(axis=1).filled(np.nan)
    axes.fill_between(layers, worst, best, color=GRAY, alpha=0.15, linewidth=0)
    axes.plot(layers, best, color=BLUE, marker="^", markersize=4, label="best head of the layer")
    axes.plot(layers, scored.layer_scores, color="black", marker="o", markersize=3, label="layer output")
    axes.plot(layers, worst, color=ORANGE, marker="v", markersize=4, label="worst head of the layer")
    if scored.chosen.granularity == "layer":
        chosen = [target.layer for target in scored.chosen.items]
        ring: dict[str, Any] = {"facecolors": "none", "edgecolors": ORANGE, "linewidths": 1.8}
        axes.scatter(chosen, scored.layer_scores[chosen], s=110, **ring, label=_selected(scored), zorder=3)
    axes.axhline(scored.chance, color=GRAY, linestyle="--", linewidth=1, label="chance")
    axes.set_xlabel("layer")
    axes.set_ylabel("MKNN")
    axes.set_xticks(range(0, len(layers), tick_step(len(layers), 4.0, 0.3)))
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=8)
    plain(axes)
    axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def draw_comparison(comparison: Comparison) -> Figure:
    """Draws the worst and top heads or layers of the first file in every file, as bars."""
    first, n_files = comparison.files[0], len(comparison.files)
    figure = new_figure(max(8.0, 1.6 + 2.2 * n_files), 3.8)
    both = figure.subplots(1, 2, sharey=True)
    for axes, (title, rows) in zip(both, comparison.groups.items(), strict=True):
        width = 0.8 / n_files
        columns = zip(*rows.values(), strict=True)
        for position, (values, name) in enumerate(zip(columns, comparison.names, strict=True)):
            places = [place + (position - (n_files - 1) / 2) * width for place in range(len(rows))]
            bars = axes.bar(places, values, width * 0.92, color=_SERIES[position % len(_SERIES)], label=name)
            for bar, target, value in zip(bars, rows, values, strict=True):
                bar.set_gid(f"{_TIP}{target} {name}: {value:.4f}")
        axes.axhline(first.chance, color="black", linestyle="--", linewidth=1, label="chance")
        axes.axvline(len(rows) - 1.5, color="black", linewidth=0.6)
        axes.set_xticks(range(len(rows)), list(rows), fontsize=8)
        whose = "" if title == "aligned" else f" of {comparison.names[0]}"
        axes.set_title(f"{title} {first.chosen.what}{whose}", fontsize=10)
        plain(axes)
    both[0].set_ylabel("MKNN")
    chance, *bars = zip(*both[0].get_legend_handles_labels(), strict=True)
    handles, labels = zip(*bars, chance, strict=True)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, n_files + 1), fontsize=8, frameon=False)
    return figure


def write_report(
    paths: Sequence[str | os.PathLike],
    output: str | os.PathLike = "hera_report",
    names: Sequence[str] = (),
    aligned: str | None = None,
) -> tuple[Path, Path]:
    """Compares score files as :func:`compare` does, in ``OUTPUT.png`` and ``OUTPUT.md``, and returns their paths."""
    comparison = compare(paths, names, aligned)
    base = Path(output)
    picture, page = base.with_name(f"{base.name}.png"), base.with_name(f"{base.name}.md")
    with writing("report", base, "give another path"):
        base.parent.mkdir(parents=True, exist_ok=True)
        save_figure(draw_comparison(comparison), picture)
        write_text(page, render_markdown(comparison, picture.name))
    return picture, page
