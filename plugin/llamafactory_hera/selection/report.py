"""Tables and pictures of scores: one file, and several files side by side, as PNG, Markdown or one HTML page."""

import math
import os
import re
import statistics
import textwrap
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .. import plots
from ..files import CARD, RUN_FOLDER, read_json, write_text
from ..heads.targets import Target, Targets
from .scores import SCORE_FILES, Paths, ScoreFile, command_line, load_files, render_table

_COMPARED = 5  # heads in each group, as in the paper
_CELL = 0.16  # inches
_CHANCE: dict[str, Any] = {"color": plots.GRAY, "linestyle": "--", "linewidth": 1, "label": "chance"}
_CURVES = {"lm_loss": plots.BLUE, "hera_loss": plots.ORANGE, "hera_mknn": plots.GREEN, "hera_temperature": plots.BLUE}
_TITLE = "# Head alignment before and after"
_NOT_LISTED = ("curves", "log", "log_lines", "command", "versions", "paper")  # entries of the card
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'none'; base-uri 'none'">
<style>:root {{ color-scheme: light dark }} img, svg {{ max-width: 100%; height: auto }}
body {{ font: 15px/1.45 sans-serif; max-width: 1500px; margin: 2em auto; padding: 0 1em; overflow-wrap: anywhere }}
td {{ vertical-align: top; padding-right: 1.5em }} pre {{ white-space: pre-wrap }}</style></head>
<body><h1>{title}</h1>{body}</body></html>
"""


class Comparison(NamedTuple):
    """Score files of one model at several times, the one before training first."""

    files: Sequence[ScoreFile]
    names: Sequence[str]
    #: ``worst-5`` or ``aligned``, and ``top-5``: the MKNN (or NaN) of heads or layers in every file, and their mean.
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
        paths: Files or folders of runs, the one before training first; or one folder with a selection and scores.
        names: A name for each file; the default is its folder.
        aligned: Heads or layers in place of the worst: names, or a ``heads.json``; for one folder those of its run.

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
    places = {Target(*place) for place in np.ndindex(first.of(granularity).shape)}
    if outside := [str(target) for target in least.items if target not in places]:
        raise ValueError(f"--aligned: {', '.join(outside)} has no score in {first.path}; name others.")
    scores, groups = [file.ranked(granularity) for file in files], {}
    for name, targets in ((title, least.items), (f"top-{n}", ranked[::-1][:n])):
        rows = {str(target): [known.get(target, math.nan) for known in scores] for target in targets}
        groups[name] = rows | {"mean": [statistics.mean(column) for column in zip(*rows.values(), strict=True)]}
    return Comparison(files, names, groups)


def show(path: Path) -> None:
    """Prints the table of a score file and draws its picture, of the same name with the suffix ``.png``."""
    scored = ScoreFile.load(path)
    print(render_table(scored))
    draw_scores(scored, path.with_suffix(".png"))
    if path.name == SCORE_FILES[0] and path.parent.name == RUN_FOLDER:
        with suppress(ValueError):  # a trained run, whose selection may be missing or of another kind
            group, rows = next(iter(compare([path.parents[1]]).groups.items()))
            print(f"{group}: " + ", ".join(f"{name} {old:.4f} -> {new:.4f}" for name, (old, new) in rows.items()))


def draw_scores(scored: ScoreFile, path: Path) -> None:
    """Draws the scores of a file, with its choice marked, into a PNG file."""
    plots.save_figure(scores_figure(scored, scored.chosen.items), path)


def scores_figure(scored: ScoreFile, marked: Sequence[Target], limits: Sequence[float] = ()) -> Figure:
    """Draws the scores of all heads, and of each layer with its best and worst head (paper, fig. 3 left)."""
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
            continue
        # a dark line around a light one is visible at both ends of the color scale
        for color, width in (("black", 3.4), ("white", 1.4)):
            box = Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor=color, linewidth=width, zorder=3)
            heat.add_patch(box).set_clip_on(False)
    curves.set_xticks(range(0, n_layers, plots.tick_step(n_layers, 4.0, 0.3)))
    curves.tick_params(labelsize=8)
    curves.set(xlabel="layer", ylabel="MKNN", ylim=(0, None))
    curves.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    plots.plain(curves)
    return figure


def draw_comparison(comparison: Comparison) -> Figure:
    """Draws the groups of a comparison as bars (paper, fig. 3 right)."""
    first, n_files = comparison.files[0], len(comparison.files)
    colors, width = plots.series_colors(comparison.names), 0.8 / n_files
    figure = plots.new_figure(max(8.0, 1.6 + 2.2 * n_files), 3.8)
    for axes, (title, rows) in zip(figure.subplots(1, 2, sharey=True), comparison.groups.items(), strict=True):
        for position, name in enumerate(comparison.names):
            values = [row[position] for row in rows.values()]
            places = np.arange(len(rows)) + (position - (n_files - 1) / 2) * width
            bars = axes.bar(places, values, width * 0.92, color=colors[name], label=name)
            for bar, target, value in zip(bars, rows, values, strict=True):
                bar.set_gid(f"{plots.TIP}{target} {name}: {value:.4f}")
        axes.axhline(first.chance, **_CHANCE)
        axes.axvline(len(rows) - 1.5, color="black", linewidth=0.6)
        axes.set_xticks(range(len(rows)), list(rows), fontsize=8)
        axes.set(title=f"{title} {first.chosen.what}", ylabel="MKNN")
        plots.plain(axes)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, n_files + 1), fontsize=8, frameon=False)
    return figure


def write_report(
    paths: Paths,
    output: str | os.PathLike | None = "hera_report",
    names: Sequence[str] = (),
    aligned: str | None = None,
    html: str | os.PathLike | None = None,
) -> list[Path]:
    """Compares score files as :func:`compare` does, and returns the paths of the files that it writes.

    These are ``OUTPUT.png`` and ``OUTPUT.md``, and one HTML page that needs no network. The page includes the training
    of one run: that of the ``heads.json`` in ``aligned``, or else of the last file next to a model card.

    Raises:
        ValueError: The files cannot be compared, or the page would replace a file of another kind.
    """
    comparison, written = compare(paths, names, aligned), []
    pages = {f"{output}.md": _TITLE} if output else {}
    for path, start in (pages | ({html: _PAGE[:9]} if html else {})).items():
        if os.path.isfile(path) and not Path(path).read_bytes().startswith(start.encode()):
            raise ValueError(f"report: {path} exists and is no report; give another path.")
    if output:
        written += [Path(f"{output}.png"), Path(f"{output}.md")]
        if written[0].is_file() and not written[1].is_file():
            raise ValueError(f"report: {written[0]} exists and belongs to no report; give another path.")
        plots.save_figure(draw_comparison(comparison), written[0])
        write_text(written[1], render_markdown(comparison, written[0].name))
    if html:
        folders = [Path(path).parent for path in (aligned, *(file.path for file in comparison.files[::-1])) if path]
        folder = next((folder for folder in folders if (folder / CARD).is_file()), None)
        card = read_json(folder / CARD) if folder else {}
        run = folder.absolute().parent.name if folder else comparison.files[-1].provenance["model"]
        body = "".join(_sections(comparison, card if isinstance(card, dict) else {}))
        write_text(html, _PAGE.format(title=escape(f"HeRA: {run}"), body=body))
        written.append(Path(html))
    return written


def render_markdown(comparison: Comparison, picture: str) -> str:
    """Renders a comparison as Markdown; ``picture`` is the path of the PNG relative to the page."""

    def literal(text: str) -> str:
        return re.sub(r"([\\`*<\[|])", r"\\\1", " ".join(text.split()))

    header, *rows = (f"| {' | '.join(map(literal, row))} |" for row in comparison.table)
    table = "\n".join([header, "|---|" + "--:|" * (len(comparison.files) + 1), *rows, ""])
    summary = literal(comparison.summary)
    return f"{_TITLE}\n\n{summary}\n\n![MKNN in every file]({picture})\n\n{table}"


def _sections(comparison: Comparison, card: Mapping[str, Any]) -> Iterator[str]:
    from .gallery import default_targets, draw_gallery  # imports torch, which the other pictures do not need

    first, (title, least) = comparison.files[0], next(iter(comparison.groups.items()))
    yield _tag("p", comparison.summary) + _table(comparison.table)
    yield plots.inline_svg(draw_comparison(comparison), "MKNN in every file")
    marked = [Target.parse(name, first.chosen.granularity) for name in least if name != "mean"]
    limits = [function([file.scores for file in comparison.files]) for function in (np.nanmin, np.nanmax)]
    for name, file in zip(comparison.names, comparison.files, strict=True):
        figure = plots.inline_svg(scores_figure(file, marked, limits), f"MKNN of {name}")
        yield _tag("h2", f"All heads: {name} ({title} marked)") + figure
    absent = f"There is no {CARD} next to the scores; a finished run writes it."
    yield _tag("h2", "Training") + (_table(_rows(card)) if card else _tag("p", absent))
    yield _training_curves(card.get("log", []))
    yield _tag("h2", "What heads see")
    try:
        for target in [marked[0], *default_targets(first)[1:]]:
            image = BytesIO()
            draw_gallery(comparison.files, comparison.names, target).savefig(image, format="jpeg", dpi=110)
            source = f"data:image/jpeg;base64,{b64encode(image.getvalue()).decode()}"
            yield f'<p><img alt="Nearest images of {target}" src="{source}"></p>'
    except ValueError as error:
        yield _tag("p", error)
    yield _tag("h2", "How it was made") + _table(_rows(card.get("versions", first.provenance.get("versions", {}))))
    yield _tag("pre", card.get("command", "")) + _tag("pre", command_line())


def _training_curves(log: Sequence[Mapping[str, float]]) -> str:
    keys = [key for key in _CURVES if any(key in line for line in log)]
    if not keys:
        return ""
    figure = plots.new_figure(3.4 * len(keys), 2.6)
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        for name, style in ((key, {"color": _CURVES[key], "marker": "."}), (f"{key}_chance", _CHANCE)):
            points = np.array([(line["step"], line[name]) for line in log if {"step", name} <= line.keys()]).reshape(
                -1, 2
            )
            axes.plot(*points.T, **style)
        axes.set(title=key, xlabel="step")
        plots.plain(axes)
    return plots.inline_svg(figure, f"Curves of {', '.join(keys)}")


def _tag(name: str, text: Any) -> str:
    return f"<{name}>{escape(str(text))}</{name}>"


def _table(rows: Iterable[Sequence[Any]]) -> str:
    lines = ("".join(_tag("td", cell) for cell in row) for row in rows)
    return f"<table><tr>{'</tr><tr>'.join(lines)}</tr></table>"


def _rows(entries: Mapping[str, Any], prefix: str = "") -> Iterator[list[str]]:
    """Flattens nested entries, and cuts digests."""
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from _rows(value, f"{name}: ")
        elif name not in _NOT_LISTED:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield [prefix + name, re.sub(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1", text)]
