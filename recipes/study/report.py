"""What the finished runs measured, with intervals over seeds, as one record and a page: nothing concluded."""

import math
import os
import platform
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llamafactory_hera.alignment import chance_level
from llamafactory_hera.files import read_json, write_json, write_text
from llamafactory_hera.selection.pictures import BLUE, GREY, ORANGE, new_figure, plain, save_figure
from llamafactory_hera.selection.scores import choose_targets, package_versions
from parts import NEIGHBOURS
from settings import BASELINE, METHODS, PRIMARY, TUNED, Settings
from world import CATEGORIES, SETS, Sample, World

LEVEL = 0.95
COLUMNS = (*CATEGORIES, "mean")
#: The models before any multimodal training.
BASE = "base"
MODES = {"mllm": "Picture and caption together, as in training", "llm": "Captions alone, as heads are selected"}
GROUPS = {"worst5": "worst", "top5": "top"}
_SET_NAMES = {"seen": "scenes as in training", "new": "held-out combinations"}
_COSTS = {"stage1_cpu_s": "stage 1, CPU s", "stage2_cpu_s": "stage 2, CPU s", "process_peak_mib": "peak memory, MiB"}


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its interval, None where one value alone says nothing of its spread."""

    mean: float
    low: float | None
    high: float | None
    count: int

    def text(self, digits: int, scale: float = 1, sign: str = "") -> str:
        """For instance ``+1.2 [0.3, 2.1]``."""
        form = f"{sign}.{digits}f"
        ends = "" if self.low is None else f" [{scale * self.low:{form}}, {scale * (self.high or 0):{form}}]"
        return f"{scale * self.mean:{form}}{ends}"


def mean_interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean of independent values, at level 0.95.

    Raises:
        ValueError: There is no value.
    """
    if not values:
        raise ValueError("values: none is given")
    from scipy.stats import t

    count, mean = len(values), sum(values) / len(values)
    if count == 1:
        return Interval(mean, None, None, 1)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * math.sqrt(variance / count)
    return Interval(mean, mean - half, mean + half, count)


def paired_interval(values: dict[int, float], others: dict[int, float]) -> Interval | None:
    """The interval of the difference over the seeds that both have, paired by seed; None where there is none."""
    both = sorted(values.keys() & others.keys())
    return mean_interval([values[seed] - others[seed] for seed in both]) if both else None


def without_looking(world: World, kind: str) -> dict[str, dict[str, float]]:
    """Accuracy without the picture, by reader and category: what an accuracy has to be compared with.

    ``text_alone`` answers a question as it was most often answered in training; ``one_answer`` gives all questions of
    a category the answer that is right most often.
    """

    def most_often(key: str, samples: Sequence[Sample]) -> dict[str, str]:
        counts: dict[str, Counter[str]] = {}
        for sample in samples:
            counts.setdefault(getattr(sample, key), Counter())[sample.answer] += 1
        return {name: found.most_common(1)[0][0] for name, found in counts.items()}

    asked, found = world.test[kind], {}
    for reader, key, known in (("text_alone", "question", world.train), ("one_answer", "category", asked)):
        answers = most_often(key, known)
        shares = {
            name: sum(answers.get(getattr(s, key)) == s.answer for s in asked if s.category == name)
            / sum(s.category == name for s in asked)
            for name in CATEGORIES
        }
        found[reader] = shares | {"mean": sum(shares.values()) / len(shares)}
    return found


def gather(root: Path, settings: Settings) -> dict[str, dict[str, dict[int, float]]]:
    """What the runs measured: by quantity, method and seed. Quantities are paths such as ``accuracy/seen/colour``."""
    seeds = {seed: read_json(root / f"done/seeds/{seed}.json") for seed in settings.seeds}
    found: dict[str, dict[str, dict[int, float]]] = {}

    def add(quantity: str, method: str, seed: int, value: float) -> None:
        found.setdefault(quantity, {}).setdefault(method, {})[seed] = value

    def add_scores(method: str, seed: int, scores: dict[str, list[list[float]]]) -> None:
        for mode, table in scores.items():
            for group, strategy in GROUPS.items():
                heads = choose_targets(seeds[seed]["scores"], strategy, 5)
                add(f"mknn/{mode}/{group}", method, seed, sum(table[h.layer][h.head] for h in heads) / len(heads))
            values = [score for row in table for score in row]
            add(f"mknn/{mode}/all", method, seed, sum(values) / len(values))

    from scipy.stats import spearmanr

    for seed, record in seeds.items():
        add_scores(BASE, seed, record["mknn"])
        one, other = ([score for row in record[name] for score in row] for name in ("scores", "again"))
        add("rank", BASE, seed, float(spearmanr(one, other).statistic))
    for method in settings.methods:
        for seed in settings.seeds_of(method):
            file = root / f"done/runs/{method}-{seed}.json"
            if not file.exists():
                continue
            record = read_json(file)
            add_scores(method, seed, record["mknn"])
            for kind, shares in record["accuracy"].items():
                for category, share in shares.items():
                    add(f"accuracy/{kind}/{category}", method, seed, share)
            for name, value in record["cost"].items():
                add(f"cost/{name}", method, seed, value)
    return found


def write_report(root: Path, settings: Settings, chosen: float, world: World, size: str, workers: int) -> Path:
    """Writes ``report.json``, a picture and the page; returns the page."""
    found = gather(root, settings)
    floors = {kind: without_looking(world, kind) for kind in SETS}
    parts = read_json(root / "done/parts.json")
    tried = {w: read_json(root / f"done/tuning/{w:g}.json")["accuracy"] for w in settings.weights}
    chance = chance_level(len(world.scored), min(NEIGHBOURS, len(world.scored) - 2))
    record = {"settings": settings.to_dict(), "chosen": chosen, "measured": found, "floors": floors, "teacher": parts}
    write_json(root / "report.json", record | {"chance": chance, "versions": package_versions()})
    methods = [name for name in settings.methods if name in found["cost/stage2_cpu_s"]]
    _draw(found, methods, chance, root / "study.png")
    missing = [
        f"{method}-{seed}"
        for method in settings.methods
        for seed in settings.seeds_of(method)
        if seed not in found["cost/stage2_cpu_s"].get(method, {})
    ]
    marks = [read_json(file) for file in sorted((root / "done").rglob("*.json"))]
    hours = sum(mark["wall_s"] for mark in marks) / workers / 3600
    page = [
        f"{sum(len(found['cost/stage2_cpu_s'][m]) for m in methods)} runs; {time.strftime('%Y-%m-%d')}; {workers} "
        f"side by side on {len(os.sched_getaffinity(0))} cores ({_processor()}); {hours:.2f} h of work. "
        + ", ".join(f"{name} {version}" for name, version in package_versions().items())
        + f". `python recipes/study --size {size}`.",
        *([f"**Not finished, and in no row below: {', '.join(missing)}.**"] if missing else []),
        "Brackets hold 95 % intervals over seeds (Student's t); those of differences are paired by seed. They are not "
        "corrected for their number. Data, questions and teacher are the same for all seeds: an interval covers the "
        "language model, the projector, the order of samples and the draw of random heads.",
        "### The question: HeRA worst-5 minus …",
        _primary(found),
        f"### MKNN of the heads that were worst and top before training (chance {chance:.4f})",
        "On captions of scenes that nothing was trained or selected on.\n\n![MKNN and accuracy](study.png)",
        *(f"{title}:\n\n{_mknn(found, mode, [BASE, *methods])}" for mode, title in MODES.items()),
        *(
            f"### Accuracy on {_SET_NAMES[kind]}, %\n\n{_accuracy(found, kind, methods, floors[kind])}"
            for kind in SETS
        ),
        "### The heads",
        f"Rank correlation (Spearman) of all heads' scores on two disjoint halves of {2 * settings.scored} training "
        f"captions, before multimodal training: {_spread(found['rank'][BASE])}.",
        "### What the teacher knows",
        "kNN accuracy of its CLS token on scenes with independent factors, %, and the most frequent answer's: "
        + ", ".join(f"{name} {100 * right:.1f} ({100 * most:.1f})" for name, (right, most) in parts["knows"].items())
        + ".",
        f"### The weight chosen on the validation questions: {chosen:g}",
        _table(
            ("weight", *(_SET_NAMES[kind] for kind in SETS)),
            [(f"{w:g}", *(f"{100 * shares[kind]['mean']:.1f}" for kind in SETS)) for w, shares in tried.items()],
        ),
        "### Cost, as a ratio to SFT's of the same seed",
        "CPU time and peak memory of each run's process, one thread each, runs side by side. The teacher's features "
        "of whole pictures were computed beforehand; methods on visual tokens run the teacher in every step.",
        _cost(found, methods),
    ]
    target = root / "report.md"
    write_text(target, "# Study\n\n" + "\n\n".join(page) + "\n")
    return target


def _primary(found: dict[str, dict[str, dict[int, float]]]) -> str:
    quantities = {
        "accuracy, scenes as in training, points": ("accuracy/seen/mean", 2, 100),
        "accuracy, held-out combinations, points": ("accuracy/new/mean", 2, 100),
        "MKNN of worst-5, picture and caption": ("mknn/mllm/worst5", 4, 1),
        "MKNN of all heads, picture and caption": ("mknn/mllm/all", 4, 1),
    }
    rows = []
    for ours in ("worst5_paper", TUNED):
        for other in (name for name in PRIMARY if name not in (TUNED, "worst5_paper")):
            cells = []
            for quantity, digits, scale in quantities.values():
                by_method = found[quantity]
                difference = paired_interval(by_method.get(ours, {}), by_method.get(other, {}))
                cells.append(difference.text(digits, scale, "+") if difference else "")
            if any(cells):
                rows.append((f"{METHODS[ours].label} − {METHODS[other].label}", *cells))
    return _table(("", *quantities), rows)


def _mknn(found: dict[str, dict[str, dict[int, float]]], mode: str, methods: Sequence[str]) -> str:
    rows = []
    for method in methods:
        cells = []
        for group in (*GROUPS, "all"):
            by_method = found[f"mknn/{mode}/{group}"]
            minus = None if method == BASELINE else paired_interval(by_method[method], by_method[BASELINE])
            cells += [_spread(by_method[method], 4), minus.text(4, sign="+") if minus else ""]
        rows.append((_label(method), *cells))
    heads = [cell for group in (*GROUPS, "all") for cell in (group, f"{group} − SFT")]
    return _table(("", *heads), rows)


def _accuracy(
    found: dict[str, dict[str, dict[int, float]]],
    kind: str,
    methods: Sequence[str],
    floor: dict[str, dict[str, float]],
) -> str:
    rows = []
    for method in methods:
        shares = [found[f"accuracy/{kind}/{name}"] for name in COLUMNS]
        minus = None if method == BASELINE else paired_interval(shares[-1][method], shares[-1][BASELINE])
        cells = [f"{100 * mean_interval(list(share[method].values())).mean:.1f}" for share in shares[:-1]]
        last = mean_interval(list(shares[-1][method].values())).text(1, 100)
        rows.append((_label(method), *cells, last, minus.text(2, 100, "+") if minus else ""))
    readers = {"text_alone": "*the question alone*", "one_answer": "*one answer a category*"}
    rows += [(name, *(f"{100 * floor[key][column]:.1f}" for column in COLUMNS), "") for key, name in readers.items()]
    return _table(("", *COLUMNS, "mean − SFT"), rows)


def _cost(found: dict[str, dict[str, dict[int, float]]], methods: Sequence[str]) -> str:
    rows = []
    for method in methods:
        cells = [_spread(found[f"cost/{name}"][BASELINE], 0) for name in _COSTS]
        if method != BASELINE:
            pairs = [(found[f"cost/{name}"][method], found[f"cost/{name}"][BASELINE]) for name in _COSTS]
            cells = [
                mean_interval([mine[seed] / theirs[seed] for seed in mine if seed in theirs]).text(3)
                for mine, theirs in pairs
            ]
        rows.append((_label(method), *cells))
    return _table(("", *_COSTS.values()), rows)


def _spread(by_seed: dict[int, float], digits: int = 2) -> str:
    return mean_interval(list(by_seed.values())).text(digits)


def _label(name: str) -> str:
    return "before" if name == BASE else METHODS[name].label


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---|" + "--:|" * (len(head) - 1), *lines[1:]])


def _draw(found: dict[str, dict[str, dict[int, float]]], methods: Sequence[str], chance: float, target: Path) -> None:
    """MKNN of worst and top heads, and mean accuracy minus the baseline's on both sets, each with its interval."""
    rows = [BASE, *methods]
    figure = new_figure(11, 1.4 + 0.36 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, series, scale in (
        (left, {"worst-5": ("mknn/mllm/worst5", ORANGE), "top-5": ("mknn/mllm/top5", BLUE)}, 1),
        (
            right,
            {_SET_NAMES["seen"]: ("accuracy/seen/mean", BLUE), _SET_NAMES["new"]: ("accuracy/new/mean", GREY)},
            100,
        ),
    ):
        for shift, (name, (quantity, colour)) in zip((-0.12, 0.12), series.items(), strict=True):
            points = []
            for place, method in enumerate(rows):
                values = found[quantity].get(method, {})
                if scale == 100 and method == BASELINE:
                    continue
                interval = (
                    paired_interval(values, found[quantity][BASELINE])
                    if scale == 100
                    else mean_interval(list(values.values()))
                )
                if interval is not None:
                    half = 0.0 if interval.low is None else interval.mean - interval.low
                    points.append((place + shift, scale * interval.mean, scale * half))
            places, means, halves = zip(*points, strict=True)
            axes.errorbar(means, places, xerr=halves, fmt="o", color=colour, label=name, capsize=2, markersize=4)
        axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
        axes.axvline(chance if scale == 1 else 0, color="black", linestyle="--", linewidth=1)
        axes.legend(fontsize=8, frameon=False)
        plain(axes)
    left.set_xlabel("MKNN, picture and caption (dashed: chance)")
    right.set_xlabel("mean accuracy minus SFT's, percentage points")
    left.invert_yaxis()
    save_figure(figure, target)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
