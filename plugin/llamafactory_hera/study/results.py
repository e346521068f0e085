"""Gathers what the finished runs measured into one record."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files import read_json
from ..selection.score_file import ScoreFile
from ..selection.strategies import choose_heads
from . import layout
from .dataset import questions_of
from .intervals import mean_interval, paired_interval
from .layout import Run, Seed, final_run
from .methods import BASELINE, METHODS
from .pool import mark_of
from .questions import CATEGORIES
from .scoring import accuracy_of
from .settings import Settings

#: The untrained LLaVA, whose language model is the pre-trained one: the mechanism's "before".
BASE = "base"
GROUPS = (("worst5", "worst", 5), ("top5", "top", 5))
COSTS = ("step_s", "process_cpu_s", "process_peak_mib")


@dataclass(frozen=True)
class Measured:
    """One quantity of one method.

    Attributes:
        by_seed: Its value in every run.
    """

    by_seed: dict[int, float]

    def record(self, baseline: "Measured | None") -> dict[str, Any]:
        """Mean and interval, and the interval of the difference to the baseline, paired by seed."""
        found = {
            "by_seed": {str(seed): value for seed, value in self.by_seed.items()},
            **asdict(mean_interval(list(self.by_seed.values()))),
        }
        if baseline is not None:
            found["minus_baseline"] = asdict(paired_interval(self.by_seed, baseline.by_seed))
        return found


def gather(root: Path, settings: Settings) -> dict[str, Any]:
    """All that a finished study has measured.

    Args:
        root: The study's folder.
        settings: Its settings.

    Returns:
        ``accuracy`` by method and category, ``mechanism`` by mode, method and group of heads, ``cost`` by method and
        quantity, ``chance`` by mode, and ``heads`` by seed and group; each value as in :meth:`Measured.record`.
    """
    seeds, methods = settings.seeds, settings.methods
    accuracy: dict[str, dict[str, Measured]] = {}
    cost: dict[str, dict[str, Measured]] = {}
    for method in methods:
        shares = {seed: _accuracy(root, final_run(method, seed)) for seed in seeds}
        accuracy[method] = {name: Measured({s: shares[s][name] for s in seeds}) for name in (*CATEGORIES, "mean")}
        costs = {seed: _cost(root, final_run(method, seed)) for seed in seeds}
        cost[method] = {name: Measured({s: costs[s][name] for s in seeds}) for name in COSTS}
    mechanism = {mode: _mechanism(root, seeds, methods, mode) for mode in layout.MODES}
    chance = {mode: ScoreFile.load(root / Seed(seeds[0]).scores("test", mode)).chance for mode in layout.MODES}
    return {
        "runs": len(seeds) * len(methods),
        "accuracy": _records(accuracy),
        "mechanism": {mode: _records(found) for mode, found in mechanism.items()},
        "cost": _records(cost),
        "chance": chance,
        "heads": {str(seed): _groups(root, seed) for seed in seeds},
    }


def _records(found: dict[str, dict[str, Measured]]) -> dict[str, dict[str, Any]]:
    baseline = found[BASELINE]
    return {
        method: {name: value.record(None if method == BASELINE else baseline[name]) for name, value in row.items()}
        for method, row in found.items()
    }


def _accuracy(root: Path, run: Run) -> dict[str, float]:
    return accuracy_of(root / run.predictions, root / layout.DATA / "key.json", questions_of("test"))


def _cost(root: Path, run: Run) -> dict[str, float]:
    trained = read_json(root / run.stage(2) / "train_results.json")
    process = read_json(mark_of(root, f"{run.path}/stage2"))["processes"][0]
    steps = read_json(root / run.stage(2) / "trainer_state.json")["global_step"]
    return {
        "step_s": trained["train_runtime"] / steps,
        "process_cpu_s": process["cpu_s"],
        "process_peak_mib": process["peak_mib"],
    }


def _mechanism(root: Path, seeds: Sequence[int], methods: Sequence[str], mode: str) -> dict[str, dict[str, Measured]]:
    """MKNN on the test captions of the heads that were worst and top before training."""
    files = {BASE: {seed: Seed(seed).scores("test", mode) for seed in seeds}}
    files |= {method: {seed: final_run(method, seed).scores(mode) for seed in seeds} for method in methods}
    found: dict[str, dict[str, Measured]] = {}
    for name, by_seed in files.items():
        means: dict[str, dict[int, float]] = {}
        for seed, file in by_seed.items():
            scored = ScoreFile.load(root / file)
            for group, heads in _group_heads(root, seed).items():
                means.setdefault(group, {})[seed] = sum(scored.score(head) for head in heads) / len(heads)
            everything = scored.ranking()
            means.setdefault("all", {})[seed] = sum(scored.score(head) for head in everything) / len(everything)
        found[name] = {group: Measured(values) for group, values in means.items()}
    return found


def _group_heads(root: Path, seed: int) -> dict[str, tuple]:
    scores = ScoreFile.load(root / Seed(seed).heads).scores
    return {group: choose_heads(scores, strategy, m) for group, strategy, m in GROUPS}


def _groups(root: Path, seed: int) -> dict[str, list[str]]:
    return {group: [str(head) for head in heads] for group, heads in _group_heads(root, seed).items()}


def label(name: str) -> str:
    """A row's name in tables and figures."""
    return "base LLM" if name == BASE else METHODS[name].label
