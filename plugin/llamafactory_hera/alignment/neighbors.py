"""Nearest neighbours and the Mutual K-Nearest Neighbour (MKNN) alignment metric (paper, eq. 2-3).

One tie rule holds everywhere: neighbours are ordered by falling similarity, and equal similarities by rising index.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Cosine similarity above which two teacher vectors are taken for the same image: only rounding lies between.
SAME_IMAGE = 1 - 1e-5
# Rows of similarities that are held at a time, where all of them would take memory by the square.
_ROWS = 1024


def similarity(queries: Tensor, candidates: Tensor, normalize: bool = True) -> Tensor:
    """Cosine similarity, or the plain dot product, of every query with every candidate.

    Args:
        queries: ``[..., N, D]``.
        candidates: ``[..., M, D]``.
        normalize: L2-normalise both sides first (cosine). The paper writes a dot product and does not say whether
            vectors are normalised; normalising is this project's choice.

    Returns:
        ``[..., N, M]`` in float32 (float64 stays float64): ranking half-precision similarities would create ties.
    """
    if queries.dtype != torch.float64:
        queries, candidates = queries.float(), candidates.float()
    if normalize:
        queries = torch.nn.functional.normalize(queries, dim=-1)
        candidates = torch.nn.functional.normalize(candidates, dim=-1)
    return queries @ candidates.transpose(-1, -2)


def rank_neighbors(similarities: Tensor, k: int, excluded: Tensor | None = None) -> Tensor:
    """The ``k`` most similar candidates of each query, best first.

    Args:
        similarities: ``[..., N, M]``.
        k: How many to keep, ``1 <= k <= M``.
        excluded: Boolean ``[N, M]``; true entries rank behind every other candidate.

    Returns:
        Candidate indices ``[..., N, k]``.
    """
    if excluded is not None:
        similarities = similarities.masked_fill(excluded, -torch.inf)
    return similarities.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def nearest_neighbors(features: Tensor, k: int, normalize: bool = True) -> Tensor:
    """``N_k(i)``: the ``k`` other samples most similar to ``i``, without ``i`` itself (paper, eq. 2).

    Args:
        features: ``[N, D]``, or ``[H, N, D]`` for many sets of features of the same samples.
        k: Neighbours per sample, ``1 <= k <= N - 1``.
        normalize: Cosine similarity when true, dot product otherwise.

    Returns:
        Indices ``[N, k]`` (``[H, N, k]``), best first.

    Raises:
        ValueError: ``k`` does not fit the number of samples.
    """
    n = features.shape[-2]
    if not 1 <= k <= n - 1:
        raise ValueError(f"k={k} neighbours of {n} samples: choose 1 <= k <= {n - 1}, or give more samples.")
    index = torch.arange(n, device=features.device)
    parts = [
        rank_neighbors(similarity(features[..., rows, :], features, normalize), k, excluded=rows[:, None] == index)
        for rows in index.split(_ROWS)
    ]
    return torch.cat(parts, dim=-2)


def neighbor_mask(neighbors: Tensor, n_candidates: int) -> Tensor:
    """Neighbour indices ``[..., N, k]`` as a boolean membership mask ``[..., N, n_candidates]``."""
    mask = torch.zeros(*neighbors.shape[:-1], n_candidates, dtype=torch.bool, device=neighbors.device)
    return mask.scatter_(-1, neighbors, True)


def mutual_knn(student: Tensor, teacher: Tensor, k: int, normalize: bool = True) -> Tensor:
    """MKNN: the mean share of neighbours that student and teacher agree on (paper, eq. 3).

    Args:
        student: ``[N, D]``, or ``[H, N, D]`` for the heads of a model.
        teacher: ``[N, D_teacher]``, features of the same samples in the same order.
        k: Neighbours per sample.
        normalize: Cosine similarity when true, dot product otherwise; for both sides.

    Returns:
        A scalar, or ``[H]``, between 0 and 1. Compare it with :func:`chance_level`.

    Raises:
        ValueError: ``k`` does not fit, or the two sides hold different numbers of samples.
    """
    n = teacher.shape[-2]
    if student.shape[-2] != n:
        raise ValueError(f"student holds {student.shape[-2]} samples and teacher {n}: give the same samples to both.")
    student_mask = neighbor_mask(nearest_neighbors(student, k, normalize), n)
    teacher_mask = neighbor_mask(nearest_neighbors(teacher, k, normalize), n)
    return (student_mask & teacher_mask).sum(dim=(-1, -2)).double().div(n * k).to(torch.float32)


def chance_level(n_samples: int, k: int) -> float:
    """The MKNN that unrelated features reach on average: ``k / (N - 1)``."""
    return k / (n_samples - 1)


@dataclass(frozen=True)
class Candidates:
    """What the teacher says about a batch of N queries and M candidates."""

    allowed: Tensor  # [N, M]
    positives: Tensor  # [N, M]
    duplicates: int


def teacher_candidates(teacher: Tensor, memory: Tensor | None, valid: Tensor, k: int, normalize: bool) -> Candidates:
    """Finds each sample's candidates and, among them, its ``k`` nearest neighbours in the teacher's space.

    A sample is no candidate of itself, and neither is another copy of its image, in the batch or in the memory.
    Where fewer than ``k`` candidates exist, all of them are neighbours.

    Args:
        teacher: ``[N, D_teacher]`` features of the batch; rows that are not valid may hold anything.
        memory: ``[m, D_teacher]`` features of remembered samples.
        valid: Boolean ``[N]``.
        k: Neighbours per sample.
        normalize: Cosine similarity when true, dot product otherwise.
    """
    n = teacher.shape[0]
    everything = teacher if memory is None else torch.cat([teacher, memory.to(teacher)])
    usable = torch.ones(everything.shape[0], dtype=torch.bool, device=teacher.device)
    usable[:n] = valid
    same_image = similarity(teacher, everything) > SAME_IMAGE
    itself = torch.zeros_like(same_image)
    itself.fill_diagonal_(True)
    pairs = valid.unsqueeze(1) & usable & ~itself
    allowed = pairs & ~same_image
    ranked = rank_neighbors(similarity(teacher, everything, normalize), min(k, everything.shape[0]), excluded=~allowed)
    positives = neighbor_mask(ranked, everything.shape[0]) & allowed
    duplicates = int((pairs & same_image)[:, :n].sum()) // 2
    return Candidates(allowed, positives, duplicates)
