"""Nearest neighbors and the Mutual K-Nearest Neighbor (MKNN) alignment metric (paper, eq. 2-3).

One tie rule holds everywhere: neighbors are ordered by falling similarity, and equal similarities by rising index.
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
        normalize: L2-normalize both sides first (cosine). The paper writes a dot product and does not say whether
            vectors are normalized; normalizing is this project's choice.

    Returns:
        ``[..., N, M]`` in float32 (float64 stays float64): ranking half-precision similarities would create ties.
    """
    if queries.dtype != torch.float64:
        queries, candidates = queries.float(), candidates.float()
    if normalize:
        queries = torch.nn.functional.normalize(queries, dim=-1)
        candidates = torch.nn.functional.normalize(candidates, dim=-1)
    return queries @ candidates.transpose(-1, -2)


@torch.no_grad()
def nearest_neighbors(features: Tensor, k: int, normalize: bool = True, allowed: Tensor | None = None) -> Tensor:
    """``N_k(i)``: the ``k`` other samples most similar to ``i``, without ``i`` itself (paper, eq. 2).

    Args:
        features: ``[M, D]``, or ``[H, M, D]`` for many sets of features of the same samples.
        k: Neighbors per sample, ``1 <= k <= M - 1``; with ``allowed`` any number above 0.
        normalize: Cosine similarity when true, dot product otherwise.
        allowed: Boolean ``[N, M]``, the candidates of each of the first N samples: those whose neighbors are asked
            for. Every sample is asked for, and all others are its candidates, when it is left out.

    Returns:
        Indices ``[N, k]`` (``[H, N, k]``), best first. With ``allowed``, ``k`` is at most M, and a sample has at most
        half of its candidates, followed by -1: if all were neighbors, the teacher would decide nothing.

    Raises:
        ValueError: ``k`` does not fit the number of samples.
    """
    m = features.shape[-2]
    if allowed is None and not 1 <= k <= m - 1:
        raise ValueError(f"k={k} neighbors of {m} samples: choose 1 <= k <= {m - 1}, or give more samples.")
    n = m if allowed is None else allowed.shape[0]
    parts = []
    for start in range(0, n, _ROWS):
        rows = slice(start, min(start + _ROWS, n))
        similarities = similarity(features[..., rows, :], features, normalize)
        if allowed is None:
            similarities.diagonal(start, dim1=-2, dim2=-1).fill_(-torch.inf)
        else:
            similarities.masked_fill_(~allowed[rows], -torch.inf)
        ranked = similarities.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        if allowed is not None:
            most = allowed[rows].sum(dim=-1, keepdim=True) // 2
            ranked = ranked.masked_fill(torch.arange(ranked.shape[-1], device=most.device) >= most, -1)
        parts.append(ranked)
    return torch.cat(parts, dim=-2)


def neighbor_mask(neighbors: Tensor, n_candidates: int) -> Tensor:
    """Neighbor indices ``[..., N, k]``, -1 for none, as a boolean membership mask ``[..., N, n_candidates]``."""
    mask = torch.zeros(*neighbors.shape[:-1], n_candidates + 1, dtype=torch.bool, device=neighbors.device)
    return mask.scatter_(-1, neighbors + 1, True)[..., 1:]  # the first column takes the -1


def mutual_knn(
    student: Tensor, teacher: Tensor, k: int, normalize: bool = True, allowed: Tensor | None = None
) -> Tensor:
    """MKNN: the mean share of neighbors that student and teacher agree on (paper, eq. 3).

    Args:
        student: ``[M, D]``, or ``[H, M, D]`` for the heads of a model.
        teacher: ``[M, D_teacher]``, features of the same samples in the same order.
        k: Neighbors per sample.
        normalize: Cosine similarity when true, dot product otherwise; for both sides.
        allowed: Boolean ``[N, M]``, the candidates of each of the first N samples, as :func:`nearest_neighbors` takes
            it; samples with fewer than two do not enter the mean.

    Returns:
        A scalar, or ``[H]``, between 0 and 1; NaN where no sample has a candidate. Compare it with
        :func:`chance_level`.

    Raises:
        ValueError: ``k`` does not fit, or the two sides hold different numbers of samples.
    """
    m = teacher.shape[-2]
    if student.shape[-2] != m:
        raise ValueError(f"student holds {student.shape[-2]} samples and teacher {m}: give the same samples to both.")
    of_student, of_teacher = (nearest_neighbors(side, k, normalize, allowed) for side in (student, teacher))
    shared = (neighbor_mask(of_student, m) & neighbor_mask(of_teacher, m)).sum(dim=-1)
    counts = (of_teacher >= 0).sum(dim=-1)
    return (shared / counts.clamp(min=1)).sum(dim=-1) / (counts > 0).sum()


def chance_level(n_samples: int, k: int) -> float:
    """The MKNN that unrelated features reach on average: ``k / (N - 1)``."""
    return k / (n_samples - 1)


@dataclass(frozen=True)
class Candidates:
    """What the teacher says about a batch of N samples among M: the batch, and remembered samples behind it.

    Attributes:
        allowed: Boolean ``[N, M]``: whom each sample is compared with.
        neighbors: ``[N, k]``, its nearest among them in the teacher's space; -1 beyond half of them.
        duplicates: Pairs of samples of the batch that show the same image, a scalar.
    """

    allowed: Tensor
    neighbors: Tensor
    duplicates: Tensor

    @property
    def known(self) -> Tensor:
        """Boolean ``[N]``: the sample has a neighbor."""
        return (self.neighbors >= 0).any(dim=-1)

    @property
    def chance(self) -> Tensor:
        """The MKNN that unrelated features reach on average among these candidates; NaN where nobody has any."""
        counts = (self.neighbors >= 0).sum(dim=-1)
        return (counts / self.allowed.sum(dim=-1).clamp(min=1)).sum() / self.known.sum()


def teacher_candidates(
    teacher: Tensor, valid: Tensor, k: int, normalize: bool, filled: Tensor | None = None
) -> Candidates:
    """Finds each sample's candidates and, among them, its ``k`` nearest neighbors in the teacher's space.

    A sample is no candidate of itself, and neither is another copy of its image, in the batch or in the memory.
    At most half of its candidates are its neighbors.

    Args:
        teacher: ``[M, D_teacher]`` features: the N of the batch, and those of remembered samples behind them. Rows
            that are not valid, or filled, may hold anything.
        valid: Boolean ``[N]``.
        k: Neighbors per sample.
        normalize: Cosine similarity when true, dot product otherwise.
        filled: Boolean ``[M - N]``, where there are remembered samples; left out where nothing is remembered.
    """
    n, m = len(valid), len(teacher)
    usable = valid if filled is None else torch.cat([valid, filled])
    same_image = similarity(teacher[:n], teacher) > SAME_IMAGE
    others = ~torch.eye(n, m, dtype=torch.bool, device=teacher.device)
    pairs = valid[:, None] & usable & others
    allowed = pairs & ~same_image
    duplicates = (pairs & same_image)[:, :n].sum() // 2
    return Candidates(allowed, nearest_neighbors(teacher, k, normalize, allowed), duplicates)
