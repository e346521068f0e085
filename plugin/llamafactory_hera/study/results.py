"""Gathers what the finished runs measured into one record."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files import read_json
from ..heads.head_set import HeadId
from ..selection.score_file import ScoreFile
from ..selection.strategies import choose_heads
from . import layout
from .dataset import questions_of
from .floor import one_answer, text_alone
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
        by_seed: Its value in every run, by seed.
    """

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
        ``accuracy`` by method and category, ``floor`` by reader and category, ``mechanism`` by mode, method and group
        of heads, ``cost`` by method and quantity, ``chance`` by mode, ``selection`` by quantity and ``heads`` by seed
        and group; each measured value as in :meth:`Measured.record`. ``missing`` names the runs that failed.

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
    accuracy: dict[str, dict[str, Measured]] = {}
    cost: dict[str, dict[str, Measured]] = {}
    for method, of in methods.items():
        shares = {seed: _accuracy(root, final_run(method, seed)) for seed in of}
        accuracy[method] = {name: Measured({s: shares[s][name] for s in of}) for name in (*CATEGORIES, "mean")}
        costs = {seed: _cost(root, final_run(method, seed)) for seed in of}
        cost[method] = {name: Measured({s: costs[s][name] for s in of}) for name in COSTS}
    return {
        "runs": sum(map(len, methods.values())),
        "missing": [f"{m}-s{seed}" for m in settings.methods for seed in settings.seeds if seed not in finished[m]],
        "accuracy": _records(accuracy, baseline=BASELINE),
        "floor": {read.__name__: read(root / layout.DATA, "test") for read in (text_alone, one_answer)},
        "mechanism": {
            mode: _records(_mechanism(root, seeds, methods, mode), baseline=BASELINE, base=BASE)
            for mode in layout.MODES
        },
        "cost": {
            method: {
                name: value.record() | {"over_baseline": value.over(cost[BASELINE][name]).record()}
                for name, value in row.items()
                if value.by_seed.keys() & cost[BASELINE][name].by_seed.keys()
            }
            for method, row in cost.items()
        },
        "chance": {mode: ScoreFile.load(root / Seed(seeds[0]).scores("test", mode)).chance for mode in layout.MODES},
        "selection": _selection(root, seeds),
        "heads": {str(seed): _groups(root, seed) for seed in seeds},
    }


def is_finished(root: Path, method: str, seed: int) -> bool:
    """Whether a method's run of a seed has been trained and scored."""
    return mark_of(root, f"{final_run(method, seed).path}/score").exists()


def _records(found: dict[str, dict[str, Measured]], **references: str) -> dict[str, dict[str, Any]]:
    return {
        method: {
            name: value.record(**{key: found[other][name] for key, other in references.items() if other != method})
            for name, value in row.items()
        }
        for method, row in found.items()
    }


def _selection(root: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """How well the order of heads by training captions holds on test captions, before any training."""
    from scipy.stats import spearmanr

    found: dict[str, dict[int, float]] = {}
    for seed in seeds:
        chosen_on, before = (
            ScoreFile.load(root / file) for file in (Seed(seed).heads, Seed(seed).scores("test", "llm"))
        )
        heads = chosen_on.ranking()
        groups = {**_group_heads(root, seed), "all": heads}
        for group, members in groups.items():
            found.setdefault(group, {})[seed] = _mean(chosen_on, members)
        ranks = spearmanr([chosen_on.score(head) for head in heads], [before.score(head) for head in heads])
        found.setdefault("rank_correlation", {})[seed] = float(ranks.statistic)
    return {name: Measured(values).record() for name, values in found.items()}


def _mean(scored: ScoreFile, heads: Sequence[HeadId]) -> float:
    return sum(scored.score(head) for head in heads) / len(heads)


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


def _mechanism(
    root: Path, seeds: Sequence[int], methods: dict[str, list[int]], mode: str
) -> dict[str, dict[str, Measured]]:
    """MKNN on the test captions of the heads that were worst and top before training."""
    files = {BASE: {seed: Seed(seed).scores("test", mode) for seed in seeds}}
    files |= {method: {seed: final_run(method, seed).scores(mode) for seed in of} for method, of in methods.items()}
    found: dict[str, dict[str, Measured]] = {}
    for name, by_seed in files.items():
        means: dict[str, dict[int, float]] = {}
        for seed, file in by_seed.items():
            scored = ScoreFile.load(root / file)
            for group, heads in {**_group_heads(root, seed), "all": scored.ranking()}.items():
                means.setdefault(group, {})[seed] = _mean(scored, heads)
        found[name] = {group: Measured(values) for group, values in means.items()}
    return found


def _group_heads(root: Path, seed: int) -> dict[str, Sequence[HeadId]]:
    scores = ScoreFile.load(root / Seed(seed).heads).scores
    return {group: choose_heads(scores, strategy, m) for group, strategy, m in GROUPS}


def _groups(root: Path, seed: int) -> dict[str, list[str]]:
    return {group: [str(head) for head in heads] for group, heads in _group_heads(root, seed).items()}


def label(name: str) -> str:
    """A row's name in tables and figures."""
    return "base LLM" if name == BASE else METHODS[name].label
