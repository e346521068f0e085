"""What the finished runs measured, as one record: accuracies, MKNN and costs, with intervals over seeds."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llamafactory_hera.config import Strategy
from llamafactory_hera.files import read_json
from llamafactory_hera.heads.targets import Target
from llamafactory_hera.selection.scores import ScoreFile, choose_targets
from pool import mark_of
from settings import BASELINE, DATA, KEY, METHODS, MODES, Run, Seed, Settings, final_run
from world import CATEGORIES, TRAIN, StudySplit, questions_of

LEVEL = 0.95
#: The untrained LLaVA, whose language model is the pre-trained one: the mechanism's "before".
BASE = "base"
GROUPS: tuple[tuple[str, Strategy, int], ...] = (("worst5", "worst", 5), ("top5", "top", 5))
COSTS = ("step_s", "process_cpu_s", "process_peak_mib")


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its interval, None where one value alone says nothing of its spread."""

    mean: float
    low: float | None
    high: float | None
    count: int


def mean_interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean of independent values, at level 0.95.

    Raises:
        ValueError: There is no value.
    """
    if not values:
        raise ValueError("values: none is given")
    from scipy.stats import t

    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return Interval(mean, None, None, 1)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * math.sqrt(variance / count)
    return Interval(mean, mean - half, mean + half, count)


def paired_interval(values: dict[int, float], baseline: dict[int, float]) -> Interval:
    """The interval of the difference to a baseline, over the seeds that both have; both by seed."""
    return mean_interval([values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())])


def accuracy(predictions: Sequence[dict[str, str]], key: Sequence[dict[str, str]]) -> dict[str, float]:
    """The share of answers that are exactly right, apart from surrounding spaces.

    Args:
        predictions: Lines of the host's ``generated_predictions.jsonl``, in the dataset's order.
        key: The dataset's entries of ``key.json``, in the same order.

    Returns:
        Accuracy of each category, and ``mean``, in which every category counts the same.

    Raises:
        ValueError: The two do not belong together.
    """
    if len(predictions) != len(key):
        raise ValueError(f"predictions: {len(predictions)} for {len(key)} questions; predict on the whole dataset")
    right: dict[str, list[bool]] = {}
    for row, (predicted, entry) in enumerate(zip(predictions, key, strict=True)):
        if predicted["label"].strip() != entry["answer"]:
            raise ValueError(
                f"predictions: row {row} has the label {predicted['label'].strip()!r}, the key {entry['answer']!r}; "
                "predict in the dataset's order"
            )
        right.setdefault(entry["category"], []).append(predicted["predict"].strip() == entry["answer"])
    shares = {name: sum(right[name]) / len(right[name]) for name in CATEGORIES if name in right}
    return shares | {"mean": sum(shares.values()) / len(shares)}


def accuracy_of(predictions: Path, key: Path, dataset: str) -> dict[str, float]:
    """:func:`accuracy` of files; ``dataset`` names the entries of the key."""
    lines = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    return accuracy(lines, read_json(key)[dataset])


def chance_accuracy(data: Path, split: StudySplit) -> dict[str, dict[str, float]]:
    """Accuracy without a look at the image, by reader and category: what an accuracy has to be compared with.

    Args:
        data: The study's data folder.
        split: Whose questions are asked.

    Returns:
        ``text_alone``: a question is answered as it was most often answered in training. ``one_answer``: all
        questions of a category get the same answer, the one that is right most often.
    """
    key = read_json(data / "key.json")[questions_of(split)]
    by_question: dict[str, Counter[str]] = {}
    for row in read_json(data / f"{TRAIN}.json"):
        texts = [message["content"].removeprefix("<image>\n") for message in row["messages"]]
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            by_question.setdefault(question, Counter())[answer] += 1
    by_category: dict[str, Counter[str]] = {}
    for entry in key:
        by_category.setdefault(entry["category"], Counter())[entry["answer"]] += 1

    def read(answers: dict[str, Counter[str]], asked: str) -> dict[str, float]:
        best = {name: counts.most_common(1)[0][0] for name, counts in answers.items()}
        return accuracy([{"label": entry["answer"], "predict": best.get(entry[asked], "")} for entry in key], key)

    return {"text_alone": read(by_question, "question"), "one_answer": read(by_category, "category")}


@dataclass(frozen=True)
class Measured:
    """One quantity of one method: its value in every run, by seed."""

    by_seed: dict[int, float]

    def record(self, **others: "Measured") -> dict[str, Any]:
        """Mean and interval, and of the difference to each other method, paired by seed, as ``minus_NAME``."""
        found = {
            "by_seed": {str(seed): value for seed, value in self.by_seed.items()},
            **asdict(mean_interval(list(self.by_seed.values()))),
        }
        pairs = {name: other for name, other in others.items() if other.by_seed.keys() & self.by_seed.keys()}
        return found | {
            f"minus_{name}": asdict(paired_interval(self.by_seed, it.by_seed)) for name, it in pairs.items()
        }

    def over(self, other: "Measured") -> "Measured":
        """Its ratio to another method, seed by seed."""
        both = sorted(self.by_seed.keys() & other.by_seed.keys())
        return Measured({seed: self.by_seed[seed] / other.by_seed[seed] for seed in both})


def gather(root: Path, settings: Settings) -> dict[str, Any]:
    """All that a study has measured.

    Args:
        root: The study's folder.
        settings: Its settings.

    Returns:
        ``accuracy`` by method and category, ``floor`` as :func:`chance_accuracy`, ``mechanism`` by mode, method and
        group of heads, ``cost`` by method and quantity, ``chance`` (of MKNN) by mode, ``selection`` by quantity and
        ``heads`` by seed and group; each measured value as in :meth:`Measured.record`. ``missing`` names the runs
        that failed.

    Raises:
        ValueError: The baseline has no finished run.
    """
    finished = {method: [s for s in settings.seeds if is_finished(root, method, s)] for method in settings.methods}
    if not finished[BASELINE]:
        raise ValueError(
            f"{root}: no run of {METHODS[BASELINE].label} has finished, so there is nothing to compare with"
        )
    methods = {method: seeds for method, seeds in finished.items() if seeds}
    seeds = [seed for seed in settings.seeds if mark_of(root, f"{Seed(seed).folder}/selection").exists()]
    accuracies: dict[str, dict[str, Measured]] = {}
    costs: dict[str, dict[str, Measured]] = {}
    for method, numbers in methods.items():
        runs = {seed: final_run(method, seed) for seed in numbers}
        shares = {s: accuracy_of(root / run.predictions, root / KEY, questions_of("test")) for s, run in runs.items()}
        accuracies[method] = _by_quantity(shares)
        costs[method] = _by_quantity({seed: _cost(root, run) for seed, run in runs.items()})
    return {
        "runs": sum(map(len, methods.values())),
        "missing": [f"{m}-s{seed}" for m in settings.methods for seed in settings.seeds if seed not in finished[m]],
        "accuracy": _records(accuracies, baseline=BASELINE),
        "floor": chance_accuracy(root / DATA, "test"),
        "mechanism": {
            mode: _records(_mechanism(root, seeds, methods, mode), baseline=BASELINE, base=BASE) for mode in MODES
        },
        "cost": {
            method: {
                name: value.record() | {"over_baseline": value.over(costs[BASELINE][name]).record()}
                for name, value in row.items()
                if value.by_seed.keys() & costs[BASELINE][name].by_seed.keys()
            }
            for method, row in costs.items()
        },
        "chance": {mode: ScoreFile.load(root / Seed(seeds[0]).scores("test", mode)).chance for mode in MODES},
        "selection": _selection(root, seeds),
        "heads": {
            str(seed): {group: list(map(str, heads)) for group, heads in _heads(root, seed).items()} for seed in seeds
        },
    }


def is_finished(root: Path, method: str, seed: int) -> bool:
    """Whether a method's run of a seed has been trained and scored, and the seed's heads have."""
    needed = (f"{final_run(method, seed).path}/score", f"{Seed(seed).folder}/selection")
    return all(mark_of(root, name).exists() for name in needed)


def _by_quantity(by_seed: dict[int, dict[str, float]]) -> dict[str, Measured]:
    names = next(iter(by_seed.values()))
    return {name: Measured({seed: values[name] for seed, values in by_seed.items()}) for name in names}


def _records(found: dict[str, dict[str, Measured]], **references: str) -> dict[str, dict[str, Any]]:
    return {
        method: {
            name: value.record(**{key: found[other][name] for key, other in references.items() if other != method})
            for name, value in row.items()
        }
        for method, row in found.items()
    }


def _cost(root: Path, run: Run) -> dict[str, float]:
    trained = read_json(root / run.stage(2) / "train_results.json")
    process = read_json(mark_of(root, f"{run.path}/stage2"))["processes"][0]
    steps = read_json(root / run.stage(2) / "trainer_state.json")["global_step"]
    values = (trained["train_runtime"] / steps, process["cpu_s"], process["peak_mib"])
    return dict(zip(COSTS, values, strict=True))


def _heads(root: Path, seed: int) -> dict[str, Sequence[Target]]:
    """The heads that were worst and top before training."""
    scores = ScoreFile.load(root / Seed(seed).heads).scores
    return {group: choose_targets(scores, strategy, m) for group, strategy, m in GROUPS}


def _group_means(root: Path, seed: int, scored: ScoreFile) -> dict[str, float]:
    scores = scored.ranked("head")
    groups = {**_heads(root, seed), "all": list(scores)}
    return {group: sum(scores[head] for head in heads) / len(heads) for group, heads in groups.items()}


def _selection(root: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """How well the order of heads by training captions holds on test captions, before any training."""
    from scipy.stats import spearmanr

    found: dict[int, dict[str, float]] = {}
    for seed in seeds:
        chosen_on = ScoreFile.load(root / Seed(seed).heads)
        before = ScoreFile.load(root / Seed(seed).scores("test", "llm"))
        ours, theirs = chosen_on.ranked("head"), before.ranked("head")
        ranks = spearmanr(list(ours.values()), [theirs[head] for head in ours])
        found[seed] = {**_group_means(root, seed, chosen_on), "rank_correlation": float(ranks.statistic)}
    return {name: measured.record() for name, measured in _by_quantity(found).items()}


def _mechanism(
    root: Path, seeds: Sequence[int], methods: dict[str, list[int]], mode: str
) -> dict[str, dict[str, Measured]]:
    """MKNN on the test captions of the heads that were worst and top before training."""
    files = {BASE: {seed: Seed(seed).scores("test", mode) for seed in seeds}}
    files |= {m: {seed: final_run(m, seed).scores(mode) for seed in numbers} for m, numbers in methods.items()}
    return {
        name: _by_quantity({s: _group_means(root, s, ScoreFile.load(root / file)) for s, file in by_seed.items()})
        for name, by_seed in files.items()
    }


def label(name: str) -> str:
    """A row's name in tables and figures."""
    return "base LLM" if name == BASE else METHODS[name].label
