"""Compares score files of one model, from before and after training, in tables and plots."""

import math
import os
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from .. import plots
from ..files import RUN_FOLDER
from ..heads.targets import Target, Targets
from .scores import SCORE_FILES, Paths, ScoreFile, load_files, render_table

_COMPARED = 5  # heads, as in the paper
_CELL = 0.16  # inches
_CHANCE: dict[str, Any] = {"color": plots.GRAY, "linestyle": "--", "linewidth": 1, "label": "chance"}


class Comparison(NamedTuple):
    """Score files of one model at several times; the first file was written before training."""

    files: Sequence[ScoreFile]
    names: Sequence[str]
    targets: Targets  #: The targets that the run of the last file aligned, or the least aligned in the first file.
    title: str  #: ``aligned`` or ``least aligned``.

    @property
    def rows(self) -> dict[str, list[float]]:
        """The MKNN (or NaN) of each target in every file; also their ``mean``, and that of all ``others`` if any."""
        scores = [file.ranked(self.targets.granularity) for file in self.files]
        rows = {str(target): [known.get(target, math.nan) for known in scores] for target in self.targets.items}
        both = [target for target in scores[0] if target in scores[-1] and target not in self.targets.items]
        mean = [statistics.fmean(column) for column in zip(*rows.values(), strict=True)]
        others = [float(np.mean([known.get(target, math.nan) for target in both])) for known in scores] if both else []
        return rows | {"mean": mean} | ({"others": others} if both else {})

    @property
    def table(self) -> list[list[str]]:
        """The header and the rows: MKNN in every file, and the difference between the last and the first."""
        cells = [
            [name, *(f"{value:.4f}" for value in values), f"{values[-1] - values[0]:+.4f}"]
            for name, values in self.rows.items()
        ]
        return [[self.targets.granularity, *self.names, f"{self.names[-1]} − {self.names[0]}"], *cells]


def compare(paths: Paths, names: Sequence[str] = (), aligned: str | None = None) -> Comparison:
    """Compares the scores of a run's targets across files; raises ``ValueError`` if these cannot be compared.

    Args:
        paths: Score files or run folders, the one from before training first; or one run folder with both.
        names: A name for each file; the default is the name of its folder.
        aligned: Names or a ``heads.json``. The default is the targets that the run of the last file aligned or, if
            unknown, the five least aligned heads or layers of the first file.
    """
    if len(paths) == 1 and os.path.isdir(paths[0]):
        scored = Path(paths[0], RUN_FOLDER, SCORE_FILES[0])
        if not scored.is_file():
            remedy = f"first run llamafactory-hera score {paths[0]} --recipe RECIPE.yaml"
            raise ValueError(f"report: {paths[0]} has no {RUN_FOLDER}/{SCORE_FILES[0]}; {remedy}.")
        after = ScoreFile.load(scored)
        paths, names = (_before(after), after.path), names or ("before", "after")
    if len(paths) < 2:
        raise ValueError(f"report: {paths[0]} is a single file; give two or more files, or the folder of a run.")
    files, names = load_files(paths, names, "report")
    first, last = files[0], files[-1]
    targets = last.marked if last.marked is not last.chosen else None  # a selection chose heads that no run aligned
    granularity = targets.granularity if targets else first.chosen.granularity
    if aligned is not None:
        targets = Targets.parse(aligned, granularity)
    ranked = first.ranked(granularity)
    title, targets = "aligned" if targets else "least aligned", targets or Targets(tuple(ranked)[:_COMPARED])
    if outside := [str(target) for target in targets.items if target not in ranked]:
        raise ValueError(f"--aligned: {', '.join(outside)} has no score in {first.path}; choose other targets.")
    return Comparison(files, names, targets, title)


def _before(after: ScoreFile) -> Path:
    """Returns the scores of a run's model from before training that are comparable with those after it.

    They are in the folder of the run, or in the folder of the model that it started from. Raises ``ValueError`` if
    there are no such scores.
    """
    places, problem = [after.path.with_name(name) for name in SCORE_FILES[1:]], "none exist"
    origins = [after.marked.provenance] if after.marked else []
    origins += [after.provenance] if after.provenance.get("adapters") else []
    places += [Path(origin["model"], RUN_FOLDER, SCORE_FILES[0]) for origin in origins if "model" in origin]
    for path in filter(Path.is_file, places):
        try:
            load_files([path, after.path], (), "report")
            return path
        except ValueError as error:
            problem = str(error)
    lack = f"{after.folder} has no scores before training that are comparable to later scores ({problem})"
    raise ValueError(f"report: {lack}; score the recipe, which writes {SCORE_FILES[1]}.")


def show(path: Path) -> Comparison | None:
    """Prints the table of a score file, and saves its plot under the same name with the suffix ``.png``.

    For the scores of a run, also prints and returns the scores of its targets, together with those before training if
    both are comparable.
    """
    scored, compared, note = ScoreFile.load(path), None, ""
    targets = scored.marked
    print(render_table(scored))
    plots.save_figure(draw_scores(scored, targets.items if targets else ()), path.with_suffix(".png"))
    if targets and path.name == SCORE_FILES[0]:
        try:
            compared = compare([scored.folder])
        except ValueError as error:
            compared, note = Comparison([scored], ["after"], targets, "aligned"), f"\nnot compared: {error}"
        rows = (f"{name} {' -> '.join(f'{value:.3f}' for value in values)}" for name, values in compared.rows.items())
        print(f"aligned {targets.plural}: {', '.join(rows)} (chance {scored.chance:.3f}){note}")
    return compared


def draw_scores(scored: ScoreFile, marked: Sequence[Target], limits: Sequence[float] = ()) -> Figure:
    """Plots all heads, with frames around the ``marked`` heads, and the range of each layer (paper, fig. 3 left).

    ``limits`` are the ends of the color scale, by default the extreme scores.
    """
    n_layers, n_heads = scored.scores.shape
    size = max(4.0, n_heads * _CELL), max(3.6, n_layers * _CELL)
    figure = plots.new_figure(size[0] + 6.2, size[1] + 1.4)
    model = " + ".join([scored.provenance["model"], *scored.provenance.get("adapters", ())])
    figure.suptitle(textwrap.fill(f"{model}: {scored.setting}", 110), fontsize=10)
    heat, curves = figure.subplots(1, 2, width_ratios=[size[0] + 1.2, 5.0])
    known = np.ma.masked_invalid(scored.scores)
    names = " ".join(map(str, marked[:8])) + (" …" if len(marked) > 8 else "")
    scale = dict(zip(("vmin", "vmax"), limits, strict=False))
    firm = [(target.layer, row) for target in marked if (row := scored.firmness.chosen.get(str(target)))]
    halves = " ".join(str(row["halves"]) for _, row in firm[:8])
    title = f"marked: {names}" + (f"\nchosen in % of random halves: {halves}" if halves else "")
    bar = plots.heat_map(figure, heat, known, size, title if names else "", **scale)
    bar.set_label(f"MKNN (chance {scored.chance:.3f})")
    for layer, head in np.argwhere(known.mask):
        heat.text(head, layer, "×", ha="center", va="center", fontsize=7, color=plots.GRAY)
    best, worst, layers = known.max(axis=1).filled(np.nan), known.min(axis=1).filled(np.nan), np.arange(n_layers)
    curves.fill_between(layers, worst, best, color=plots.GRAY, alpha=0.15, linewidth=0)
    curves.plot(layers, best, "^-", color=plots.BLUE, markersize=4, label="best head of the layer")
    curves.plot(layers, scored.layer_scores, "o-", color="black", markersize=3, label="layer output")
    curves.plot(layers, worst, "v-", color=plots.ORANGE, markersize=4, label="worst head of the layer")
    curves.axhline(scored.chance, **_CHANCE)
    if firm:
        ends = {"x": [layer for layer, _ in firm], "y": [row["mean"] for _, row in firm]}
        ends["yerr"] = [2 * row["deviation"] for _, row in firm]
        curves.errorbar(**ends, fmt="none", ecolor=plots.GREEN, label="marked, samples permuted (± 2 σ)")
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
