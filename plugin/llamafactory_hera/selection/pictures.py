"""The pictures: scores of all heads, layers against heads (paper, fig. 3 left), runs side by side (fig. 3 right)."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..files import write_text
from ..plots import BLUE, GRAY, ORANGE, SERIES, TIP, heat_map, new_figure, plain, save_figure, tick_step
from .scores import Comparison, ScoreFile, compare, render_markdown, render_table

_CELL = 0.16  # inches


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
        f"{provenance['model']} ({provenance['keys']['hera_select_mode']}) against {provenance['teacher']}\n"
        f"{provenance['samples']} samples of {provenance['dataset']}, k={provenance['keys']['hera_select_k']}",
        fontsize=10,
    )
    save_figure(figure, target)


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
    return (
        f"selected ({scored.provenance['keys']['hera_select']}) {' '.join(names[:8])}{' …' if len(names) > 8 else ''}"
    )


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
            bars = axes.bar(places, values, width * 0.92, color=SERIES[position % len(SERIES)], label=name)
            for bar, target, value in zip(bars, rows, values, strict=True):
                bar.set_gid(f"{TIP}{target} {name}: {value:.4f}")
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
    base.parent.mkdir(parents=True, exist_ok=True)
    save_figure(draw_comparison(comparison), picture)
    write_text(page, render_markdown(comparison, picture.name))
    return picture, page
