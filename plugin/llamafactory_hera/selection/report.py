"""Tables and plots of one file of scores, and of several files side by side in a Markdown and an HTML page."""

import math
import os
import re
import statistics
import textwrap
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from .. import plots
from ..files import RUN_FOLDER, write_text
from ..heads.targets import Target, Targets
from .gallery import default_heads, draw_gallery
from .scores import SCORE_FILES, Paths, ScoreFile, command_line, load_files, render_table

_COMPARED = 5  # heads in each group, as in the paper
_CELL = 0.16  # inches
_CHANCE: dict[str, Any] = {"color": plots.GRAY, "linestyle": "--", "linewidth": 1, "label": "chance"}
_TITLE = "# Head alignment before and after"
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>body {{ font: 15px sans-serif; margin: 2em }} img {{ max-width: 100% }} td {{ padding-right: 1.5em }}</style>
<body><h1>{title}</h1>
{body}
</body></html>
"""


class Comparison(NamedTuple):
    """Score files of one model at several times; the first file was written before training."""

    files: Sequence[ScoreFile]
    names: Sequence[str]
    #: ``worst-5`` or ``aligned``, and ``top-5``: each head or layer -> its MKNN (or NaN) in every file; also the mean.
    groups: dict[str, dict[str, list[float]]]

    @property
    def summary(self) -> str:
        """The setting of the scores, and the origin of the groups."""
        first, groups = self.files[0], " and ".join(group for group in self.groups if group != "aligned")
        return f"MKNN on {first.setting}. The {groups} {first.chosen.what} are those of {self.names[0]}."

    @property
    def table(self) -> list[list[str]]:
        """The header and rows: MKNN in every file, and the difference between the last and the first."""
        rows = [[self.files[0].chosen.granularity, *self.names, f"{self.names[-1]} - {self.names[0]}"]]
        for title, group in self.groups.items():
            for name, values in group.items():
                label = f"{title} mean" if name == "mean" else name
                rows.append([label, *(f"{value:.4f}" for value in values), f"{values[-1] - values[0]:+.4f}"])
        return rows


def compare(paths: Paths, names: Sequence[str] = (), aligned: str | None = None) -> Comparison:
    """Compares the worst and the most aligned heads or layers of the first of several score files.

    Args:
        paths: Score files or run folders, starting before training; or one run folder with a selection and scores.
        names: A name for each file; the default is the name of its folder.
        aligned: Heads or layers in place of the worst: names or a ``heads.json``. For a run folder, those of the run.

    Raises:
        ValueError: Files are missing or cannot be compared.
    """
    of_run = len(paths) == 1 and os.path.isdir(paths[0])
    if of_run:
        after, *selections = (Path(paths[0], RUN_FOLDER, name) for name in SCORE_FILES)
        paths = (next((path for path in selections if path.is_file()), selections[0]), after)
        names = names or ("before", "after")
    if len(paths) < 2:
        raise ValueError(f"report: {paths[0]} is a single file; give two files or more, or the folder of a run.")
    files, names = load_files(paths, names, "report")
    first, granularity = files[0], files[0].chosen.granularity
    ranked = list(first.ranked())
    n = min(_COMPARED, len(ranked))
    title, least = f"worst-{n}", Targets(tuple(ranked[:n]))
    if aligned is not None or (of_run and set(first.chosen.items) != set(least.items)):
        title, least = "aligned", Targets.parse(aligned or first.chosen, granularity)
    if outside := [str(target) for target in least.items if target not in ranked]:
        raise ValueError(f"--aligned: {', '.join(outside)} has no score in {first.path}; choose others.")
    scores, groups = [file.ranked(granularity) for file in files], {}
    for name, targets in ((title, least.items), (f"top-{n}", ranked[::-1][:n])):
        rows = {str(target): [known.get(target, math.nan) for known in scores] for target in targets}
        groups[name] = rows | {"mean": [statistics.mean(column) for column in zip(*rows.values(), strict=True)]}
    return Comparison(files, names, groups)


def show(path: Path) -> None:
    """Prints the table of a score file, and saves its plot under the same name with the suffix ``.png``."""
    scored = ScoreFile.load(path)
    print(render_table(scored))
    plots.save_figure(draw_scores(scored, scored.chosen.items), path.with_suffix(".png"))
    if path.name == SCORE_FILES[0] and path.parent.name == RUN_FOLDER:
        with suppress(ValueError):  # the selection of a trained run may be missing or of a different kind
            group, rows = next(iter(compare([path.parents[1]]).groups.items()))
            print(f"{group}: " + ", ".join(f"{name} {old:.4f} -> {new:.4f}" for name, (old, new) in rows.items()))


def draw_scores(scored: ScoreFile, marked: Sequence[Target], limits: Sequence[float] = ()) -> Figure:
    """Plots all heads, with a frame around ``marked`` ones, and the range of each layer (paper, fig. 3 left).

    ``limits`` are the ends of the color scale, by default the extreme scores.
    """
    n_layers, n_heads = scored.scores.shape
    size = max(4.0, n_heads * _CELL), max(3.6, n_layers * _CELL)
    figure = plots.new_figure(size[0] + 6.2, size[1] + 1.4)
    figure.suptitle(textwrap.fill(f"{scored.provenance['model']}: {scored.setting}", 110), fontsize=10)
    heat, curves = figure.subplots(1, 2, width_ratios=[size[0] + 1.2, 5.0])
    known = np.ma.masked_invalid(scored.scores)
    names = " ".join(map(str, marked[:8])) + (" …" if len(marked) > 8 else "")
    scale = dict(zip(("vmin", "vmax"), limits, strict=False))
    bar = plots.heat_map(figure, heat, known, size, f"marked: {names}", **scale)
    bar.set_label(f"MKNN (chance {scored.chance:.3f})")
    for layer, head in np.argwhere(known.mask):
        heat.text(head, layer, "×", ha="center", va="center", fontsize=7, color=plots.GRAY)
    best, worst, layers = known.max(axis=1).filled(np.nan), known.min(axis=1).filled(np.nan), np.arange(n_layers)
    curves.fill_between(layers, worst, best, color=plots.GRAY, alpha=0.15, linewidth=0)
    curves.plot(layers, best, "^-", color=plots.BLUE, markersize=4, label="best head of the layer")
    curves.plot(layers, scored.layer_scores, "o-", color="black", markersize=3, label="layer output")
    curves.plot(layers, worst, "v-", color=plots.ORANGE, markersize=4, label="worst head of the layer")
    curves.axhline(scored.chance, **_CHANCE)
    for layer, head in marked:
        if head is None:
            curves.plot(layer, scored.layer_scores[layer], "o", color=plots.ORANGE, markersize=10, fillstyle="none")
        else:
            # a dark line around a light one is visible at both ends of the color scale
            frame = Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor="white", linewidth=1.4, zorder=3)
            frame.set_path_effects([withStroke(linewidth=3.4, foreground="black")])
            heat.add_patch(frame).set_clip_on(False)
    curves.xaxis.set_major_locator(MaxNLocator(min(n_layers, 13), integer=True))
    curves.tick_params(labelsize=8)
    curves.set(xlabel="layer", ylabel="MKNN", ylim=(0, None))
    curves.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    plots.plain(curves)
    return figure


def draw_comparison(comparison: Comparison) -> Figure:
    """Plots the groups of a comparison as bars (paper, fig. 3 right)."""
    first, n_files = comparison.files[0], len(comparison.files)
    width = 0.8 / n_files
    figure = plots.new_figure(max(8.0, 1.6 + 2.2 * n_files), 3.8)
    for axes, (title, rows) in zip(figure.subplots(1, 2, sharey=True), comparison.groups.items(), strict=True):
        for position, name in enumerate(comparison.names):
            values = [row[position] for row in rows.values()]
            places = np.arange(len(rows)) + (position - (n_files - 1) / 2) * width
            axes.bar(places, values, width * 0.92, color=plots.SERIES[position % len(plots.SERIES)], label=name)
        axes.axhline(first.chance, **_CHANCE)
        axes.axvline(len(rows) - 1.5, color="black", linewidth=0.6)
        axes.set_xticks(range(len(rows)), list(rows), fontsize=8)
        axes.set(title=f"{title} {first.chosen.what}", ylabel="MKNN")
        plots.plain(axes)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, n_files + 1), fontsize=8, frameon=False)
    return figure


def write_report(
    paths: Paths, output: str | os.PathLike = "hera_report", names: Sequence[str] = (), aligned: str | None = None
) -> tuple[Path, Path]:
    """Compares score files as :func:`compare` does, writes ``OUTPUT.md`` and ``OUTPUT.html``, and returns both paths.

    The page also shows the scores of all heads and the gallery.

    Raises:
        ValueError: The files cannot be compared, or the report would replace a page of another kind.
    """
    comparison, text, page = compare(paths, names, aligned), Path(f"{output}.md"), Path(f"{output}.html")
    for path, start in ((text, _TITLE), (page, _PAGE[:9])):
        if path.is_file() and not path.read_bytes().startswith(start.encode()):
            raise ValueError(f"report: {path} exists and is not a report; give another path.")
    write_text(text, _markdown(comparison))
    title = escape(f"HeRA: {comparison.files[0].provenance['model']}")
    write_text(page, _PAGE.format(title=title, body="\n".join(_sections(comparison))))
    return text, page


def _markdown(comparison: Comparison) -> str:
    def literal(text: str) -> str:
        return re.sub(r"([\\`*<\[|])", r"\\\1", " ".join(text.split()))

    header, *rows = (f"| {' | '.join(map(literal, row))} |" for row in comparison.table)
    table = "\n".join([header, "|---|" + "--:|" * (len(comparison.files) + 1), *rows, ""])
    return f"{_TITLE}\n\n{literal(comparison.summary)}\n\n{table}"


def _sections(comparison: Comparison) -> Iterator[str]:
    first, (title, least) = comparison.files[0], next(iter(comparison.groups.items()))
    rows = ("".join(_element("td", cell) for cell in row) for row in comparison.table)
    yield f"{_element('p', comparison.summary)}<table><tr>{'</tr><tr>'.join(rows)}</tr></table>"
    yield _picture(draw_comparison(comparison), "MKNN in every file")
    marked = [Target.parse(name, first.chosen.granularity) for name in least if name != "mean"]
    limits = [function([file.scores for file in comparison.files]) for function in (np.nanmin, np.nanmax)]
    for name, file in zip(comparison.names, comparison.files, strict=True):
        yield _element("h2", f"All heads: {name} ({title} marked)")
        yield _picture(draw_scores(file, marked, limits), f"MKNN of {name}")
    yield _element("h2", "What heads see")
    try:
        worst, *others = default_heads(first)
        for head in (worst if marked[0].head is None else marked[0], *others):
            figure = draw_gallery(comparison.files, comparison.names, head)
            yield _picture(figure, f"Nearest images of {head}")
    except (OSError, ValueError) as error:
        yield _element("p", error)
    yield _element("h2", "How it was made") + _element("pre", command_line())


def _element(name: str, text: Any) -> str:
    return f"<{name}>{escape(str(text))}</{name}>"


def _picture(figure: Figure, alt: str) -> str:
    content = b64encode(plots.render(figure, "webp")).decode()
    return f'<p><img alt="{escape(alt)}" src="data:image/webp;base64,{content}"></p>'
