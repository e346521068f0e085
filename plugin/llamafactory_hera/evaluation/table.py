"""The table that compares models with each other and with the paper's scores, as Markdown and JSON."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..files import read_json, reading, write_json, write_text
from .suites import Task

#: The file of the averages that the paper reports, by backbone.
PAPER = Path(__file__).with_name("paper.json")
_RESAMPLES = 1000
_RANKS = ("", "same", "close", "no")


@dataclass
class Line:
    """A line of the table: one score of a task, or an average of scores."""

    key: str  #: ``task``, or ``task/score`` if the task has several scores; for an average, the category.
    title: str
    n: int | None  #: The number of samples.
    comparable: str  #: How comparable the score is to the paper's: same, close or no; empty if the paper has none.
    why: str = ""  #: The reason if ``comparable`` is close or no.
    scale: float = 1.0  #: Multiplies the score in averages.
    average: bool = False
    values: dict[str, float] = field(default_factory=dict)  #: The score of each model.
    resampled: dict[str, Any] = field(default_factory=dict)  #: Differences from the first model, in each resample.
    paper: dict[str, float] = field(default_factory=dict)  #: The paper's scores: LLaVA, HeRA and the gain.

    @property
    def differences(self) -> dict[str, tuple[float, ...]]:
        """The difference of each model from the first, with the 2.5th and 97.5th percentiles over resamples."""
        ends = {model: np.percentile(values, [2.5, 97.5]).tolist() for model, values in self.resampled.items()}
        first = next(iter(self.values.values()), 0.0)
        return {model: (self.values[model] - first, low, high) for model, (low, high) in ends.items()}


def write_table(
    path: Path, tasks: Sequence[Task], results: Mapping[str, Mapping[Task, Path]], paper: str | None = None
) -> list[Path]:
    """Writes a table as ``.md`` and ``.json``, and returns the two paths, which begin with ``path``.

    Each line contains the differences from the first model, with intervals from a paired bootstrap over sample groups.
    The table of the suite "paper" also has averages of complete results. ``paper`` names a backbone whose scores
    in the paper become additional columns.
    """
    paper_scores, models, generator = read_json(PAPER), list(results), np.random.default_rng(0)
    lines: list[Line] = []
    for category in dict.fromkeys(task.category for task in tasks):
        with reading(path.parent, "a folder of results of llamafactory-hera eval"):
            members = [_lines(task, results, generator) for task in tasks if task.category == category]
        lines += [line for member in members for line in member]
        if path.name == "paper":
            lines.append(_average(category, [member[0] for member in members], models))
    if path.name == "paper":
        lines.append(_average("All", [line for line in lines if not line.average], models))
    reported = paper_scores["backbones"].get(paper, {})
    for line in lines:
        line.paper = {run: reported[run][line.key] for run in ("LLaVA", "HeRA") if line.key in reported.get(run, ())}
        if len(line.paper) == 2:
            line.paper["gain"] = round(line.paper["HeRA"] - line.paper["LLaVA"], 1)
    page, data = (path.with_name(f"{path.name}.{kind}") for kind in ("md", "json"))
    fields = ("key", "title", "n", "values", "differences", "paper", "comparable", "why")
    rows = [{name: getattr(line, name) for name in fields} for line in lines]
    write_json(data, {"suite": path.name, "models": models, "paper": reported.get("title"), "rows": rows})
    write_text(page, _markdown(lines, models, f"{reported['title']}: {paper_scores['source']}" if reported else ""))
    return [page, data]


def _lines(task: Task, files: Mapping[str, Mapping[Task, Path]], generator: np.random.Generator) -> list[Line]:
    """Creates a line for each score of a task."""
    results = {model: read_json(each[task]) for model, each in files.items() if each[task].is_file()}
    if not results:
        return [Line(task.name, task.title, None, task.comparable, task.why)]
    tallies = {model: task.tally(result["records"]) for model, result in results.items()}
    first, reference, lines = next(iter(results)), next(iter(files)), {}
    n, several = results[first]["n"], len(results[first]["scores"]) > 1
    remark = (task.comparable, task.why) if task.n in (None, n) else ("no", f"{n} of {task.n} samples")
    for score in results[first]["scores"]:
        key, title = task.name + several * f"/{score}", task.title + several * f": {score}"
        in_category = sum(sums[f"{score}/n"] for sums in tallies[first].values())
        lines[score] = Line(key, title, in_category or n, *remark, 0.05 if task.title == "MME" else 1.0)
    for model, result in results.items():
        for score, line in lines.items() if result["n"] == n else ():  # a line compares scores on the same samples
            line.values[model] = result["scores"][score]
        if model != reference and list(tallies[model]) == list(tallies.get(reference, ())):
            before, after = _resample(task, [tallies[reference], tallies[model]], generator)
            for score, line in lines.items():
                line.resampled[model] = after[score] - before[score]
    return list(lines.values())


def _resample(task: Task, tallies: Sequence[Mapping], generator: np.random.Generator) -> list[dict[str, Any]]:
    """Scores several models on the same resamples of their groups."""
    groups, names = len(tallies[0]), sorted({name for tally in tallies for sums in tally.values() for name in sums})
    members = zip(*(tally.values() for tally in tallies), strict=True)
    table = np.array([[sums.get(name, 0.0) for sums in group for name in names] for group in members])
    draws = (np.bincount(generator.integers(groups, size=groups), minlength=groups) for _ in range(_RESAMPLES))
    totals = np.split(np.stack([counts @ table for counts in draws]), len(tallies), axis=1)
    return [task.score(Counter(dict(zip(names, total.T, strict=True)))) for total in totals]


def _average(key: str, lines: Sequence[Line], models: Sequence[str]) -> Line:
    """Averages the scores of each model that has complete results."""
    worst = max((line.comparable for line in lines), key=_RANKS.index)
    average = Line(key, f"{key}, average", None, worst, average=True)
    for model in models if worst != "no" else ():
        if all(model in line.values for line in lines):
            average.values[model] = float(np.mean([line.values[model] * line.scale for line in lines]))
        if all(model in line.resampled for line in lines):
            average.resampled[model] = np.mean([line.resampled[model] * line.scale for line in lines], axis=0)
    return average


def _markdown(lines: Sequence[Line], models: Sequence[str], source: str) -> str:
    reference, *others = models
    remarks = any(line.comparable for line in lines)
    forms = {"LLaVA": "{:.1f}", "HeRA": "{:.1f}", "gain": "{:+z.1f}"} if source else {}
    table = [["benchmark", "n", *models, *(f"{model} − {reference}" for model in others)]]
    table[0] += [*(f"paper: {name}" for name in forms), *["comparable", "why not"] * remarks]
    for line in lines:
        cells = [line.title, str(line.n or "")]
        cells += [f"{line.values[model]:.1f}" if model in line.values else "–" for model in models]
        differences = [line.differences.get(model) for model in others]
        cells += ["{} ({} … {})".format(*(f"{end:+z.1f}" for end in ends)) if ends else "–" for ends in differences]
        cells += [form.format(line.paper[name]) if name in line.paper else "–" for name, form in forms.items()]
        cells[2:] = [cell.replace("-", "−") for cell in cells[2:]]
        cells = [f"**{cell}**" if cell and line.average else cell for cell in cells]
        table.append([*cells, *[line.comparable, line.why] * remarks])
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in table]
    notes = ["Scores are in percent. For scores with ↓, lower is better."]
    notes += ["MME is in points; averages divide it by 20."] if any(line.scale != 1 for line in lines) else []
    notes += ["Parentheses contain the 95% interval of the difference over resamples of the data."] if others else []
    notes += [f"Paper: {source}."] if source else []
    return "\n".join([rows[0], "| --- " * len(table[0]) + "|", *rows[1:], "", " ".join(notes), ""])
