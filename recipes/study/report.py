"""Writes the report: measurements of the finished runs, with intervals over seeds, as JSON, a page and a figure."""

import math
import os
import platform
import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import spearmanr, t

from llamafactory_hera.alignment import chance_level
from llamafactory_hera.files import read_json, write_json, write_text
from llamafactory_hera.plots import BLUE, GRAY, ORANGE, new_figure, plain, save_figure
from llamafactory_hera.selection.scores import choose_targets, package_versions

from .settings import BASELINE, METHODS, PRIMARY, TUNED, Settings
from .train import NEIGHBORS
from .world import CATEGORIES, SETS, World, shares

COLUMNS = (*CATEGORIES, "mean")
#: The name for models before multimodal training.
BASE = "base"
MODES = {"mllm": "Picture and caption together, as in training", "llm": "Captions alone, as in the selection"}
GROUPS = {"worst5": "worst", "top5": "top"}
_SET_NAMES = {"seen": "scenes as in training", "new": "held-out combinations"}
_COSTS = {"stage1_cpu_s": "stage 1, CPU s", "stage2_cpu_s": "stage 2, CPU s", "process_peak_mib": "peak memory, MiB"}
_RUN = "cost/stage2_cpu_s"  # a quantity that every finished run has

BySeed = dict[int, float]
ByMethod = dict[str, BySeed]


class Interval(NamedTuple):
    """A mean and the ends of its interval, which are None for a single value."""

    mean: float
    low: float | None
    high: float | None


def mean_interval(values: Collection[float]) -> Interval | None:
    """Returns the mean of independent values and its 95% interval (Student's t), or None without values."""
    if not values:
        return None
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, None, None)
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, float(mean - half), float(mean + half))


def paired_interval(values: BySeed, others: BySeed, ratio: bool = False) -> Interval | None:
    """Returns the interval of the difference or ratio, paired by seed, over the seeds in both."""
    pairs = [(values[seed], others[seed]) for seed in sorted(values.keys() & others.keys())]
    return mean_interval([value / other if ratio else value - other for value, other in pairs])


def format_interval(interval: Interval | None, digits: int, scale: float = 1, sign: str = "") -> str:
    """Formats an interval, for instance ``+1.2 [+0.3, +2.1]``; None becomes an empty text."""
    if interval is None:
        return ""
    mean, *ends = (None if end is None else f"{scale * end:{sign}.{digits}f}" for end in interval)
    return mean if None in ends else f"{mean} [{', '.join(ends)}]"


def without_looking(world: World, kind: str) -> dict[str, dict[str, float]]:
    """Returns the accuracy, by category, of two strategies that ignore the picture, as a floor for comparison.

    ``text_alone`` gives the most frequent answer to the same question in training. ``one_answer`` gives the same
    answer to all questions of a category: the answer that is right most often.
    """
    questions, found = world.test[kind], {}
    for reader, key, known in (("text_alone", "question", world.train), ("one_answer", "category", questions)):
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for sample in known:
            counts[getattr(sample, key)][sample.answer] += 1
        answers = {name: counted.most_common(1)[0][0] for name, counted in counts.items()}
        found[reader] = shares(questions, [answers.get(getattr(sample, key)) == sample.answer for sample in questions])
    return found


def gather(root: Path, settings: Settings) -> dict[str, ByMethod]:
    """Collects the measurements by quantity (such as ``accuracy/seen/color``), method and seed."""
    seeds = {seed: read_json(root / f"done/seeds/{seed}.json") for seed in settings.seeds}
    found: dict[str, ByMethod] = {}

    def add(quantity: str, method: str, seed: int, value: float) -> None:
        found.setdefault(quantity, {}).setdefault(method, {})[seed] = value

    def add_scores(method: str, seed: int, scores: dict[str, list[list[float]]]) -> None:
        for mode, table in scores.items():
            for group, strategy in GROUPS.items():
                heads = choose_targets(seeds[seed]["scores"], strategy, 5)
                add(f"mknn/{mode}/{group}", method, seed, statistics.fmean(table[h.layer][h.head] for h in heads))
            add(f"mknn/{mode}/all", method, seed, float(np.mean(table)))

    for seed, record in seeds.items():
        add_scores(BASE, seed, record["mknn"])
        add("rank", BASE, seed, float(spearmanr(np.ravel(record["scores"]), np.ravel(record["again"])).statistic))
    for method, seed in settings.runs():
        if not (file := root / f"done/runs/{method}-{seed}.json").exists():
            continue
        record = read_json(file)
        add_scores(method, seed, record["mknn"])
        for kind, by_category in record["accuracy"].items():
            for category, share in by_category.items():
                add(f"accuracy/{kind}/{category}", method, seed, share)
        for name, value in record["cost"].items():
            add(f"cost/{name}", method, seed, value)
    return found


def write_report(root: Path, settings: Settings, chosen: float, world: World, size: str) -> Path:
    """Writes ``report.json``, the figure and the page, and returns the page's path."""
    found = gather(root, settings)
    floors = {kind: without_looking(world, kind) for kind in SETS}
    parts = read_json(root / "done/parts.json")
    tried = {w: read_json(root / f"done/tuning/{w:g}.json")["accuracy"] for w in settings.weights}
    chance = chance_level(len(world.scored), min(NEIGHBORS, len(world.scored) - 2))
    record = {"settings": settings.to_dict(), "chosen": chosen, "measured": found, "floors": floors, "teacher": parts}
    write_json(root / "report.json", record | {"chance": chance, "versions": package_versions()})
    methods = [name for name in settings.methods if name in found[_RUN]]
    _draw(found, methods, chance, root / "study.png")
    missing = [f"{method}-{seed}" for method, seed in settings.runs() if seed not in found[_RUN].get(method, {})]
    hours = sum(read_json(file)["wall_s"] for file in (root / "done").rglob("*.json")) / 3600
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text("utf-8"))
    machine = names[0] if names else platform.machine()
    page = [
        f"{sum(map(len, found[_RUN].values()))} runs were complete on {time.strftime('%Y-%m-%d')}. All processes took "
        f"{hours:.2f} hours in total, with one thread each, on {len(os.sched_getaffinity(0))} cores ({machine}). "
        + "Versions: "
        + ", ".join(f"{name} {version}" for name, version in package_versions().items())
        + f". The command was `python recipes/study --size {size} --seeds {len(settings.seeds)}`.",
        *([f"**Unfinished, so not included below: {', '.join(missing)}.**"] if missing else []),
        "Brackets are 95% intervals over seeds (Student's t), paired by seed for differences, and not corrected for "
        "multiple comparisons. Data, questions and teacher are the same for all seeds. The intervals therefore "
        "reflect only variation in the language model, the projector, the order of samples and the random heads.",
        "### The question: HeRA worst-5 minus …",
        _primary(found),
        f"### MKNN of the worst and the top heads before training (chance {chance:.4f})",
        "The MKNN is measured on new scenes, which are drawn like the training scenes.\n\n"
        "![MKNN and accuracy](study.png)",
        *(f"{title}:\n\n{_mknn(found, mode, [BASE, *methods])}" for mode, title in MODES.items()),
        *(
            f"### Accuracy on {_SET_NAMES[kind]}, %\n\n{_accuracy(found, kind, methods, floors[kind])}"
            for kind in SETS
        ),
        "### The heads",
        f"Rank correlation (Spearman) of all heads' scores on two disjoint halves of {2 * settings.scored} training "
        f"captions, before multimodal training: {format_interval(mean_interval(found['rank'][BASE].values()), 2)}.",
        "### The teacher's knowledge",
        "This is the kNN accuracy (%) of the teacher's CLS token on scenes with independent factors, followed by the "
        "accuracy of always giving the most frequent answer, in parentheses: "
        + ", ".join(f"{name} {100 * right:.1f} ({100 * most:.1f})" for name, (right, most) in parts["knows"].items())
        + ".",
        f"### The weight chosen on the validation questions: {chosen:g}",
        _table(
            ("weight", *(_SET_NAMES[kind] for kind in SETS)),
            [(f"{w:g}", *(f"{100 * shares[kind]['mean']:.1f}" for kind in SETS)) for w, shares in tried.items()],
        ),
        "### Cost, relative to SFT with the same seed",
        "The table lists the CPU time and peak memory of each run's process; several ran at the same time. The "
        "teacher's CLS tokens were computed beforehand, but methods on visual tokens run the teacher in every step.",
        _cost(found, methods),
    ]
    path = root / "report.md"
    write_text(path, "# Study\n\n" + "\n\n".join(page) + "\n")
    return path


def _against(by_method: ByMethod, method: str, other: str = BASELINE, ratio: bool = False) -> Interval | None:
    """Returns the paired interval of two methods, or None if they are the same method."""
    return None if method == other else paired_interval(by_method.get(method, {}), by_method.get(other, {}), ratio)


def _primary(found: dict[str, ByMethod]) -> str:
    quantities = {
        "accuracy, scenes as in training, points": ("accuracy/seen/mean", 2, 100),
        "accuracy, held-out combinations, points": ("accuracy/new/mean", 2, 100),
        "MKNN of worst-5, picture and caption": ("mknn/mllm/worst5", 4, 1),
        "MKNN of all heads, picture and caption": ("mknn/mllm/all", 4, 1),
    }
    rows, hera = [], ("worst5_paper", TUNED)
    for method, other in ((method, other) for method in hera for other in PRIMARY if other not in hera):
        cells = [
            format_interval(_against(found[name], method, other), *how, "+") for name, *how in quantities.values()
        ]
        if any(cells):
            rows.append((f"{METHODS[method].label} − {METHODS[other].label}", *cells))
    return _table(("", *quantities), rows)


def _mknn(found: dict[str, ByMethod], mode: str, methods: Sequence[str]) -> str:
    groups, rows = (*GROUPS, "all"), []
    for method in methods:
        cells = []
        for by_method in (found[f"mknn/{mode}/{group}"] for group in groups):
            cells.append(format_interval(mean_interval(by_method[method].values()), 4))
            cells.append(format_interval(_against(by_method, method), 4, sign="+"))
        rows.append((_label(method), *cells))
    return _table(("", *(cell for group in groups for cell in (group, f"{group} − SFT"))), rows)


def _accuracy(
    found: dict[str, ByMethod], kind: str, methods: Sequence[str], floor: dict[str, dict[str, float]]
) -> str:
    rows = []
    for method in methods:
        *of_categories, mean = (found[f"accuracy/{kind}/{name}"] for name in COLUMNS)
        cells = [f"{100 * statistics.fmean(by_method[method].values()):.1f}" for by_method in of_categories]
        cells.append(format_interval(mean_interval(mean[method].values()), 1, 100))
        rows.append((_label(method), *cells, format_interval(_against(mean, method), 2, 100, "+")))
    readers = {"text_alone": "*the question alone*", "one_answer": "*one answer per category*"}
    rows += [(name, *(f"{100 * floor[key][column]:.1f}" for column in COLUMNS), "") for key, name in readers.items()]
    return _table(("", *COLUMNS, "mean − SFT"), rows)


def _cost(found: dict[str, ByMethod], methods: Sequence[str]) -> str:
    costs = [found[f"cost/{name}"] for name in _COSTS]
    rows = [
        (_label(BASELINE), *(format_interval(mean_interval(by_method[BASELINE].values()), 0) for by_method in costs))
    ]
    rows += [
        (_label(method), *(format_interval(_against(by_method, method, ratio=True), 3) for by_method in costs))
        for method in methods
        if method != BASELINE
    ]
    return _table(("", *_COSTS.values()), rows)


def _label(name: str) -> str:
    return "before" if name == BASE else METHODS[name].label


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---|" + "--:|" * (len(head) - 1), *lines[1:]])


def _draw(found: dict[str, ByMethod], methods: Sequence[str], chance: float, path: Path) -> None:
    """Draws the MKNN of the worst and top heads, and the gain in accuracy over the baseline on both sets."""
    rows = [BASE, *methods]
    figure = new_figure(11, 1.4 + 0.36 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, shift, quantity, name, color in (
        (left, -0.12, "mknn/mllm/worst5", "worst-5", ORANGE),
        (left, 0.12, "mknn/mllm/top5", "top-5", BLUE),
        (right, -0.12, "accuracy/seen/mean", _SET_NAMES["seen"], BLUE),
        (right, 0.12, "accuracy/new/mean", _SET_NAMES["new"], GRAY),
    ):
        by_method, scale, points = found[quantity], 1 if axes is left else 100, []
        for place, method in enumerate(rows):
            interval = mean_interval(by_method[method].values()) if axes is left else _against(by_method, method)
            if interval is not None:
                half = 0.0 if interval.low is None else interval.mean - interval.low
                points.append((place + shift, scale * interval.mean, scale * half))
        places, means, halves = zip(*points, strict=True)
        axes.errorbar(means, places, xerr=halves, fmt="o", color=color, label=name, capsize=2, markersize=4)
    for axes, dashed, label in (
        (left, chance, "MKNN, picture and caption (dashed: chance)"),
        (right, 0, "mean accuracy minus SFT's, percentage points"),
    ):
        axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
        axes.axvline(dashed, color="black", linestyle="--", linewidth=1)
        axes.legend(fontsize=8, frameon=False)
        axes.set_xlabel(label)
        plain(axes)
    left.invert_yaxis()
    save_figure(figure, path)
