"""The firmness of a selection: how its scores compare with chance, and whether other samples lead to the same choice.

No number needs a forward pass: all are computed from neighbors and from outputs in memory.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..heads.targets import Target

_ROUNDS = 100  # random halves, and random permutations
_FIRM_SHARE = 0.6  # of the chosen heads or layers, which most halves must choose again
_LEAST = 3  # samples that can be scored


class Firmness(NamedTuple):
    """The firmness of a choice of heads or layers, as ``heads.json`` stores it."""

    chosen: dict[str, dict[str, Any]]  #: By name: ``score``, ``mean``, ``deviation``, ``z`` and ``halves``.
    rank_correlation: float | None  #: Of the scores on two disjoint halves of the samples; None if it is undefined.
    galleries: list[dict[str, Any]]  #: ``samples``, with the ``mean`` score of all and the ``chance`` level.

    @property
    def warning(self) -> str:
        """A sentence about a choice that is not firm, with the remedy; empty for a firm one."""
        firm = sum(row["halves"] > _ROUNDS / 2 for row in self.chosen.values())
        if firm >= _FIRM_SHARE * len(self.chosen):
            return ""
        return (
            f"Most random halves of the {self.galleries[-1]['samples']} samples select only {firm} of the "
            f"{len(self.chosen)} ({', '.join(self.chosen)}) again: select on more samples with a larger "
            "hera_select_samples or with auto, and on more data if these are all samples."
        )

    @property
    def table(self) -> list[list[str]]:
        """The header, and a row for each chosen head or layer."""
        chance = f"{self.galleries[-1]['chance']:.4f}"
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
        means = [f"{each['mean']:.4f} for {each['samples']} (chance {each['chance']:.4f})" for each in self.galleries]
        return f"The rank correlation of two halves is {agreement}. The mean score by samples: {', '.join(means)}."


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
        chosen: The heads or layers that ``choose`` chooses by the scores on all samples.
        choose: The rule of the selection; a NaN score excludes a head or layer.
        counts: The number of neighbors that a sample shares with the teacher, for every head ``[L, H, N]`` or layer
            ``[L, N]``; NaN excludes a head or layer.
        neighbors: The neighbors of every sample, ``[M, N, k]`` for M chosen heads or layers.
        teacher: The teacher's neighbors, ``[N, k]``.
        rescore: Returns the scores and the chance level if the selection has only a slice of the samples.
        seed: The seed of the random halves and permutations.
    """
    n, k = teacher.shape
    random, rows, half = np.random.default_rng(seed), {}, n // 2
    in_halves = chosen_in_halves(choose, counts, random)
    for target, permuted, own in zip(chosen, permuted_scores(neighbors, teacher, random).T, neighbors, strict=True):
        score = shared_neighbors(own, teacher) / (n * k)
        values = {"score": score, "mean": permuted.mean(), "deviation": permuted.std(ddof=1)}
        z = (values["score"] - values["mean"]) / values["deviation"] if values["deviation"] else None
        rows[str(target)] = {name: round(float(value), 7) for name, value in values.items()}
        rows[str(target)] |= {"z": z and round(float(z), 2), "halves": in_halves[target]}
    first = {size: rescore(slice(size)) for size in (n // 4, half) if size >= _LEAST}
    first[n] = counts.mean(-1) / k, k / (n - 1)
    both = (first[half][0], rescore(slice(half, 2 * half))[0]) if half in first else None
    galleries = [
        {"samples": size, "mean": round(float(np.nanmean(scores)), 7), "chance": chance}
        for size, (scores, chance) in first.items()
    ]
    return Firmness(rows, rank_correlation(*both) if both else None, galleries)


def chosen_in_halves(
    choose: Callable[[np.ndarray], tuple[Target, ...]], counts: np.ndarray, random: np.random.Generator
) -> Counter[Target]:
    """Counts in how many of 100 random halves of the samples each head or layer is chosen.

    A half averages over half of the samples, but their neighbors are those among all samples.
    """
    n = counts.shape[-1]
    halves = random.permuted(np.tile(np.arange(n) < max(n // 2, 1), (_ROUNDS, 1)), axis=1)
    sums = counts @ halves.T.astype(counts.dtype)
    return Counter(target for scores in np.moveaxis(sums, -1, 0) for target in choose(scores))


def permuted_scores(neighbors: np.ndarray, teacher: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Computes the MKNN ``[100, M]`` of M sets of neighbors ``[M, N, k]`` after permutations of the teacher's samples."""
    n, k = teacher.shape
    scores = np.empty((_ROUNDS, len(neighbors)))
    for number in range(_ROUNDS):
        order = random.permutation(n)  # the teacher takes sample order[i] for sample i
        permuted = np.argsort(order)[teacher[order]]
        scores[number] = [shared_neighbors(own, permuted) / (n * k) for own in neighbors]
    return scores


def shared_neighbors(neighbors: np.ndarray, teacher: np.ndarray) -> int:
    """Counts the pairs of a sample and a neighbor that two sets of neighbors ``[N, k]`` share."""
    return int((neighbors[:, :, None] == teacher[:, None]).sum())


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Computes Spearman's rank correlation of two arrays, without NaN; None if all values of one are equal."""
    known = ~(np.isnan(first) | np.isnan(second))
    ranks = []
    for values in (first[known], second[known]):
        _, places, sizes = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(sizes) - (sizes - 1) / 2)[places])  # equal values share their mean rank
    if min(len(np.unique(each)) for each in ranks) < 2:
        return None
    return round(float(np.corrcoef(ranks)[0, 1]), 4)
