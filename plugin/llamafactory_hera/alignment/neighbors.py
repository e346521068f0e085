"""Nearest neighbors and the Mutual K-Nearest Neighbor (MKNN) alignment metric (paper, eq. 2-3).

Ties are always broken in the same way: neighbors are sorted by decreasing similarity, then by increasing index.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# Two samples whose teacher features have a higher cosine similarity than this show the same image.
SAME_IMAGE = 1 - 1e-5
ROWS = 1024  # samples to compare at once; comparing all would take memory quadratic in the sample count


def similarity(queries: Tensor, candidates: Tensor, normalize: bool = True) -> Tensor:
    """Computes the cosine similarity, or the dot product, of every query with every candidate.

    Args:
        queries: ``[..., N, D]``.
        candidates: ``[..., M, D]``.
        normalize: True for cosine, this project's choice; the paper does not say whether vectors are normalized.

    Returns:
        ``[..., N, M]`` in fp32 (fp64 stays fp64), even under autocast or TF32, because less precision would create
        ties. A zero vector has the similarity 0.
    """
    if queries.dtype != torch.float64:
        queries, candidates = queries.float(), candidates.float()
    with full_precision(queries.device.type):
        if not normalize:
            return queries @ candidates.transpose(-1, -2)
        # dividing the products avoids a normalized copy of the candidates, which may take a gigabyte
        products = (queries / _lengths(queries)) @ candidates.transpose(-1, -2)
        return products / _lengths(candidates).transpose(-1, -2)


def _lengths(vectors: Tensor) -> Tensor:
    lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    # dividing a zero vector by a tiny number would give it an enormous gradient
    return torch.where(lengths > 1e-12, lengths, 1.0)


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Disables autocast, TF32 and bf16 emulation, so that matrix products of fp32 tensors are computed in fp32."""
    # PyTorch 2.9 replaced the global setting with one per backend; a program must not use both kinds
    by_backend = hasattr(torch.backends.cuda.matmul, "fp32_precision")
    backends: list = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul] if by_backend else []  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends] if by_backend else torch.get_float32_matmul_precision()
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        if not by_backend:
            torch.set_float32_matmul_precision("highest")
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=False):
            backend.fp32_precision = precision
        if isinstance(before, str):
            torch.set_float32_matmul_precision(before)


@torch.no_grad()
def nearest_neighbors(
    features: Tensor, k: int, normalize: bool = True, allowed: Tensor | None = None, first: int = 0
) -> Tensor:
    """Finds ``N_k(i)``: the ``k`` samples most similar to ``i``, excluding ``i`` itself (paper, eq. 2).

    Args:
        features: ``[M, D]``, or ``[H, M, D]`` for several sets of features of the same samples.
        k: Neighbors per sample, ``1 <= k <= M - 1``; with ``allowed``, any number above 0.
        normalize: True for cosine similarity, false for the dot product.
        allowed: Boolean ``[N, M]``, the candidates of each of N samples. By default N is M, and all other samples are
            candidates.
        first: The index of the first of these N samples among the M samples.

    Returns:
        Indices ``[N, k]`` (``[H, N, k]``), nearest first. With ``allowed``, at most half of a sample's candidates
        become neighbors, because choosing every candidate would carry no information; -1 fills the rest.
    """
    m = features.shape[-2]
    if allowed is None and not 1 <= k <= m - 1:
        raise ValueError(f"k={k} does not fit {m} samples; choose 1 <= k <= {m - 1}, or give more samples.")
    # not checked with `allowed`, because a training step must not wait for the device
    if allowed is None and not features.isfinite().all():
        raise ValueError("features contain NaN or infinity, so some samples have no neighbors; remove them.")
    n = m if allowed is None else allowed.shape[0]
    parts = []
    for start in range(0, n, ROWS):
        rows = slice(start, min(start + ROWS, n))
        similarities = similarity(features[..., first + rows.start : first + rows.stop, :], features, normalize)
        if allowed is None:
            similarities.diagonal(start, dim1=-2, dim2=-1).fill_(-torch.inf)
        else:
            similarities.masked_fill_(~allowed[rows], -torch.inf)
        ranked = largest(similarities, min(k, m))
        if allowed is not None:
            most = allowed[rows].sum(dim=-1, keepdim=True) // 2
            ranked = ranked.masked_fill(torch.arange(ranked.shape[-1], device=most.device) >= most, -1)
        parts.append(ranked)
    return torch.cat(parts, dim=-2)


def largest(values: Tensor, k: int) -> Tensor:
    """Returns the indices ``[..., k]`` of each row's largest values, sorted by decreasing value, then by index."""
    # topk alone selects and orders equal values arbitrarily
    m, index = values.shape[-1], torch.arange(values.shape[-1], device=values.device, dtype=torch.int32)
    least = values.topk(k).values[..., -1:]
    priority = torch.where(values > least, 1, torch.where(values == least, -index, -m))
    chosen = priority.topk(k).indices.sort().values
    order = values.gather(-1, chosen).sort(dim=-1, descending=True, stable=True).indices
    return chosen.gather(-1, order)


def neighbor_mask(neighbors: Tensor, n_candidates: int) -> Tensor:
    """Turns neighbor indices ``[..., N, k]`` (missing ones are -1) into a boolean mask ``[..., N, n_candidates]``."""
    mask = torch.zeros(*neighbors.shape[:-1], n_candidates + 1, dtype=torch.bool, device=neighbors.device)
    return mask.scatter_(-1, neighbors + 1, True)[..., 1:]  # the first column collects missing neighbors


def shared_fraction(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the fraction of each sample's teacher neighbors that are also student neighbors; 0 if there are none.

    Args:
        student: Neighbors ``[..., N, k]``; missing neighbors are -1.
        teacher: ``[N, k]``, in the same form.
    """
    shared = ((student.unsqueeze(-1) == teacher.unsqueeze(-2)) & (teacher >= 0).unsqueeze(-2)).sum(dim=(-1, -2))
    return shared / (teacher >= 0).sum(dim=-1).clamp(min=1)


def mutual_knn(student: Tensor, teacher: Tensor, k: int, normalize: bool = True) -> Tensor:
    """Computes MKNN, the mean fraction of neighbors that student and teacher share (paper, eq. 3).

    Args:
        student: ``[N, D]``, or ``[H, N, D]`` for the heads of a model.
        teacher: ``[N, D_teacher]``, features of the same samples in the same order.
        k: Neighbors per sample.
        normalize: True for cosine similarity, false for the dot product, for both student and teacher.

    Returns:
        A scalar, or ``[H]``, between 0 and 1. Compare the result with ``chance_level``.
    """
    n = teacher.shape[-2]
    if student.shape[-2] != n:
        raise ValueError(f"student has {student.shape[-2]} samples and teacher {n}; give the same samples to both.")
    return shared_fraction(*(nearest_neighbors(side, k, normalize) for side in (student, teacher))).mean(dim=-1)


def chance_level(n_samples: int, k: int) -> float:
    """Returns the MKNN that unrelated features reach on average: ``k / (N - 1)``."""
    return k / (n_samples - 1)


@dataclass(frozen=True)
class Candidates:
    """The candidates and neighbors of n consecutive samples, among M: those of the batch, then remembered samples."""

    allowed: Tensor  #: Boolean ``[n, M]``, the candidates to compare each sample with.
    neighbors: Tensor  #: ``[n, k]``, the nearest candidates in the teacher's space; missing neighbors are -1.
    first: int  #: The index of the first of the n samples among the M samples.
    #: A scalar: the number of pairs of one of the n samples and a later batch sample that show the same image.
    duplicates: Tensor

    @property
    def has_neighbor(self) -> Tensor:
        """The samples that have a neighbor, boolean ``[n]``."""
        return (self.neighbors >= 0).any(dim=-1)

    @property
    def chance(self) -> Tensor:
        """The average agreement of unrelated features, ``[n]``; 0 for a sample without a neighbor."""
        return (self.neighbors >= 0).sum(dim=-1) / self.allowed.sum(dim=-1).clamp(min=1)

    def agreement(self, student: Tensor, normalize: bool) -> Tensor:
        """Returns the fraction of each sample's neighbors that ``student [H, M, D]`` shares: ``[H, n]``."""
        found = nearest_neighbors(student, self.neighbors.shape[-1], normalize, self.allowed, self.first)
        return shared_fraction(found, self.neighbors)


def teacher_candidates(
    teacher: Tensor,
    valid: Tensor,
    k: int,
    normalize: bool,
    filled: Tensor | None = None,
    image_ids: Tensor | None = None,
    rows: slice = slice(None),
) -> Candidates:
    """Finds each sample's candidates and, among them, its ``k`` nearest neighbors in the teacher's space.

    Neither the sample itself nor a copy of its image is a candidate. Copies have equal ids (a half-precision teacher
    may give one file different features) or almost equal features (two files may contain the same picture).

    Args:
        teacher: Features ``[M, D_teacher]`` of the batch's N samples, followed by those of remembered samples.
            Features of invalid samples and unfilled places are arbitrary.
        valid: Boolean ``[N]``, the samples of the batch to include.
        k: Neighbors per sample, at most half of its candidates.
        normalize: True for cosine similarity, false for the dot product.
        filled: Boolean ``[M - N]``, the places in the memory that contain a sample; None without a memory.
        image_ids: Ids ``[M, 2]``, equal for copies of one image file and 0 if unknown.
        rows: The n samples of the batch to find candidates for; by default, all.
    """
    index = torch.arange(len(teacher), device=teacher.device)
    first, queries = rows.indices(len(valid))[0], index[: len(valid)][rows, None]
    usable = valid if filled is None else torch.cat([valid, filled])
    same_image = similarity(teacher[: len(valid)][rows], teacher) > SAME_IMAGE
    if image_ids is not None:
        ids = image_ids[: len(valid)][rows, None]
        same_image |= (ids == image_ids).all(dim=-1) & ids.any(dim=-1)
    pairs = valid[rows, None] & usable & (index != queries)
    allowed = pairs & ~same_image
    duplicates = (pairs & same_image & (index > queries))[:, : len(valid)].sum()
    neighbors = nearest_neighbors(teacher, k, normalize, allowed, first)
    return Candidates(allowed, neighbors, first, duplicates)
