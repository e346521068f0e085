"""Measures how firm a selection is: compares scores with chance, and repeats the choice on halves of the samples.

This needs no forward passes, only neighbors and outputs in memory.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..heads.targets import Target

_ROUNDS = 100  # the number of random halves, and of random permutations
_FIRM_SHARE = 0.6  # the share of the chosen heads or layers that most halves must choose again
_LEAST = 3  # the smallest number of samples that can be scored


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Renders rows, the header first, as a Markdown table."""
    header, *others = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([header, f"|---|{'--:|' * (len(rows[0]) - 1)}", *others])


class Firmness(NamedTuple):
    """The firmness of a choice of heads or layers, as ``heads.json`` stores it."""

    chosen: dict[str, dict[str, Any]]  #: By name: ``score``, ``mean``, ``deviation``, ``z`` and ``halves``.
    rank_correlation: float | None  #: Between the scores on two disjoint halves of the samples, or None.
    sample_counts: list[dict[str, Any]]  #: For each number of ``samples``, the ``mean`` of all scores, and ``chance``.

    @property
    def warning(self) -> str:
        """A warning with a remedy if the choice is not firm; otherwise empty."""
        firm = sum(row["halves"] > _ROUNDS / 2 for row in self.chosen.values())
        if firm >= _FIRM_SHARE * len(self.chosen):
            return ""
        return (
            f"Most random halves of the {self.sample_counts[-1]['samples']} samples select only {firm} of the "
            f"{len(self.chosen)} ({', '.join(self.chosen)}) again: raise hera_select_samples or set it to auto, and "
            "use more data if these are all samples."
        )

    @property
    def table(self) -> list[list[str]]:
        """The header, and a row for each chosen head or layer."""
        chance = f"{self.sample_counts[-1]['chance']:.4f}"
        rows = [["chosen", "MKNN", "chance", "permuted", "z", "in halves"]]
        for name, row in self.chosen.items():
            z = "–" if row["z"] is None else f"{row['z']:+.1f}"
            permuted = f"{row['mean']:.4f} ± {row['deviation']:.4f}"
            rows.append([name, f"{row['score']:.4f}", chance, permuted, z, f"{row['halves']}/{_ROUNDS}"])
        return rows

    @property
    def note(self) -> str:
        """Two sentences about all scores: how well two halves agree, and the effect of the number of samples."""
        agreement = "undefined" if self.rank_correlation is None else f"{self.rank_correlation:.2f}"
        means = ["{mean:.4f} for {samples} (chance {chance:.4f})".format(**each) for each in self.sample_counts]
        return f"The rank correlation of two halves is {agreement}. Mean score by sample count: {', '.join(means)}."

    @property
    def markdown(self) -> str:
        """The table, the note and the warning for the card of a model or of a repository."""
        return f"{markdown_table(self.table)}\n\n{self.note} {self.warning}".strip()


def measure_firmness(
    chosen: tuple[Target, ...],
    choose: Callable[[np.ndarray], tuple[Target, ...]],
    counts: np.ndarray,
    neighbors: np.ndarray,
    teacher: np.ndarray,
    rescore: Callable[[slice], tuple[np.ndarray, float]],
    seed: int,
) -> Firmness:
    """Measures the firmness of a choice.

    Args:
        chosen: The heads or layers that ``choose`` chooses by their scores on all samples.
        choose: The rule of the selection; a NaN score excludes a head or layer.
        counts: The number of neighbors that each sample shares with the teacher, for every head ``[L, H, N]`` or layer
            ``[L, N]``; NaN excludes a head or layer.
        neighbors: The neighbors of each sample, for every head ``[L, H, N, k]`` or layer ``[L, N, k]``.
        teacher: The teacher's neighbors ``[N, k]``.
        rescore: Returns the scores and the chance level of a selection on a slice of the samples.
        seed: The seed of the random halves and permutations.
    """
    (n, k), random = teacher.shape, np.random.default_rng(seed)
    rows: dict[str, dict[str, float | None]] = {}
    in_halves = chosen_in_halves(choose, counts, random)
    for target in chosen:
        index = target[: counts.ndim - 1]
        permuted = permuted_scores(neighbors[index], teacher, random)
        score, mean, deviation = counts[index].mean() / k, permuted.mean(), permuted.std(ddof=1)
        values = {"score": score, "mean": mean, "deviation": deviation}
        z = round(float((score - mean) / deviation), 2) if deviation else None
        rounded = {name: round(float(value), 7) for name, value in values.items()}
        rows[str(target)] = {**rounded, "z": z, "halves": in_halves[target]}
    half = n // 2
    parts = {size: rescore(slice(size)) for size in (n // 4, half) if size >= _LEAST}
    correlation = rank_correlation(parts[half][0], rescore(slice(half, 2 * half))[0]) if half in parts else None
    parts[n] = counts.mean(-1) / k, k / (n - 1)
    sample_counts = [
        {"samples": size, "mean": round(float(np.nanmean(scores)), 7), "chance": round(chance, 7)}
        for size, (scores, chance) in parts.items()
    ]
    return Firmness(rows, correlation, sample_counts)


def chosen_in_halves(
    choose: Callable[[np.ndarray], tuple[Target, ...]], counts: np.ndarray, random: np.random.Generator
) -> Counter[Target]:
    """Counts the random halves of the samples, out of 100, that choose each head or layer.

    A half averages over half of the samples, but their neighbors come from all samples.
    """
    n = counts.shape[-1]
    halves = random.permuted(np.tile(np.arange(n) < max(n // 2, 1), (_ROUNDS, 1)), axis=1)
    sums = counts @ halves.T.astype(counts.dtype)
    return Counter(target for scores in np.moveaxis(sums, -1, 0) for target in choose(scores))


def permuted_scores(neighbors: np.ndarray, teacher: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Computes the MKNN of a head's neighbors ``[N, k]`` after each of 100 permutations of the teacher's samples."""
    n, k = teacher.shape
    scores = []
    for order in (random.permutation(n) for _ in range(_ROUNDS)):
        permuted = np.argsort(order)[teacher[order]]  # the teacher sees sample order[i] instead of sample i
        scores.append((neighbors[:, :, None] == permuted[:, None]).sum() / (n * k))
    return np.array(scores)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Computes Spearman's rank correlation of two arrays, ignoring NaN; None if all values of an array are equal."""
    known = ~(np.isnan(first) | np.isnan(second))
    ranks = []
    for values in (first[known], second[known]):
        _, places, sizes = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(sizes) - (sizes - 1) / 2)[places])  # equal values share their mean rank
    if min(len(np.unique(each)) for each in ranks) < 2:
        return None
    return round(float(np.asarray(np.corrcoef(ranks))[0, 1]), 4)
