"""The table of one or several evaluated models: Markdown, JSON and a picture, beside what the paper reports."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..files import read_json, write_json, write_text
from ..plots import BLUE, GRAY, GREEN, ORANGE, new_figure, plain, save_figure
from .lines import read_json_lines
from .suites import SUITES, Task, scores, tally

#: What the paper reports: for each backbone, for LLaVA's training and with HeRA, scores by row.
PAPER = Path(__file__).with_name("paper.json")
_RESAMPLES = 1000
_RANKS = ("same", "close", "no")


@dataclass
class Row:
    """One score of a task, or an average of scores."""

    key: str  # a task's name, with the score behind a stroke where it has several; a category; All
    title: str
    n: int | None = None
    comparable: str = ""
    why: str = ""
    values: dict[str, float] = field(default_factory=dict)  # by model
    #: By model, to the first one: the difference, and the ends of the interval that holds 95 % of it over resamples.
    differences: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    paper: dict[str, float] = field(default_factory=dict)  # LLaVA, HeRA, gain
    average: bool = False
    whole: bool = True  # all samples of the task, as far as their number is known
    scale: float = 1.0  # what an average multiplies it by
    draws: dict[str, Any] = field(default_factory=dict)  # by model, the differences of all resamples

    def compare(self, model: str, difference: float, draws: Any) -> None:
        """Keeps a difference with its resamples."""
        low, high = np.percentile(draws, [2.5, 97.5])
        self.draws[model], self.differences[model] = draws, (difference, float(low), float(high))


def write_table(output: Path, folders: Mapping[str, Path], suite: str, paper: str | None = None) -> list[Path]:
    """Writes ``<suite>.md``, ``.json`` and ``.png`` into ``output`` and returns their paths.

    Intervals are of a paired bootstrap: both models are scored on the same resamples of samples, or of their groups.

    Args:
        folders: Name of a model -> the folder with its ``<task>/result.json``; differences are to the first.
        suite: Whose tasks are the rows; one without a result stays empty. An average is there where every one of its
            tasks is, with all its samples.
        paper: The backbone of the paper's columns, for instance qwen3_8b; none by default.
    """
    known = read_json(PAPER)
    reported = known["backbones"][paper] if paper else None
    generator = np.random.default_rng(0)
    rows = []
    for category in dict.fromkeys(task.category for task in SUITES[suite]):
        members = [_rows(task, folders, generator) for task in SUITES[suite] if task.category == category]
        rows += [row for member in members for row in member]
        if suite == "paper":
            rows.append(_average(category, f"{category}, average", [member[0] for member in members], folders))
    if suite == "paper":
        rows.append(_average("All", "All 18, average", [row for row in rows if not row.average], folders))
    for row in rows:
        both = {name: reported[name] for name in ("LLaVA", "HeRA")} if reported else {}
        row.paper = {name: values[row.key] for name, values in both.items() if row.key in values}
        if len(row.paper) == 2:
            row.paper["gain"] = round(row.paper["HeRA"] - row.paper["LLaVA"], 1)
    page, data, picture = (output / f"{suite}.{kind}" for kind in ("md", "json", "png"))
    columns = ["key", "title", "n", "values", "differences", "paper", "comparable", "why"]
    kept = [{name: getattr(row, name) for name in columns} for row in rows]
    write_json(data, {"suite": suite, "models": list(folders), "paper": reported and reported["title"], "rows": kept})
    write_text(page, _markdown(rows, list(folders), reported and f"{reported['title']}: {known['source']}"))
    _draw(rows, list(folders), picture)
    return [page, data, picture]


def _rows(task: Task, folders: Mapping[str, Path], generator: np.random.Generator) -> list[Row]:
    """A row for each score of a task."""
    results = {name: _load(folder / task.name) for name, folder in folders.items()}
    found = {name: result for name, result in results.items() if result is not None}
    if not found:
        return [Row(task.name, task.title, None, task.comparable, task.why)]
    first, before = next(iter(found.values())), results[next(iter(folders))]
    n, several, whole = first["n"], len(first["scores"]) > 1, task.n in (None, first["n"])
    comparable, why = (task.comparable, task.why) if whole else ("no", f"{n} of {task.n} samples")
    extra: dict[str, Any] = {"whole": whole, "scale": 0.05 if task.title == "MME" else 1.0}
    asked = {name: int(sum(sums.get(f"{name}/n", 0) for sums in first["tally"].values())) for name in first["scores"]}
    rows = {
        name: Row(
            task.name + several * f"/{name}", task.title + several * f": {name}", count or n, comparable, why, **extra
        )
        for name, count in asked.items()
    }
    for model, result in found.items():
        if result["n"] == n:  # in one row stand the same samples
            for name, row in rows.items():
                row.values[model] = result["scores"][name]
        if before is not None and result is not before and list(result["tally"]) == list(before["tally"]):
            drawn = _resample(task.name, [before["tally"], result["tally"]], generator)
            for name, row in rows.items():
                row.compare(model, result["scores"][name] - before["scores"][name], drawn[1][name] - drawn[0][name])
    return list(rows.values())


def _load(folder: Path) -> dict[str, Any] | None:
    """A result with its records; None where there is none."""
    if not (folder / "result.json").is_file():
        return None
    result = read_json(folder / "result.json")
    return result | {"tally": tally(result["task"], read_json_lines(folder / "records.jsonl"))}


def _resample(task: str, tallies: Sequence[Mapping], generator: np.random.Generator) -> list[dict[str, Any]]:
    """The scores of several models on the same resamples of their groups."""
    groups, names = len(tallies[0]), sorted({name for each in tallies for sums in each.values() for name in sums})
    members = zip(*(each.values() for each in tallies), strict=True)
    table = np.array([[sums.get(name, 0.0) for sums in same for name in names] for same in members])
    times = (np.bincount(generator.integers(groups, size=groups), minlength=groups) for _ in range(_RESAMPLES))
    totals = np.stack([times_each @ table for times_each in times])
    return [scores(task, dict(zip(names, part.T, strict=True))) for part in np.split(totals, len(tallies), axis=1)]


def _average(key: str, title: str, rows: Sequence[Row], folders: Mapping[str, Path]) -> Row:
    """The mean of scores, of the models that have all of them whole."""
    worst = max((row.comparable for row in rows), key=_RANKS.index)
    average = Row(key, title, None, worst, average=True)
    for model in folders:
        if all(row.whole and model in row.values for row in rows):
            average.values[model] = float(np.mean([row.values[model] * row.scale for row in rows]))
        if all(row.whole and model in row.draws for row in rows):
            draws = np.mean([row.draws[model] * row.scale for row in rows], axis=0)
            average.compare(model, average.values[model] - average.values[next(iter(folders))], draws)
    return average


def _signed(value: float) -> str:
    return f"{round(value, 1) + 0:+.1f}".replace("-", "−")  # never −0.0


def _markdown(rows: Sequence[Row], models: Sequence[str], source: str | None) -> str:
    others = models[1:]
    differences = [f"{model} − {models[0]}" for model in others]
    theirs = ["paper LLaVA", "paper HeRA", "paper's gain"] if source else []
    table = [["benchmark", "n", *models, *differences, *theirs, "comparable", "why not"]]
    for row in rows:
        cells = [row.title, str(row.n or "")]
        cells += [f"{row.values[model]:.1f}" if model in row.values else "–" for model in models]
        for model in others:
            drawn = [_signed(value) for value in row.differences.get(model, ())]
            cells.append(f"{drawn[0]} ({drawn[1]} … {drawn[2]})" if drawn else "–")
        for name in ("LLaVA", "HeRA", "gain") if theirs else ():
            value = row.paper.get(name)
            cells.append("–" if value is None else _signed(value) if name == "gain" else f"{value:.1f}")
        table.append([f"**{cell}**" if row.average and cell else cell for cell in cells] + [row.comparable, row.why])
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in table]
    lines.insert(1, "| --- " * len(table[0]) + "|")
    notes = "In percent (MME: points; divided by 20 in averages), ↓: lower is better."
    if others:
        notes += " In brackets: 95 % of the differences over resamples of the samples."
    if source:
        notes += f"\nPaper, {source}."
    return "\n".join([*lines, "", notes, ""])


def _draw(rows: Sequence[Row], models: Sequence[str], target: Path) -> None:
    """Differences with their intervals and the paper's gains; of one model its scores."""
    figure = new_figure(8.0, 1.2 + 0.3 * len(rows))
    axes = figure.subplots()
    others = models[1:]
    for position, model in enumerate(others or models):
        offset, color = (position - (len(others or models) - 1) / 2) * 0.22, (BLUE, ORANGE, GREEN)[position % 3]
        drawn = []
        for place, row in enumerate(rows):
            of = row.differences if others else {name: (value,) * 3 for name, value in row.values.items()}
            if model in of:
                drawn.append((place + offset, *(row.scale * value for value in of[model])))
        if drawn:
            y, middle, low, high = np.array(drawn).T
            axes.hlines(y, low, high, color=color, linewidth=1.6)
            axes.plot(middle, y, "o", color=color, markersize=5, label=model)
    gains = [(row.paper["gain"], place) for place, row in enumerate(rows) if "gain" in row.paper]
    if others and gains:
        axes.plot(*zip(*gains, strict=True), "D", color="none", markeredgecolor="black", label="the paper's gain")
    if others:
        axes.axvline(0, color=GRAY, linewidth=1, linestyle="--")
    axes.set_yticks(
        range(len(rows)), [f"{row.title} / 20" if row.scale != 1 else row.title for row in rows], fontsize=8
    )
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(f"difference to {models[0]} in points, 95 % interval" if others else "percent")
    plain(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
    save_figure(figure, target)
