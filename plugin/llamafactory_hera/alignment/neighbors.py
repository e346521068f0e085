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
ROWS = 1024  # similarities to compute at once; all of them would take memory quadratic in the sample count


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
        if normalize:
            queries, candidates = _unit(queries), _unit(candidates)
        return queries @ candidates.transpose(-1, -2)


def _unit(vectors: Tensor) -> Tensor:
    lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    # dividing a zero vector by a tiny number would send it an enormous gradient
    return vectors / torch.where(lengths > 1e-12, lengths, 1.0)


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Disables autocast, TF32 and bf16 emulation, so that matrix products of fp32 tensors are computed in fp32."""
    new = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # since PyTorch 2.9; both APIs must not be mixed
    backends: list = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul] if new else []  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends] if new else torch.get_float32_matmul_precision()
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        if not new:
            torch.set_float32_matmul_precision("highest")
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=False):
            backend.fp32_precision = precision
        if isinstance(before, str):
            torch.set_float32_matmul_precision(before)


@torch.no_grad()
def nearest_neighbors(features: Tensor, k: int, normalize: bool = True, allowed: Tensor | None = None) -> Tensor:
    """Finds ``N_k(i)``: the ``k`` samples most similar to ``i``, excluding ``i`` itself (paper, eq. 2).

    Args:
        features: ``[M, D]``, or ``[H, M, D]`` for several sets of features of the same samples.
        k: Neighbors per sample, ``1 <= k <= M - 1``; with ``allowed``, any number above 0.
        normalize: True for cosine similarity, false for the dot product.
        allowed: Boolean ``[N, M]``, the candidates of each of the first N samples. By default N is M, and all other
            samples are candidates.

    Returns:
        Indices ``[N, k]`` (``[H, N, k]``), nearest first. With ``allowed``, at most half of the candidates of a sample
        are its neighbors, and -1 fills the rest, because a teacher that chose every candidate would say nothing.
    """
    m = features.shape[-2]
    if allowed is None and not 1 <= k <= m - 1:
        raise ValueError(f"k={k} does not fit {m} samples; choose 1 <= k <= {m - 1}, or give more samples.")
    # not checked with `allowed`, because a training step does not wait for the device
    if allowed is None and not features.isfinite().all():
        raise ValueError("features contain NaN or infinity, and such samples have no neighbors; leave them out.")
    n = m if allowed is None else allowed.shape[0]
    parts = []
    for start in range(0, n, ROWS):
        rows = slice(start, min(start + ROWS, n))
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
    """Turns neighbor indices ``[..., N, k]``, -1 for none, into a boolean mask ``[..., N, n_candidates]``."""
    mask = torch.zeros(*neighbors.shape[:-1], n_candidates + 1, dtype=torch.bool, device=neighbors.device)
    return mask.scatter_(-1, neighbors + 1, True)[..., 1:]  # the first column collects the -1


def mutual_knn(
    student: Tensor, teacher: Tensor, k: int, normalize: bool = True, allowed: Tensor | None = None
) -> Tensor:
    """Computes MKNN, the mean fraction of neighbors that student and teacher share (paper, eq. 3).

    Args:
        student: ``[M, D]``, or ``[H, M, D]`` for the heads of a model.
        teacher: ``[M, D_teacher]``, features of the same samples in the same order.
        k: Neighbors per sample.
        normalize: True for cosine similarity, false for the dot product, for both student and teacher.
        allowed: The candidates, as for :func:`nearest_neighbors`; samples with fewer than two candidates do not count.

    Returns:
        A scalar, or ``[H]``, between 0 and 1; NaN if no sample counts. Compare the result with :func:`chance_level`.
    """
    m = teacher.shape[-2]
    if student.shape[-2] != m:
        raise ValueError(f"student has {student.shape[-2]} samples and teacher {m}; give the same samples to both.")
    of_student, of_teacher = (nearest_neighbors(side, k, normalize, allowed) for side in (student, teacher))
    shared = (neighbor_mask(of_student, m) & neighbor_mask(of_teacher, m)).sum(dim=-1)
    counts = (of_teacher >= 0).sum(dim=-1)
    return (shared / counts.clamp(min=1)).sum(dim=-1) / (counts > 0).sum()


def chance_level(n_samples: int, k: int) -> float:
    """Returns the MKNN that unrelated features reach on average: ``k / (N - 1)``."""
    return k / (n_samples - 1)


@dataclass(frozen=True)
class Candidates:
    """The candidates and neighbors of a batch's N samples, among M samples: the batch, then remembered samples."""

    allowed: Tensor  #: Boolean ``[N, M]``, the candidates, with which each sample is compared.
    neighbors: Tensor  #: ``[N, k]``, the nearest candidates in the teacher's space; -1 beyond half of the candidates.
    duplicates: Tensor  #: The number of pairs in the batch that show the same image, a scalar.

    @property
    def known(self) -> Tensor:
        """The samples that have a neighbor, boolean ``[N]``."""
        return (self.neighbors >= 0).any(dim=-1)

    @property
    def chance(self) -> Tensor:
        """The MKNN that unrelated features reach on average; NaN if no sample has a candidate."""
        counts = (self.neighbors >= 0).sum(dim=-1)
        return (counts / self.allowed.sum(dim=-1).clamp(min=1)).sum() / self.known.sum()


def teacher_candidates(
    teacher: Tensor,
    valid: Tensor,
    k: int,
    normalize: bool,
    filled: Tensor | None = None,
    numbers: Tensor | None = None,
) -> Candidates:
    """Finds each sample's candidates and, among them, its ``k`` nearest neighbors in the teacher's space.

    Neither a sample itself nor a copy of its image is a candidate. Copies have equal numbers or almost equal features:
    a teacher in half precision may differ on one file, and two files may contain one picture.

    Args:
        teacher: Features ``[M, D_teacher]`` of the N samples of the batch, followed by those of remembered samples.
            Features of samples that are not valid, and of places that are not filled, are arbitrary.
        valid: Boolean ``[N]``, the samples of the batch that take part.
        k: Neighbors per sample, at most half of its candidates.
        normalize: True for cosine similarity, false for the dot product.
        filled: Boolean ``[M - N]``, the places of the memory that contain a sample; None without a memory.
        numbers: ``[M, 2]``, equal for copies of one image file and 0 if unknown.
    """
    n, m = len(valid), len(teacher)
    usable = valid if filled is None else torch.cat([valid, filled])
    same_image = similarity(teacher[:n], teacher) > SAME_IMAGE
    if numbers is not None:
        same_image |= (numbers[:n, None] == numbers).all(dim=-1) & numbers[:n, None].any(dim=-1)
    others = ~torch.eye(n, m, dtype=torch.bool, device=teacher.device)
    pairs = valid[:, None] & usable & others
    allowed = pairs & ~same_image
    duplicates = (pairs & same_image)[:, :n].sum() // 2
    return Candidates(allowed, nearest_neighbors(teacher, k, normalize, allowed), duplicates)
